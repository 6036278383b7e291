"""The trainer: a run's folder, and the loop of steps, log lines, evaluations and checkpoints.

Data and noise are functions of the step and of a slot's place in the global batch, so no loader has state: a run that stops after
any step and resumes, on any number of ranks, goes on as if uninterrupted. The loop waits for the device only at a log line, an
evaluation or a checkpoint. One step is in `step.py`, its loss in `loss.py`.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import Config, to_dict
from atat_fast.diffusion.adaptive import BadScores, bias
from atat_fast.diffusion.bound import Estimate, Spread
from atat_fast.distributed.ranks import FAILED, GO_ON, STOP, Launch, Ranks
from atat_fast.distributed.tensors import local
from atat_fast.distributed.watch import Watch
from atat_fast.errors import UsageError
from atat_fast.evaluation.likelihood import evaluate, report
from atat_fast.hardware.monitor import Monitor, Stopwatch, card_of
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.runs.figures import duration
from atat_fast.runs.telemetry import Telemetry
from atat_fast.training import records
from atat_fast.training.optimizers import learning_rate
from atat_fast.training.parts import build_parts, check_start
from atat_fast.training.run_state import Checkpoints, Window, load_state, new_state
from atat_fast.training.step import train_step
from atat_fast.training.stops import Diverged, Interrupted, catch_signals

__all__ = ["Diverged", "Interrupted", "Trainer"]

WORTH_TELLING = 5.0
"""Seconds a run must still take for a line to announce them."""


class Trainer:
    """A run on one of its ranks. `train` takes it to the end.

    ranks: the processes that share the run, each with a Trainer; by default one process. resume: go on from the last checkpoint,
    which also happens if a launcher restarts the ranks.
    """

    def __init__(self, config: Config, *, resume: bool = False, show_progress: bool = True, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks(Launch())
        self._lock: Any = None
        self._closed = False
        try:
            self._start(resume, show_progress)
        except BaseException:
            self._release()
            raise

    def _start(self, resume: bool, show_progress: bool) -> None:
        config, ranks = self.config, self.ranks
        plan, compute = check_start(config, ranks)
        saved = self._open(resume)
        self.parts = build_parts(config, ranks, plan, compute, saved, progress=show_progress)
        if saved is None:
            self.state = new_state(self.parts)
        else:
            self.state = load_state(self.parts, saved)
            self.parts.notes += self._longer(saved)
        self._first_step = self.state.step
        self.estimate: Estimate | None = None
        self._foretold = 1 if self.parts.compute.compile else 0
        self.facts = records.run_facts(self.parts, resumed_from=None if saved is None else self.state.step)
        with ranks.agree():
            if ranks.first:
                if self._lock is None:
                    self._lock = run_folder.lock(self.folder)
                    if saved is None and not self._again and run_folder.holds_run(self.folder):
                        raise UsageError(f"{self.folder} already holds a run, started just now; choose another --run.name")
                run_folder.open_folder(self.folder, config, self.facts)
        run_folder.check_shared(self.folder, ranks)
        with ranks.agree():
            self.show = Telemetry(
                self.folder,
                config.run,
                max_steps=config.train.max_steps,
                first_step=self.state.step,
                resumed=saved is not None or self._again,
                rank=ranks.rank,
                settings=to_dict(config),
            )
        self.stopwatch = Stopwatch(self.parts.compute.device)
        self.watch = Watch(ranks, config.parallel.timeout, self.folder)
        self.monitor = Monitor(card_of(self.parts.compute.device))
        self.checkpoints = Checkpoints(self.parts, self.folder, self.watch)

    def _open(self, resume: bool) -> checkpoint.Checkpoint | None:
        """Choose the run's folder on rank 0, for all. Returns the checkpoint to resume from, checked, or None."""
        ranks, found = self.ranks, None
        with ranks.agree():
            if ranks.first:
                self._again = ranks.launch.restarts > 0 and run_folder.begun_by(
                    run_folder.last_folder(self.config), ranks.launch.name
                )
                folder = run_folder.choose_folder(self.config, resume=resume or self._again)
                saved = None
                if resume or self._again:
                    self._lock = run_folder.lock(folder)
                    checkpoint.tidy(folder)
                    run_folder.check_same_settings(self.config, folder)
                    if resume or checkpoint.steps(folder / checkpoint.FOLDER):  # else it stopped before its first checkpoint
                        saved = checkpoint.find(folder)
                found = (folder, self._again, None if saved is None else (saved.path, saved.manifest))
        self.folder, self._again, place = ranks.share(found)
        return None if place is None else checkpoint.Checkpoint(*place)

    def close(self) -> None:
        """Close the display, the watch and the folder's lock, once."""
        if self._closed:
            return
        self._closed = True
        self.watch.stop()
        self.monitor.close()
        self.show.close()
        self._release()

    @contextlib.contextmanager
    def _closed_after_an_error(self) -> Iterator[None]:
        """Close while signals are still caught: once a rank fails, the launcher ends the others, and each is to say first why."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def train(self) -> dict[str, Any]:
        """Train to max_steps, with evaluations and checkpoints. Returns the last evaluation's row.

        Raises Diverged, Interrupted (after saving) or UsageError (a full disk).
        """
        config, state, last = self.config, self.state, None
        try:
            with catch_signals() as caught, self._closed_after_an_error():
                for sentence in self.introduction():
                    self.show.say(sentence)
                state.window.begin = time.perf_counter()
                while state.step < config.train.max_steps:
                    self._train_step()
                    self.show.advance(state.step)
                    final = state.step == config.train.max_steps
                    if final or state.step % config.train.log_every == 0:
                        self._log()
                    if final or state.step % config.eval.every == 0:
                        last = self._evaluate()
                    elif config.train.checkpoint_every and state.step % config.train.checkpoint_every == 0:
                        self.save()
                    wish = FAILED if self.checkpoints.failed else STOP if caught else GO_ON
                    decided = self.ranks.vote(wish) if not final else self.ranks.last_vote()
                    if decided == FAILED:
                        self.checkpoints.wait()
                    elif decided == STOP and not final:
                        self._leave(caught)
                self.checkpoints.wait()
                self._note_checkpoints()
            if last is None:  # resumed after its last step
                last = self._evaluate()
                self.checkpoints.wait()
            with self.watch.patient("finishing"):
                if config.sample.num_samples:
                    self._draw_samples()
                with self.ranks.agree():
                    self.checkpoints.export()
        finally:
            self.close()
        return last

    def _train_step(self) -> None:
        compiles = self.parts.compute.compile and self.state.step == self._first_step
        try:
            with self.watch.patient("compiling") if compiles else contextlib.nullcontext():
                train_step(self.parts, self.state, self.watch, self.stopwatch)
        except BadScores as error:
            what = f"{error}, at step {self.state.step + 1:,}"
            raise self._diverged(what, [self.ranks.rank], everywhere=False) from error

    def _leave(self, caught: Sequence[int]) -> None:
        """Save and raise Interrupted, on all ranks at the same step."""
        if self.state.saved_step != self.state.step:
            self.save()
        self.checkpoints.wait()
        self.ranks.last_vote()
        number = max(self.ranks.gather(caught[0] if caught else 0))
        text = f"{signal.Signals(number).name}: saved {self.folder} at step {self.state.step:,}; add --resume to continue"
        raise Interrupted(128 + number, text)

    def time_steps(self, steps: Sequence[int]) -> list[float]:
        """Seconds of each given step, with data and the wait for the device. Trains the model; writes nothing."""
        seconds = []
        for self.state.step in steps:
            begin = time.perf_counter()
            self._train_step()
            self._check_finite()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def introduction(self) -> list[str]:
        """Lines on the model, data and device, for the start of the run."""
        parts, step = self.parts, self.state.step
        begin = f"resuming {self.folder} at step {step:,}" if step else f"training into {self.folder}"
        total, note = parts.parameters["total"], bias(self.config.importance)
        return [
            f"{begin}: {total:,} parameters, {parts.tokens_per_step:,} tokens a step, {parts.compute.describe()}",
            parts.data.describe(),
            *([parts.layout.describe()] if self.ranks.size > 1 else []),
            *(f"note: {sentence}" for sentence in [*parts.notes, note] if sentence),
        ]

    def _longer(self, saved: checkpoint.Checkpoint) -> list[str]:
        """Lines on what changes if a resumed run gets more steps."""
        before, now = saved.config.train.max_steps, self.config.train.max_steps
        if now == before:
            return []
        step = self.state.step
        rates = [learning_rate(self.config.optim, at, total) for at, total in ((step - 1, before), (step, now))]
        return [
            f"train.max_steps grew from {before:,} to {now:,}; what is a share of the run, like warm-up and decay, is now "
            f"one of the longer run: the learning rate goes from {rates[0]:.2e} to {rates[1]:.2e}"
        ]

    def _check_finite(self) -> None:
        """Raise Diverged if a step since the last log line, or a weight now, is not finite. Names the first such step."""
        norms = torch._foreach_norm([local(p) for p in self.parts.objective.parameters()])
        fine, sums = bool(torch.stack(norms).isfinite().all()), self.state.window.sums
        told = self.ranks.gather((int(sums["odd"]), int(sums["bad"]), fine))
        for place in (0, 1):  # the loss is a rank's own and names the culprit; the gradient is the sum of all
            bad = {rank: row[place] for rank, row in enumerate(told) if row[place] >= 0}
            if bad:
                step = min(bad.values())
                ranks = [rank for rank, first in bad.items() if first == step]
                raise self._diverged(f"the loss or its gradient is not finite at step {step:,}", ranks)
        ranks = [rank for rank, row in enumerate(told) if not row[2]]
        if ranks:
            raise self._diverged(f"the weights are not finite after step {self.state.step:,}", ranks)

    def _diverged(self, what: str, ranks: list[int], *, everywhere: bool = True) -> Diverged:
        if everywhere:
            with contextlib.suppress(UsageError):
                self.checkpoints.wait()
        good = "there is no checkpoint yet"
        root = self.folder / checkpoint.FOLDER
        last = checkpoint.led_to(root, "last")
        if last is not None:
            good = f"the last good checkpoint is {root / 'last'} (step {int(last.name.removeprefix('step-')):,})"
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return Diverged(f"{what} ({where}); {good}; try a lower optim.lr", everywhere=everywhere)

    def _log(self) -> None:
        """Write a log line on the steps since the last one."""
        self._check_finite()
        state, window = self.state, self.state.window
        steps, elapsed = state.step - window.first, time.perf_counter() - window.begin
        state.seconds += elapsed
        row = records.train_row(self.parts, state, window.totals(), steps, elapsed)
        self.show.train(row | records.hardware_row(self.ranks, self.monitor, self.stopwatch))
        self._foretell(elapsed / steps)
        self._note_checkpoints()
        if self.config.curriculum.watch == "train":
            self.parts.objective.curriculum.observe(row["loss"])
        state.window = Window(self.ranks, self.parts.compute.device, state.step)

    def _foretell(self, step_seconds: float) -> None:
        """Say once how long the rest takes: at the first line, or at the second if the first steps compiled."""
        rest = (self.config.train.max_steps - self.state.step) * step_seconds
        if self._foretold == 0 and rest > WORTH_TELLING:
            self.show.say(f"about {duration(rest)} to go, and what evaluations take")
        self._foretold -= 1

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Inside, no training time passes."""
        begin = time.perf_counter()
        yield
        self.state.window.begin += time.perf_counter() - begin

    def _evaluate(self) -> dict[str, Any]:
        """Measure the held-out bound of the averaged weights. Saves `last`, and `best` if it is the best."""
        self._check_finite()
        parts, state, begin = self.parts, self.state, time.perf_counter()
        with self._averaged():
            spread = Spread(self.ranks.rank, self.ranks.size, self.ranks.total, self._inside_evaluation)
            what = (parts.model, parts.data.valid, self.config.eval, parts.compute.autocast(), spread)
            self.estimate = estimate = evaluate(*what)
            own = evaluate(*what, process=parts.process) if parts.process.own_bound else None
            record = parts.parallel.inside(lambda: records.importance_record(parts, state, self.folder))
        row = {"step": state.step} | report(estimate, parts.data.valid, own) | record
        row["seconds"] = round(time.perf_counter() - begin, 3)
        if self.config.curriculum.watch == "valid":
            parts.objective.curriculum.observe(estimate.nll)
        better = estimate.nll < state.best
        state.best = min(state.best, estimate.nll)
        self.show.evaluation(row)
        self.save(row, best=better)
        self.show.line(state.step)
        return row

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights, on all ranks, and no training time passes."""
        with torch.no_grad(), self._paused(), self.parts.average.applied(), self.parts.parallel.settled():
            yield

    def _inside_evaluation(self, function: Callable[[], Tensor]) -> Tensor:
        self.watch.mark(self.state.step, "evaluating")
        return self.parts.parallel.inside(function)

    def _draw_samples(self) -> None:
        """Draw samples of the averaged weights on rank 0, which gathers sharded weights into a separate model."""
        model = self.parts.model
        averaged: contextlib.AbstractContextManager[None] = self.parts.average.applied()
        if self.parts.parallel.sharded:
            model, averaged = self.checkpoints.whole_model(), contextlib.nullcontext()
        if self.ranks.first:
            self.show.samples(records.draw_samples(self.parts, self.state, model, averaged))

    def save(self, evaluation: dict[str, Any] | None = None, *, best: bool = False) -> None:
        """Write the `last` checkpoint, and `best`. Raises Diverged if it would not be finite.

        Several ranks start writing here and finish while training goes on.
        """
        self._check_finite()
        pending = time.perf_counter() - self.state.window.begin
        self.watch.mark(self.state.step, "saving")
        with self._paused():
            self.checkpoints.save(self.state, self.state.seconds + pending, evaluation, best=best)
        self.state.saved_step = self.state.step

    def _note_checkpoints(self) -> None:
        for written in self.checkpoints.finished():
            self.show.checkpoint(vars(written))
