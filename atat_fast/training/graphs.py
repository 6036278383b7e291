"""Forward and backward of a micro-batch as one CUDA graph: one launch instead of hundreds.

A small model, or few sequences on a fast card, keeps a GPU waiting for the host (docs/notes/gpu.md). The first micro-batch of a
shape runs eagerly, which compiles kernels. The next is captured, which executes nothing, and replayed from then on. Masks,
targets, weights and the step's number change, so they lie in buffers that are filled before each replay.

All graphs share one place for each gradient. A graph that begins an optimizer step writes gradients; one for a later micro-batch
adds to them. The optimizer may drop them: they are put back.

With uniform counts in pairs every micro-batch hides equally many tokens. If that number varies, the first shape keeps its own;
others are rounded up to a multiple of a 16th of the tokens, with rows of weight 0, so that shapes repeat. After MOST shapes, new
ones run eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atat_fast.config import Config
from atat_fast.diffusion.process import MaskedBatch, Tilt
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.training.loss import Objective

MOST = 6
"""Most shapes to capture."""
PARTS, LEAST = 16, 64
"""Numbers of rows are rounded up to a multiple of a 16th of the tokens, at least 64."""

Grads = list[Tensor | None]
Replay = Callable[[], None]


def why_not(config: Config, compute: Compute, mode: str) -> str | None:
    """Why passes of a run in this parallel mode cannot be graphs, or None if they can."""
    if compute.device.type != "cuda":
        return "graphs are captured on a GPU, and this run computes on a CPU"
    if mode != "none":
        return f"under {mode} ranks sum gradients during the backward pass, which a graph would hide from them"
    if config.importance.source != "none":
        return "the importance estimator's strength changes from step to step on the host"
    if config.diffusion.gap_power or config.diffusion.counts == "learned":
        return "weights by gaps and laws of counts are learned from the loss of each token, which a graph does not return"
    if config.model.document_mask:
        return "the number of documents changes from batch to batch"
    return None


def wanted(config: Config, compute: Compute, mode: str) -> bool:
    """Whether passes are graphs under `train.cuda_graphs`. Raises UsageError if it is on and they cannot be."""
    asked, reason = config.train.cuda_graphs, why_not(config, compute, mode)
    if asked == "on" and reason:
        raise UsageError(f"train.cuda_graphs is on, but {reason}; use --train.cuda_graphs auto")
    return asked != "off" and reason is None


@dataclass
class Shape:
    """Micro-batches of one shape: their buffers, and a graph with its loss, for the first micro-batch of a step (True) and for
    later ones (False).
    """

    batch: MaskedBatch
    sample_ids: Tensor
    step: Tensor
    graphs: dict[bool, tuple[Replay, Tensor]] = field(default_factory=dict)

    def fill(self, batch: MaskedBatch, sample_ids: Tensor, step: int) -> None:
        """Copy a micro-batch into the buffers."""
        for target, source in zip(self.batch.tensors(), batch.tensors(), strict=True):
            target.copy_(source, non_blocking=True)
        self.sample_ids.copy_(sample_ids, non_blocking=True)
        self.step.fill_(step)


class Graphs:
    """The passes of an objective, as graphs if possible. capture: makes a graph of a call, as `Capture` does."""

    def __init__(
        self, objective: Objective, capture: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] | None = None
    ) -> None:
        self.objective = objective
        self.parameters: list[nn.Parameter] = list(objective.parameters())
        self.shapes: dict[tuple[object, ...], Shape] = {}
        self.grads: Grads = []
        """The parameters' gradients, once a graph has made them."""
        self.capture = capture or Capture()
        self.off = False

    def __call__(self, batch: MaskedBatch, tokens: Tensor, sample_ids: Tensor, step: int) -> Tensor:
        """Add a micro-batch's gradients to the parameters'. tokens: what was masked. Returns its loss, detached."""
        if self.off:
            return self._run(batch, sample_ids, torch.full((), step, device=tokens.device))
        batch = self._rounded(batch, tokens)
        key = tuple(tuple(tensor.shape) for tensor in batch.tensors())
        shape = self.shapes.get(key)
        if shape is None and len(self.shapes) == MOST:
            return self._run(batch, sample_ids, torch.full((), step, device=tokens.device))
        if shape is None:
            shape = Shape(batch.clone(), sample_ids.clone(), torch.full((), step, device=tokens.device))
            self.shapes[key] = shape
            return self._run(shape.batch, shape.sample_ids, shape.step)
        shape.fill(batch, sample_ids, step)
        begins = all(p.grad is None for p in self.parameters)
        elsewhere = not begins and any(p.grad is not g for p, g in zip(self.parameters, self.grads or [None], strict=False))
        if elsewhere or (begins not in shape.graphs and not self._record(shape, begins)):  # or after an eager pass
            return self._run(shape.batch, shape.sample_ids, shape.step)
        for p, grad in zip(self.parameters, self.grads, strict=True):
            p.grad = grad
        replay, loss = shape.graphs[begins]
        replay()
        return loss.clone()

    def _rounded(self, batch: MaskedBatch, tokens: Tensor) -> MaskedBatch:
        """The batch, padded with rows of weight 0 unless it is the first or has a known number of rows."""
        count = len(batch.rows)
        if not self.shapes or any(len(shape.batch.rows) == count for shape in self.shapes.values()):
            return batch
        unit = max(LEAST, tokens.numel() // PARTS)
        more = -(-count // unit) * unit - count
        rows, weights = F.pad(batch.rows, (0, more)), F.pad(batch.weights, (0, more))
        tilt = None if batch.tilt is None else Tilt(batch.tilt.rates, F.pad(batch.tilt.elapsed, (0, more)))
        return replace(batch, rows=rows, target=tokens.flatten()[rows], weights=weights, tilt=tilt)

    def _record(self, shape: Shape, begins: bool) -> bool:
        """Capture a pass that begins a step, or adds to one. Returns whether it worked; if not, no capture is tried again."""

        def call() -> Tensor:
            if begins and self.grads:
                torch._foreach_zero_([grad for grad in self.grads if grad is not None])
            return self._run(shape.batch, shape.sample_ids, shape.step)

        if begins and self.grads:  # the first graph makes the gradients; others write to the same place
            for p, grad in zip(self.parameters, self.grads, strict=True):
                p.grad = grad
        try:
            shape.graphs[begins] = self.capture(call)
        except RuntimeError as error:
            self.off = True
            for p in self.parameters if begins else ():
                p.grad = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"a pass cannot be captured as a CUDA graph ({reason}); training goes on without", stacklevel=2)
            return False
        self.grads = self.grads or [p.grad for p in self.parameters]
        return True

    def _run(self, batch: MaskedBatch, sample_ids: Tensor, step: Tensor) -> Tensor:
        """Run the pass eagerly."""
        loss, _ = self.objective.forward_loss(batch, sample_ids, step)
        loss.backward()
        return loss.detach()


class Capture:
    """Captures calls into CUDA graphs that share memory, since they are replayed one after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(replay, what the call returned). Executes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = call()
        return graph.replay, out
