"""The importance estimator: its size, its scores, what it learns from and what its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch

from atat_fast.config import Config, ImportanceConfig, load_preset
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.models.dit import step_cost
from atat_fast.models.importance import ImportanceEstimator, error_chance, importance_cost, importance_loss, log_rank
from atat_fast.ops import documents_of
from atat_fast.training.loss import Objective, baseline

V, L = 11, 12
MASK = V - 1
SMALL = {"dim": 16, "layers": 1, "heads": 2, "length": L, "conditioning_dim": 8, "dropout": 0.0}


def settings(*, weighting="uniform", kind="none", **importance) -> Config:
    config = Config()
    for name, value in SMALL.items():
        setattr(config.model, name, value)
    config.importance = ImportanceConfig(**{"source": "learned", "width": 16, "layers": 1, "heads": 2} | importance)
    config.diffusion.weighting, config.curriculum.kind = weighting, kind
    return config


def make(config: Config, total=4) -> Objective:
    model = DiT(V, MASK, **vars(config.model))
    estimator = ImportanceEstimator.of(config, torch.arange(V))
    with torch.no_grad():  # away from the zero start, so that every gradient is real
        for p in [*model.parameters(), *(estimator.parameters() if estimator else ())]:
            p.add_(0.2 * torch.randn_like(p))
    compute = Compute(torch.device("cpu"), torch.float32, compile=False)
    return Objective(model, config, compute, seed=3, total=total, estimator=estimator)


def tokens(batch=4):
    return torch.randint(0, MASK, (batch, L)), torch.arange(batch)


def test_size_and_work_at_preset_small():
    config = load_preset("wikitext103")
    with torch.device("meta"):
        estimator = ImportanceEstimator.of(config)
    assert 1.8e6 < estimator.parameter_count() < 2.1e6
    half = 24 * 1024 // 2
    share = importance_cost(config.importance, config.model, 24).flops / step_cost(config.model, 50_258, 24, half).flops
    assert 0.01 < share <= 0.05
    forward = importance_cost(config.importance, config.model, 24, backward=False)
    assert importance_cost(config.importance, config.model, 24).flops == 3 * forward.flops


def test_the_cost_is_that_of_the_products():
    """Counted by PyTorch's own counter, whose attention is counted apart from it."""
    from torch.utils.flop_counter import FlopCounterMode

    config = settings()
    network = ImportanceEstimator.of(config).network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(3, L, 16), torch.rand(3))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 2 * 2 * 3 * L**2 * 16
    cost = importance_cost(config.importance, config.model, 3, backward=False).flops
    small = 2 * 3 * (256 * 16 + 16 * 16) + 2 * 3 * L * 16  # the time embedding and the head, which the formula leaves out
    assert cost - attention <= counted <= cost - attention + small + attention


def test_it_starts_undecided_and_scores_stay_in_range():
    config = settings()
    estimator = ImportanceEstimator.of(config)
    embedded = torch.randn(3, L, 16)
    logits = estimator.network(embedded, torch.rand(3))
    assert logits.shape == (3, L) and logits.dtype == torch.float32 and torch.equal(logits, torch.zeros(3, L))
    with torch.no_grad():
        for p in estimator.parameters():
            p.add_(3 * torch.randn_like(p))
    scores = estimator.combine(estimator.network(100 * embedded, torch.rand(3)), torch.zeros(3, L, dtype=torch.int64)).scores
    assert ((scores >= 0) & (scores <= 1)).all() and scores.std() > 0


def test_it_is_told_the_time_and_the_place():
    estimator = make(settings()).estimator
    embedded = torch.randn(1, 1, 16).expand(2, L, 16)
    logits = estimator.network(embedded, torch.tensor([0.1, 0.7]))
    assert not torch.allclose(logits[0], logits[1])
    mixed = torch.randn(1, L, 16)
    turned = estimator.network(mixed.flip(1), torch.tensor([0.5]))
    assert not torch.allclose(estimator.network(mixed, torch.tensor([0.5])), turned.flip(1))  # rotary: order matters


def test_documents_keep_it_inside():
    estimator = make(settings()).estimator
    x, _ = tokens(1)
    x[0, 5] = 0
    x[0, torch.arange(L) != 5] = x[0, torch.arange(L) != 5].clamp(min=1)
    embedded, share = torch.randn(1, L, 16), torch.tensor([0.5])
    changed = embedded.clone()
    changed[0, 6:] = torch.randn(L - 6, 16)
    for documents, same in ((documents_of(x, 0), True), (None, False)):
        first, second = (estimator.network(e, share, documents)[0, :6] for e in (embedded, changed))
        assert torch.allclose(first, second, atol=1e-5) == same


def test_log_rank():
    scores = log_rank(torch.tensor([5, 0, 9, 5]))
    expected = [math.log(1 + rank) / math.log(4) for rank in (1, 3, 0, 2)]  # equal counts go by id
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    assert float(scores.max()) == 1.0 and float(scores.min()) == 0.0


def test_sources():
    x, _ = tokens()
    counts = torch.randint(0, 100, (V,))
    logits = torch.randn(4, L)
    parts = {}
    for source in ("learned", "frequency", "full"):
        estimator = ImportanceEstimator(settings(source=source).importance, 16, L, counts)
        parts[source] = estimator.combine(None if source == "frequency" else logits, x).scores
    assert torch.equal(parts["frequency"], log_rank(counts)[x])
    torch.testing.assert_close(parts["full"], 0.7 * torch.sigmoid(logits) + 0.3 * parts["frequency"])
    assert ImportanceEstimator(settings(source="frequency").importance, 16, L, counts).parameter_count() == 0
    for source in ("frequency", "full"):
        with pytest.raises(ValueError, match=f"importance.source {source} needs the counts"):
            ImportanceEstimator(settings(source=source).importance, 16, L)
    with pytest.raises(ValueError, match="has no estimator"):
        ImportanceEstimator(ImportanceConfig(), 16, L)


def test_the_target_is_the_chance_of_error():
    nll = torch.tensor([0.0, math.log(2), 50.0], requires_grad=True)
    target = error_chance(nll)
    torch.testing.assert_close(target, torch.tensor([0.0, 0.5, 1.0]))
    assert not target.requires_grad
    p = torch.tensor([0.3, 0.9])
    by_hand = -(target[1] * p.log() + (1 - target[1]) * (1 - p).log())
    torch.testing.assert_close(importance_loss(torch.logit(p), target[1].expand(2)), by_hand)
    assert baseline(0.5) == pytest.approx(math.log(2)) and baseline(0.0) == baseline(1.0) == 0.0


def test_the_estimators_loss_reaches_the_estimator_and_the_embeddings_and_nothing_else():
    objective = make(settings())
    x, ids = tokens()
    batch = objective.hide(x, ids, first=0, step=1)
    nll = torch.rand(len(batch.rows), requires_grad=True)
    own, _ = objective._importance(batch, batch.importance, nll, L, 1, 0.0)
    own.backward()
    reached = {name for name, p in objective.named_parameters().items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"embedding.weight"} | {n for n in objective.named_parameters() if n.startswith("importance.")}
    assert nll.grad is None  # the target is detached


def test_the_models_loss_reaches_the_estimator_only_through_learned_weights():
    x, ids = tokens()
    for differentiable in (False, True):
        objective = make(settings(weighting="importance", differentiable_weights=differentiable, loss_weight=0.0))
        loss, _ = objective.loss(x, ids, first=0, step=1)
        loss.backward()
        network = [p for n, p in objective.named_parameters().items() if n.startswith("importance.")]
        reached = sum(float(p.grad.abs().sum()) for p in network if p.grad is not None)
        assert (reached > 0) == differentiable


def test_the_gradient_through_weights_is_the_derivative_of_the_loss():
    """With one score moved a little, the loss moves as its gradient says: masks held, in fp32, by central differences."""
    from atat_fast.diffusion.adaptive import relative_weights

    scores = torch.rand(2, L, dtype=torch.float64)
    hidden = torch.rand(2, L) < 0.5
    nll = torch.rand(2, L, dtype=torch.float64)
    value = lambda s: (relative_weights(s, hidden, 1.5) * nll).sum()  # noqa: E731
    moved = scores.clone().float().requires_grad_()
    value(moved).backward()
    eps = 1e-2
    for place in ((0, 0), (1, 3), (1, 7)):
        up, down = scores.clone(), scores.clone()
        up[place] += eps
        down[place] -= eps
        slope = float(value(up) - value(down)) / (2 * eps)
        assert float(moved.grad[place]) == pytest.approx(slope, abs=2e-3)


def test_differentiable_weights_are_the_ops_weights():
    x, ids = tokens()
    for weighting in ("importance", "order"):
        plain = make(settings(weighting=weighting))
        learned = Objective(
            plain.model, settings(weighting=weighting, differentiable_weights=True), plain.compute, seed=3, total=4,
            estimator=plain.estimator,
        )  # fmt: skip
        a, b = (o.hide(x, ids, first=0, step=1) for o in (plain, learned))
        assert torch.equal(a.rows, b.rows) and torch.equal(a.noisy, b.noisy)
        torch.testing.assert_close(a.weights, b.weights.detach(), rtol=1e-5, atol=1e-6)


def test_parts_of_the_loss_add_up():
    objective = make(settings(weighting="importance"))
    x, ids = tokens()
    loss, parts = objective.loss(x, ids, first=0, step=1)
    assert float(loss.detach()) == pytest.approx(float(parts["diffusion"] + 0.1 * parts["importance"]), rel=1e-6)
    halves = [objective.loss(x[i : i + 2], ids[i : i + 2], first=i, step=1)[1] for i in (0, 2)]
    for name in ("diffusion", "importance", "target", "score", "square_error"):
        assert float(parts[name]) == pytest.approx(sum(float(h[name]) for h in halves), rel=1e-4), name
    assert int(parts["hidden_quarters"].sum()) == 4 * L // 2  # counts are drawn in pairs (k, L - k)
    batch = objective.hide(x, ids, first=0, step=1)
    assert float(parts["score"]) == pytest.approx(float(batch.importance.scores.detach().flatten()[batch.rows].mean()), rel=1e-5)


def test_it_learns_which_tokens_are_hard():
    """The first half of a sequence is one id over and over, the second chance: the estimator tells them apart."""
    torch.manual_seed(0)
    config = settings(width=32, tilt=0.0)
    model, estimator = DiT(V, MASK, **SMALL), ImportanceEstimator.of(config)
    compute = Compute(torch.device("cpu"), torch.float32, compile=False)
    objective = Objective(model, config, compute, seed=3, total=16, estimator=estimator)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    ids = torch.arange(16)
    for step in range(160):
        x = torch.randint(0, MASK, (16, L))
        x[:, : L // 2] = 3  # known for certain
        loss, parts = objective.loss(x, ids, first=0, step=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = objective.hide(x, ids, first=0, step=999)
    scores, second = batch.importance.scores.detach().flatten()[batch.rows], batch.rows % L >= L // 2  # of hidden tokens
    assert float(scores[second].mean()) > float(scores[~second].mean()) + 0.1
    target, found = float(parts["target"]), float(parts["importance"])
    assert found < 0.9 * baseline(target)


def test_without_a_source_it_is_the_plain_process_bit_for_bit():
    """Masks, weights and model called by hand give the same loss and gradients."""
    from atat_fast.diffusion.masking import hide_for_training
    from atat_fast.models.dit import Randomness

    x, ids = tokens()
    config = settings(source="none")
    config.model.dropout = 0.1
    torch.manual_seed(1)
    objective = make(config)
    loss, parts = objective.loss(x, ids, first=0, step=7, progress=0.5)
    loss.backward()
    torch.manual_seed(1)
    model = make(config).model
    batch = hide_for_training(x, config.diffusion, first=0, total=4, mask_id=MASK, sample_ids=ids, seed=3, step=7)
    own, _ = model(
        batch.noisy, batch.rows, batch.target, batch.weights, batch.hidden_share, Randomness(3, torch.full((), 7), ids), None
    )
    own = own / (4 * L)
    own.backward()
    assert parts.keys() == {"diffusion"} and torch.equal(loss, own)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(objective.model.parameters(), model.parameters(), strict=True))


def test_an_objective_has_an_estimator_where_settings_say_so():
    config = settings()
    model, compute = DiT(V, MASK, **SMALL), Compute(torch.device("cpu"), torch.float32, compile=False)
    with pytest.raises(ValueError, match=r"importance.source is learned, and of estimators there is none"):
        Objective(model, config, compute, seed=0, total=4)
    plain = Objective(model, Config(), compute, seed=0, total=4)
    assert plain.named_parameters().keys() == dict(model.named_parameters()).keys()


@pytest.mark.slow
def test_the_network_is_one_compiled_graph():
    torch._dynamo.reset()
    network = make(settings()).estimator.network
    embedded, share = torch.randn(2, L, 16), torch.rand(2)
    compiled = torch.compile(network, fullgraph=True)
    torch.testing.assert_close(compiled(embedded, share), network(embedded, share), rtol=1e-4, atol=1e-5)
