"""Memory options and what the driver says, on a GPU: compiled bf16 moments, blocks computed again, a card that is read."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import ModelConfig, OptimConfig
from atat_fast.distributed.wrap import recompute_blocks
from atat_fast.hardware.devices import memory_of
from atat_fast.hardware.monitor import Monitor, Stopwatch, card_of
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.training.optimizers import Optimizers, low_precision
from atat_fast.training.optimizers.low_precision import AdamWBf16, round_by_chance, update

GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
BOTH = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=on_gpu, id="cuda")]


def moments(device, steps=6, count=5000):
    """Weights and moments after some steps on data made on the CPU."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(count).to(device))
    optimizer = AdamWBf16([p], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        p.grad = torch.randn(count).to(device)
        optimizer.step()
    return p.detach().cpu(), {name: t.float().cpu() for name, t in optimizer.state[p].items()}


@pytest.mark.parametrize("device", BOTH)
def test_bf16_moments_are_the_same_wherever_they_are_computed(device):
    """On a GPU the update is one compiled kernel; the draws are Philox's, so only sums that round otherwise may differ."""
    want, state = moments("cpu")
    got, other = moments(device)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        apart = (other[name] != state[name]).float().mean()
        assert apart < 0.01 and torch.allclose(other[name], state[name], rtol=2**-7)


@pytest.mark.parametrize("device", BOTH)
def test_rounding_by_chance_is_right_on_average(device):
    x = torch.full((200_000,), 1 + 2**-9, device=device)
    bits = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=device)
    rounded = round_by_chance(x, bits).double()
    assert abs(rounded.mean().item() - (1 + 2**-9)) < 4 * (1 / 4 * 3 / 4 / len(x)) ** 0.5 * 2**-7


@pytest.mark.parametrize("device", BOTH)
def test_a_bf16_step_waits_for_nothing(device):
    model = DiT(67, 66, dim=32, layers=2, heads=2, length=24).to(device)
    optimizers = Optimizers(model, OptimConfig(state="bf16"))
    for _ in range(2):  # the first makes states and compiles
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizers.step(1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        optimizers.step(1e-3)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("device", BOTH)
def test_blocks_computed_again_give_the_same_bits(device):
    found = []
    for every in (0, 1, 2):
        torch.manual_seed(1)
        model = DiT(67, 66, **vars(ModelConfig(dim=64, layers=4, heads=2, length=32, dropout=0.1)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        model.to(device)
        recompute_blocks(model, every)
        torch.manual_seed(2)
        tokens, rows = torch.randint(0, 66, (4, 32)).to(device), torch.arange(0, 128, 2, device=device)
        randomness = Randomness(1, torch.zeros((), dtype=torch.int64, device=device), torch.arange(4, device=device))
        with torch.autocast(device, dtype=torch.bfloat16):
            loss, _ = model(tokens, rows, tokens.flatten()[rows], torch.ones(64, device=device), None, randomness)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_peak_memory_falls_on_a_card():
    most = {}
    for every in (0, 1):
        model = DiT(1000, 999, **vars(ModelConfig(dim=512, layers=8, heads=8, length=512, dropout=0.1))).cuda()
        recompute_blocks(model, every)
        tokens, rows = torch.randint(0, 999, (16, 512), device="cuda"), torch.arange(0, 8192, 2, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = model(tokens, rows, tokens.flatten()[rows], torch.ones(4096, device="cuda"))
        loss.backward()
        most[every] = torch.cuda.max_memory_allocated() - before
        del model, loss
    assert most[1] < 0.6 * most[0]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_card_is_read_and_known():
    device = torch.device("cuda", 0)
    card = card_of(device)
    if card is None:
        pytest.skip("no driver library for NVML here")
    reading = card.read()
    assert 0 <= reading["gpu_utilisation"] <= 1 and 0 < reading["memory_used_gib"] < 1024 and 0 < reading["celsius"] < 120
    monitor, watch = Monitor(card, seconds=0.05), Stopwatch(device)
    with watch.own():
        torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
    torch.cuda.synchronize()
    assert watch.seconds() > 0
    monitor.close()
    assert monitor.row()["memory_used_gib"] > 0
    assert memory_of(device) == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.slow
def test_the_compiled_update_is_the_eager_one(monkeypatch):
    """What a GPU runs is `update` under torch.compile: traced whole, for parameters of several sizes by one graph or two."""
    want, state = moments("cpu")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(update, dynamic=True, fullgraph=True, backend=backend)
    monkeypatch.setattr(low_precision, "update", compiled)
    for count in (5000, 64, 300):
        got, other = moments("cpu", count=count)
    assert len(graphs) <= 2
    got, other = moments("cpu")
    assert torch.equal(got, want) and all(torch.equal(other[name], state[name]) for name in state)
