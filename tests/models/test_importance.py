"""The importance estimator: its size, its scores, what it learns from and what its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from small import SIZE, filled, small_dit
from torch.utils.flop_counter import FlopCounterMode

from atat_fast.config import Config, ImportanceConfig, load_preset
from atat_fast.diffusion.adaptive import relative_weights
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness, step_cost
from atat_fast.models.importance import ImportanceEstimator, error_chance, importance_cost, importance_loss, log_rank
from atat_fast.ops import documents_of
from atat_fast.training.loss import Objective, baseline

V, L = 11, 12
MASK = V - 1
CPU = Compute(torch.device("cpu"), torch.float32, compile=False)


def settings(*, weighting="uniform", kind="none", **importance) -> Config:
    config = Config()
    vars(config.model).update(SIZE | {"layers": 1})
    config.importance = ImportanceConfig(**{"source": "learned", "width": 16, "layers": 1, "heads": 2} | importance)
    config.diffusion.weighting, config.curriculum.kind = weighting, kind
    return config


def make(config: Config, total=4) -> Objective:
    model, estimator = small_dit(V, **vars(config.model)), ImportanceEstimator.of(config, torch.arange(V))
    return Objective(model, config, CPU, seed=3, total=total, estimator=estimator and filled(estimator))


def tokens(batch=4):
    return torch.randint(0, MASK, (batch, L)), torch.arange(batch)


def test_the_cost_is_that_of_the_products_and_small_beside_a_models():
    """Counted by PyTorch's own counter, whose attention is counted apart from it."""
    config = settings()
    network = ImportanceEstimator.of(config).network
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(3, L, 16), torch.rand(3))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 2 * 2 * 3 * L**2 * 16
    cost = importance_cost(config.importance, config.model, 3, backward=False).flops
    small = 2 * 3 * (256 * 16 + 16 * 16) + 2 * 3 * L * 16  # the time embedding and the head, which the formula leaves out
    assert cost - attention <= counted <= cost - attention + small + attention
    config = load_preset("wikitext103")
    with torch.device("meta"):
        assert 1.8e6 < ImportanceEstimator.of(config).parameter_count() < 2.1e6
    work = importance_cost(config.importance, config.model, 24).flops
    assert 0.01 < work / step_cost(config.model, 50_258, 24, 24 * 1024 // 2).flops <= 0.05
    assert work == 3 * importance_cost(config.importance, config.model, 24, backward=False).flops


def test_it_starts_undecided_and_scores_stay_in_range():
    estimator, embedded = ImportanceEstimator.of(settings()), torch.randn(3, L, 16)
    logits = estimator.network(embedded, torch.rand(3))
    assert logits.dtype == torch.float32 and torch.equal(logits, torch.zeros(3, L))
    filled(estimator, 3)
    scores = estimator.combine(estimator.network(100 * embedded, torch.rand(3)), torch.zeros(3, L, dtype=torch.int64)).scores
    assert ((scores >= 0) & (scores <= 1)).all() and scores.std() > 0


def test_it_is_told_the_time_and_the_place():
    network, mixed, half = make(settings()).estimator.network, torch.randn(1, L, 16), torch.tensor([0.5])
    early, late = network(mixed[:, :1].expand(2, L, 16), torch.tensor([0.1, 0.7]))
    assert not torch.allclose(early, late)
    assert not torch.allclose(network(mixed, half), network(mixed.flip(1), half).flip(1))  # rotary: order matters


def test_documents_keep_it_inside():
    network, x = make(settings()).estimator.network, tokens(1)[0].clamp(min=1)
    x[0, 5] = 0
    embedded, share = torch.randn(1, L, 16), torch.tensor([0.5])
    changed = torch.cat((embedded[:, :6], torch.randn(1, L - 6, 16)), 1)
    for documents, same in ((documents_of(x, 0), True), (None, False)):
        first, second = (network(e, share, documents)[0, :6] for e in (embedded, changed))
        assert torch.allclose(first, second, atol=1e-5) == same


def test_scores_are_of_the_network_of_frequencies_or_of_both():
    scores = log_rank(torch.tensor([5, 0, 9, 5]))
    torch.testing.assert_close(scores, torch.tensor([math.log(1 + rank) / math.log(4) for rank in (1, 3, 0, 2)]))  # equal: by id
    x, counts, logits, parts = tokens()[0], torch.randint(0, 100, (V,)), torch.randn(4, L), {}
    for source in ("learned", "frequency", "full"):
        estimator = ImportanceEstimator(settings(source=source).importance, 16, L, counts)
        parts[source] = estimator.combine(None if source == "frequency" else logits, x).scores
        assert (estimator.parameter_count() == 0) == (source == "frequency")
        if source != "learned":
            with pytest.raises(ValueError, match=f"importance.source {source} needs the counts"):
                ImportanceEstimator(settings(source=source).importance, 16, L)
    assert torch.equal(parts["frequency"], log_rank(counts)[x])
    torch.testing.assert_close(parts["learned"], torch.sigmoid(logits))
    torch.testing.assert_close(parts["full"], 0.7 * parts["learned"] + 0.3 * parts["frequency"])
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


@pytest.mark.parametrize(("reads", "also"), [("embedding", {"embedding.weight"}), ("hidden", set())])
def test_the_estimators_loss_reaches_the_estimator_and_the_embeddings_it_reads_and_nothing_else(reads, also):
    objective = make(settings(reads=reads))
    x, ids = tokens()
    batch = objective.hide(x, ids, first=0, step=1)
    nll = torch.rand(len(batch.rows), requires_grad=True)
    own, _ = objective._importance(batch, batch.importance, nll, L, 1, 0.0)
    own.backward()
    reached = {name for name, p in objective.named_parameters().items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == also | {n for n in objective.named_parameters() if n.startswith("importance.")}
    assert nll.grad is None  # the target is detached


def test_a_linear_map_of_hidden_states_sees_what_the_backbone_sees_and_costs_the_blocks_it_reads_behind():
    config = settings(reads="hidden", depth=2)
    config.model.layers = 3
    objective = make(config)
    estimator, model = objective.estimator, objective.model
    x, share = tokens()[0], torch.rand(4)
    states = estimator.read(model, x, share)
    whole = model.features(x, share)
    assert states.shape == (4, L, 16) and not states.requires_grad and not torch.allclose(states.flatten(0, 1), whole)
    assert torch.equal(model.features(x, share, depth=3), whole) and torch.equal(model.features(x, share, depth=9), whole)
    logits = objective.scores(x, x, share).logits
    torch.testing.assert_close(logits, estimator.network(states, share))
    torch.testing.assert_close(estimator.scorer(model)(x, share), torch.sigmoid(logits))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        estimator.read(model, x, share)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 2 * 2 * 4 * L**2 * 16 * 2
    cost = importance_cost(config.importance, config.model, 4).flops
    conditioning = 2 * (256 * 8 + 8 * 8 + 8 * (6 * 3 + 2) * 16)
    assert cost - attention <= counted <= cost + conditioning
    config = load_preset("tiny")
    config.importance = ImportanceConfig(source="learned", reads="hidden")
    work = importance_cost(config.importance, config.model, 8).flops
    assert work / step_cost(config.model, 4097, 8, 8 * config.model.length // 2).flops < 0.07


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
    scores, nll = torch.rand(2, 2, L, dtype=torch.float64)
    hidden, eps = torch.rand(2, L) < 0.5, 1e-2
    value = lambda s: (relative_weights(s, hidden, 1.5) * nll).sum()  # noqa: E731
    moved = scores.clone().float().requires_grad_()
    value(moved).backward()
    for place in ((0, 0), (1, 3), (1, 7)):
        step = torch.zeros_like(scores)
        step[place] = eps
        slope = float(value(scores + step) - value(scores - step)) / (2 * eps)
        assert float(moved.grad[place]) == pytest.approx(slope, abs=2e-3)


def test_differentiable_weights_are_the_ops_weights():
    x, ids = tokens()
    for weighting in ("importance", "order"):
        a, b = (
            make(settings(weighting=weighting, differentiable_weights=d)).hide(x, ids, first=0, step=1) for d in (False, True)
        )
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
    config = settings(width=32, tilt=0.0)
    model = DiT(V, MASK, **vars(config.model))
    objective = Objective(model, config, CPU, seed=3, total=16, estimator=ImportanceEstimator.of(config))
    optimizer, ids = torch.optim.AdamW(objective.parameters(), lr=1e-2), torch.arange(16)
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
    assert float(parts["importance"]) < 0.9 * baseline(float(parts["target"]))


def test_without_a_source_it_is_the_plain_process_bit_for_bit():
    """Masks, weights and model called by hand give the same loss and gradients."""
    (x, ids), config = tokens(), settings(source="none")
    config.model.dropout = 0.1
    objective, model = make(config), make(config).model
    loss, parts = objective.loss(x, ids, first=0, step=7, progress=0.5)
    loss.backward()
    batch = hide_for_training(x, config.diffusion, first=0, total=4, mask_id=MASK, sample_ids=ids, seed=3, step=7)
    randomness = Randomness(3, torch.full((), 7), ids)
    own = model(batch.noisy, batch.rows, batch.target, batch.weights, batch.hidden_share, randomness, None)[0] / (4 * L)
    own.backward()
    assert parts.keys() == {"diffusion"} and torch.equal(loss, own)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(objective.model.parameters(), model.parameters(), strict=True))


def test_an_objective_has_an_estimator_where_settings_say_so():
    model = small_dit(V, layers=1)
    with pytest.raises(ValueError, match=r"importance.source is learned, but no estimator is given"):
        Objective(model, settings(), CPU, seed=0, total=4)
    plain = Objective(model, Config(), CPU, seed=0, total=4)
    assert plain.named_parameters().keys() == dict(model.named_parameters()).keys()


@pytest.mark.slow
def test_the_network_is_one_compiled_graph():
    torch._dynamo.reset()
    network = make(settings()).estimator.network
    embedded, share = torch.randn(2, L, 16), torch.rand(2)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(embedded, share), network(embedded, share), rtol=1e-4, atol=1e-5)
