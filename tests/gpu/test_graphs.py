"""Passes as CUDA graphs: the gradients, step by step, that passes as they are would give.

A CPU has no graphs: there a stand-in does a captured call again, which shows the buffers, the shapes and where gradients lie.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from atat_fast.config import Config, DiffusionConfig, ImportanceConfig, ModelConfig, TrainConfig
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.uniform import UNIFORM
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.training import graphs
from atat_fast.training.graphs import Graphs, wanted
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Optimizers

GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
BOTH = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=on_gpu, id="cuda")]
VOCABULARY, LENGTH, TOTAL = 67, 24, 8


class Again:
    """What `Capture` gives, on a CPU: a replay is the call once more, into the tensors that capturing left."""

    def __init__(self, parameters):
        self.parameters, self.captured, self.replayed = parameters, 0, 0

    def __call__(self, call):
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        fresh = all(grad is None for grad in before)
        out = call()
        self.captured += 1
        for p, grad in zip(self.parameters, before, strict=True):  # capturing executes nothing
            if p.grad is not None:
                p.grad.copy_(torch.full_like(p.grad, torch.nan) if grad is None else grad)

        def replay():
            self.replayed += 1
            if fresh:
                for p in self.parameters:
                    if p.grad is not None:
                        p.grad.zero_()
            out.copy_(call())

        return replay, out


def objective_of(device, **diffusion):
    """A small model that is not all zeros, with dropout, and its loss."""
    torch.manual_seed(0)
    config = Config(model=ModelConfig(dim=32, layers=2, heads=2, length=LENGTH, dropout=0.1))
    config.diffusion = DiffusionConfig(**diffusion)
    model = DiT(VOCABULARY, VOCABULARY - 1, **vars(config.model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.to(device)
    identity: Process = UNIFORM
    if config.diffusion.schedule == "token_identity":
        identity = IdentitySchedule(torch.linspace(0.3, 2.0, VOCABULARY)).to(torch.device(device))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Objective(
        model, config, Compute(torch.device(device), dtype, compile=False), seed=1, total=TOTAL, process=identity
    )  # fmt: skip


def steps(objective, passes, device, count, micro, lr):
    """Losses and gradients of each optimizer step; `passes` adds a micro-batch's gradients and gives its loss."""
    optimizers = Optimizers(objective.named_parameters(), objective.config.optim)
    generator, found = torch.Generator().manual_seed(3), []
    for step in range(count):
        losses = []
        for first in range(0, TOTAL, micro):
            tokens = torch.randint(0, VOCABULARY - 1, (micro, LENGTH), generator=generator).to(device)
            ids = torch.arange(step * TOTAL + first, step * TOTAL + first + micro, device=device)
            batch = objective.hide(tokens, ids, first=first, step=step)
            losses.append(passes(batch, tokens, ids, step))
        found.append((torch.stack(losses), [None if p.grad is None else p.grad.clone() for p in objective.parameters()]))
        optimizers.step(lr)
    return found


def plain(objective):
    """Passes as they are."""

    def run(batch, tokens, ids, step):
        loss, _ = objective.loss_of(batch, ids, step=step, progress=0.0)
        loss.backward()
        return loss.detach()

    return run


def graphed(objective, device):
    return Graphs(objective, None if device == "cuda" else Again(list(objective.parameters())))


KINDS = {
    "antithetic": {}, "ce": {"weighting": "ce"}, "independent": {"pairing": "independent"},
    "identity": {"schedule": "token_identity"}, "bell": {"counts": "bell", "weighting": "ce"},
}  # fmt: skip


@pytest.mark.parametrize("micro", [TOTAL, TOTAL // 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", BOTH)
def test_gradients_are_those_of_passes_as_they_are(device, kind, micro, poisoned):
    changing = kind in ("independent", "bell")
    rounds = device == "cuda" and changing  # bf16 products and sums over more rows round otherwise
    count, lr = 16 if changing else 5, 1e-6 if rounds else 1e-3
    one, two = objective_of(device, **KINDS[kind]), objective_of(device, **KINDS[kind])
    passes = graphed(two, device)
    want, got = steps(one, plain(one), device, count, micro, lr), steps(two, passes, device, count, micro, lr)
    for (loss, grads), (other, others) in zip(want, got, strict=True):
        torch.testing.assert_close(other, loss, rtol=1e-3 if rounds else 1e-5, atol=1e-7)
        for a, b in zip(grads, others, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert float((a - b).norm()) <= (1e-2 if rounds else 1e-4) * float(a.norm()) + 1e-9
    assert not passes.off and 0 < len(passes.shapes) <= graphs.MOST
    captured = [shape.graphs for shape in passes.shapes.values() if shape.graphs]
    if changing:
        assert captured and all(len(shape.batch.rows) % graphs.LEAST == 0 for shape in list(passes.shapes.values())[1:])
    else:
        assert len(passes.shapes) == 1 and len(captured[0]) == (1 if micro == TOTAL else 2)


def test_a_pass_that_cannot_be_captured_runs_as_it_is():
    def refuse(call):
        call()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    one, two = objective_of("cpu"), objective_of("cpu")
    passes = Graphs(two, refuse)
    want = steps(one, plain(one), "cpu", 3, TOTAL, 1e-3)
    with pytest.warns(UserWarning, match=r"cannot be captured as a CUDA graph \(operation not permitted .* goes on without"):
        got = steps(two, passes, "cpu", 3, TOTAL, 1e-3)
    assert passes.off and all(torch.equal(a[0], b[0]) for a, b in zip(want, got, strict=True))


def test_where_graphs_are_wanted():
    gpu, cpu = Compute(torch.device("cuda"), torch.bfloat16, compile=True), Compute(torch.device("cpu"), torch.float32, False)
    config = Config()
    assert wanted(config, gpu, "none") and not wanted(config, cpu, "none") and not wanted(config, gpu, "ddp")
    adaptive = dataclasses.replace(config, importance=ImportanceConfig(source="learned"))
    assert not wanted(adaptive, gpu, "none")
    off = dataclasses.replace(config, train=TrainConfig(cuda_graphs="off"))
    assert not wanted(off, gpu, "none")
    on = dataclasses.replace(config, train=TrainConfig(cuda_graphs="on"))
    assert wanted(on, gpu, "none")
    with pytest.raises(UsageError, match=r"cuda_graphs is on, but graphs are captured on a GPU, and this run computes on a CPU"):
        wanted(on, cpu, "none")
