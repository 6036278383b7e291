"""How much is hidden: exact counts stratified over the global batch, and MDLM's log-linear schedule.

Everything here is computed on the host from (seed, step) alone, so that every rank knows every count without asking, and
the number of rows the vocabulary head will see is known before anything reaches a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.counts import draw_counts
from atat_fast.ops.philox import STREAM_COUNT, random_words, uniform


def stratified_uniforms(first: int, count: int, total: int, *, seed: int, step: int, pairing: str = "antithetic") -> Tensor:
    """Numbers in (0, 1) for slots first .. first + count - 1 of a batch of `total`, fp64 [count].

    antithetic: slots 2j and 2j + 1 get u and 1 - u with u in the j-th of total // 2 equal strata of (0, 1/2), so each number
    is uniform, the batch covers (0, 1) evenly, and every pair adds up to 1. A last odd slot draws on its own.
    stratified: slot s gets u in the s-th of `total` equal strata of (0, 1), which is how MDLM draws its times.
    independent: each slot draws on its own.
    """
    slot = torch.arange(first, first + count, dtype=torch.int64)
    if pairing in ("independent", "stratified"):
        own = uniform(random_words(slot, seed, step, STREAM_COUNT)[0])
        return own if pairing == "independent" else (slot + own) / total
    pairs = total // 2
    pair, second = slot // 2, slot % 2 == 1
    jitter = uniform(random_words(pair, seed, step, STREAM_COUNT)[0])
    u = torch.where(pair < pairs, (pair + jitter) / max(1, 2 * pairs), jitter)
    return torch.where(second, 1 - u, u)


def mask_counts(
    length: int, first: int, count: int, total: int, *, seed: int, step: int, pairing: str = "antithetic",
    chances: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """k for slots first .. first + count - 1 of a global batch of `total` sequences: int64 [count], uniform on 0..length, or with
    the given chances [length + 1] (atat_fast.diffusion.counts) at the same stratified points.

    With antithetic pairing slots 2j and 2j + 1 hide k and length - k tokens: an even slice of whole pairs hides exactly
    count * length / 2, whatever the draw. Under other chances a pair is the law's quantiles of u and 1 - u.
    """
    u = stratified_uniforms(first, count, total, seed=seed, step=step, pairing=pairing)
    if chances is not None:
        return draw_counts(u, chances)
    if pairing != "antithetic":
        return (u * (length + 1)).long().clamp_(max=length)
    second = torch.arange(first, first + count) % 2 == 1
    low = (torch.where(second, 1 - u, u) * (length + 1)).long().clamp_(max=length)
    return torch.where(second, length - low, low)


@dataclass(frozen=True)
class LogLinear:
    """MDLM's schedule with total noise sigma from sigma_min to sigma_max: the hide rate is linear in time.

    rate(t) = 1 - exp(-sigma(t)) runs from 1 - exp(-sigma_min) to 1 - exp(-sigma_max). The loss weighs hidden tokens by
    sigma'(t) / (exp(sigma(t)) - 1), which for rates running over the whole of 0..1 would be 1 / t.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    @property
    def rates(self) -> tuple[float, float]:
        """Hide rates at t = 0 and t = 1."""
        return -math.expm1(-self.sigma_min), -math.expm1(-self.sigma_max)

    def rate(self, t: Tensor) -> Tensor:
        """Chance of each token to be hidden at time t in [0, 1], fp64."""
        low, high = self.rates
        return low + (high - low) * t.double()

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at time t, fp64. Written so that sigma(1) keeps its digits: 1 - rate is e^-20 there."""
        t = t.double()
        return -torch.log((1 - t) * math.exp(-self.sigma_min) + t * math.exp(-self.sigma_max))

    def weight(self, t: Tensor) -> Tensor:
        """sigma'(t) / expm1(sigma(t)) = rate'(t) / rate(t), fp64."""
        low, high = self.rates
        return (high - low) / self.rate(t)
