"""Memory options and what the driver says, on a GPU: compiled bf16 moments, blocks computed again, a card that is read."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import ModelConfig
from atat_fast.distributed.wrap import recompute_blocks
from atat_fast.hardware.devices import memory_of
from atat_fast.hardware.monitor import Monitor, Stopwatch, card_of
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.training.optimizers import low_precision
from atat_fast.training.optimizers.low_precision import AdamWBf16, round_by_chance, update


def moments(device, steps=6, count=5000):
    """Weights and moments after some steps on data made on the CPU."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(count).to(device))
    optimizer = AdamWBf16([p], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        p.grad = torch.randn(count).to(device)
        optimizer.step()
    return p.detach().cpu(), {name: t.float().cpu() for name, t in optimizer.state[p].items()}


def test_bf16_moments_are_the_same_wherever_they_are_computed(device):
    """On a GPU the update is one compiled kernel; the draws are Philox's, so only sums that round otherwise may differ."""
    want, state = moments("cpu")
    got, other = moments(device)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        apart = (other[name] != state[name]).float().mean()
        assert apart < 0.01 and torch.allclose(other[name], state[name], rtol=2**-7)


def test_rounding_is_right_on_average_and_leaves_what_fits_alone(device):
    x = torch.full((200_000,), 1 + 2**-10, device=device)  # an eighth of the way from 1 to the next bf16
    bits = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=device)
    rounded = round_by_chance(x, bits).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert abs(rounded.mean() - x.double().mean()) < 4 * (1 / 8 * 7 / 8 / len(x)) ** 0.5 * 2**-7
    exact = torch.randn(1000, device=device).bfloat16()
    assert torch.equal(round_by_chance(exact.float(), bits[:1000]), exact)


def test_blocks_computed_again_give_the_same_bits(card):
    found = []
    for every in (0, 1, 2):
        torch.manual_seed(1)
        model = DiT(67, 66, **vars(ModelConfig(dim=64, layers=4, heads=2, length=32, dropout=0.1)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        model.to(card)
        recompute_blocks(model, every)
        torch.manual_seed(2)
        tokens, rows = torch.randint(0, 66, (4, 32)).to(card), torch.arange(0, 128, 2, device=card)
        randomness = Randomness(1, torch.zeros((), dtype=torch.int64, device=card), torch.arange(4, device=card))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = model(tokens, rows, tokens.flatten()[rows], torch.ones(64, device=card), None, randomness)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_peak_memory_falls_on_a_card(card):
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


def test_a_card_is_read_and_known(card):
    driver = card_of(card)
    if driver is None:
        pytest.skip("no driver library for NVML here")
    reading = driver.read()
    assert 0 <= reading["gpu_utilisation"] <= 1 and 0 < reading["memory_used_gib"] < 1024 and 0 < reading["celsius"] < 120
    monitor, watch = Monitor(driver, seconds=0.05), Stopwatch(card)
    with watch.own():
        torch.randn(2048, 2048, device=card) @ torch.randn(2048, 2048, device=card)
    torch.cuda.synchronize()
    assert watch.seconds() > 0
    monitor.close()
    assert monitor.row()["memory_used_gib"] > 0
    assert memory_of(card) == torch.cuda.get_device_properties(0).total_memory


@pytest.mark.slow
def test_the_compiled_update_is_the_eager_one(monkeypatch):
    """What a GPU runs is `update` under torch.compile: traced whole, for parameters of several sizes by one graph or two."""
    want, state = moments("cpu")
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(low_precision, "update", torch.compile(update, dynamic=True, fullgraph=True, backend=backend))
    for count in (64, 300, 5000):
        got, other = moments("cpu", count=count)
    assert len(graphs) <= 2
    assert torch.equal(got, want) and all(torch.equal(other[name], state[name]) for name in state)
