"""A whole training step on a GPU: nothing waits for the device, one captured graph draws fresh noise at each replay, NCCL with
one rank changes nothing, and memory stays inside the plan's estimate.

Every law is a function of a size and a device, which a CPU runs small; where a CPU has no such thing (a stream, an allocator's
count) the nearest that it has is asked instead, so that the functions themselves are known to work.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from atat_fast.config import Config, ImportanceConfig, ModelConfig, load_preset
from atat_fast.diffusion.counts import mask_counts
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.uniform import UNIFORM
from atat_fast.distributed.fit import Layout, Sizes, card_memory
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.ops import mask_tokens
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Average, Optimizers
from atat_fast.training.plan import card_of

aten = torch.ops.aten
GPU = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
BOTH = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=on_gpu, id="cuda")]
MEMORY_SLACK = 1.25
"""Over the estimate: what the allocator rounds up, temporaries of autograd, libraries' workspaces."""


@dataclass
class Size:
    """Sequences and vocabulary of a step, and the model's settings."""

    batch: int
    vocabulary: int
    model: ModelConfig


def size_for(device: str) -> Size:
    """MDLM's small on a GPU; a model of the same shape that a CPU finishes at once elsewhere."""
    if device == "cuda":
        return Size(4, 50_258, load_preset("small").model)
    return Size(4, 67, ModelConfig(dim=32, layers=2, heads=2, length=24, dropout=0.1))


class Step:
    """A model and everything that moves it, with fixed data."""

    def __init__(
        self, device: str, *, adaptive: bool = False, identity: bool = False, dtype: torch.dtype | None = None
    ) -> None:  # fmt: skip
        self.size, self.device = size_for(device), torch.device(device)
        torch.manual_seed(0)
        self.config = Config(model=self.size.model)
        self.config.optim.clip = 1.0
        if adaptive:
            self.config.importance = ImportanceConfig(source="learned", width=16 if device != "cuda" else 256, heads=2)
            self.config.diffusion.weighting = "importance"
        schedule: Process = UNIFORM
        if identity:
            self.config.diffusion.schedule = "token_identity"
            schedule = IdentitySchedule(torch.linspace(0.3, 2.0, self.size.vocabulary)).to(self.device)
        dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        self.compute = Compute(self.device, dtype, compile=False)
        self.model = DiT(self.size.vocabulary, self.size.vocabulary - 1, **vars(self.size.model)).to(self.device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, device=p.device))
        estimator = ImportanceEstimator.of(self.config, None) if adaptive else None
        if estimator is not None:
            estimator = estimator.to(self.device)
        self.objective = Objective(
            self.model, self.config, self.compute, seed=1, total=self.size.batch, estimator=estimator, process=schedule
        )
        self.tokens = torch.randint(0, self.size.vocabulary - 1, (self.size.batch, self.size.model.length)).to(self.device)
        self.ids = torch.arange(self.size.batch, device=self.device)

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


@contextlib.contextmanager
def no_waiting(device: str) -> Any:
    """Within, whatever makes the host wait for a GPU raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


KINDS = pytest.mark.parametrize("kind", [{}, {"adaptive": True}, {"identity": True}], ids=["uniform", "atat", "identity"])


@KINDS
@pytest.mark.parametrize("device", BOTH)
def test_nothing_waits_in_a_step(device, kind):
    step = Step(device, **kind).with_optimizer()
    for number in range(2):  # libraries make their handles, and the optimizer its state
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


class Captured:
    """A whole step whose noise depends on a step counter in device memory, which the step itself advances."""

    def __init__(self, device: str) -> None:
        self.step = Step(device).with_optimizer()
        for part in self.step.optimizers.parts:
            for group in part.param_groups:
                group["capturable"] = device == "cuda"
        size = self.step.size
        counts = mask_counts(size.model.length, 0, size.batch, size.batch, seed=1, step=0, pairing="antithetic")
        self.num_rows, self.counts = int(counts.sum()), counts.to(device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.seed = torch.ones((), dtype=torch.int64, device=device)
        self.rows = torch.zeros(self.num_rows, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Mask, forward, backward, clip, optimizer, average, and the counter."""
        s = self.step
        noisy, rows, weights = mask_tokens(
            s.tokens, self.counts, num_rows=self.num_rows, mask_id=s.model.mask_id, sample_ids=s.ids, seed=self.seed,
            step=self.counter,
        )  # fmt: skip
        with s.compute.autocast():
            target, randomness = s.tokens.flatten()[rows], Randomness(self.seed, self.counter, s.ids)
            loss, _ = s.model(noisy, rows, target, weights, None, randomness)
        (loss / s.tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(s.model.parameters(), 1.0)
        s.optimizers.step(1e-3)
        s.average.update(10)
        self.rows.copy_(rows)
        self.loss.copy_(loss.detach())
        self.counter += 1

    def run(self, times: int, call: Any) -> list[tuple[torch.Tensor, float]]:
        """(rows, loss) after each call."""
        found = []
        for _ in range(times):
            call()
            found.append((self.rows.clone(), float(self.loss)))
        return found


def fresh(found: list[tuple[torch.Tensor, float]]) -> bool:
    """Whether no two calls hid the same rows or gave the same loss."""
    rows = {tuple(rows.tolist()) for rows, _ in found}
    return len(rows) == len({loss for _, loss in found}) == len(found)


def test_a_step_that_reads_its_number_from_memory_draws_fresh_noise():
    found, again = Captured("cpu"), Captured("cpu")
    first, second = found.run(4, found), again.run(4, again)
    assert fresh(first) and int(found.counter) == 4
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_captured_step_draws_fresh_noise_and_goes_where_an_eager_one_goes(poisoned):
    """Sums are made in a fixed order, for AdamW's first steps turn a rounding into the whole of a step."""
    warm = 3
    eager = Captured("cuda")
    want = eager.run(warm + 4, eager)
    captured = Captured("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    assert int(captured.counter) == warm  # capturing runs nothing
    got = captured.run(4, graph.replay)
    assert fresh(got)
    for (rows, loss), (rows_eager, loss_eager) in zip(got, want[warm:], strict=True):
        assert torch.equal(rows, rows_eager)
        assert loss == pytest.approx(loss_eager, rel=1e-3)


@pytest.mark.parametrize("device", BOTH)
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


def held_bytes(step: Step) -> dict[str, int]:
    """Bytes of weights, optimizer state and average, counted tensor by tensor."""
    tensors = {
        "parameters": list(step.model.parameters()),
        "optimizer": [value for name, value in step.optimizers.state().items() if not name.endswith("/step")],
        "average": list(step.average.values.values()),
    }
    return {name: sum(t.numel() * t.element_size() for t in found) for name, found in tensors.items()}


@pytest.mark.parametrize("device", BOTH)
def test_memory_is_what_the_plan_says(device):
    before = torch.cuda.memory_allocated() if device == "cuda" else 0  # by other tests
    step = Step(device).with_optimizer()
    size, counts = step.size, step.model.parameter_counts()
    sizes = Sizes(counts["total"], counts["blocks"], step.config.model.layers, size.vocabulary)
    estimate = card_memory(step.config, sizes, Layout("none", 1, 1), card_of(step.compute), size.batch)
    kept = {name: estimate[name] for name in ("parameters", "optimizer", "average")}
    step.whole(0)
    assert held_bytes(step) == kept
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.whole(1)
        peak = torch.cuda.max_memory_allocated() - before
        assert sum(kept.values()) < peak < MEMORY_SLACK * (sum(estimate.values()) - estimate["reserved"])
