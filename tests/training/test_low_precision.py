"""AdamW with moments in fewer bits: rounding that is right on average, and a resume that is exact."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from atat_fast.config import OptimConfig
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.training.optimizers import Optimizers
from atat_fast.training.optimizers.low_precision import AdamWBf16, chance, check_state, first_element, round_by_chance

TORCHAO = importlib.util.find_spec("torchao") is not None
SMALL = {"dim": 64, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}
NEEDS_TORCHAO = pytest.mark.skipif(not TORCHAO, reason="torchao is not installed")
STATES = ["bf16", pytest.param("8bit", marks=[pytest.mark.slow, NEEDS_TORCHAO])]  # torchao compiles


def words(count, step=0, seed=0, first=0):
    return chance(count, torch.tensor(first), torch.tensor(seed), torch.tensor(step), 16)


def test_rounding_is_right_on_average_and_leaves_what_fits_alone():
    x = torch.full((200_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next bf16
    bits, _ = words(len(x))
    rounded = round_by_chance(x, bits).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    spread = (1 / 8 * 7 / 8 / len(x)) ** 0.5 * 2**-7
    assert abs(rounded.mean() - x.double().mean()) < 4 * spread
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_by_chance(exact.float(), words(1000)[0]), exact)


def test_what_is_not_finite_stays_so():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -0.0])
    rounded = round_by_chance(x, torch.full((5,), 0xFFFF, dtype=torch.int32))
    assert rounded[0] == torch.inf and rounded[1] == -torch.inf and rounded[2].isnan() and rounded[4] == 0


def test_chance_is_uniform_and_a_function_of_its_place():
    low, high = words(100_000)
    for bits in (low, high):
        assert bits.min() >= 0 and bits.max() <= 0xFFFF and abs(bits.double().mean() - 32767.5) < 4 * 18918 / 100_000**0.5
    assert not torch.equal(low, high) and not torch.equal(low, words(100_000, step=1)[0])
    parts = torch.cat([words(37)[1], words(63, first=37)[1]])
    assert torch.equal(parts, words(100)[1])


def test_a_slow_second_moment_moves_as_it_should():
    """beta2 0.999: rounding to nearest would leave a second moment at its first values for ever."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([p], lr=1e-3)
    exact = torch.zeros(4096, dtype=torch.float64)
    for _ in range(400):
        p.grad = torch.randn(4096)
        exact = 0.999 * exact + 0.001 * p.grad.double() ** 2
        optimizer.step()
    kept = optimizer.state[p]["exp_avg_sq"]
    assert kept.dtype is torch.bfloat16
    assert kept.double().mean() == pytest.approx(exact.mean().item(), rel=0.01)


def train(model, optimizers, steps):
    for step in steps:
        torch.manual_seed(step)
        noisy, rows = torch.randint(0, 11, (2, 12)), torch.arange(0, 24, 2)
        loss, _ = model(noisy, rows, torch.randint(0, 10, (12,)), torch.ones(12))
        loss.backward()
        optimizers.step(1e-3 * (1 + step))
    return loss.item()


@pytest.mark.parametrize("state", STATES)
def test_it_follows_adamw(state):
    last = {}
    for kind in ("fp32", state):
        torch.manual_seed(1)
        model = DiT(11, 10, **SMALL)
        last[kind] = train(model, Optimizers(model, OptimConfig(state=kind)), range(12))
    assert last[state] == pytest.approx(last["fp32"], rel=0.02)


@pytest.mark.parametrize("state", STATES)
def test_a_resume_through_safetensors_is_exact(state, tmp_path):
    config = OptimConfig(state=state)
    first = DiT(11, 10, **SMALL)
    optimizers = Optimizers(first, config)
    train(first, optimizers, range(3))
    saved = optimizers.state()
    assert all(type(t) is torch.Tensor for t in saved.values())
    save_file({name: t.contiguous() for name, t in saved.items()}, tmp_path / "optimizer.safetensors")
    copy = DiT(11, 10, **SMALL)
    copy.load_state_dict(first.state_dict())
    resumed = Optimizers(copy, config)
    resumed.load(load_file(tmp_path / "optimizer.safetensors"))
    for model, opt in ((first, optimizers), (copy, resumed)):
        train(model, opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("state", STATES)
def test_moments_take_less_memory(state):
    kept = {}
    for kind in ("fp32", state):
        model = DiT(300, 10, **SMALL)
        optimizers = Optimizers(model, OptimConfig(state=kind))
        train(model, optimizers, range(1))
        kept[kind] = sum(t.numel() * t.element_size() for t in optimizers.state().values())
    assert kept[state] / kept["fp32"] < {"bf16": 0.51, "8bit": 0.35}[state]


def test_a_shard_rounds_as_the_whole_does():
    """A rank's part of a parameter begins where the whole one's elements do, so shards of one rank are the parameter itself."""
    whole = torch.nn.Parameter(torch.zeros(6, 5))
    assert first_element(whole) == 0
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.zeros(6, 5), mesh))
        assert first_element(sharded) == 0
        moved = []
        for p in (whole, sharded):
            grad = torch.linspace(-1, 1, 30).view(6, 5)
            p.grad = grad if p is whole else distribute_tensor(grad, mesh)
            optimizer = AdamWBf16([p], lr=1e-2)
            optimizer.step()
            optimizer.step()
            moved.append(p.detach() if p is whole else p.detach().full_tensor())
        assert torch.equal(*moved) and (moved[0] != 0).any()
    finally:
        torch.distributed.destroy_process_group()


def test_what_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"optim\.state bf16 is for optim\.name adamw"):
        check_state("bf16", "muon")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UsageError, match="pip install torchao"):
        Optimizers(DiT(11, 10, **SMALL), OptimConfig(state="8bit"))
