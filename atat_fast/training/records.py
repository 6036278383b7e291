"""What a run writes down of itself: lines of its log, what held-out text says of importance, and samples."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import torch

from atat_fast.diffusion.counts import expected_share
from atat_fast.evaluation.likelihood import evaluating
from atat_fast.files import disk_errors, write_text
from atat_fast.hardware.compute import peak_flops
from atat_fast.hardware.monitor import by_card, stragglers
from atat_fast.models.dit import step_cost
from atat_fast.models.importance import importance_cost
from atat_fast.runs import folder as run_folder
from atat_fast.sampling.samplers import sample
from atat_fast.training.importance_record import reliability, text_importance
from atat_fast.training.loss import baseline
from atat_fast.training.optimizers import learning_rate

if TYPE_CHECKING:
    from atat_fast.training.trainer import Trainer


def train_row(t: Trainer, sums: dict[str, Any], steps: int, elapsed: float) -> dict[str, Any]:
    """A line of the log, the same on every rank but for its times. sums: the window's totals over `steps` steps, which took
    `elapsed` seconds.
    """
    config, tokens = t.config, t.facts["tokens_per_step"]
    done = t.step - t.window.timed_from
    row = {
        "step": t.step,
        "loss": sums["loss"] / steps,
        "lr": learning_rate(config.optim, t.step - 1, config.train.max_steps),
        "grad_norm": sums["norm"] / steps,
        "tokens": t.step * tokens,
        "tokens_per_second": done * tokens / elapsed,
        "seconds": round(t.seconds, 3),
    }
    peak = peak_flops(t.compute.device)
    if peak is not None:
        length = config.model.length
        hidden = round(t.plan.global_batch * length * expected_share(config.diffusion, length, t.progress))
        work = step_cost(config.model, t.tokenizer.model_vocab_size, t.plan.global_batch, hidden).flops
        work += importance_cost(config.importance, config.model, t.plan.global_batch).flops
        row["mfu"] = done * work / elapsed / (peak * t.ranks.size)
        row["memory_gib"] = torch.cuda.max_memory_allocated(t.compute.device) / (1 << 30)
    return row | importance_row(t, sums, steps) | hardware_row(t)


def hardware_row(t: Trainer) -> dict[str, Any]:
    """What a line of the log says of all ranks' cards, and of the slowest rank where there are several. All ranks call it."""
    cards: dict[str, Any] = dict(by_card(t.ranks.gather(t.monitor.row())))
    own = t.stopwatch.seconds()
    return cards | (stragglers(own, t.ranks.gather) if t.ranks.size > 1 else {})


def importance_row(t: Trainer, sums: dict[str, Any], steps: int) -> dict[str, Any]:
    """What a line of the log says of importance: nothing where there is none.

    tilt, focus, level and phase are those of the last step; the rest are means over the hidden tokens since the last line.
    """
    if t.estimator is None:
        return {}
    stage = t.objective.curriculum.at((t.step - 1) / t.config.train.max_steps)
    mean = {name: sums[name] / steps for name in ("importance", "target", "score", "square_error")}
    quarters = zip(sums["nll_quarters"], sums["hidden_quarters"], strict=True)
    row: dict[str, Any] = {
        "phase": stage.phase,
        "level": stage.level,
        "tilt": stage.level * t.config.importance.tilt,
        "focus": stage.level * t.config.importance.focus if t.config.diffusion.weighting == "importance" else 0.0,
        "importance_target": mean["target"],
        "importance_score": mean["score"],
        "importance_square_error": mean["square_error"],
        "nll_quarters": [total / count if count else None for total, count in quarters],
    }
    if t.estimator.network is not None:
        row |= {"importance_loss": mean["importance"], "importance_baseline": baseline(mean["target"])}
    return row


def importance_record(t: Trainer) -> dict[str, Any]:
    """The estimator on held-out text, with the weights the model holds: its reliability for the row, and importance.json. Every
    rank computes all of it.
    """
    if t.estimator is None:
        return {}
    progress = min(t.progress, 1 - t.config.curriculum.cooldown)  # masks of level 0 would be none of importance's
    found = reliability(t.objective, t.data.valid, t.config.eval, progress=progress)
    passages = text_importance(t.objective, t.data.valid, t.tokenizer)
    if t.ranks.first:
        with disk_errors(t.folder):
            page = json.dumps({"step": t.step, "passages": passages}, indent=1)
            write_text(t.folder / run_folder.IMPORTANCE, page + "\n")
    return {"reliability": found}


def draw_samples(t: Trainer) -> None:
    """Draw the run's samples with the averaged weights: on rank 0, which puts sharded ones together in a model of its own."""
    settings, device = t.config.sample, t.compute.device
    sampler = "ancestral" if t.model.time_conditioning else settings.sampler
    averaged: contextlib.AbstractContextManager[None] = t.average.applied()
    model = t.model
    if t.parallel.sharded:
        model, averaged = t.state.whole_model(), contextlib.nullcontext()
    if not t.ranks.first:
        return
    start = torch.full((settings.num_samples, t.config.model.length), t.tokenizer.mask_id, device=device)
    with averaged, evaluating(model), t.compute.autocast():
        drawn = sample(
            model, start, steps=settings.steps, sampler=sampler, temperature=settings.temperature, seed=t.config.train.seed
        )
    texts = [t.tokenizer.decode(ids) for ids in drawn.tolist()]
    t.show.samples({"step": t.step, "sampler": sampler, "steps": settings.steps, "texts": texts})
