"""A training batch: how many tokens of each sequence are hidden, by exact counts or MDLM's Bernoulli process, and their weights.
The process chooses which ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import bound_weights, count_chances, mask_counts, weighting_at
from atat_fast.diffusion.noise import LogLinear, stratified_uniforms
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
) -> MaskedBatch:
    """Mask slots first .. first + B - 1 of a global batch of `total` sequences as `config` says at `progress`, the share of the
    run that is done. With config.mirror, slots 2j and 2j + 1 must hold the same sequence, and sample_ids be even for slot 2j.

    `choose` says which tokens are hidden; by default every set of k is equally likely. `learned` is as in `count_chances`.
    Weights do not depend on how the global batch is cut: `ce` divides by all tokens hidden in it (for bernoulli by their expected
    number, which needs no other slots).
    With a tilt every weight is multiplied by the process's own weight over (L + 1) / k. The rest of the weight then depends only
    on the count, which leaves the best model unchanged.
    """
    batch, length = tokens.shape
    weighting = weighting_at(config, progress)
    if config.masking == "bernoulli":
        return _hide_bernoulli(tokens, config, first, total, mask_id, sample_ids, seed, step, choose, weighting)
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


def hidden_in_batch(
    config: DiffusionConfig,
    length: int,
    total: int,
    *,
    seed: int,
    step: int,
    progress: float = 0.0,
    learned: Tensor | None = None,
) -> float:
    """Tokens hidden in a global batch of `total` sequences; for bernoulli, their expected number at its times."""
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
) -> MaskedBatch:
    """Hide each token whose random word falls under the rate. Those are the k smallest words, so mask_tokens with that count
    hides the same set. The count has to be read back from the device, one reason why exact counts are the default.
    """
    batch, length = tokens.shape
    schedule = LogLinear(config.sigma_min, config.sigma_max)
    t = stratified_uniforms(first, batch, total, seed=seed, step=step, pairing=config.pairing)
    index = sample_ids[:, None] * length + torch.arange(length, device=tokens.device)
    word = random_words(index, seed, step, STREAM_MASK)[0]
    threshold = (schedule.rate(t) * 2.0**32).round().long().to(tokens.device)
    counts = (word < threshold[:, None]).sum(1).cpu()
    masked = choose(tokens, counts, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step, weighting=weighting)
    if weighting == "uniform":
        masked.weights = per_row(schedule.weight(t), counts, masked.rows)
    elif weighting in ("order", "importance"):  # rate'(t) / rate(t) instead of (L + 1) / k
        masked.weights = masked.weights * per_row(schedule.weight(t) * counts / (length + 1), counts, masked.rows)
    else:
        everywhere = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=config.pairing)
        masked.weights.fill_(1 / float(schedule.rate(everywhere).mean()))
    masked.hidden_share = schedule.rate(t).to(tokens.device, torch.float32, non_blocking=True)
    return masked
