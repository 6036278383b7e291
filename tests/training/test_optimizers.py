"""Schedules, optimizers, moments in fewer bits, and the average."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from atat_fast.config import OptimConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.training.optimizers import Average, Optimizers, check_optim, learning_rate, muon
from atat_fast.training.optimizers.low_precision import AdamWBf16, chance, check_state, first_element, round_by_chance

SMALL = {"dim": 64, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}
NEEDS_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
STATES = ["bf16", pytest.param("8bit", marks=[pytest.mark.slow, NEEDS_TORCHAO])]  # torchao compiles


def test_the_seeds_learning_rate_phases():
    config = load_preset("wikitext103").optim
    rate = lambda step: learning_rate(config, step, 50_000)  # noqa: E731
    assert rate(0) == pytest.approx(1e-4 / 15_000)
    assert rate(14_999) == pytest.approx(1e-4) == rate(15_000) == rate(34_999)
    assert rate(42_499) == pytest.approx((1e-4 + 1e-6) / 2)
    assert rate(49_999) == pytest.approx(1e-6)
    falling = [rate(s) for s in range(35_000, 50_000, 500)]
    assert falling == sorted(falling, reverse=True)
    assert all(0 < learning_rate(OptimConfig(), step, steps) <= 1e-4 for steps in (1, 2, 3) for step in range(steps))


def test_muon_takes_the_blocks_matrices_and_weight_decay_all_matrices_and_nothing_else():
    model = DiT(11, 10, **SMALL)
    adamw, inner = Optimizers(model, OptimConfig(name="muon")).parts
    chosen = {id(p) for group in inner.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert names == {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "out", "up", "down")}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not rest & chosen and len(rest | chosen) == len(list(model.parameters()))
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


def test_bad_settings():
    for change, message in (
        ({"lr": 0.0}, "optim.lr must be above 0"),
        ({"warmup": 0.8}, "optim.warmup 0.8 and optim.decay_from 0.7 must be ordered"),
        ({"beta2": 1.0}, "optim.beta2 must be in"),
    ):
        with pytest.raises(UsageError, match=message):
            check_optim(OptimConfig(**change))
    with pytest.raises(ValueError, match=r"muon moves matrices, and one of its parameters has shape \(3,\)"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1, weight_decay=0.0)


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
    half, full, exact = (
        muon.Muon(some, dtype=t, **options)
        for some, t in zip(sets[1:], (torch.bfloat16, torch.float32, torch.float64), strict=True)
    )
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
    assert [tuple(theirs.state[p]) for p in sets[0]] == [tuple(half.state[p]) for p in sets[1]]


@pytest.mark.parametrize("shape", [(3, 12, 40), (3, 12, 13), (3, 12, 12), (0, 12, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_muon_makes_matrices_nearly_orthogonal(shape, dtype):
    x = torch.randn(shape, dtype=dtype) * torch.tensor([1e-6, 1.0, 1e6], dtype=dtype)[: shape[0], None, None]
    values = torch.linalg.svdvals(muon.orthogonal(x).double())
    assert (values < 1.25).all()
    assert (values > 0.6).all() or shape[2] < 2 * shape[1]  # a nearly square one may have singular values near 0
    zeros = torch.zeros(1, *shape[1:], dtype=dtype)
    assert torch.equal(muon.orthogonal(zeros), zeros)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 8, 12), (3, 17, 40), (1, 1, 7)])
def test_the_iteration_on_gram_matrices_is_the_one_on_matrices(shape, power):
    """In fp32, against the textbook's steps in fp64; singular values fall to 10^-power of the largest."""
    a, b, c = muon.COEFFICIENTS
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    start = u @ torch.diag_embed(torch.logspace(0, -power, shape[1], dtype=torch.float64).expand(shape[:2])) @ v
    want = start / torch.linalg.matrix_norm(start, keepdim=True)
    for _ in range(muon.STEPS):
        gram = want @ want.mT
        want = a * want + (b * gram + c * gram @ gram) @ want
    for dtype, bound in ((torch.float32, 1e-3), (torch.float64, 1e-10)):
        error = (muon.orthogonal(start.to(dtype)).double() - want).norm() / want.norm()
        assert error < bound, f"{dtype}: {error:.1e}"


def test_muon_takes_few_launches():
    """Of 24 matrices in four shapes, two of which are one another's transpose: a stack for each of three. Three products a step
    of the iteration; where fp32 takes the gram matrices, of two of the shapes here, four more in all.
    """
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 6
    some = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    counts, options = [], {"lr": 0.1, "weight_decay": 0.1}
    ours = [muon.Muon(some, dtype=dtype, **options) for dtype in (torch.bfloat16, torch.float32)]
    for optimizer in (*ours, torch.optim.Muon(some, **options)):
        for p in some:
            p.grad = torch.randn_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
            optimizer.step()
        products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
        counts.append(sum(event.count for event in watched.key_averages() if event.key in products))
    assert counts[:2] == [3 * muon.STEPS * 3, 3 * muon.STEPS * 3 + 2 * 4] and counts[2] >= 24 * muon.STEPS * 3


def words(count, step=0, seed=0, first=0):
    return chance(count, torch.tensor(first), torch.tensor(seed), torch.tensor(step), 16)


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
def test_it_follows_adamw_with_less_memory(state):
    last, kept = {}, {}
    for kind in ("fp32", state):
        torch.manual_seed(1)
        model = DiT(300, 10, **SMALL)
        optimizers = Optimizers(model, OptimConfig(state=kind))
        last[kind] = train(model, optimizers, range(12))
        kept[kind] = sum(t.numel() * t.element_size() for t in optimizers.state().values())
    assert last[state] == pytest.approx(last["fp32"], rel=0.02)
    assert kept[state] / kept["fp32"] < {"bf16": 0.51, "8bit": 0.35}[state]


@pytest.mark.parametrize("state", ["fp32", "muon", *STATES])
def test_a_resume_through_safetensors_is_exact(state, tmp_path):
    config = OptimConfig(name="muon") if state == "muon" else OptimConfig(state=state)
    first, copy = DiT(11, 10, **SMALL), DiT(11, 10, **SMALL)
    optimizers = Optimizers(first, config)
    train(first, optimizers, range(3))
    saved = optimizers.state()
    assert all(type(t) is torch.Tensor for t in saved.values())
    save_file({name: t.contiguous() for name, t in saved.items()}, tmp_path / "optimizer.safetensors")
    copy.load_state_dict(first.state_dict())
    resumed = Optimizers(copy, config)
    resumed.load(load_file(tmp_path / "optimizer.safetensors"))
    for model, opt in ((first, optimizers), (copy, resumed)):
        train(model, opt, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), copy.parameters(), strict=True))


def test_a_shard_rounds_as_the_whole_does():
    """A rank's part of a parameter begins where the whole one's elements do, so shards of one rank are the parameter itself."""
    whole = torch.nn.Parameter(torch.zeros(6, 5))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.zeros(6, 5), mesh))
        assert first_element(whole) == first_element(sharded) == 0
        moved = []
        for p in (whole, sharded):
            grad = torch.linspace(-1, 1, 30).view(6, 5)
            p.grad = grad if p is whole else distribute_tensor(grad, mesh)
            optimizer = AdamWBf16([p], lr=1e-2)
            for _ in range(2):
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
