"""What a run keeps of itself: the tensors and facts of a checkpoint, written by one process or several ranks, and taken back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atat_fast.distributed.tensors import whole
from atat_fast.files import disk_errors
from atat_fast.models.dit import DiT
from atat_fast.runs import checkpoint
from atat_fast.runs.saver import Saver, Written
from atat_fast.training.loss import PREFIX

if TYPE_CHECKING:
    from atat_fast.training.trainer import Trainer

MODEL = "model"
"""Folder of the weights as one file, in a run of several ranks."""


class State:
    """The saved state of a trainer. All ranks call all methods at the same places."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.saver: Saver | None = None
        if trainer.ranks.size > 1:
            self.saver = Saver(trainer.folder, trainer.ranks, trainer.config.train.keep)
        self._written: list[Written] = []

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The files of a checkpoint. The estimator's, where there is one, hold its frequency table beside its parameters."""
        t = self.trainer
        own = {name: value for name, value in t.average.values.items() if not name.startswith(PREFIX)}
        files: dict[str, dict[str, Tensor]] = {
            checkpoint.WEIGHTS: dict(t.model.named_parameters()),
            checkpoint.EMA: own,
            checkpoint.OPTIMIZER: t.optimizers.state(),
        }
        if t.estimator is not None:
            kept = checkpoint.saved_tensors(t.estimator)
            files[checkpoint.IMPORTANCE] = kept
            files[checkpoint.IMPORTANCE_EMA] = {name: t.average.values.get(PREFIX + name, value) for name, value in kept.items()}
        if t.identity is not None:
            files[checkpoint.SCHEDULE] = {"rates": t.identity.rates}
        return files

    def save(self, seconds: float, evaluation: dict[str, Any] | None, *, best: bool) -> None:
        """Write a checkpoint of this step: at once in one process, and while training goes on from several ranks.

        seconds: training time so far. Raises UsageError where the disk refuses, of several ranks at the next call.
        """
        t, begin = self.trainer, time.perf_counter()
        facts = {
            "seconds": seconds,
            "tokens": t.step * t.facts["tokens_per_step"],
            "best": t.best,
            "evaluation": evaluation,
            "vocabulary": t.tokenizer.model_vocab_size,
            "data": t.data_identity(),
            "window": t.window.state(),
            "curriculum": t.objective.curriculum.state(),
        }
        if self.saver is not None:
            with t.watch.patient("waiting for the checkpoint before this one"):
                self.saver.save(t.step, t.config, self.files(), t.tokenizer, facts, best=best)
            return
        path = checkpoint.save(t.folder, t.step, t.config, self.files(), t.tokenizer, facts)
        if best:
            checkpoint.point(t.folder, "best", path, t.config.train.keep)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        elapsed = time.perf_counter() - begin
        self._written.append(Written(t.step, size, elapsed, elapsed))

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint of any number of ranks. Raises UsageError for one of another model."""
        t = self.trainer
        with t.ranks.agree():
            room = t.optimizers.room(saved.layout(checkpoint.OPTIMIZER))
        targets = self.files() | {checkpoint.OPTIMIZER: room}
        with t.ranks.agree():
            saved.restore(targets, t.ranks.control)
        t.optimizers.load(room)
        if t.estimator is not None:
            t.objective.curriculum.load(saved.manifest["curriculum"])
        t.step, t.seconds, t.best = saved.step, saved.manifest["seconds"], saved.manifest["best"]
        # A stop may fall between two log lines; what was summed until then belongs to the next one.
        t.window = type(t.window)(t.ranks, t.compute.device, t.step)
        t.window.load(saved.manifest["window"])

    def whole_model(self) -> DiT:
        """A model of its own with the averaged weights, on rank 0; an empty one on the others, which lend their shards."""
        t = self.trainer
        with torch.device("meta"):
            model = DiT(t.model.vocab_size, t.model.mask_id, **vars(t.config.model))
        if t.ranks.first:
            model = DiT(t.model.vocab_size, t.model.mask_id, **vars(t.config.model)).to(t.compute.device)
        for name, p in model.named_parameters():
            value = whole(t.average.values[name])
            if t.ranks.first:
                p.data.copy_(value)
        return model

    def export(self) -> None:
        """Put a sharded run's best averaged weights into one safetensors file beside a config.json, for `DiT.from_pretrained`."""
        t = self.trainer
        if self.saver is None or not t.ranks.first:
            return
        model, _ = checkpoint.load_model(checkpoint.find(t.folder, "best"))
        with disk_errors(t.folder):
            model.save_pretrained(t.folder / MODEL)

    @property
    def failed(self) -> bool:
        """Whether a write is known here to have failed; `wait` raises it."""
        return self.saver is not None and self.saver.failed

    def finished(self) -> list[Written]:
        """Checkpoints that were completed since the last call."""
        if self.saver is not None:
            return self.saver.finished()
        done, self._written = self._written, []
        return done

    def wait(self) -> None:
        """Wait until nothing is being written. Raises UsageError where that failed."""
        if self.saver is not None:
            with self.trainer.watch.patient("writing a checkpoint"):
                self.saver.wait()
