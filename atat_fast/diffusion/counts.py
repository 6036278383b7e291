"""How many tokens are hidden: exact counts, the laws training draws them from, and the weights that keep the bound.

Counts are drawn on the host from (seed, step), so the number of rows of the vocabulary head is known before anything reaches a
device. Evaluation always draws uniform counts.

If k is uniform on 0..L, a hidden token weighs (L + 1) / k in the bound. Under another law q the weight is multiplied by the ratio
of the laws, (1 / (L + 1)) / q(k), which gives 1 / (k q(k)): exact for every q that is above 0 on 1..L, and never clipped.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.count_law import UNIFORM
from atat_fast.diffusion.noise import stratified_uniforms
from atat_fast.errors import UsageError

RAREST = 2.0**-32
"""The resolution of one random word: a rarer count is as good as never drawn."""


@functools.lru_cache(maxsize=4096)  # of prompt and response rows, every length has its own
def bell(length: int, centre: float, width: float) -> Tensor:
    """A Gaussian in k / L cut to the counts 1..L: chances [L + 1] fp64, 0 at k = 0, which has nothing to learn from."""
    k = torch.arange(length + 1, dtype=torch.float64)
    score = -0.5 * ((k / max(1, length) - centre) / width) ** 2
    score[0] = -torch.inf if length else 0.0
    return torch.softmax(score, 0)


def count_chances(config: DiffusionConfig, length: int, progress: float, learned: Tensor | None = None) -> Tensor | None:
    """Chances [L + 1] fp64 of the counts at `progress`, the share of the run that is done; None if they are uniform on 0..L.

    learned: the law that counts learned has come to; without it, it is where it starts, the bell mixed with uniform counts.
    From `counts_anneal_from` on, the law is the mixture (1 - a) law + a uniform; a rises from 0 there to 1 at the end. A mixture
    is a law too, so weights stay exact.
    """
    if config.counts == "uniform":
        return None
    start = config.counts_anneal_from
    share = 0.0 if progress <= start else (progress - start) / (1 - start)
    if share >= 1:
        return None
    law = bell(length, config.counts_centre, config.counts_width) if learned is None else learned
    if config.counts == "learned" and learned is None:
        flat = (law > 0).double()
        law = (1 - UNIFORM) * law + UNIFORM * flat / flat.sum()
    return (1 - share) * law + share / (length + 1)


def draw_counts(u: Tensor, chances: Tensor) -> Tensor:
    """The law's quantile of each u in (0, 1): int64, from the cumulated fp64 chances. A count of chance 0 is never drawn."""
    cumulated = chances.cumsum(0)
    return torch.searchsorted(cumulated, u * cumulated[-1], right=True).clamp_(max=len(chances) - 1)


def mask_counts(
    length: int,
    first: int,
    count: int,
    total: int,
    *,
    seed: int,
    step: int,
    pairing: str = "antithetic",
    chances: Tensor | None = None,
) -> Tensor:
    """k for slots first .. first + count - 1 of a global batch of `total` sequences, int64 [count].

    k is uniform on 0..length or, with chances [length + 1], follows them at the same stratified points. With antithetic pairing
    slots 2j and 2j + 1 hide k and length - k tokens, so a slice of whole pairs always hides exactly count * length / 2. With
    chances a pair is the law's quantiles of u and 1 - u.
    """
    u = stratified_uniforms(first, count, total, seed=seed, step=step, pairing=pairing)
    if chances is not None:
        return draw_counts(u, chances)
    if pairing != "antithetic":
        return (u * (length + 1)).long().clamp_(max=length)
    second = torch.arange(first, first + count) % 2 == 1
    low = (torch.where(second, 1 - u, u) * (length + 1)).long().clamp_(max=length)
    return torch.where(second, length - low, low)


def ragged_counts(config: DiffusionConfig, lengths: Tensor, u: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
    """k of sequences of which lengths[b] tokens may be hidden, at the points u: int64 [B], each by the law of its own length.

    Also the bound's weight of a hidden token of each, fp64 [B]; None if it is (lengths + 1) / k, as of uniform counts.
    lengths [B] int64 and u [B] fp64 on a CPU.
    """
    counts, weights = torch.zeros_like(lengths), torch.zeros_like(u)
    plain = True
    for length in lengths.unique().tolist():
        of_length = lengths == length
        chances = count_chances(config, length, progress)
        if chances is None:
            counts[of_length] = (u[of_length] * (length + 1)).long().clamp_(max=length)
        else:
            plain = False
            counts[of_length] = draw_counts(u[of_length], chances)
            weights[of_length] = bound_weights(chances)[counts[of_length]]
    return counts, None if plain else weights


def bound_weights(chances: Tensor) -> Tensor:
    """The weight of a hidden token for each count, [L + 1] fp64: 1 / (k q(k)), and 0 if k or q(k) is 0."""
    k = torch.arange(len(chances), dtype=torch.float64)
    return torch.where(k * chances > 0, 1 / (k * chances), 0.0)


def expected_share(config: DiffusionConfig, length: int, progress: float = 0.0, learned: Tensor | None = None) -> float:
    """Average share of tokens that a step hides, and so of rows that the vocabulary head sees."""
    chances = count_chances(config, length, progress, learned)
    if chances is None:
        return 0.5
    return float((chances * torch.arange(length + 1, dtype=torch.float64)).sum()) / max(1, length)


def weighting_at(config: DiffusionConfig, progress: float) -> str:
    """The weighting at `progress`: `ce` for the first `ce_until` of the run, then `weighting`."""
    return "ce" if progress < config.ce_until else config.weighting


def check_counts(config: DiffusionConfig, length: int, global_batch: int) -> None:
    """Raise UsageError for counts, pairs and schedules that do not go together."""
    if not 0 <= config.counts_centre <= 1 or not config.counts_width > 0:
        raise UsageError(
            "diffusion.counts_centre must be a share from 0 to 1 and diffusion.counts_width above 0, "
            f"got {config.counts_centre} and {config.counts_width}"
        )
    for name in ("counts_anneal_from", "ce_until"):
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(f"diffusion.{name} must be a share of the run from 0 to 1, got {getattr(config, name)}")
    if config.ce_until and config.weighting == "ce":
        raise UsageError(
            f"diffusion.ce_until {config.ce_until} changes nothing if diffusion.weighting is ce; "
            "set diffusion.weighting to what follows ce, or leave ce_until at 0"
        )
    if config.masking == "bernoulli" and (config.counts != "uniform" or config.mirror):
        raise UsageError(
            f"diffusion.counts {config.counts} and diffusion.mirror {str(config.mirror).lower()} need exact counts; set "
            "diffusion.masking exact, or diffusion.counts uniform and diffusion.mirror false"
        )
    if config.counts == "bell" and config.weighting != "ce":
        chances = bell(length, config.counts_centre, config.counts_width)
        rarest = float(chances[1:].min())
        if rarest < RAREST:
            k = 1 + int(chances[1:].argmin())
            raise UsageError(
                f"diffusion.counts bell with width {config.counts_width} hides {k} of {length} tokens with chance {rarest:.1g}, "
                f"too rarely for {config.weighting} weights to make up for; use a greater counts_width, or ce weights"
            )
    if config.mirror:
        if config.counts != "uniform" or config.pairing != "antithetic":
            raise UsageError(
                "diffusion.mirror hides k and L-k tokens of the same sequence, so it needs diffusion.counts uniform and "
                f"diffusion.pairing antithetic, got {config.counts} and {config.pairing}"
            )
        if global_batch % 2:
            raise UsageError(
                f"diffusion.mirror pairs the sequences of a step, and train.global_batch {global_batch} is odd; "
                f"use {global_batch - 1 or 2} or {global_batch + 1}"
            )
