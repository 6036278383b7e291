"""From masks to text: the reverse process, with any tokens held fixed.

At step s of S each token still hidden is revealed with chance 1 / (S - s), independently; a revealed token is drawn from the
model's distribution there, in which the mask token has probability 0. Which tokens are revealed does not depend on what they
become, so it is drawn first, and what follows the last attention runs on those rows only; the law is the ancestral sampler's. All
randomness is a function of (seed, sample, step, position): a sample does not depend on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from atat_fast.errors import UsageError, nearest
from atat_fast.ops.philox import STREAM_SAMPLE, random_words, uniform, uniform64

SAMPLERS = ("ddpm_cache", "ancestral")


class Denoiser(Protocol):
    """What a sampler needs of a model."""

    mask_id: int

    def features(self, tokens: Tensor, hidden_share: Tensor | None = None, *, rows: Tensor | None = None) -> Tensor:
        """[B, L] ids to what the head reads: [R, D] at rows, flat indices b * L + i, or [B * L, D]."""

    def logits(self, features: Tensor) -> Tensor:
        """[R, D] rows to [R, V] logits, -inf at the mask token."""


@torch.no_grad()
def sample(
    model: Denoiser,
    tokens: Tensor,
    *,
    steps: int = 128,
    sampler: str = "ddpm_cache",
    temperature: float = 1.0,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Fill every mask token of `tokens`; all other tokens stay as they are.

    tokens:      [B, L] int64 on the model's device, the model's mask_id wherever something is to be filled in.
    sampler:     ancestral runs the model at every step. ddpm_cache runs it only where a step reveals a token, which is the
                 same law for a model that is not told the time, and is refused for one that is.
    temperature: divides the logits; above 0.
    sample_ids:  [B] int64 names of the samples in the random stream; 0 .. B - 1 by default.
    on_step:     called with (step, tokens) after each step, for showing progress.

    Returns [B, L] with no mask token in it. Raises UsageError for zero steps, a temperature that is not positive or an unknown
    sampler.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"there is no sampler {sampler!r}{nearest(sampler, SAMPLERS)}; choose {' or '.join(SAMPLERS)}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    told_the_time = bool(getattr(model, "time_conditioning", False))
    if sampler == "ddpm_cache" and told_the_time:
        raise UsageError("ddpm_cache reuses a prediction across times, but this model is told the time; use sampler ancestral")

    batch, length = tokens.shape
    tokens = tokens.clone()
    ids = torch.arange(batch, device=tokens.device) if sample_ids is None else sample_ids
    index = ids[:, None] * length + torch.arange(length, device=tokens.device)
    for step in range(steps):
        words = random_words(index, seed, step, STREAM_SAMPLE)
        revealed = (tokens == model.mask_id) & (uniform(words[0]) < 1 / (steps - step))
        rows = revealed.flatten().nonzero().flatten()
        if sampler == "ancestral" or len(rows):
            share = (tokens == model.mask_id).float().mean(1) if told_the_time else None
            features = model.features(tokens, share, rows=rows)
            noise = uniform64(words[1].flatten()[rows], words[2].flatten()[rows])
            tokens.view(-1)[rows] = draw_categorical(model.logits(features), noise, temperature)
        if on_step is not None:
            on_step(step, tokens)
    return tokens


def draw_categorical(logits: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """One id a row by inverting the distribution function in fp64: [R, V] logits and [R] uniforms in (0, 1] to [R] int64.

    Sums of probabilities in fp64 keep a tail of 1e-16, where Gumbel noise from 24-bit uniforms cuts off at 6e-8. An id of
    probability 0 is never drawn.
    """
    shares = torch.softmax(logits.double() / temperature, dim=-1)
    distribution = shares.cumsum(-1)
    point = (noise * distribution[:, -1]).unsqueeze(1)
    drawn = torch.searchsorted(distribution, point).squeeze(1)  # first id whose sum reaches the point: its share is above 0
    return drawn.clamp_(max=logits.shape[1] - 1)
