"""The trainer: one loop, readable top to bottom.

Where a step's data and noise come from is a function of the step, so there is no loader or generator state: a run stopped
after any step and resumed goes on as if it had not been. Nothing in the loop waits for the device except at a log line, an
evaluation or a checkpoint.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import Config
from atat_fast.data import Dataset, SequenceLoader, Tokenizer, prepare
from atat_fast.diffusion.adaptive import BadScores, bias
from atat_fast.diffusion.counts import expected_share
from atat_fast.diffusion.objective import Estimate
from atat_fast.diffusion.samplers import sample
from atat_fast.errors import UsageError
from atat_fast.evaluation.importance import reliability, text_importance
from atat_fast.evaluation.likelihood import evaluate, evaluating, report
from atat_fast.models.dit import DiT, step_cost
from atat_fast.models.importance import ImportanceEstimator, importance_cost
from atat_fast.ops.attention import choose_attention, documents_of
from atat_fast.training import checkpoint, run_folder
from atat_fast.training.device import Compute, environment, peak_flops, resolve
from atat_fast.training.objective import PREFIX, Objective, baseline
from atat_fast.training.optimizers import Average, Optimizers, learning_rate
from atat_fast.training.plan import Batches, check
from atat_fast.training.telemetry import Telemetry


class Diverged(RuntimeError):
    """The loss or a gradient is no longer finite. Its text names the step and the last good checkpoint."""


class Interrupted(Exception):
    """SIGINT or SIGTERM: the run was saved. `code` is the exit status, 128 + the signal's number, which a launcher restarts."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Trainer:
    """Everything a run holds. `train` runs it to the end."""

    def __init__(self, config: Config, *, resume: bool = False, show_progress: bool = True) -> None:
        self.config = config
        self.plan: Batches = check(config)
        self.compute: Compute = resolve(config.train)
        head_dim = config.model.dim // config.model.heads
        choose_attention(self.compute.device, self.compute.dtype, head_dim, config.model.document_mask)  # before a folder is made
        self.folder: Path = run_folder.choose_folder(config, resume=resume)
        saved = checkpoint.find(self.folder) if resume else None
        if saved is not None:
            run_folder.check_same_settings(config, self.folder)

        tokenizer = saved.tokenizer() if saved is not None else None
        self.data: Dataset = prepare(config.data, progress=show_progress, tokenizer=tokenizer)
        self.tokenizer: Tokenizer = self.data.tokenizer
        self.loader = SequenceLoader(
            self.data.train, config.model.length, config.train.seed, copies=2 if config.diffusion.mirror else 1
        )
        self.data.valid.require_sequences(config.model.length)
        if saved is not None and saved.manifest["data"] != self._data_identity():
            raise UsageError(f"the tokens of {config.data.corpus} are not those {self.folder} was started with; start a new run")

        torch.manual_seed(config.train.seed)
        self.model = DiT(self.tokenizer.model_vocab_size, self.tokenizer.mask_id, **vars(config.model)).to(self.compute.device)
        self.estimator = self._make_estimator()
        self.objective = Objective(
            self.model, config, self.compute, seed=config.train.seed, total=self.plan.global_batch, estimator=self.estimator
        )
        self.optimizers = Optimizers(self.objective.named_parameters(), config.optim)
        self.step = 0
        self.seconds = 0.0
        self.best = math.inf
        self.estimate: Estimate | None = None
        if saved is not None:
            checkpoint.load_weights(self.model, saved, checkpoint.WEIGHTS)
            if self.estimator is not None:
                checkpoint.load_weights(self.estimator, saved, checkpoint.IMPORTANCE)
        self.average = Average(self.objective.named_parameters(), config.optim.ema)
        if saved is not None:
            self.average.load(saved.tensors(checkpoint.EMA))
            if self.estimator is not None:
                averaged, trained = saved.tensors(checkpoint.IMPORTANCE_EMA), dict(self.estimator.named_parameters())
                self.average.load({PREFIX + name: value for name, value in averaged.items() if name in trained})
                self.objective.curriculum.load(saved.manifest["curriculum"])
            self.optimizers.load(saved.tensors(checkpoint.OPTIMIZER))
            self.step, self.seconds, self.best = saved.step, saved.manifest["seconds"], saved.manifest["best"]
        self.saved_step = self.step if saved is not None else None
        self._start_window()
        if saved is not None:  # a stop may fall between two log lines; what was summed until then belongs to the next one
            window = saved.manifest["window"]
            self._window_step = window["step"]
            for name in window.keys() - {"step"}:
                self._window[name] = torch.tensor(window[name], device=self.compute.device)

        self.facts = environment(self.compute) | {
            "parameters": self._parameter_counts(),
            "data": self.data.describe(),
            "tokens_per_step": self.plan.global_batch * config.model.length,
            "unigram_entropy": self.data.valid.unigram_entropy(),
            "bytes_per_token": self.data.valid.num_bytes / max(1, self.data.valid.num_tokens),
            "vocabulary": self.tokenizer.model_vocab_size,
            "sequence_length": config.model.length,
            "resumed_from": self.step if saved is not None else None,
        }
        run_folder.open_folder(self.folder, config, self.facts)
        self.show = Telemetry(
            self.folder,
            max_steps=config.train.max_steps,
            first_step=self.step,
            resumed=resume,
            tensorboard=config.run.tensorboard,
        )

    def train(self) -> dict[str, Any]:
        """Run to max_steps, evaluating and saving on the way. Returns the last evaluation's row.

        Raises Diverged, Interrupted (after saving) or UsageError (a full disk).
        """
        config, last = self.config, None
        try:
            with catch_signals() as caught:
                for sentence in self.introduction():
                    self.show.say(sentence)
                self._window_start = time.perf_counter()
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
                    if caught and not final:
                        self.save()
                        number = caught[0]
                        text = (
                            f"{signal.Signals(number).name}: saved {self.folder} at step {self.step:,}; add --resume to continue"
                        )
                        raise Interrupted(128 + number, text)
            if last is None:  # resumed at its very end
                last = self._evaluate()
            if config.sample.num_samples:
                self._sample()
        finally:
            self.show.close()
        return last

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
            *([f"note: {note}"] if note else []),
        ]

    def _make_estimator(self) -> ImportanceEstimator | None:
        """The importance estimator, where settings ask for one; it is made after the model, whose weights stay what they were."""
        needs_counts = self.config.importance.source in ("frequency", "full")
        counts = torch.from_numpy(self.data.train.token_counts()) if needs_counts else None
        estimator = ImportanceEstimator.of(self.config, counts)
        return None if estimator is None else estimator.to(self.compute.device)

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
        config, plan, device = self.config, self.plan, self.compute.device
        for micro in range(plan.accumulation):
            slot = micro * plan.micro_batch
            tokens, ids = self.loader.batch(self.step * plan.global_batch + slot, plan.micro_batch)
            documents = documents_of(tokens, self.tokenizer.eos_id) if config.model.document_mask else None
            tokens, ids = self._to_device(tokens), self._to_device(ids)
            documents = None if documents is None else documents.to(device)
            try:
                loss, parts = self.objective.loss(
                    tokens, ids, first=slot, step=self.step, progress=self.progress, documents=documents
                )
            except BadScores as error:
                raise self._diverged(f"{error}, at step {self.step + 1:,}") from error
            loss.backward()
            self._window["loss"] += parts.pop("diffusion")
            for name, part in parts.items():
                self._window[name] = self._window[name] + part if name in self._window else part
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), config.optim.clip or math.inf)
        self.optimizers.step(learning_rate(config.optim, self.step, config.train.max_steps))
        self.average.update(self.step)
        self.step += 1
        self._window["norm"] += norm.detach()
        bad = ~(torch.isfinite(norm) & torch.isfinite(self._window["loss"]))
        self._window["bad"] = torch.where(bad & (self._window["bad"] < 0), self.step, self._window["bad"])

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.compute.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.compute.device, non_blocking=True)

    def _start_window(self) -> None:
        """Begin summing for the next log line; the sums stay on the device until it is written."""
        zero = torch.zeros((), device=self.compute.device)
        self._window = {"loss": zero.clone(), "norm": zero.clone(), "bad": torch.full_like(zero, -1, dtype=torch.int64)}
        self._window_step = self._timed_from = self.step
        self._window_start = time.perf_counter()

    def _check_finite(self) -> None:
        """Raise Diverged with the first step since the last log line that was not finite, or where a weight no longer is."""
        step = int(self._window["bad"])
        if step >= 0:
            raise self._diverged(f"the loss or its gradient is not finite at step {step:,}")
        norms = torch._foreach_norm([p.detach() for p in self.objective.parameters()])
        if not bool(torch.stack(norms).isfinite().all()):
            raise self._diverged(f"the weights are not finite after step {self.step:,}")

    def _diverged(self, what: str) -> Diverged:
        good = "there is no checkpoint yet"
        if self.saved_step is not None:
            good = f"the last good checkpoint is {self.folder / checkpoint.FOLDER / 'last'} (step {self.saved_step:,})"
        return Diverged(f"{what} (rank 0); {good}; try a lower optim.lr")

    def _log(self) -> None:
        """Write what happened since the last line."""
        self._check_finite()
        steps, elapsed = self.step - self._window_step, time.perf_counter() - self._window_start
        self.seconds += elapsed
        tokens = self.facts["tokens_per_step"]
        row = {
            "step": self.step,
            "loss": float(self._window["loss"]) / steps,
            "lr": learning_rate(self.config.optim, self.step - 1, self.config.train.max_steps),
            "grad_norm": float(self._window["norm"]) / steps,
            "tokens": self.step * tokens,
            "tokens_per_second": (self.step - self._timed_from) * tokens / elapsed,
            "seconds": round(self.seconds, 3),
        }
        peak = peak_flops(self.compute.device)
        if peak is not None:
            length, progress = self.config.model.length, self.step / self.config.train.max_steps
            hidden = round(self.plan.global_batch * length * expected_share(self.config.diffusion, length, progress))
            work = step_cost(self.config.model, self.tokenizer.model_vocab_size, self.plan.global_batch, hidden).flops
            work += importance_cost(self.config.importance, self.config.model, self.plan.global_batch).flops
            row["mfu"] = (self.step - self._timed_from) * work / elapsed / peak
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.compute.device) / (1 << 30)
        row |= self._importance_row(steps)
        self.show.train(row)
        if self.config.curriculum.watch == "train":
            self.objective.curriculum.observe(row["loss"])
        self._start_window()

    def _importance_row(self, steps: int) -> dict[str, Any]:
        """What a line of the log says of importance: nothing where there is none.

        tilt, focus, level and phase are those of the last step; the rest are means over the hidden tokens since the last line.
        """
        if self.estimator is None:
            return {}
        stage = self.objective.curriculum.at((self.step - 1) / self.config.train.max_steps)
        mean = {name: float(self._window[name]) / steps for name in ("importance", "target", "score", "square_error")}
        sums, counts = (self._window[name].tolist() for name in ("nll_quarters", "hidden_quarters"))
        row: dict[str, Any] = {
            "phase": stage.phase,
            "level": stage.level,
            "tilt": stage.level * self.config.importance.tilt,
            "focus": stage.level * self.config.importance.focus if self.config.diffusion.weighting == "importance" else 0.0,
            "importance_target": mean["target"],
            "importance_score": mean["score"],
            "importance_square_error": mean["square_error"],
            "nll_quarters": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
        }
        if self.estimator.network is not None:
            row |= {"importance_loss": mean["importance"], "importance_baseline": baseline(mean["target"])}
        return row

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Keep what happens inside out of the training time."""
        begin = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - begin

    def _evaluate(self) -> dict[str, Any]:
        """The held-out bound on averaged weights; saves `last`, and `best` where it is."""
        self._check_finite()
        begin = time.perf_counter()
        with self._paused(), self.average.applied():
            self.estimate = estimate = evaluate(self.model, self.data.valid, self.config.eval, self.compute.autocast())
            record = self._evaluate_importance()
        row = {"step": self.step} | report(estimate, self.data.valid) | record
        row["seconds"] = round(time.perf_counter() - begin, 3)
        if self.config.curriculum.watch == "valid":
            self.objective.curriculum.observe(estimate.nll)
        better = estimate.nll < self.best
        self.best = min(self.best, estimate.nll)
        self.show.evaluation(row)
        path = self.save(row)
        if better:
            checkpoint.point(self.folder, "best", path)
        return row

    def _evaluate_importance(self) -> dict[str, Any]:
        """The estimator on held-out text, with averaged weights: its reliability for the row, and importance.json."""
        if self.estimator is None:
            return {}
        progress = min(self.progress, 1 - self.config.curriculum.cooldown)  # masks of level 0 would be none of importance's
        found = reliability(self.objective, self.data.valid, self.config.eval, progress=progress)
        passages = text_importance(self.objective, self.data.valid, self.tokenizer)
        with checkpoint.disk_errors(self.folder):
            page = json.dumps({"step": self.step, "passages": passages}, indent=1)
            run_folder.write_aside(self.folder / run_folder.IMPORTANCE, page + "\n")
        return {"reliability": found}

    def save(self, evaluation: dict[str, Any] | None = None) -> Path:
        """Write the `last` checkpoint, unless what would be saved is not finite (then Diverged is raised)."""
        self._check_finite()
        pending = time.perf_counter() - self._window_start
        with self._paused():
            path = checkpoint.save(
                self.folder,
                self.step,
                self.config,
                self._tensors(),
                self.tokenizer,
                {
                    "seconds": self.seconds + pending,
                    "tokens": self.step * self.facts["tokens_per_step"],
                    "best": self.best,
                    "evaluation": evaluation,
                    "vocabulary": self.tokenizer.model_vocab_size,
                    "data": self._data_identity(),
                    "window": {"step": self._window_step}
                    | {name: value.tolist() for name, value in self._window.items() if name != "bad"},
                    "curriculum": self.objective.curriculum.state(),
                },
            )
        self.saved_step = self.step
        return path

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The files of a checkpoint. The estimator's, where there is one, hold its frequency table beside its parameters."""
        own = {name: value for name, value in self.average.values.items() if not name.startswith(PREFIX)}
        files: dict[str, dict[str, Tensor]] = {
            checkpoint.WEIGHTS: dict(self.model.named_parameters()),
            checkpoint.EMA: own,
            checkpoint.OPTIMIZER: self.optimizers.state(),
        }
        if self.estimator is not None:
            kept = checkpoint.saved_tensors(self.estimator)
            files[checkpoint.IMPORTANCE] = kept
            files[checkpoint.IMPORTANCE_EMA] = {
                name: self.average.values.get(PREFIX + name, value) for name, value in kept.items()
            }
        return files

    def _data_identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to see the same tokens."""
        return {name: self.data.manifest["splits"][name]["sha256"] for name in ("train", "valid")}

    def _sample(self) -> None:
        """Draw the run's samples with the averaged weights."""
        settings, device = self.config.sample, self.compute.device
        start = torch.full((settings.num_samples, self.config.model.length), self.tokenizer.mask_id, device=device)
        sampler = "ancestral" if self.model.time_conditioning else settings.sampler
        with self.average.applied(), evaluating(self.model), self.compute.autocast():
            drawn = sample(
                self.model,
                start,
                steps=settings.steps,
                sampler=sampler,
                temperature=settings.temperature,
                seed=self.config.train.seed,
            )
        texts = [self.tokenizer.decode(ids) for ids in drawn.tolist()]
        self.show.samples({"step": self.step, "sampler": sampler, "steps": settings.steps, "texts": texts})


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM are noted in the list instead of ending the process; a second one ends it."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
