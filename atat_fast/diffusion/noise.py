"""Noise levels: numbers in (0, 1) stratified over the global batch, and MDLM's log-linear schedule.

All are computed on the host from (seed, step), so every rank knows every slot's level without communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.ops.philox import STREAM_COUNT, random_words, uniform


def stratified_uniforms(first: int, count: int, total: int, *, seed: int, step: int, pairing: str = "antithetic") -> Tensor:
    """Numbers in (0, 1) for slots first .. first + count - 1 of a batch of `total`, fp64 [count].

    antithetic: slots 2j and 2j + 1 get u and 1 - u, with u in the j-th of total // 2 equal strata of (0, 1/2). Each number is
    uniform, the batch covers (0, 1) evenly, and every pair adds up to 1. A last odd slot draws on its own.
    stratified: slot s gets u in the s-th of `total` equal strata of (0, 1), as MDLM draws its times.
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


def dealt_uniforms(total: int, *, seed: int, step: int, pairing: str = "antithetic") -> Tensor:
    """`stratified_uniforms` of a whole batch, dealt to its slots in a random order, fp64 [total].

    For sequences of different lengths, whose order in the batch may go by length: a slot's stratum must then not be fixed.
    """
    u = stratified_uniforms(0, total, total, seed=seed, step=step, pairing=pairing)
    return u[torch.argsort(random_words(torch.arange(total), seed, step, STREAM_COUNT)[1], stable=True)]


@dataclass(frozen=True)
class LogLinear:
    """MDLM's schedule, with total noise sigma from sigma_min to sigma_max: the hide rate is linear in time.

    rate(t) = 1 - exp(-sigma(t)) runs from 1 - exp(-sigma_min) to 1 - exp(-sigma_max). A hidden token weighs
    sigma'(t) / (exp(sigma(t)) - 1) in the loss; for rates from 0 to 1 that would be 1 / t.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    @property
    def rates(self) -> tuple[float, float]:
        """Hide rates at t = 0 and t = 1."""
        return -math.expm1(-self.sigma_min), -math.expm1(-self.sigma_max)

    def rate(self, t: Tensor) -> Tensor:
        """Chance that a token is hidden at time t in [0, 1], fp64."""
        low, high = self.rates
        return low + (high - low) * t.double()

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at time t, fp64. This form keeps the digits of sigma(1), where 1 - rate is e^-20."""
        t = t.double()
        return -torch.log((1 - t) * math.exp(-self.sigma_min) + t * math.exp(-self.sigma_max))

    def weight(self, t: Tensor) -> Tensor:
        """sigma'(t) / expm1(sigma(t)) = rate'(t) / rate(t), fp64."""
        low, high = self.rates
        return (high - low) / self.rate(t)
