"""A training batch: how many tokens of each sequence are hidden, by exact counts or MDLM's Bernoulli process, and their weights.
The process chooses which ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import bound_weights, count_chances, mask_counts, ragged_counts, weighting_at
from atat_fast.diffusion.noise import LogLinear, dealt_uniforms, stratified_uniforms
from atat_fast.diffusion.process import Hide, MaskedBatch, per_row
from atat_fast.diffusion.uniform import hide, hide_mirrored
from atat_fast.ops.philox import STREAM_MASK, random_words


def hide_for_training(
    tokens: Tensor,
    config: DiffusionConfig,
    *,
    first: int,
    total: int,
    mask_id: int,
    sample_ids: Tensor,
    seed: int,
    step: int,
    progress: float = 0.0,
    choose: Hide = hide,
    learned: Tensor | None = None,
    frozen: Tensor | None = None,
    lengths: Tensor | None = None,
) -> MaskedBatch:
    """Mask slots first .. first + B - 1 of a global batch of `total` sequences as `config` says at `progress`, the share of the
    run that is done. With config.mirror, slots 2j and 2j + 1 must hold the same sequence, and sample_ids be even for slot 2j.

    `choose` says which tokens are hidden; by default every set of k is equally likely. `learned` is as in `count_chances`.
    Weights do not depend on how the global batch is cut: `ce` divides by all tokens hidden in it (for bernoulli by their expected
    number, which needs no other slots).
    With a tilt every weight is multiplied by the process's own weight over (L + 1) / k. The rest of the weight then depends only
    on the count, which leaves the best model unchanged.

    frozen [B, L] bool: tokens that are never hidden nor counted. A sequence's count then follows the law of the number n of its
    other tokens. lengths [total] int64 on a CPU: that number for each sequence of the global batch; without it this call's own
    sequences are counted, which waits for a GPU, and must be the whole batch. Raises ValueError if they are not.
    """
    batch, length = tokens.shape
    weighting = weighting_at(config, progress)
    if frozen is not None:
        lengths = _lengths(frozen, lengths, batch, total)
    if config.masking == "bernoulli":
        return _hide_bernoulli(tokens, config, first, total, mask_id, sample_ids, seed, step, choose, weighting, frozen, lengths)
    if lengths is not None:
        place: dict[str, Any] = {"mask_id": mask_id, "sample_ids": sample_ids, "seed": seed, "step": step}
        return _hide_ragged(tokens, config, first, progress, choose, weighting, frozen, lengths, place)
    chances = count_chances(config, length, progress, learned)
    counts = mask_counts(length, first, batch, total, seed=seed, step=step, pairing=config.pairing, chances=chances)
    if config.mirror:
        masked = hide_mirrored(tokens, counts, first=first, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)
    else:
        masked = choose(tokens, counts, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step, weighting=weighting)
    if weighting == "ce":
        hidden = hidden_in_batch(config, length, total, seed=seed, step=step, progress=progress, learned=learned)
        plain = total * length / max(1, hidden)
        if masked.tilt is None:
            masked.weights.fill_(plain)
        else:
            masked.weights = masked.weights * per_row(plain * counts / (length + 1), counts, masked.rows)
    elif chances is not None and weighting == "uniform" and masked.tilt is None:
        masked.weights = per_row(bound_weights(chances)[counts], counts, masked.rows)
    elif chances is not None:
        masked.weights = masked.weights * per_row(bound_weights(chances)[counts] * counts / (length + 1), counts, masked.rows)
    return masked


def _lengths(frozen: Tensor, lengths: Tensor | None, batch: int, total: int) -> Tensor:
    if lengths is None:
        if total != batch:
            raise ValueError(f"lengths of all {total} sequences of the global batch are needed beside frozen tokens of {batch}")
        return (~frozen).sum(1).cpu()
    if tuple(lengths.shape) != (total,) or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
        got = f"{lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
        raise ValueError(f"lengths must be int64 ({total},) on the CPU, one for each sequence of the global batch; got {got}")
    return lengths


def _hide_ragged(
    tokens: Tensor,
    config: DiffusionConfig,
    first: int,
    progress: float,
    choose: Hide,
    weighting: str,
    frozen: Tensor | None,
    lengths: Tensor,
    place: dict[str, Any],
) -> MaskedBatch:
    """Hide tokens of sequences with frozen ones. lengths [total]: tokens that may be hidden in each of the global batch."""
    total, slots = len(lengths), slice(first, first + len(tokens))
    u = dealt_uniforms(total, seed=place["seed"], step=place["step"], pairing=config.pairing)
    counts, bound = ragged_counts(config, lengths, u, progress)
    own, n = counts[slots], lengths[slots]
    if frozen is not None:
        place["frozen"] = frozen
    masked: MaskedBatch = choose(tokens, own, weighting=weighting, **place)
    if weighting == "ce":
        plain = int(lengths.sum()) / max(1, int(counts.sum()))
        if masked.tilt is None:
            masked.weights.fill_(plain)
        else:
            masked.weights = masked.weights * per_row(plain * own / (n + 1), own, masked.rows)
    elif bound is not None:  # times what the process makes of (n + 1) / k
        masked.weights = masked.weights * per_row(bound[slots] * own / (n + 1), own, masked.rows)
    masked.hidden_share = (own / n.clamp(min=1)).to(tokens.device, torch.float32, non_blocking=True)
    masked.tokens = int(lengths.sum()) * len(tokens) / total
    return masked


def hidden_in_batch(
    config: DiffusionConfig,
    length: int,
    total: int,
    *,
    seed: int,
    step: int,
    progress: float = 0.0,
    learned: Tensor | None = None,
    lengths: Tensor | None = None,
) -> float:
    """Tokens hidden in a global batch of `total` sequences; for bernoulli, their expected number at its times.

    lengths: as in `hide_for_training`, if some tokens are frozen.
    """
    if lengths is not None:
        u = dealt_uniforms(total, seed=seed, step=step, pairing=config.pairing)
        if config.masking == "exact":
            return int(ragged_counts(config, lengths, u, progress)[0].sum())
        return float((lengths * LogLinear(config.sigma_min, config.sigma_max).rate(u)).sum())
    if config.masking == "exact":
        chances = count_chances(config, length, progress, learned)
        return int(mask_counts(length, 0, total, total, seed=seed, step=step, pairing=config.pairing, chances=chances).sum())
    schedule = LogLinear(config.sigma_min, config.sigma_max)
    t = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=config.pairing)
    return total * length * float(schedule.rate(t).mean())


def _hide_bernoulli(
    tokens: Tensor,
    config: DiffusionConfig,
    first: int,
    total: int,
    mask_id: int,
    sample_ids: Tensor,
    seed: int,
    step: int,
    choose: Hide,
    weighting: str,
    frozen: Tensor | None,
    lengths: Tensor | None,
) -> MaskedBatch:
    """Hide each token whose random word falls under the rate. Those are the k smallest words, so mask_tokens with that count
    hides the same set. The count has to be read back from the device, one reason why exact counts are the default.
    """
    batch, length = tokens.shape
    schedule = LogLinear(config.sigma_min, config.sigma_max)
    if lengths is None:
        t = stratified_uniforms(first, batch, total, seed=seed, step=step, pairing=config.pairing)
    else:
        t = dealt_uniforms(total, seed=seed, step=step, pairing=config.pairing)[first : first + batch]
    index = sample_ids[:, None] * length + torch.arange(length, device=tokens.device)
    word = random_words(index, seed, step, STREAM_MASK)[0]
    threshold = (schedule.rate(t) * 2.0**32).round().long().to(tokens.device)
    under = word < threshold[:, None]
    counts = (under if frozen is None else under & ~frozen).sum(1).cpu()
    place: dict[str, Any] = {"mask_id": mask_id, "sample_ids": sample_ids, "seed": seed, "step": step}
    if frozen is not None:
        place["frozen"] = frozen
    masked: MaskedBatch = choose(tokens, counts, weighting=weighting, **place)
    n: Any = length
    if lengths is not None:
        n = lengths[first : first + batch]
        masked.tokens = int(lengths.sum()) * batch / total
    if weighting == "uniform":
        masked.weights = per_row(schedule.weight(t), counts, masked.rows)
    elif weighting in ("order", "importance"):  # rate'(t) / rate(t) instead of (L + 1) / k
        masked.weights = masked.weights * per_row(schedule.weight(t) * counts / (n + 1), counts, masked.rows)
    else:
        expected = hidden_in_batch(config, length, total, seed=seed, step=step, lengths=lengths)
        everything = total * length if lengths is None else int(lengths.sum())
        masked.weights.fill_(everything / max(expected, 1e-30))
    masked.hidden_share = schedule.rate(t).to(tokens.device, torch.float32, non_blocking=True)
    return masked
