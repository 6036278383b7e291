"""The trainer: one loop, readable top to bottom.

Where a step's data and noise come from is a function of the step and of a slot's place in the global batch, so there is no loader
or generator state: a run stopped after any step and resumed, on as many ranks as before or others, goes on as if it had not been.
Nothing in the loop waits for the device except at a log line, an evaluation or a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import Config, to_dict
from atat_fast.data import Dataset, SequenceLoader, Tokenizer, prepare
from atat_fast.diffusion.adaptive import BadScores, bias
from atat_fast.diffusion.bound import Estimate, Spread
from atat_fast.diffusion.identity import IdentitySchedule, identity_rates
from atat_fast.distributed.ranks import FAILED, GO_ON, STOP, Launch, Ranks
from atat_fast.distributed.tensors import local
from atat_fast.distributed.watch import Watch
from atat_fast.distributed.wrap import Parallel, recompute_blocks
from atat_fast.errors import UsageError
from atat_fast.evaluation.likelihood import evaluate, report
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.hardware.monitor import Monitor, Stopwatch, card_of
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator, log_rank
from atat_fast.ops.attention import choose_attention, documents_of
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.runs.figures import duration
from atat_fast.runs.telemetry import Telemetry
from atat_fast.runs.trackers import require
from atat_fast.training import records
from atat_fast.training.graphs import Graphs, wanted
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Average, Optimizers, learning_rate
from atat_fast.training.origin import Origin, begin_from, check_tokenizer, open_origin, same_tokenizer
from atat_fast.training.plan import Batches, check, choose_layout
from atat_fast.training.run_state import State
from atat_fast.training.stops import Diverged, Interrupted, catch_signals
from atat_fast.training.window import Window

__all__ = ["Diverged", "Interrupted", "Trainer"]

OF_THE_TEXT = ("corpus", "valid", "valid_fraction", "text_column", "max_documents")
"""Settings that say which text is read."""
WORTH_TELLING = 5.0
"""Seconds from which on the rest of a run is worth a line."""


class Trainer:
    """Everything a run holds on one of its ranks. `train` runs it to the end.

    ranks: the processes that share the run, each with a Trainer; one process where it is not given. With `resume` the run goes on
    from its last checkpoint; so it does by itself where a launcher starts its ranks again.
    """

    def __init__(self, config: Config, *, resume: bool = False, show_progress: bool = True, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks(Launch())
        self._lock: Any = None
        try:
            self._start(resume, show_progress)
        except BaseException:
            self._release()
            raise

    def _start(self, resume: bool, show_progress: bool) -> None:
        config, ranks = self.config, self.ranks
        with ranks.agree():
            require(config.run)
            self.plan: Batches = check(config, ranks.size, ranks.launch.local_size)
            self.compute: Compute = resolve(config.train)
            head_dim = config.model.dim // config.model.heads  # before a folder is made:
            choose_attention(self.compute.device, self.compute.dtype, head_dim, config.model.document_mask)
        shared = {name: value for name, value in run_folder.flat(to_dict(config)).items() if name not in run_folder.OF_A_HOST}
        ranks.require_same("settings", shared)
        saved = self._open(resume)

        with ranks.agree():
            origin = None
            if saved is None and config.train.init_from is not None:
                origin = open_origin(config.train.init_from)
            self.data: Dataset = self._open_data(saved, origin, show_progress and ranks.first)
            self.tokenizer: Tokenizer = self.data.tokenizer
            self.loader = SequenceLoader(
                self.data.train, config.model.length, config.train.seed, copies=2 if config.diffusion.mirror else 1
            )
            self.data.valid.require_sequences(config.model.length)
        ranks.require_same("data", {f"{split} tokens of hash": value for split, value in self.data_identity().items()})
        if saved is not None and saved.manifest["data"] != self.data_identity():
            raise UsageError(f"the tokens of {config.data.corpus} are not those {self.folder} was started with; start a new run")

        torch.manual_seed(config.train.seed)
        self.model = DiT(self.tokenizer.model_vocab_size, self.tokenizer.mask_id, **vars(config.model)).to(self.compute.device)
        self.estimator = self._make_estimator()
        self.identity = self._make_identity() if saved is None else checkpoint.load_identity(saved)
        if self.identity is not None:
            self.identity = self.identity.to(self.compute.device)
        self.notes: list[str] = []
        if origin is not None:
            with ranks.agree():
                self.notes.append(begin_from(origin, self.model, self.estimator))
        parameters = self._parameter_counts()
        with ranks.agree():
            self.layout = ranks.share(choose_layout(config, ranks.launch, self.model.vocab_size, self.compute))
            graphed = wanted(config, self.compute, self.layout.mode)
        recompute_blocks(self.model, config.parallel.activation_checkpointing)
        self.objective = Objective(
            self.model, config, self.compute, seed=config.train.seed, total=self.plan.global_batch, estimator=self.estimator,
            identity=self.identity, by_block=ranks.size > 1 or config.parallel.activation_checkpointing > 0,
        )  # fmt: skip
        self.parallel = Parallel(self.model, self.estimator, self.layout, config.parallel, ranks.size, self.compute.device.type)
        self.graphs = Graphs(self.objective) if graphed else None
        self.optimizers = Optimizers(self.objective.named_parameters(), config.optim)
        self.average = Average(self.objective.named_parameters(), config.optim.ema)
        self.step = 0
        self.seconds = 0.0
        self.best = math.inf
        self.estimate: Estimate | None = None
        self._foretold = 1 if self.compute.compile else 0
        self.window = Window(ranks, self.compute.device, 0)
        self.state = State(self)
        if saved is not None:
            self.state.load(saved)
            self.notes += self._longer(saved)
        self.saved_step = self.step if saved is not None else None

        self.facts = environment(self.compute) | {
            "parameters": parameters,
            "data": self.data.describe(),
            "tokens_per_step": self.plan.global_batch * config.model.length,
            "unigram_entropy": self.data.valid.unigram_entropy(),
            "bytes_per_token": self.data.valid.num_bytes / max(1, self.data.valid.num_tokens),
            "vocabulary": self.tokenizer.model_vocab_size,
            "sequence_length": config.model.length,
            "resumed_from": self.step if saved is not None else None,
            "ranks": ranks.size,
            "parallel": self.layout.describe(),
            "launch": ranks.launch.name,
        }
        with ranks.agree():
            if ranks.first:
                if self._lock is None:
                    self._lock = run_folder.lock(self.folder)
                    if saved is None and not self._again and run_folder.holds_run(self.folder):
                        raise UsageError(f"{self.folder} already holds a run, begun this moment; choose another --run.name")
                run_folder.open_folder(self.folder, config, self.facts)
            self.show = Telemetry(
                self.folder,
                config.run,
                max_steps=config.train.max_steps,
                first_step=self.step,
                resumed=saved is not None or self._again,
                rank=ranks.rank,
                settings=to_dict(config),
            )
        self.stopwatch = Stopwatch(self.compute.device)
        self.watch = Watch(ranks, config.parallel.timeout)
        self.monitor = Monitor(card_of(self.compute.device))

    def _open(self, resume: bool) -> checkpoint.Checkpoint | None:
        """Settle the run's folder on rank 0, for all; the checkpoint to go on from, whole and of this run's settings."""
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
                    if resume or checkpoint.steps(folder / checkpoint.FOLDER):  # else it was stopped before its first one
                        saved = checkpoint.find(folder)
                found = (folder, self._again, None if saved is None else (saved.path, saved.manifest))
        self.folder, self._again, place = ranks.share(found)
        return None if place is None else checkpoint.Checkpoint(*place)

    def close(self) -> None:
        """End what the run shows, watches and holds."""
        self.watch.stop()
        self.monitor.close()
        self.show.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def train(self) -> dict[str, Any]:
        """Run to max_steps, evaluating and saving on the way. Returns the last evaluation's row.

        Raises Diverged, Interrupted (after saving) or UsageError (a full disk).
        """
        config, last = self.config, None
        try:
            with catch_signals() as caught:
                for sentence in self.introduction():
                    self.show.say(sentence)
                self.window.begin = time.perf_counter()
                while self.step < config.train.max_steps:
                    self._train_step()
                    self.show.advance(self.step)
                    final = self.step == config.train.max_steps
                    if final or self.step % config.train.log_every == 0:
                        self._log()
                    if final or self.step % config.eval.every == 0:
                        last = self._evaluate()
                    elif config.train.checkpoint_every and self.step % config.train.checkpoint_every == 0:
                        self.save()
                    wish = FAILED if self.state.failed else STOP if caught else GO_ON
                    decided = self.ranks.vote(wish) if not final else self.ranks.last_vote()
                    if decided == FAILED:
                        self.state.wait()
                    elif decided == STOP and not final:
                        self._leave(caught)
                self.state.wait()
                self._note_checkpoints()
            if last is None:  # resumed at its very end
                last = self._evaluate()
                self.state.wait()
            with self.watch.patient("finishing"):
                if config.sample.num_samples:
                    records.draw_samples(self)
                with self.ranks.agree():
                    self.state.export()
        finally:
            self.close()
        return last

    def _leave(self, caught: Sequence[int]) -> None:
        """Save and raise Interrupted, on all ranks at the same step."""
        if self.saved_step != self.step:
            self.save()
        self.state.wait()
        self.ranks.last_vote()
        number = max(self.ranks.gather(caught[0] if caught else 0))
        text = f"{signal.Signals(number).name}: saved {self.folder} at step {self.step:,}; add --resume to continue"
        raise Interrupted(128 + number, text)

    def time_steps(self, steps: Sequence[int]) -> list[float]:
        """Seconds of each of the given steps, data and the wait for the device included; the model moves, nothing is written."""
        seconds = []
        for self.step in steps:
            begin = time.perf_counter()
            self._train_step()
            self._check_finite()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def introduction(self) -> list[str]:
        """What is about to be trained, on what, where."""
        begin = f"resuming {self.folder} at step {self.step:,}" if self.step else f"training into {self.folder}"
        total = self.facts["parameters"]["total"]
        note = bias(self.config.importance)
        return [
            f"{begin}: {total:,} parameters, {self.facts['tokens_per_step']:,} tokens a step, {self.compute.describe()}",
            self.data.describe(),
            *([self.layout.describe()] if self.ranks.size > 1 else []),
            *(f"note: {sentence}" for sentence in [*self.notes, note] if sentence),
        ]

    def _longer(self, saved: checkpoint.Checkpoint) -> list[str]:
        """What follows where a resumed run has been given more steps."""
        before, now = saved.config.train.max_steps, self.config.train.max_steps
        if now == before:
            return []
        rates = [learning_rate(self.config.optim, step, total) for step, total in ((self.step - 1, before), (self.step, now))]
        return [
            f"train.max_steps grew from {before:,} to {now:,}; what is a share of the run, like warm-up and decay, is now "
            f"one of the longer run: the learning rate goes from {rates[0]:.2e} to {rates[1]:.2e}"
        ]

    def _open_data(self, saved: checkpoint.Checkpoint | None, origin: Origin | None, progress: bool) -> Dataset:
        """The run's tokens. A resumed run finds the ones it was started with, even where the text itself is gone or has moved."""
        data = self.config.data
        if saved is None:
            if origin is not None:
                check_tokenizer(origin, data.tokenizer)
            return prepare(data, progress=progress, tokenizer=None if origin is None else origin.tokenizer)
        tokenizer, before = saved.tokenizer(), saved.config.data
        if data.tokenizer != before.tokenizer and not same_tokenizer(tokenizer, data.tokenizer):
            raise UsageError(
                f"{self.folder} was started with data.tokenizer {before.tokenizer}, and {data.tokenizer} is another; resume it "
                "with its own or start a new run"
            )
        moved = any(getattr(data, name) != getattr(before, name) for name in OF_THE_TEXT)
        return prepare(data, progress=progress, tokenizer=tokenizer, hashes=None if moved else saved.manifest["data"])

    def _make_estimator(self) -> ImportanceEstimator | None:
        """The importance estimator, where settings ask for one; it is made after the model, whose weights stay what they were."""
        needs_counts = self.config.importance.source in ("frequency", "full")
        counts = torch.from_numpy(self.data.train.token_counts()) if needs_counts else None
        estimator = ImportanceEstimator.of(self.config, counts)
        return None if estimator is None else estimator.to(self.compute.device)

    def _make_identity(self) -> IdentitySchedule | None:
        """The token-identity schedule, where settings ask for one: rates from the counts of the training text."""
        if self.config.diffusion.schedule != "token_identity":
            return None
        counts = torch.from_numpy(self.data.train.token_counts())
        return IdentitySchedule(identity_rates(log_rank(counts), counts, self.config.diffusion.identity_strength))

    def _parameter_counts(self) -> dict[str, int]:
        counts = self.model.parameter_counts()
        if self.estimator is None:
            return counts
        total, extra = counts.pop("total"), self.estimator.parameter_count()
        return counts | {"importance": extra, "total": total + extra}

    @property
    def progress(self) -> float:
        """The share of the run that is over."""
        return self.step / self.config.train.max_steps

    def _train_step(self) -> None:
        """One optimizer step: accumulate, clip, move, average."""
        config, parallel = self.config, self.parallel
        slots = self.plan.slots(self.ranks.rank)
        for slot in slots:
            self.watch.mark(self.step, "reading a batch")
            batch = self._batch(slot)
            self.watch.mark(self.step, "in the forward and backward pass")
            if self.graphs is not None:
                tokens, ids, _ = batch
                with self.stopwatch.own():
                    loss = self.graphs(tokens, ids, first=slot, step=self.step, progress=self.progress)
                self.window.add("loss", loss)
                continue
            with parallel.accumulating(last=slot == slots[-1]):
                try:
                    with self.stopwatch.own():
                        loss, parts = parallel.inside(lambda slot=slot, batch=batch: self._loss(slot, *batch))  # type: ignore[misc]
                except BadScores as error:
                    raise self._diverged(f"{error}, at step {self.step + 1:,}", [self.ranks.rank], everywhere=False) from error
                parallel.backward(loss)
            self.window.add("loss", parts.pop("diffusion"))
            for name, part in parts.items():
                self.window.add(name, part)
        self.watch.mark(self.step, "moving the weights")
        norm = parallel.clip(self.objective.parameters(), config.optim.clip)
        self.optimizers.step(learning_rate(config.optim, self.step, config.train.max_steps))
        self.average.update(self.step)
        self.step += 1
        self.window.step(self.step, norm.detach())

    def _batch(self, slot: int) -> tuple[Tensor, Tensor, Any]:
        """Tokens, their numbers and documents of the micro-batch that begins at a slot of the global batch, on the device."""
        tokens, ids = self.loader.batch(self.step * self.plan.global_batch + slot, self.plan.micro_batch)
        documents = documents_of(tokens, self.tokenizer.eos_id) if self.config.model.document_mask else None
        tokens, ids = self._to_device(tokens), self._to_device(ids)
        return tokens, ids, None if documents is None else documents.to(self.compute.device)

    def _loss(self, slot: int, tokens: Tensor, ids: Tensor, documents: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(tokens, ids, first=slot, step=self.step, progress=self.progress, documents=documents)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.compute.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.compute.device, non_blocking=True)

    def _check_finite(self) -> None:
        """Raise Diverged with the first step since the last log line that was not finite, or where a weight no longer is."""
        norms = torch._foreach_norm([local(p) for p in self.objective.parameters()])
        fine = bool(torch.stack(norms).isfinite().all())
        told = self.ranks.gather((int(self.window.sums["odd"]), int(self.window.sums["bad"]), fine))
        for place in (0, 1):  # a rank's own loss tells whose fault it was; the gradient is everybody's sum
            bad = {rank: row[place] for rank, row in enumerate(told) if row[place] >= 0}
            if bad:
                step = min(bad.values())
                ranks = [rank for rank, first in bad.items() if first == step]
                raise self._diverged(f"the loss or its gradient is not finite at step {step:,}", ranks)
        ranks = [rank for rank, row in enumerate(told) if not row[2]]
        if ranks:
            raise self._diverged(f"the weights are not finite after step {self.step:,}", ranks)

    def _diverged(self, what: str, ranks: list[int], *, everywhere: bool = True) -> Diverged:
        if everywhere:
            with contextlib.suppress(UsageError):
                self.state.wait()
        good = "there is no checkpoint yet"
        root = self.folder / checkpoint.FOLDER
        last = checkpoint.led_to(root, "last")
        if last is not None:
            good = f"the last good checkpoint is {root / 'last'} (step {int(last.name.removeprefix('step-')):,})"
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return Diverged(f"{what} ({where}); {good}; try a lower optim.lr", everywhere=everywhere)

    def _log(self) -> None:
        """Write what happened since the last line."""
        self._check_finite()
        window = self.window
        steps, elapsed = self.step - window.first, time.perf_counter() - window.begin
        self.seconds += elapsed
        sums = window.totals()
        row = records.train_row(self, sums, steps, elapsed)
        self._foretell(elapsed / steps)
        self.show.train(row)
        self._note_checkpoints()
        if self.config.curriculum.watch == "train":
            self.objective.curriculum.observe(row["loss"])
        self.window = Window(self.ranks, self.compute.device, self.step)

    def _foretell(self, step_seconds: float) -> None:
        """Say once how long the rest takes: at the first line, or where that was spent on compiling at the second."""
        rest = (self.config.train.max_steps - self.step) * step_seconds
        if self._foretold == 0 and rest > WORTH_TELLING:
            self.show.say(f"about {duration(rest)} to go, and what evaluations take")
        self._foretold -= 1

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Keep what happens inside out of the training time."""
        begin = time.perf_counter()
        yield
        self.window.begin += time.perf_counter() - begin

    def _evaluate(self) -> dict[str, Any]:
        """The held-out bound on averaged weights; saves `last`, and `best` where it is."""
        self._check_finite()
        begin = time.perf_counter()
        with self._averaged():
            spread = Spread(self.ranks.rank, self.ranks.size, self.ranks.total, self._inside_evaluation)
            estimate = evaluate(self.model, self.data.valid, self.config.eval, self.compute.autocast(), spread)
            own = None
            if self.identity is not None:
                own = evaluate(
                    self.model, self.data.valid, self.config.eval, self.compute.autocast(), spread, identity=self.identity
                )
            record = self.parallel.inside(lambda: records.importance_record(self))
        self.estimate = estimate
        row = {"step": self.step} | report(estimate, self.data.valid, own) | record
        row["seconds"] = round(time.perf_counter() - begin, 3)
        if self.config.curriculum.watch == "valid":
            self.objective.curriculum.observe(estimate.nll)
        better = estimate.nll < self.best
        self.best = min(self.best, estimate.nll)
        self.show.evaluation(row)
        self.save(row, best=better)
        self.show.line(self.step)
        return row

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within, the model holds the averaged weights, on all ranks, and no time passes."""
        with torch.no_grad(), self._paused(), self.average.applied(), self.parallel.settled():
            yield

    def _inside_evaluation(self, function: Any) -> Tensor:
        self.watch.mark(self.step, "evaluating")
        return self.parallel.inside(function)  # type: ignore[no-any-return]

    def save(self, evaluation: dict[str, Any] | None = None, *, best: bool = False) -> None:
        """Write the `last` checkpoint, and `best`, unless what would be saved is not finite (then Diverged is raised).

        On several ranks it is begun here, and written while training goes on.
        """
        self._check_finite()
        pending = time.perf_counter() - self.window.begin
        self.watch.mark(self.step, "saving")
        with self._paused():
            self.state.save(self.seconds + pending, evaluation, best=best)
        self.saved_step = self.step

    def _note_checkpoints(self) -> None:
        for written in self.state.finished():
            self.show.checkpoint(vars(written))

    def data_identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the same tokens."""
        return {name: self.data.manifest["splits"][name]["sha256"] for name in ("train", "valid")}
