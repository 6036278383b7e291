"""Schedules, optimizers and the average."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import OptimConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.training.optimizers import Average, Optimizers, check_optim, learning_rate, muon

SMALL = {"dim": 16, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}


def test_the_seeds_learning_rate_phases():
    config = load_preset("wikitext103").optim
    rate = lambda step: learning_rate(config, step, 50_000)  # noqa: E731
    assert rate(0) == pytest.approx(1e-4 / 15_000)
    assert rate(14_999) == pytest.approx(1e-4) == rate(15_000) == rate(34_999)
    assert rate(42_499) == pytest.approx((1e-4 + 1e-6) / 2)
    assert rate(49_999) == pytest.approx(1e-6)
    falling = [rate(s) for s in range(35_000, 50_000, 500)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_schedule_of_a_very_short_run(steps):
    for step in range(steps):
        assert 0 < learning_rate(OptimConfig(), step, steps) <= 1e-4


def train(model, optimizers, steps):
    for step in range(steps):
        torch.manual_seed(step)
        noisy, rows = torch.randint(0, 11, (2, 12)), torch.arange(0, 24, 2)
        loss, _ = model(noisy, rows, torch.randint(0, 10, (12,)), torch.ones(12))
        loss.backward()
        optimizers.step(1e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_goes_on_as_if_nothing_had_happened(name):
    config = OptimConfig(name=name)
    first = DiT(11, 10, **SMALL)
    optimizers = Optimizers(first, config)
    train(first, optimizers, 3)
    copy = DiT(11, 10, **SMALL)
    copy.load_state_dict(first.state_dict())
    resumed = Optimizers(copy, config)
    resumed.load({key: value.clone() for key, value in optimizers.state().items()})
    for model, opt in ((first, optimizers), (copy, resumed)):
        train(model, opt, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), copy.parameters(), strict=True))


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    model = DiT(11, 10, **SMALL)
    adamw, inner = Optimizers(model, OptimConfig(name="muon")).parts
    chosen = {id(p) for group in inner.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert names == {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "out", "up", "down")}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not rest & chosen and len(rest | chosen) == len(list(model.parameters()))


def test_weight_decay_touches_matrices_only():
    (adamw,) = Optimizers(DiT(11, 10, **SMALL), OptimConfig(weight_decay=0.3)).parts
    for group in adamw.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_the_average_follows_its_definition_and_gives_the_weights_back():
    model = DiT(11, 10, **SMALL)
    average = Average(model, decay=0.9)
    by_hand = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        by_hand = {n: decay * by_hand[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    with average.applied():
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), by_hand[n], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[n]) and p.data_ptr() == places[n] for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be above 0"),
        ({"warmup": 0.8}, "optim.warmup 0.8 and optim.decay_from 0.7 must be ordered"),
        ({"beta2": 1.0}, "optim.beta2 must be in"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UsageError, match=message):
        check_optim(OptimConfig(**change))


MATRICES = [(16, 48), (48, 16), (16, 16), (64, 16), (16, 64), (48, 16), (1, 7), (7, 1), (5, 5)]


@pytest.mark.parametrize("most", [1, 2000, 1 << 25])
def test_muon_is_torchs_up_to_rounding(most, monkeypatch):
    """Stacked or one by one, in bf16 it makes torch.optim.Muon's updates; in fp32 they differ by what bf16 rounds away."""
    monkeypatch.setattr(muon, "MOST", most)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in MATRICES]
    options = {"lr": 0.1, "weight_decay": 0.2}
    sets = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(4)]
    theirs = torch.optim.Muon(sets[0], adjust_lr_fn="match_rms_adamw", **options)
    half, full, exact = (muon.Muon(some, dtype=t, **options)
                         for some, t in zip(sets[1:], (torch.bfloat16, torch.float32, torch.float64), strict=True))  # fmt: skip
    for step in range(4):
        for i, shape in enumerate(MATRICES):
            grad = None if (step, i) == (1, 3) else torch.randn(shape)  # a matrix that nothing reached
            for some in sets:
                some[i].grad = None if grad is None else grad.clone()
        for one in (theirs, half, full, exact):
            one.step()
    for p, start_of, h, f, e in zip(sets[0], start, *sets[1:], strict=True):
        torch.testing.assert_close(h, p, rtol=2e-2, atol=2e-2)
        moved = float((e - start_of).detach().norm())
        rounding = float((p - e).detach().norm()) / moved
        assert float((f - e).detach().norm()) / moved < 1e-4 and rounding < 0.1
        assert float((h - e).detach().norm()) / moved <= 1.5 * rounding + 1e-3
    assert {key: tuple(theirs.state[p]) for key, p in enumerate(sets[0])} == {
        key: tuple(half.state[p]) for key, p in enumerate(sets[1])
    }


def test_muon_makes_matrices_nearly_orthogonal():
    torch.manual_seed(0)
    x = torch.randn(3, 12, 40) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    values = torch.linalg.svdvals(muon.orthogonal(x))
    assert ((values > 0.6) & (values < 1.25)).all()
    assert torch.equal(muon.orthogonal(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_muon_takes_few_launches():
    """Of 24 matrices in four shapes, two of which are one another's transpose: a stack for each of three."""
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 6
    some = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    counts = []
    for optimizer in (muon.Muon(some, lr=0.1, weight_decay=0.1), torch.optim.Muon(some, lr=0.1, weight_decay=0.1)):
        for p in some:
            p.grad = torch.randn_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
            optimizer.step()
        products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
        counts.append(sum(event.count for event in watched.key_averages() if event.key in products))
    assert counts[0] == 3 * muon.STEPS * 3 and counts[1] >= 24 * muon.STEPS * 3


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"muon moves matrices, and one of its parameters has shape \(3,\)"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1, weight_decay=0.0)
