"""A run's records: lines of its log, importance on held-out text, and samples."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atat_fast.diffusion.counts import expected_share
from atat_fast.diffusion.prompts import frozen_of
from atat_fast.distributed.ranks import Ranks
from atat_fast.evaluation.likelihood import evaluating
from atat_fast.files import disk_errors, write_text
from atat_fast.hardware.compute import environment, peak_flops
from atat_fast.hardware.monitor import Monitor, Stopwatch, by_card, stragglers
from atat_fast.models.dit import DiT, step_cost
from atat_fast.models.importance import importance_cost
from atat_fast.runs import folder as run_folder
from atat_fast.sampling.samplers import sample
from atat_fast.training.importance_record import reliability, text_importance
from atat_fast.training.loss import baseline
from atat_fast.training.optimizers import learning_rate
from atat_fast.training.parts import Parts
from atat_fast.training.run_state import RunState


def run_facts(parts: Parts, resumed_from: int | None) -> dict[str, Any]:
    """The content of run.json: software, hardware, model and data."""
    return environment(parts.compute) | {
        "parameters": parts.parameters,
        "data": parts.data.describe(),
        "tokens_per_step": parts.tokens_per_step,
        "unigram_entropy": parts.data.valid.unigram_entropy(),
        "bytes_per_token": parts.data.valid.bytes_per_token,
        "vocabulary": parts.tokenizer.model_vocab_size,
        "sequence_length": parts.config.model.length,
        "resumed_from": resumed_from,
        "ranks": parts.ranks.size,
        "parallel": parts.layout.describe(),
        "launch": parts.ranks.launch.name,
    }


def train_row(parts: Parts, state: RunState, sums: dict[str, Any], steps: int, elapsed: float) -> dict[str, Any]:
    """A line of the log, the same on every rank except for times. sums: the window's totals over `steps` steps. elapsed: their
    seconds.
    """
    config, tokens = parts.config, parts.tokens_per_step
    done = state.step - state.window.timed_from
    row = {
        "step": state.step,
        "loss": sums["loss"] / steps,
        "lr": learning_rate(config.optim, state.step - 1, config.train.max_steps),
        "grad_norm": sums["norm"] / steps,
        "tokens": state.step * tokens,
        "tokens_per_second": done * tokens / elapsed,
        "seconds": round(state.seconds, 3),
    }
    learned, length = parts.objective.learned_counts(), config.model.length
    share = expected_share(config.diffusion, length, state.progress(config), learned)
    if learned is not None:
        row["hidden_share"] = share
    peak = peak_flops(parts.compute.device)
    if peak is not None:
        sequences = parts.plan.global_batch
        hidden = round(sequences * length * share)
        work = step_cost(config.model, parts.tokenizer.model_vocab_size, sequences, hidden).flops
        work += importance_cost(config.importance, config.model, sequences).flops
        row["mfu"] = done * work / elapsed / (peak * parts.ranks.size)
        row["memory_gib"] = torch.cuda.max_memory_allocated(parts.compute.device) / (1 << 30)
    return row | importance_row(parts, state, sums, steps)


def hardware_row(ranks: Ranks, monitor: Monitor, stopwatch: Stopwatch) -> dict[str, Any]:
    """A log line's part on all ranks' cards, and on the slowest of several ranks. All ranks call it."""
    cards: dict[str, Any] = dict(by_card(ranks.gather(monitor.row())))
    own = stopwatch.seconds()
    return cards | (stragglers(own, ranks.gather) if ranks.size > 1 else {})


def importance_row(parts: Parts, state: RunState, sums: dict[str, Any], steps: int) -> dict[str, Any]:
    """A log line's part on importance; {} without an estimator.

    tilt, focus, level and phase are the last step's; the rest are means over the hidden tokens since the last line.
    """
    if parts.estimator is None:
        return {}
    config = parts.config
    stage = parts.objective.curriculum.at((state.step - 1) / config.train.max_steps)
    mean = {name: sums[name] / steps for name in ("importance", "target", "score", "square_error")}
    quarters = zip(sums["nll_quarters"], sums["hidden_quarters"], strict=True)
    row: dict[str, Any] = {
        "phase": stage.phase,
        "level": stage.level,
        "tilt": stage.level * config.importance.tilt,
        "focus": stage.level * config.importance.focus if config.diffusion.weighting == "importance" else 0.0,
        "importance_target": mean["target"],
        "importance_score": mean["score"],
        "importance_square_error": mean["square_error"],
        "nll_quarters": [total / count if count else None for total, count in quarters],
    }
    if parts.estimator.network is not None:
        row |= {"importance_loss": mean["importance"], "importance_baseline": baseline(mean["target"])}
    return row


def importance_record(parts: Parts, state: RunState, folder: Path) -> dict[str, Any]:
    """The estimator on held-out text, with the model's present weights: returns its reliability and writes importance.json.
    Every rank computes all of it.
    """
    if parts.estimator is None:
        return {}
    config = parts.config
    progress = min(state.progress(config), 1 - config.curriculum.cooldown)  # at level 0 masks would ignore importance
    found = reliability(parts.objective, parts.data.valid, config.eval, progress=progress)
    passages = text_importance(parts.objective, parts.data.valid, parts.tokenizer)
    if parts.ranks.first:
        with disk_errors(folder):
            page = json.dumps({"step": state.step, "passages": passages}, indent=1)
            write_text(folder / run_folder.IMPORTANCE, page + "\n")
    return {"reliability": found}


def draw_samples(parts: Parts, state: RunState, model: DiT, averaged: contextlib.AbstractContextManager[None]) -> dict[str, Any]:
    """The run's samples, drawn on rank 0 by `model`, which holds the averaged weights within `averaged`."""
    settings, device = parts.config.sample, parts.compute.device
    sampler = "ancestral" if model.time_conditioning else settings.sampler
    start, lengths = _starts(parts)
    with averaged, evaluating(model), parts.compute.autocast():
        drawn = sample(
            model,
            start.to(device),
            steps=settings.steps,
            sampler=sampler,
            temperature=settings.temperature,
            seed=parts.config.train.seed,
            lengths=None if lengths is None else lengths.to(device),
        )
    ends = [drawn.shape[1]] * len(drawn) if lengths is None else lengths.tolist()
    texts = [parts.tokenizer.decode(ids[:end]) for ids, end in zip(drawn.tolist(), ends, strict=True)]
    return {"step": state.step, "sampler": sampler, "steps": settings.steps, "texts": texts}


def _starts(parts: Parts) -> tuple[Tensor, Tensor | None]:
    """What samples begin from: nothing; or held-out prompts with as many masks as their responses are long, and all lengths."""
    wanted, length, mask = parts.config.sample.num_samples, parts.config.model.length, parts.tokenizer.mask_id
    split = parts.data.valid
    which = list(range(min(wanted, split.num_sequences(length))))
    found = split.extents(which, length)
    if found is None:
        return torch.full((wanted, length), mask), None
    tokens = torch.from_numpy(np.stack([split.sequence(i, length) for i in which]).astype(np.int64))
    extents = torch.from_numpy(found)
    return torch.where(frozen_of(extents, length), tokens, mask), extents[:, 1]
