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
from atat_fast.distributed.tensors import whole
from atat_fast.distributed.watch import Watch
from atat_fast.files import disk_errors
from atat_fast.models.dit import DiT
from atat_fast.runs import checkpoint
from atat_fast.runs.saver import Saver, Written
from atat_fast.training.loss import PREFIX
from atat_fast.training.parts import Parts
from atat_fast.training.window import Window

MODEL = "model"
"""Folder of the weights as one file, for runs on several ranks."""


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
    process = parts.process.tensors()
    return files | ({checkpoint.SCHEDULE: process} if process else {})


class Checkpoints:
    """The checkpoints in a run's folder. All ranks call all methods at the same places.

    One process writes before it returns; several ranks write while training goes on.
    """

    def __init__(self, parts: Parts, folder: Path, watch: Watch) -> None:
        self.parts, self.folder, self.watch = parts, folder, watch
        self.saver = Saver(folder, parts.ranks, parts.config.train.keep) if parts.ranks.size > 1 else None
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
            "data": parts.data_hashes(),
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
