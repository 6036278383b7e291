"""What is hidden: a masked batch from clean tokens, by exact counts or by MDLM's Bernoulli process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.noise import LogLinear, mask_counts, stratified_uniforms
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
    come first); importance: what the masks were chosen by, where they were.
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
    share = (counts / max(1, tokens.shape[1])).to(device, torch.float32)
    return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, share, tokens.numel(), hidden=hidden)


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
    choose: Hide = hide,
) -> MaskedBatch:
    """Mask slots first .. first + B - 1 of a global batch of `total` sequences as `config` says.

    Weights are those of the global batch, however it is cut: `ce` divides by the tokens hidden in all of it (for bernoulli, by
    their expected number, which is known without asking the other slots). `choose` says which tokens are hidden: uniformly, where
    it is not given.
    """
    batch, length = tokens.shape
    if config.masking == "exact":
        counts = mask_counts(length, first, batch, total, seed=seed, step=step, pairing=config.pairing)
        masked = choose(tokens, counts, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step, weighting=config.weighting)
        if config.weighting == "ce":
            masked.weights.fill_(total * length / max(1, hidden_in_batch(config, length, total, seed=seed, step=step)))
        return masked
    return _hide_bernoulli(tokens, config, first, total, mask_id, sample_ids, seed, step, choose)


def hidden_in_batch(config: DiffusionConfig, length: int, total: int, *, seed: int, step: int) -> float:
    """Tokens hidden in a whole global batch of `total` sequences; for bernoulli, their expected number at its times."""
    if config.masking == "exact":
        return int(mask_counts(length, 0, total, total, seed=seed, step=step, pairing=config.pairing).sum())
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
) -> MaskedBatch:
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
    masked = choose(tokens, counts, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step, weighting=config.weighting)
    if config.weighting == "uniform":
        weights = schedule.weight(t).to(tokens.device, torch.float32)
        masked.weights = weights.repeat_interleave(counts.to(tokens.device), output_size=len(masked.rows))
    elif config.weighting in ("order", "importance"):  # rate'(t) / rate(t) in the place of (L + 1) / k
        scale = (schedule.weight(t) * counts / (length + 1)).to(tokens.device, torch.float32)
        masked.weights = masked.weights * scale.repeat_interleave(counts.to(tokens.device), output_size=len(masked.rows))
    else:
        everywhere = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=config.pairing)
        masked.weights.fill_(1 / float(schedule.rate(everywhere).mean()))
    masked.hidden_share = schedule.rate(t).to(tokens.device, torch.float32)
    return masked
