"""Sampling on a GPU: graphs draw what eager steps draw, and nothing waits.

A CPU runs the same laws small. It has no graphs, so there the steps that a graph would hold run as they are, rounded up
alike; and where a GPU is told to refuse any wait, a CPU refuses the operations that would be one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atat_fast.config import ModelConfig, load_preset
from atat_fast.models import DiT
from atat_fast.sampling import samplers
from atat_fast.sampling.samplers import SAMPLERS, sample

aten = torch.ops.aten


def model_for(device: str) -> DiT:
    """MDLM's small on a GPU, and a model of the same shape that a CPU finishes at once elsewhere."""
    large = device == "cuda"
    settings, vocabulary = (
        (load_preset("small").model, 50_258) if large else (ModelConfig(dim=32, layers=2, heads=2, length=24), 67)
    )
    settings.dropout = 0.0
    torch.manual_seed(0)
    model = DiT(vocabulary, vocabulary - 1, **vars(settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device).eval()


def by_place(tokens: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, 1, tokens.shape[1], device=tokens.device).expand_as(tokens)


def options_of(sampler: str) -> dict[str, Any]:
    """What a sampler needs."""
    return {"sampler": sampler} | ({"importance": by_place} if sampler == "importance" else {})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_draw_what_eager_steps_draw(device, sampler, monkeypatch):
    model = model_for(device)
    start = torch.full((2, model.config.length), model.mask_id, device=device)
    start[1, : model.config.length // 2] = 3
    if device == "cpu":
        monkeypatch.setattr(samplers, "Replay", lambda advance: advance)
    for seed in (1, 2):
        eager, graphs = (sample(model, start, steps=12, seed=seed, graphs=on, **options_of(sampler)) for on in (False, True))
        assert (eager != model.mask_id).all() and torch.equal(eager[start != model.mask_id], start[start != model.mask_id])
        # Padded products may round otherwise, which changes a draw now and then, and what follows from it.
        assert device == "cuda" or torch.equal(graphs, eager)
        assert float((graphs == eager).float().mean()) > 0.5


class Refuse(TorchDispatchMode):
    """Raises at an operation whose result has a size or a number that the host would have to wait for."""

    WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten.equal)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


# Orders by certainty check their rows on a CPU, which has nothing to wait for: on a GPU they do not.
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_waits_for_the_device(device, sampler, monkeypatch, no_waiting):
    if device == "cpu" and sampler in ("confidence", "entropy"):
        pytest.skip("the loss's row pass checks ids on a CPU, where that waits for nobody")
    model, steps = model_for(device), []
    start = torch.full((2, model.config.length), model.mask_id, device=device)

    def watched(advance):
        def run(sizes):
            with Refuse() if device == "cpu" else no_waiting(device):
                advance(sizes)
            steps.append(sizes)

        return run

    sample(model, start, steps=4, **options_of(sampler))  # kernels are compiled, and libraries loaded
    monkeypatch.setattr(samplers, "Replay", watched)
    drawn = sample(model, start, steps=8, graphs=True, **options_of(sampler))
    assert len(steps) >= 6 and (drawn != model.mask_id).all()
