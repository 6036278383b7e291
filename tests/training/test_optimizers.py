"""Schedules, optimizers and the average."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import OptimConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.training.optimizers import Average, Optimizers, check_optim, learning_rate

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
    adamw, muon = Optimizers(model, OptimConfig(name="muon")).parts
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
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
