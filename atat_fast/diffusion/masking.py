"""What is hidden: a masked batch from clean tokens, by exact counts or by MDLM's Bernoulli process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import bound_weights, count_chances, mask_counts, weighting_at
from atat_fast.diffusion.noise import LogLinear, stratified_uniforms
from atat_fast.ops.attention import Documents
from atat_fast.ops.masking import mask_tokens
from atat_fast.ops.philox import STREAM_MASK, random_words


class Scored(NamedTuple):
    """Importance of a batch's tokens: scores [B, L] fp32 in [0, 1], and the estimator's logits [B, L], where it made them."""

    scores: Tensor
    logits: Tensor | None = None


@dataclass
class MaskedBatch:
    """What the model sees and what it must say.

    noisy [B, L]; rows [R] flat indices of hidden tokens; target [R] their true ids; weights [R] fp32; hidden_share [B] fp32,
    the share of each sequence that is hidden (what a time-conditioned model is told); tokens: B * L, what the loss divides by;
    documents: the boundaries attention is to keep, where it is to keep any; hidden: how many of the rows are no padding (they
    come first); importance: what the masks were chosen by, where they were. Under a token-identity schedule, rates [V] fp32 of
    the vocabulary and elapsed [R] fp32, the time of each hidden token; nll is then the schedule's loss of a row.
    """

    noisy: Tensor
    rows: Tensor
    target: Tensor
    weights: Tensor
    hidden_share: Tensor
    tokens: int
    documents: Documents | None = None
    hidden: int = 0
    importance: Scored | None = None
    rates: Tensor | None = None
    elapsed: Tensor | None = None


class Hide(Protocol):
    """`hide`, or anything that is called like it."""

    def __call__(
        self,
        tokens: Tensor,
        counts: Tensor,
        *,
        mask_id: int,
        sample_ids: Tensor,
        seed: int | Tensor,
        step: int | Tensor,
        weighting: str = "uniform",
    ) -> MaskedBatch:
        """Hide exactly counts[b] tokens of sequence b."""


def hide(
    tokens: Tensor,
    counts: Tensor,
    *,
    mask_id: int,
    sample_ids: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    weighting: str = "uniform",
) -> MaskedBatch:
    """Hide exactly counts[b] (CPU int64) tokens of sequence b. A loss is sum(weights * nll) / batch.tokens, nats a token."""
    device, hidden = tokens.device, int(counts.sum())
    noisy, rows, weights = mask_tokens(
        tokens,
        counts.to(device, non_blocking=True),
        num_rows=hidden,
        mask_id=mask_id,
        sample_ids=sample_ids,
        seed=seed,
        step=step,
        weighting=weighting,
    )
    share = (counts / max(1, tokens.shape[1])).to(device, torch.float32, non_blocking=True)
    return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, share, tokens.numel(), hidden=hidden)


def hide_mirrored(
    tokens: Tensor, counts: Tensor, *, first: int, mask_id: int, sample_ids: Tensor, seed: int, step: int
) -> MaskedBatch:
    """Hide counts[b] tokens of sequence b, where an odd slot hides exactly what the even one before it leaves visible.

    Slots are first .. first + B - 1. An odd slot draws its partner's mask and takes the complement, so a pair may be cut apart.
    Each slot alone hides a set of its size with equal chances, so each alone, and so their mean, is the bound's estimate.
    """
    batch, length = tokens.shape
    second = torch.arange(first, first + batch) % 2 == 1
    drawn = torch.where(second, length - counts, counts)
    turned = second.to(tokens.device, non_blocking=True)
    ids = sample_ids - turned.to(sample_ids.dtype)
    partner = hide(tokens, drawn, mask_id=mask_id, sample_ids=ids, seed=seed, step=step)
    hidden = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device).index_fill_(0, partner.rows, True)
    hidden = hidden.view(batch, length) ^ turned[:, None]
    rows = torch.nonzero_static(hidden.flatten(), size=int(counts.sum()))[:, 0]
    weights = spread((length + 1) / counts.clamp(min=1).double(), counts, rows)
    share = (counts / max(1, length)).to(tokens.device, torch.float32, non_blocking=True)
    noisy, target = tokens.masked_fill(hidden, mask_id), tokens.flatten()[rows]
    return MaskedBatch(noisy, rows, target, weights, share, tokens.numel(), hidden=len(rows))


def spread(per_sequence: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """One number a sequence as one a hidden token: fp32 on the device of rows."""
    values, device = per_sequence.to(rows.device, torch.float32, non_blocking=True), rows.device
    return values.repeat_interleave(counts.to(device, non_blocking=True), output_size=len(rows))


def hide_for_training(
    tokens: Tensor, config: DiffusionConfig, *, first: int, total: int, mask_id: int, sample_ids: Tensor, seed: int, step: int,
    progress: float = 0.0, choose: Hide = hide,
) -> MaskedBatch:  # fmt: skip
    """Mask slots first .. first + B - 1 of a global batch of `total` sequences as `config` says at `progress`, the share of the
    run that is done. With config.mirror, slots 2j and 2j + 1 must hold the same sequence, and sample_ids be even for slot 2j.

    Weights are those of the global batch, however it is cut: `ce` divides by the tokens hidden in all of it (for bernoulli, by
    their expected number, which is known without asking the other slots). `choose` says which tokens are hidden: uniformly, where
    it is not given. Under a token-identity schedule every weight is multiplied by k / W, k hidden tokens over the sum of their
    rates: whatever else a weight is, it then depends on the count alone and leaves the best model what it is.
    """
    batch, length = tokens.shape
    weighting = weighting_at(config, progress)
    if config.masking == "bernoulli":
        return _hide_bernoulli(tokens, config, first, total, mask_id, sample_ids, seed, step, choose, weighting)
    chances = count_chances(config, length, progress)
    counts = mask_counts(length, first, batch, total, seed=seed, step=step, pairing=config.pairing, chances=chances)
    if config.mirror:
        masked = hide_mirrored(tokens, counts, first=first, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)
    else:
        masked = choose(tokens, counts, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step, weighting=weighting)
    if weighting == "ce":
        hidden = hidden_in_batch(config, length, total, seed=seed, step=step, progress=progress)
        plain = total * length / max(1, hidden)
        if masked.rates is None:
            masked.weights.fill_(plain)
        else:
            masked.weights = masked.weights * spread(plain * counts / (length + 1), counts, masked.rows)
    elif chances is not None and weighting == "uniform" and masked.rates is None:
        masked.weights = spread(bound_weights(chances)[counts], counts, masked.rows)
    elif chances is not None:
        masked.weights = masked.weights * spread(bound_weights(chances)[counts] * counts / (length + 1), counts, masked.rows)
    return masked


def hidden_in_batch(config: DiffusionConfig, length: int, total: int, *, seed: int, step: int, progress: float = 0.0) -> float:
    """Tokens hidden in a whole global batch of `total` sequences; for bernoulli, their expected number at its times."""
    if config.masking == "exact":
        chances = count_chances(config, length, progress)
        return int(mask_counts(length, 0, total, total, seed=seed, step=step, pairing=config.pairing, chances=chances).sum())
    schedule = LogLinear(config.sigma_min, config.sigma_max)
    t = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=config.pairing)
    return total * length * float(schedule.rate(t).mean())


def _hide_bernoulli(
    tokens: Tensor, config: DiffusionConfig, first: int, total: int, mask_id: int, sample_ids: Tensor, seed: int, step: int,
    choose: Hide, weighting: str,
) -> MaskedBatch:  # fmt: skip
    """Each token hides when its word falls under the rate. The k smallest words are those k tokens, so mask_tokens with that
    count hides the same set; the count has to be read back, which is one reason why exact counts are the default.
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
        masked.weights = spread(schedule.weight(t), counts, masked.rows)
    elif weighting in ("order", "importance"):  # rate'(t) / rate(t) in the place of (L + 1) / k
        masked.weights = masked.weights * spread(schedule.weight(t) * counts / (length + 1), counts, masked.rows)
    else:
        everywhere = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=config.pairing)
        masked.weights.fill_(1 / float(schedule.rate(everywhere).mean()))
    masked.hidden_share = schedule.rate(t).to(tokens.device, torch.float32, non_blocking=True)
    return masked
