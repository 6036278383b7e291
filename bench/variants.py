"""The training steps that bench/throughput.py times: plain MDLM, the same compiled, atat_fast, and atat_fast with parts of ATAT.

All begin with the same weights and read the same tokens. A step is everything a trainer does: read tokens, hide some, forward,
backward, clip, optimizer, average. A clock, which does nothing unless it is started, notes which part time belongs to.
Under torchrun each rank takes its slots of one global batch, and DistributedDataParallel sums gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mdlm import PlainMDLM, block_by_block
from timing import synchronize
from torch import Tensor, nn

from atat_fast.config import Config, ImportanceConfig, OptimConfig, load_preset
from atat_fast.data import SequenceLoader
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.training.graphs import Graphs, why_not
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Average, Optimizers

PLAIN, COMPILED, OURS, SPREAD, HIDDEN, ADAPTIVE = VARIANTS = (
    "mdlm",
    "mdlm+compile",
    "atat_fast",
    "atat_fast+spread",
    "atat_fast+hidden",
    "atat_fast+atat",
)
MDLM = (PLAIN, COMPILED)
MEANING = {
    PLAIN: "MDLM as people run it: eager, SDPA, fp32 log-probabilities of every token",
    COMPILED: "the same under torch.compile",
    OURS: "atat_fast, uniform masks",
    SPREAD: "atat_fast with evenly spread masks",
    HIDDEN: "atat_fast with preset atat: an estimator that reads hidden states, two-stage masks, curriculum",
    ADAPTIVE: "atat_fast with an estimator of its own, two-stage masks, importance weights and curriculum",
}
PARTS = ("data", "masking", "forward", "backward", "clip", "optimizer", "average")
LR = 1e-4
SEED = 1
PROGRESS = 0.9
"""The ATAT variant's fixed place in its curriculum: the last phase, in which tilt and focus are not 0."""


class Clock:
    """Times the parts of a step: by wall time on a CPU, by events of the stream on a GPU, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.current = device, False, ""
        self.marks: list[tuple[str, Any]] = []

    def _mark(self, name: str) -> None:
        self.current = name
        if self.device.type == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self.marks.append((name, stamp))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within belongs to `name`, and afterwards to the part before."""
        if not self.on:
            yield
            return
        before = self.current
        with torch.profiler.record_function(f"part:{name}"):
            self._mark(name)
            yield
            self._mark(before)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Note parts within, starting from zero."""
        self.on, self.current, self.marks = True, "", []
        try:
            yield
        finally:
            self.on = False

    def seconds(self) -> dict[str, float]:
        """Seconds of every part since `started`, in the order of a step."""
        synchronize(self.device)
        total = dict.fromkeys(PARTS, 0.0)
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if name:
                total[name] += begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin
        return total


@dataclass(frozen=True)
class Setting:
    """Shared by all variants; `batch` sequences on each of `ranks` processes."""

    config: Config
    vocabulary: int
    batch: int
    compute: Compute
    loader: SequenceLoader
    rank: int = 0
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.ranks * self.batch * self.config.model.length


class Plain:
    """Plain MDLM's loss, as an objective."""

    def __init__(self, model: PlainMDLM, compute: Compute, compiled: bool) -> None:
        self.model, self.compute, self.estimator = model, compute, None
        self.forward = model.loss
        if compiled:
            # Only cuBLAS's products: on an H100 the search took 13 s a shape and found none within 21 % of them.
            tuned = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"} if compute.device.type == "cuda" else {}
            self.forward = torch.compile(model.fusible_loss, dynamic=False, options=tuned or None)

    def hide(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy, weight)."""
        return self.model.masks(tokens)

    def loss(self, tokens: Tensor, ids: Tensor, *, first: int, step: int, progress: float = 0.0) -> tuple[Tensor, dict[str, Any]]:
        """The mean over this rank's tokens."""
        noisy, weight = self.hide(tokens)
        with self.compute.autocast():
            return self.forward(tokens, noisy, weight), {}


def config_of(name: str, config: Config) -> Config:
    """`config` with the variant's parts of ATAT. The estimator of all of it has the default size."""
    if name == SPREAD:
        return dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, spread=1.0))
    if name not in (HIDDEN, ADAPTIVE):
        return config
    preset = load_preset("atat")
    if name == ADAPTIVE:
        preset.importance = ImportanceConfig(source="learned")
        preset.diffusion.weighting = "importance"
    return dataclasses.replace(config, importance=preset.importance, curriculum=preset.curriculum, diffusion=preset.diffusion)


def common_start(setting: Setting) -> DiT:
    """The weights that all variants begin with; not the all-zero start, so that no gradient is 0."""
    torch.manual_seed(0)
    model = DiT(setting.vocabulary, setting.vocabulary - 1, **vars(setting.config.model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def objective_of(name: str, setting: Setting) -> Any:
    """The variant's loss, with its model on the device."""
    ours, compute = common_start(setting), setting.compute
    if name in MDLM:
        plain = PlainMDLM(setting.vocabulary, setting.vocabulary - 1, setting.config.model)
        plain.load_state_dict(block_by_block(ours.state_dict(), setting.config.model.layers))
        return Plain(plain.to(compute.device), compute, name == COMPILED)
    config = config_of(name, setting.config)
    estimator = ImportanceEstimator.of(config, None)
    estimator = estimator and estimator.to(compute.device)
    total = setting.ranks * setting.batch
    return Objective(ours.to(compute.device), config, compute, seed=SEED, total=total, estimator=estimator)


class Losses(nn.Module):
    """An objective as a module, so that DistributedDataParallel can hold its parameters."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.model, self.estimator, self.objective = objective.model, objective.estimator, objective

    def forward(self, tokens: Tensor, ids: Tensor, first: int, step: int) -> Tensor:
        """The scalar that is backpropagated."""
        return self.objective.loss(tokens, ids, first=first, step=step, progress=PROGRESS)[0]


class Variant:
    """One way to train: a loss, its optimizer and average, and a step."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self.device, self.clock = setting.compute.device, Clock(setting.compute.device)
        objective = objective_of(name, setting)
        hide = objective.hide

        def timed_hide(*arguments: Any, **named: Any) -> Any:
            with self.clock.part("masking"):
                return hide(*arguments, **named)

        objective.hide = timed_hide
        self.model, self.losses_of = objective.model, Losses(objective)
        self.call: Any = self.losses_of
        # DDP takes the mean over ranks: right for plain MDLM's loss, a rank's mean; ours is a share of the sum.
        self.scale = 1 if name in MDLM else setting.ranks
        if setting.ranks > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.call = nn.parallel.DistributedDataParallel(self.losses_of, device_ids=ids)
        self.graphs: Graphs | None = None
        if name in (OURS, SPREAD) and why_not(objective.config, setting.compute, "none" if setting.ranks == 1 else "ddp") is None:
            self.graphs = Graphs(objective)
        self.optimizers = Optimizers(self.losses_of, OptimConfig())
        self.average = Average(self.losses_of, 0.9999)
        self.losses: list[Tensor] = []
        self.count = 0
        self.memory: dict[str, int] | None = None
        """Bytes that a step adds, and all that is held at its peak; None if they were not measured."""

    def step(self) -> None:
        """One whole training step; nothing in it waits for the device."""
        s, part = self.setting, self.clock.part
        first = s.rank * s.batch
        with part("data"):
            tokens, ids = s.loader.batch(self.count * s.ranks * s.batch + first, s.batch)
            if self.device.type == "cuda":
                tokens, ids = (t.pin_memory().to(self.device, non_blocking=True) for t in (tokens, ids))
        if self.graphs is not None and not self.clock.on:
            objective = self.losses_of.objective
            batch = objective.hide(tokens, ids, first=first, step=self.count, progress=PROGRESS)
            loss = self.graphs(batch, tokens, ids, self.count)
        else:
            with part("forward"):
                loss = self.call(tokens, ids, first, self.count) * self.scale
            with part("backward"):
                loss.backward()
        with part("clip"):
            torch.nn.utils.clip_grad_norm_(self.losses_of.parameters(), 1.0)
        with part("optimizer"):
            self.optimizers.step(LR)
        with part("average"):
            self.average.update(self.count)
        self.count += 1
        self.losses.append(loss.detach())

    def timed(self, steps: int) -> float:
        """Seconds a step, from an idle device to an idle device."""
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return (time.perf_counter() - begin) / steps

    def parts(self, steps: int) -> tuple[dict[str, float], float]:
        """(seconds of each part, seconds) of a step, from separate steps without CUDA graphs."""
        with self.clock.started():
            whole = self.timed(steps)
        return {name: total / steps for name, total in self.clock.seconds().items()}, whole

    def mean_loss(self) -> float:
        """Nats a token, over all steps so far."""
        return float(torch.stack(self.losses).mean())


def check_agreement(plain: Variant, ours: Variant, tokens: Tensor) -> float:
    """The largest relative difference of loss and gradients on one masked batch without dropout; raises if they disagree."""
    one, two = plain.model, ours.model
    noisy, weight = one.masks(tokens)
    rows = (noisy == one.mask_id).flatten().nonzero().flatten()
    weights = weight.repeat_interleave((noisy == one.mask_id).sum(1))
    one.eval()
    with plain.setting.compute.autocast():
        want = (one.fusible_loss if plain.name == COMPILED else one.loss)(tokens, noisy, weight)
        got = two(noisy, rows, tokens.flatten()[rows], weights)[0] / tokens.numel()
    want.backward()
    got.backward()
    one.train()
    worst = abs(float(got.detach() - want.detach())) / abs(float(want.detach()))
    theirs = {name: p.grad for name, p in one.named_parameters()}
    mine = block_by_block({name: p.grad for name, p in two.named_parameters()}, len(two.blocks))
    for name, grad in mine.items():
        scale = float(theirs[name].norm())
        worst = max(worst, float((grad - theirs[name]).norm()) / scale if scale else 0.0)
    limit = 5e-2 if plain.setting.compute.dtype is torch.bfloat16 else 1e-3
    if not worst < limit:
        raise RuntimeError(f"the variants disagree: loss and gradients differ by up to {worst:.2e} of their size")
    one.zero_grad()
    two.zero_grad()
    return worst
