"""Sampling on a GPU: draws are the specification's on every backend, graphs draw what eager steps draw, and nothing waits.

A CPU runs the same laws small. It has no graphs, so there the steps that a graph would hold run as they are, rounded up
alike; and where a GPU is told to refuse any wait, a CPU refuses the operations that would be one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atat_fast.config import ModelConfig, load_preset
from atat_fast.models import DiT
from atat_fast.ops import linear_categorical, linear_categorical_reference, registry
from atat_fast.sampling import samplers
from atat_fast.sampling.samplers import SAMPLERS, sample

aten = torch.ops.aten
GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
BOTH = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=on_gpu, id="cuda")]


def model_for(device: str) -> DiT:
    """MDLM's small on a GPU, and a model of the same shape that a CPU finishes at once elsewhere."""
    settings = load_preset("small").model if device == "cuda" else ModelConfig(dim=32, layers=2, heads=2, length=24)
    settings.dropout = 0.0
    vocabulary = 50_258 if device == "cuda" else 67
    torch.manual_seed(0)
    model = DiT(vocabulary, vocabulary - 1, **vars(settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device).eval()


def options_of(sampler: str) -> dict[str, Any]:
    """What a sampler needs beside its name."""

    def by_place(tokens: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, tokens.shape[1], device=tokens.device).expand_as(tokens)

    return {"sampler": sampler} | ({"importance": by_place} if sampler == "importance" else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("device", BOTH)
def test_draws_are_the_specification_s(device, dtype, poisoned):
    rows, width, vocabulary = (300, 768, 50_257) if device == "cuda" else (40, 48, 131)
    hidden, weight = torch.randn(rows, width).to(device, dtype), (width**-0.5 * torch.randn(vocabulary, width)).to(device, dtype)
    bias, index = torch.randn(vocabulary).to(device, dtype), (torch.arange(rows) * 1_000_003).to(device)
    seed, step = (torch.tensor(n, device=device) for n in (7, 3))
    want = linear_categorical_reference(hidden.double(), weight.double(), index, bias.double(), 5, 0.8, seed=7, step=3)
    found = [name for name, reason in registry.explain("linear_categorical", hidden.device).items() if reason is None]
    assert device == "cpu" or "triton" in found
    for backend in found:
        runs = [
            linear_categorical(
                hidden, weight, index, bias=bias, forbidden=5, temperature=0.8, seed=seed, step=step, backend=backend
            )
            for _ in range(2)
        ]
        assert torch.equal(*runs), f"{backend}: two runs differ"
        share = float((runs[0] == want).float().mean())  # logits stored in bf16 are rounded, and change a few draws
        assert share > (0.999 if dtype is torch.float32 else 0.9), f"{backend}: {share:.1%} of the rows as specified"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("device", BOTH)
def test_graphs_draw_what_eager_steps_draw(device, sampler, monkeypatch):
    model = model_for(device)
    start = torch.full((2, model.config.length), model.mask_id, device=device)
    start[1, : model.config.length // 2] = 3
    if device == "cpu":
        monkeypatch.setattr(samplers, "Replay", lambda advance: advance)
    for seed in (1, 2):
        eager = sample(model, start, steps=12, seed=seed, graphs=False, **options_of(sampler))
        graphs = sample(model, start, steps=12, seed=seed, graphs=True, **options_of(sampler))
        assert (eager != model.mask_id).all() and torch.equal(eager[start != model.mask_id], start[start != model.mask_id])
        # Padded products may round otherwise, which changes a draw now and then, and what follows from it.
        assert device == "cuda" or torch.equal(graphs, eager)
        assert float((graphs == eager).float().mean()) > 0.5


class Refuse(TorchDispatchMode):
    """Raises at an operation whose result has a size or a number that the host would have to wait for."""

    WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten.equal)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        assert func.overloadpacket not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def refusing(device: str) -> Any:
    """No wait inside."""
    if device == "cpu":
        with Refuse():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Orders by certainty check their rows on a CPU, which has nothing to wait for: on a GPU they do not.
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("device", BOTH)
def test_no_step_waits_for_the_device(device, sampler, monkeypatch):
    if device == "cpu" and sampler in ("confidence", "entropy"):
        pytest.skip("the loss's row pass checks ids on a CPU, where that waits for nobody")
    model, steps = model_for(device), []
    start = torch.full((2, model.config.length), model.mask_id, device=device)

    def watched(advance):
        def run(sizes):
            with refusing(device):
                advance(sizes)
            steps.append(sizes)

        return run

    sample(model, start, steps=4, **options_of(sampler))  # kernels are compiled, and libraries loaded
    monkeypatch.setattr(samplers, "Replay", watched)
    drawn = sample(model, start, steps=8, graphs=True, **options_of(sampler))
    assert len(steps) >= 6 and (drawn != model.mask_id).all()
