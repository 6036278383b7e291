"""Is a way of hiding and weighing tokens a likelihood bound? Answered by enumeration, not by argument.

Over an alphabet small enough to list every sequence x and every mask M, the best any model can do from a masked sequence is
the exact posterior p(x_i | x visible, M), and the objective's value there can be computed to rounding. A bound cannot be
less than the entropy of the joint; the exact-count bound equals it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.noise import LogLinear

HideLaw = Callable[[Tensor, int], dict[tuple[int, ...], Tensor]]
"""(sequences [S, L], k) -> for each set of k hidden positions its chance given each sequence, [S] fp64."""


@dataclass(frozen=True)
class Joint:
    """A distribution over all sequences of `length` tokens from `vocabulary`: sequences [S, L] int64, chance [S] fp64."""

    sequences: Tensor
    chance: Tensor

    @staticmethod
    def random(vocabulary: int, length: int, *, seed: int, sharpness: float = 2.0) -> Joint:
        """A joint with no structure: the softmax of Gaussian noise."""
        sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
        noise = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return Joint(sequences, torch.softmax(sharpness * noise, 0))

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.sequences.shape[1]

    def entropy(self) -> float:
        """In nats a sequence."""
        return float(-(self.chance * self.chance.log()).sum())


def subsets(length: int, k: int) -> Iterator[tuple[int, ...]]:
    """All sets of k positions."""
    return itertools.combinations(range(length), k)


def uniform_law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
    """Every set of k positions equally likely, whatever the tokens."""
    length = sequences.shape[1]
    share = torch.full((len(sequences),), 1 / math.comb(length, k), dtype=torch.float64)
    return dict.fromkeys(subsets(length, k), share)


def plackett_luce_law(score: Callable[[Tensor], Tensor], tilt: float) -> HideLaw:
    """Tokens are revealed one by one with odds exp(-tilt * score(x)) until k are left; score gives [S, L] from clean tokens.

    Scores that look at the clean tokens make the pattern of masks tell what is under them; see `clean` importance.
    """

    def law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
        odds = torch.exp(-tilt * score(sequences).double())
        total = {hidden: torch.zeros(len(sequences), dtype=torch.float64) for hidden in subsets(sequences.shape[1], k)}
        positions = range(sequences.shape[1])
        for order in itertools.permutations(positions, sequences.shape[1] - k):
            chance, left = torch.ones(len(sequences), dtype=torch.float64), list(positions)
            for i in order:
                chance = chance * odds[:, i] / odds[:, left].sum(1)
                left.remove(i)
            total[tuple(left)] += chance
        return total

    return law


def masked_cross_entropy(joint: Joint, hidden: tuple[int, ...], chance: Tensor) -> float:
    """E over x and this mask of the summed -log p*(x_i | visible tokens, this mask), nats: sum_x p(x) q(M | x) sum_i CE_i.

    p* is the exact posterior: it knows the mask's own law, chance [S] = q(M | x), as the best model would.
    """
    weight = joint.chance * chance
    visible = [i for i in range(joint.length) if i not in hidden]
    total = 0.0
    for i in hidden:
        groups = _group(joint.sequences[:, visible])
        with_i = _group(joint.sequences[:, [*visible, i]])
        given = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, weight)[groups]
        both = torch.zeros(int(with_i.max()) + 1, dtype=torch.float64).index_add_(0, with_i, weight)[with_i]
        total -= float((weight * (both / given).log()).sum())
    return total


def _group(columns: Tensor) -> Tensor:
    if columns.shape[1] == 0:
        return torch.zeros(len(columns), dtype=torch.int64)
    groups: Tensor = torch.unique(columns, dim=0, return_inverse=True)[1]
    return groups


def exact_count_value(joint: Joint, law: HideLaw = uniform_law) -> float:
    """E_{k ~ U{0..L}} (L + 1) / k * E sum of CE over the k hidden tokens, at the best model, with the `uniform` weights."""
    return sum(
        masked_cross_entropy(joint, hidden, chance) / k
        for k in range(1, joint.length + 1)
        for hidden, chance in law(joint.sequences, k).items()
    )


def count_law_value(joint: Joint, chances: Tensor, weights: Tensor, law: HideLaw = uniform_law) -> float:
    """E_{k ~ chances} weights[k] * E sum of CE over the k hidden tokens, at the best model; chances and weights are [L + 1]."""
    return sum(
        float(chances[k] * weights[k]) * masked_cross_entropy(joint, hidden, chance)
        for k in range(1, joint.length + 1)
        for hidden, chance in law(joint.sequences, k).items()
    )


def bernoulli_value(joint: Joint, schedule: LogLinear) -> float:
    """The integral over time of weight(t) * E sum of CE at the best model, each token hidden with chance rate(t).

    The integrand is a polynomial in the rate of degree L - 1, so Gauss-Legendre quadrature with L nodes is exact.
    """
    low, high = schedule.rates
    nodes, weights = _gauss_legendre(max(2, joint.length))
    ones = torch.ones(len(joint.chance), dtype=torch.float64)
    value = 0.0
    for k in range(1, joint.length + 1):
        entropy = sum(masked_cross_entropy(joint, hidden, ones) for hidden in subsets(joint.length, k))
        for node, weight in zip(nodes, weights, strict=True):
            rate = low + (high - low) * (node + 1) / 2
            value += weight / 2 * (high - low) / rate * rate**k * (1 - rate) ** (joint.length - k) * entropy
    return value


def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    return nodes.tolist(), weights.tolist()
