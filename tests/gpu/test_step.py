"""A whole training step on a GPU: nothing waits for the device; passes as CUDA graphs give the losses and gradients, step by
step, that passes as they are would; NCCL with one rank changes nothing; memory stays inside the plan's estimate.

Every law is a function of a size and a device, which a CPU runs small; what a CPU lacks (a stream, a graph, an allocator's count)
a stand-in replaces, so that the functions themselves are known to work.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from atat_fast.config import Config, DiffusionConfig, ImportanceConfig, ModelConfig, TrainConfig, load_preset
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.diffusion.uniform import UNIFORM
from atat_fast.distributed.fit import Layout, Sizes, card_memory
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.training import graphs
from atat_fast.training.graphs import Graphs, wanted
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Average, Optimizers
from atat_fast.training.plan import card_of

aten = torch.ops.aten
TOTAL = 8
MEMORY_SLACK = 1.25
"""Over the estimate: what the allocator rounds up, temporaries of autograd, libraries' workspaces."""


class Step:
    """A model and everything that moves it, with fixed data: MDLM's small on a GPU; one that a CPU finishes at once elsewhere."""

    def __init__(self, device, *, size="", batch=4, adaptive=False, diffusion=MappingProxyType({}), state="fp32", dtype=None):
        self.device, large = torch.device(device), device == "cuda" and not size
        small = ModelConfig(dim=32, layers=2, heads=2, length=24, dropout=0.1)
        self.config = Config(model=load_preset("small").model if large else small)
        self.config.diffusion = DiffusionConfig(**diffusion)
        self.batch, self.vocabulary = batch, 50_258 if large else 67
        self.config.optim.clip, self.config.optim.state = 1.0, state
        if adaptive:
            self.config.importance = ImportanceConfig(source="learned", width=256 if large else 16, heads=2)
            self.config.diffusion.weighting = "importance"
        identity = self.config.diffusion.schedule == "token_identity"
        process = IdentitySchedule(torch.linspace(0.3, 2.0, self.vocabulary)) if identity else UNIFORM
        self.compute = Compute(self.device, dtype or (torch.bfloat16 if device == "cuda" else torch.float32), compile=False)
        torch.manual_seed(0)
        self.model = DiT(self.vocabulary, self.vocabulary - 1, **vars(self.config.model)).to(self.device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, device=p.device))
        more = {"process": process.to(self.device)}
        if adaptive:
            more["estimator"] = ImportanceEstimator.of(self.config, None).to(self.device)
        self.objective = Objective(self.model, self.config, self.compute, seed=1, total=self.batch, **more)
        self.tokens = torch.randint(0, self.vocabulary - 1, (self.batch, self.config.model.length)).to(self.device)
        self.ids = torch.arange(self.batch, device=self.device)

    def with_optimizer(self) -> Step:
        """The same, with what a step ends with."""
        self.optimizers = Optimizers(self.objective.named_parameters(), self.config.optim)
        self.average = Average(self.objective.named_parameters(), 0.9)
        return self

    def gradients(self, step: int) -> torch.Tensor:
        """Loss, gradients and clipping; the loss."""
        loss, _ = self.objective.loss(self.tokens, self.ids, first=0, step=step, progress=0.9)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.clip)
        return loss.detach()

    def whole(self, step: int) -> torch.Tensor:
        """A whole step."""
        loss = self.gradients(step)
        self.optimizers.step(1e-3)
        self.average.update(step)
        return loss


class Waits(TorchDispatchMode):
    """Notes what would make the host wait, were `meta` a GPU: copies between it and the host that do not say non_blocking.

    Reading a value of a meta tensor, or a size that depends on one, raises by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        crosses = func is aten._to_copy.default and target is not None and torch.device(target).type != args[0].device.type
        crosses |= func is aten.copy_.default and args[0].device.type != args[1].device.type
        told = kwargs.get("non_blocking", args[2] if func is aten.copy_.default and len(args) > 2 else False)
        if crosses and not told:
            self.found.append(f"{func} of {tuple(args[0].shape)}")
        return func(*args, **kwargs)


SORTS = [{}, {"adaptive": True}, {"diffusion": {"schedule": "token_identity"}}, {"state": "bf16"}]
KINDS = pytest.mark.parametrize("kind", SORTS, ids=str)


@KINDS
def test_nothing_waits_in_a_step(device, kind, no_waiting):
    step = Step(device, **kind).with_optimizer()
    for number in range(2):  # libraries make their handles, and the optimizer its state and its kernel
        step.whole(number)
    with no_waiting(device):
        losses = [step.whole(number) for number in (2, 3)]
    assert all(bool(torch.isfinite(loss)) for loss in losses)


@KINDS
def test_nothing_would_wait_were_it_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # torch's own refuses to say for meta
    step = Step("meta", **kind, dtype=torch.float32)
    with Waits() as waits:
        step.gradients(3)
    assert waits.found == []


def test_waits_are_noticed():
    there = torch.empty(3, device="meta")
    with Waits() as waits:
        torch.ones(3).to("meta", non_blocking=True)
        assert waits.found == []
        torch.ones(3).to("meta")
        there.copy_(torch.ones(3))
    assert len(waits.found) == 2


def test_one_rank_changes_nothing(device, tmp_path, poisoned):
    """Under deterministic algorithms, for a GPU's attention and embedding otherwise add up as threads arrive."""

    class Losses(torch.nn.Module):
        def __init__(self, step: Step) -> None:
            super().__init__()
            self.model, self.step = step.model, step

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.step.objective.loss(tokens, self.step.ids, first=0, step=0)[0]

    alone = Step(device)
    Losses(alone)(alone.tokens).backward()
    kind = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        together = Step(device)
        ranks = [together.device] if device == "cuda" else None
        torch.nn.parallel.DistributedDataParallel(Losses(together), device_ids=ranks)(together.tokens).backward()
    finally:
        dist.destroy_process_group()
    for (name, p), q in zip(alone.model.named_parameters(), together.model.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_memory_is_what_the_plan_says(state, device):
    before = torch.cuda.memory_allocated() if device == "cuda" else 0  # by other tests
    step = Step(device, state=state).with_optimizer()
    counts = step.model.parameter_counts()
    sizes = Sizes(counts["total"], counts["blocks"], step.config.model.layers, step.vocabulary)
    estimate = card_memory(step.config, sizes, Layout("none", 1, 1), card_of(step.compute), step.batch)
    kept = {name: estimate[name] for name in ("parameters", "optimizer", "average")}
    step.whole(0)
    states = [value for name, value in step.optimizers.state().items() if not name.endswith("/step")]
    held = {"parameters": step.model.parameters(), "optimizer": states, "average": step.average.values.values()}
    assert {name: sum(t.nbytes for t in tensors) for name, tensors in held.items()} == kept
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.whole(1)
        peak = torch.cuda.max_memory_allocated() - before
        assert sum(kept.values()) < peak < MEMORY_SLACK * (sum(estimate.values()) - estimate["reserved"])


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
    """A small model's loss, in whole batches of TOTAL."""
    return Step(device, size="small", batch=TOTAL, diffusion=diffusion).objective


def steps(objective, passes, device, count, micro, lr):
    """Losses and gradients of each optimizer step; `passes` adds a micro-batch's gradients and gives its loss."""
    optimizers = Optimizers(objective.named_parameters(), objective.config.optim)
    generator, found = torch.Generator().manual_seed(3), []
    for step in range(count):
        losses = []
        for first in range(0, TOTAL, micro):
            tokens = torch.randint(0, 66, (micro, 24), generator=generator).to(device)
            ids = torch.arange(step * TOTAL + first, step * TOTAL + first + micro, device=device)
            batch = objective.hide(tokens, ids, first=first, step=step)
            losses.append(passes(batch, tokens, ids, step))
        found.append((torch.stack(losses), [None if p.grad is None else p.grad.clone() for p in objective.parameters()]))
        optimizers.step(lr)
    return found


def plain(objective):
    def run(batch, tokens, ids, step):
        loss, _ = objective.loss_of(batch, ids, step=step, progress=0.0)
        loss.backward()
        return loss.detach()

    return run


DIFFUSIONS = {
    "antithetic": {}, "ce": {"weighting": "ce"}, "independent": {"pairing": "independent"},
    "identity": {"schedule": "token_identity"}, "bell": {"counts": "bell", "weighting": "ce"},
}  # fmt: skip


@pytest.mark.parametrize("micro", [TOTAL, TOTAL // 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_gradients_are_those_of_passes_as_they_are(device, kind, micro, poisoned):
    changing = kind in ("independent", "bell")
    rounds = device == "cuda" and changing  # bf16 products and sums over more rows round otherwise
    count, lr = 16 if changing else 5, 1e-6 if rounds else 1e-3
    one, two = objective_of(device, **DIFFUSIONS[kind]), objective_of(device, **DIFFUSIONS[kind])
    passes = Graphs(two, None if device == "cuda" else Again(list(two.parameters())))
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
    auto, adaptive = Config(), Config(importance=ImportanceConfig(source="learned"))
    off, on = (Config(train=TrainConfig(cuda_graphs=choice)) for choice in ("off", "on"))
    assert wanted(auto, gpu, "none") and not wanted(auto, cpu, "none") and not wanted(auto, gpu, "ddp")
    assert wanted(on, gpu, "none") and not wanted(off, gpu, "none") and not wanted(adaptive, gpu, "none")
    with pytest.raises(UsageError, match=r"cuda_graphs is on, but graphs are captured on a GPU, and this run computes on a CPU"):
        wanted(on, cpu, "none")
