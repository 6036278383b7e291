"""The state of a run, and its checkpoints: written by one process or several ranks, and loaded."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import Config
from atat_fast.distributed.ranks import Ranks
from atat_fast.distributed.tensors import whole
from atat_fast.distributed.watch import Watch
from atat_fast.files import disk_errors
from atat_fast.models.dit import DiT
from atat_fast.runs import checkpoint
from atat_fast.runs.saver import Saver, Written
from atat_fast.training.loss import PREFIX
from atat_fast.training.parts import Parts

MODEL = "model"
"""Folder of the weights as one file, for runs on several ranks."""


LOCAL = ("bad", "odd")
"""Steps, not sums: the first step with a gradient, and with a loss on this rank, that was not finite; -1 for none."""


class Window:
    """Sums since the last log line. `norm` is the global batch's on every rank; other sums are this rank's share."""

    def __init__(self, ranks: Ranks, device: torch.device, step: int) -> None:
        self.ranks, self.device = ranks, device
        zero = torch.zeros((), device=device)
        none = torch.full_like(zero, -1, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {"loss": zero.clone(), "norm": zero.clone(), "bad": none, "odd": none.clone()}
        self.first = self.timed_from = step
        self.begin = time.perf_counter()

    def add(self, name: str, part: Tensor) -> None:
        """Add to a sum; the first part starts it."""
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def step(self, number: int, norm: Tensor) -> None:
        """Note the gradient's norm in step `number`, and anything not finite, without waiting for the device."""
        self.add("norm", norm)
        for name, fine in (("odd", torch.isfinite(self.sums["loss"])), ("bad", torch.isfinite(norm))):
            known = self.sums[name]
            self.sums[name] = torch.where(~fine & (known < 0), number, known)

    def totals(self) -> dict[str, Any]:
        """Each sum over all ranks, as a number or a list."""
        names = sorted(self.sums.keys() - set(LOCAL))
        flat = [self.sums[name].detach().flatten() for name in names]
        values = torch.cat([part.double() for part in flat]).cpu()
        total = self.ranks.total(values)
        parts = dict(zip(names, total.split([len(part) for part in flat]), strict=True))
        parts["norm"] = parts["norm"] / self.ranks.size
        return {name: part.view(self.sums[name].shape).tolist() for name, part in parts.items()}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the first step, and every rank's sums."""
        mine = {name: value.tolist() for name, value in self.sums.items() if name not in LOCAL}
        return {"step": self.first, "ranks": self.ranks.gather(mine)}

    def load(self, state: dict[str, Any]) -> None:
        """Load a state: this rank's own part if there are as many ranks as then, else the sum of all on rank 0."""
        self.first = state["step"]
        parts = state.get("ranks") or [{name: value for name, value in state.items() if name != "step"}]
        tensors = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]
        if len(tensors) == self.ranks.size:
            mine = tensors[self.ranks.rank]
        else:
            scale = 1.0 if self.ranks.first else 0.0
            mine = {name: scale * torch.stack([part[name] for part in tensors]).sum(0) for name in tensors[0]}
            mine["norm"] = tensors[0]["norm"]  # the same on every rank
        self.sums |= {name: value.to(self.device) for name, value in mine.items()}


@dataclass
class RunState:
    """The state of a run.

    window: sums since the last log line.   step: optimizer steps taken.   seconds: of training, until the last log line.
    best: the least val/nll.   saved_step: the step of the last checkpoint, or None.
    """

    window: Window
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    saved_step: int | None = None

    def progress(self, config: Config) -> float:
        """The share of the run that is over."""
        return self.step / config.train.max_steps


def new_state(parts: Parts) -> RunState:
    """The state before the first step."""
    return RunState(Window(parts.ranks, parts.compute.device, 0))


def load_state(parts: Parts, saved: checkpoint.Checkpoint) -> RunState:
    """Fill the parts from a checkpoint of any number of ranks. Returns its state. Raises UsageError for another model's."""
    with parts.ranks.agree():
        room = parts.optimizers.room(saved.layout(checkpoint.OPTIMIZER))
    targets = tensor_files(parts) | {checkpoint.OPTIMIZER: room}
    with parts.ranks.agree():
        saved.restore(targets, parts.ranks.control)
    parts.optimizers.load(room)
    if parts.estimator is not None:
        parts.objective.curriculum.load(saved.manifest["curriculum"])
    # A stop may fall between two log lines; the sums until then belong to the next line.
    window = Window(parts.ranks, parts.compute.device, saved.step)
    window.load(saved.manifest["window"])
    return RunState(window, saved.step, saved.manifest["seconds"], saved.manifest["best"], saved.step)


def tensor_files(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file. The estimator's files also hold its frequency table."""
    average = parts.average.values
    files: dict[str, dict[str, Tensor]] = {
        checkpoint.WEIGHTS: dict(parts.model.named_parameters()),
        checkpoint.EMA: {name: value for name, value in average.items() if not name.startswith(PREFIX)},
        checkpoint.OPTIMIZER: parts.optimizers.state(),
    }
    if parts.estimator is not None:
        kept = checkpoint.saved_tensors(parts.estimator)
        files[checkpoint.IMPORTANCE] = kept
        files[checkpoint.IMPORTANCE_EMA] = {name: average.get(PREFIX + name, value) for name, value in kept.items()}
    more = {checkpoint.SCHEDULE: parts.process.tensors(), checkpoint.OBJECTIVE: parts.objective.tensors()}
    return files | {name: tensors for name, tensors in more.items() if tensors}


class Checkpoints:
    """The checkpoints in a run's folder. All ranks call all methods at the same places.

    One process writes before it returns; several ranks write while training goes on.
    """

    def __init__(self, parts: Parts, folder: Path, watch: Watch) -> None:
        self.parts, self.folder, self.watch = parts, folder, watch
        sharded, keep = parts.parallel.sharded, parts.config.train.keep
        self.saver = Saver(folder, parts.ranks, keep, sharded=sharded) if parts.ranks.size > 1 else None
        self._written: list[Written] = []

    def save(self, state: RunState, seconds: float, evaluation: dict[str, Any] | None, *, best: bool) -> None:
        """Write a checkpoint. seconds: of training so far. Raises UsageError if the disk refuses; several ranks raise it at the
        next call.
        """
        parts, begin = self.parts, time.perf_counter()
        facts = {
            "seconds": seconds,
            "tokens": state.step * parts.tokens_per_step,
            "best": state.best,
            "evaluation": evaluation,
            "vocabulary": parts.tokenizer.model_vocab_size,
            "data": parts.data.hashes(),
            "window": state.window.state(),
            "curriculum": parts.objective.curriculum.state(),
        }
        what = (state.step, parts.config, tensor_files(parts), parts.tokenizer, facts)
        if self.saver is not None:
            with self.watch.patient("waiting for the checkpoint before this one"):
                self.saver.save(*what, best=best)
            return
        path = checkpoint.save(self.folder, *what)
        if best:
            checkpoint.point(self.folder, "best", path, parts.config.train.keep)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        elapsed = time.perf_counter() - begin
        self._written.append(Written(state.step, size, elapsed, elapsed))

    def whole_model(self) -> DiT:
        """A new model with the averaged weights on rank 0; a meta model on the others, which send their shards."""
        parts = self.parts
        own = parts.model
        with torch.device(parts.compute.device if parts.ranks.first else "meta"):
            model = DiT(own.vocab_size, own.mask_id, **vars(parts.config.model))
        for name, p in model.named_parameters():
            value = whole(parts.average.values[name])
            if parts.ranks.first:
                p.data.copy_(value)
        return model

    def export(self) -> None:
        """Save a sharded run's best averaged weights as one folder for `DiT.from_pretrained`."""
        if self.saver is None or not self.parts.ranks.first:
            return
        model, _ = checkpoint.load_model(checkpoint.find(self.folder, "best"))
        with disk_errors(self.folder):
            model.save_pretrained(self.folder / MODEL)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that a write failed; `wait` raises the error."""
        return self.saver is not None and self.saver.failed

    def finished(self) -> list[Written]:
        """Checkpoints that were completed since the last call."""
        if self.saver is not None:
            return self.saver.finished()
        done, self._written = self._written, []
        return done

    def wait(self) -> None:
        """Wait until nothing is being written. Raises UsageError if that failed."""
        if self.saver is not None:
            with self.watch.patient("writing a checkpoint"):
                self.saver.wait()
