"""Is a way of hiding and weighing tokens a likelihood bound? Enumeration answers.

The alphabet is small enough to list every sequence x and every mask M. No model can do better on a masked sequence than the
exact posterior p(x_i | x visible, M), so the objective's value there can be computed to rounding. A bound is never less than the
entropy of the joint; the exact-count bound equals it. If weights differ between tokens, the best model is the minimiser of the
weighted loss, and its distance from p(x_i | x visible) is the harm to what is learned.

`python -m atat_fast.audit` prints the tables of docs/atat.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.gaps import CELLS, DISTANCES, GapTable, cells_of
from atat_fast.diffusion.noise import LogLinear

JOINTS = ((3, 4, 0), (2, 4, 2))  # vocabulary, length and seed of the joints in the table
TILT, FOCUS, RHO = 2.0, 1.0, 0.5  # of the table; tilts of both signs are tried
ROUNDING = 1e-9  # nats a sequence

HideLaw = Callable[[Tensor, int], dict[tuple[int, ...], Tensor]]
"""(sequences [S, L], k) -> for each set of k hidden positions, its chance given each sequence, [S] fp64."""

WeightedLaw = Callable[[Tensor, int], dict[tuple[int, ...], Tensor]]
"""(sequences [S, L], k) -> for each set of k hidden positions, [S, k] fp64: its chance given each sequence, times each position's
weight relative to the masking's own, (L + 1) / k or rate' / rate."""
Scores = Callable[[Tensor, Tensor, int], Tensor]
"""(what may be seen [S, L], with -1 at hidden positions; clean sequences [S, L]; k) -> importance [S, L] in [0, 1]."""


@dataclass(frozen=True)
class Joint:
    """A distribution over all sequences of `length` tokens from `vocabulary`: sequences [S, L] int64, chance [S] fp64."""

    sequences: Tensor
    chance: Tensor

    @staticmethod
    def random(vocabulary: int, length: int, *, seed: int, sharpness: float = 2.0) -> Joint:
        """A joint without structure: the softmax of Gaussian noise."""
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
    """Every set of k positions is equally likely, whatever the tokens."""
    length = sequences.shape[1]
    share = torch.full((len(sequences),), 1 / math.comb(length, k), dtype=torch.float64)
    return dict.fromkeys(subsets(length, k), share)


def spread_law(spread: float) -> HideLaw:
    """Evenly spread with chance `spread` (one of each of k cells), a span with chance -spread, at a random turn; else uniform."""

    def law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
        length = sequences.shape[1]
        total = {hidden: (1 - abs(spread)) * chance for hidden, chance in uniform_law(sequences, k).items()}
        edges = [-(-cell * length // max(1, k)) for cell in range(k + 1)]
        cells = [range(a, b) for a, b in itertools.pairwise(edges)] if spread > 0 else [range(i, i + 1) for i in range(k)]
        for turn in range(length):
            for places in itertools.product(*cells):
                hidden = tuple(sorted((place - turn) % length for place in places))
                total[hidden] = total[hidden] + abs(spread) / length / math.prod(map(len, cells))
        return total

    return law


def plackett_luce_law(score: Callable[[Tensor], Tensor], tilt: float) -> HideLaw:
    """Tokens are revealed one by one with odds exp(-tilt * score(x)) until k are left; score gives [S, L] from clean tokens.

    If scores look at clean tokens, the pattern of masks tells what is hidden; see `clean` importance.
    """

    def law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
        return _reveal(torch.exp(-tilt * score(sequences).double()), tuple(range(sequences.shape[1])), k)

    return law


def _reveal(odds: Tensor, positions: tuple[int, ...], k: int) -> dict[tuple[int, ...], Tensor]:
    """Reveal positions one by one with these odds [S, L] until k are left: the chance [S] of each set that may be left."""
    total = {hidden: torch.zeros(len(odds), dtype=torch.float64) for hidden in itertools.combinations(positions, k)}
    for order in itertools.permutations(positions, len(positions) - k):
        chance, left = torch.ones(len(odds), dtype=torch.float64), list(positions)
        for i in order:
            chance = chance * odds[:, i] / odds[:, left].sum(1)
            left.remove(i)
        total[tuple(left)] += chance
    return total


def importance_law(
    score: Scores, *, sees: str, tilt: float, rho: float = RHO, weighting: str = "uniform", focus: float = FOCUS
) -> WeightedLaw:
    """The law of `hide_by_importance`. If sees is `visible`, a uniform context comes first; then scores say what is revealed."""

    def law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
        length = sequences.shape[1]
        outer = k + math.ceil(rho * (length - k)) if sees == "visible" else length
        total = {hidden: torch.zeros(len(sequences), k, dtype=torch.float64) for hidden in subsets(length, k)}
        for context in subsets(length, outer):
            seen = sequences.clone()
            if sees == "visible":
                seen[:, list(context)] = -1
            scores = score(seen, sequences, k).double()
            for hidden, chance in _reveal(torch.exp(-tilt * scores), context, k).items():
                weight = _relative(scores[:, list(hidden)], weighting, tilt, focus)
                total[hidden] += chance[:, None] / math.comb(length, outer) * weight
        return total

    return law


def _relative(scores: Tensor, weighting: str, tilt: float, focus: float) -> Tensor:
    """Weights of hidden tokens [S, k], of mean 1."""
    if weighting not in ("order", "importance"):
        return torch.ones_like(scores)
    return scores.shape[1] * torch.softmax(scores * (-tilt if weighting == "order" else focus), dim=1)


def masked_cross_entropy(joint: Joint, hidden: tuple[int, ...], chance: Tensor) -> float:
    """E over x and this mask of the summed -log p*(x_i | visible tokens, this mask), nats: sum_x p(x) q(M | x) sum_i CE_i.

    p* is the exact posterior. Like the best model it knows the mask's law, chance [S] = q(M | x).
    """
    return weighted_cross_entropy(joint, hidden, chance[:, None].expand(-1, len(hidden)))[0]


def weighted_cross_entropy(joint: Joint, hidden: tuple[int, ...], weight: Tensor) -> tuple[float, float]:
    """The least sum_x p(x) sum_i weight[x, i] * -log p~(x_i | visible tokens, this mask), and how far its minimiser p~ is off.

    weight: [S, k] = q(M | x) * w_i. The second number is the largest |p~(v | visible) - p(v | visible)|.
    """
    visible = [i for i in range(joint.length) if i not in hidden]
    value = off = 0.0
    for column, i in enumerate(hidden):
        groups, with_i = group_of(joint.sequences[:, visible]), group_of(joint.sequences[:, [*visible, i]])
        weighted = joint.chance * weight[:, column]
        learned = _share(weighted, with_i, groups)
        value -= float((weighted * learned.log()).sum())
        off = max(off, float((learned - _share(joint.chance, with_i, groups)).abs().max()))
    return value, off


def _share(weight: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """For each sequence, the total weight of its group in `part` over that of its group in `whole`."""
    sums = [torch.zeros(len(weight), dtype=torch.float64).index_add_(0, g, weight)[g] for g in (part, whole)]
    return sums[0] / sums[1]


def group_of(columns: Tensor) -> Tensor:
    """A number below S for each of S sequences, the same if these columns are the same: columns are digits, and S = V^L."""
    base = int(columns.max()) + 1 if columns.numel() else 1
    return (columns * base ** torch.arange(columns.shape[1])).sum(1)


def exact_count_value(joint: Joint, law: HideLaw = uniform_law) -> float:
    """E_{k ~ U{0..L}} (L + 1) / k * E sum of CE over the k hidden tokens, at the best model, with `uniform` weights."""
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
    """The integral over time of weight(t) * E sum of CE at the best model. Each token is hidden with chance rate(t)."""
    factors = count_factors(joint.length, "bernoulli", "uniform", schedule)
    return sum(
        factors[k] * masked_cross_entropy(joint, hidden, chance)
        for k in range(1, joint.length + 1)
        for hidden, chance in uniform_law(joint.sequences, k).items()
    )


def count_factors(length: int, masking: str, weighting: str, schedule: LogLinear) -> list[float]:
    """The factor of E of the summed (relatively weighted) CE given k hidden tokens, in the loss of a sequence: k = 0..L.

    exact: chance 1 / (L + 1) times weight (L + 1) / k. bernoulli: the integral over time of weight(t) times the binomial chance.
    It is a polynomial in the rate of degree L - 1, so Gauss-Legendre quadrature with L + 1 nodes is exact. `ce`: L over the
    expected number of hidden tokens, whatever k.
    """
    if masking == "exact":
        flat = 2 / (length + 1)
        return [0.0] + [flat if weighting == "ce" else 1 / k for k in range(1, length + 1)]
    low, high = schedule.rates
    nodes, weights = gauss_legendre(length + 1)
    factors = [0.0] * (length + 1)
    for node, weight in zip(nodes, weights, strict=True):
        rate = low + (high - low) * (node + 1) / 2
        scale = 2 / (low + high) if weighting == "ce" else (high - low) / rate
        for k in range(1, length + 1):
            factors[k] += weight / 2 * scale * math.comb(length, k) * rate**k * (1 - rate) ** (length - k)
    return factors


def gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """`count` nodes and weights on (-1, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    return nodes.tolist(), weights.tolist()


def learned_example(seen: Tensor, clean: Tensor, k: int) -> Tensor:
    """A stand-in for the estimator: an arbitrary function of the visible neighbours, the position, and k."""
    left, right = seen.roll(1, 1), seen.roll(-1, 1)
    position = torch.arange(seen.shape[1])
    return torch.remainder(seen * 3 + left * 5 + right * 7 + 2 * position + k, 11).double() / 10


def frequency_example(seen: Tensor, clean: Tensor, k: int) -> Tensor:
    """Importance of a token by its id."""
    return clean.double() / clean.max()


def full_example(seen: Tensor, clean: Tensor, k: int) -> Tensor:
    """0.7 `learned_example` + 0.3 `frequency_example`."""
    return 0.7 * learned_example(seen, clean, k) + 0.3 * frequency_example(seen, clean, k)


SOURCES: dict[tuple[str, str], Scores] = {
    ("learned", "visible"): learned_example,
    ("learned", "clean"): learned_example,
    ("frequency", "clean"): frequency_example,
    ("full", "visible"): full_example,
    ("full", "clean"): full_example,
}
MASKINGS = ("exact", "bernoulli")


@dataclass(frozen=True)
class Finding:
    """What a combination of settings does, over the table's joints and tilts of both signs.

    low, high: by masking, the least and greatest value at the best model minus the entropy, nats a sequence. off: the largest
    error of a probability of the best model. clipping: how far bernoulli's clipped rates alone may put the value below the
    entropy.
    """

    source: str
    sees: str
    weighting: str
    low: dict[str, float]
    high: dict[str, float]
    off: float
    clipping: float

    def is_bound(self, masking: str) -> bool:
        """Whether the value was never below the entropy, apart from what clipped rates explain."""
        return self.low[masking] >= -ROUNDING - (self.clipping if masking == "bernoulli" else 0.0)

    @property
    def learns_the_posterior(self) -> bool:
        """Whether the best model is p(token | visible tokens)."""
        return self.off < ROUNDING


def audit(source: str, sees: str, weighting: str) -> Finding:
    """Enumerate one combination of settings. source none hides uniformly."""
    low, high, off, clipping = dict.fromkeys(MASKINGS, math.inf), dict.fromkeys(MASKINGS, -math.inf), 0.0, 0.0
    schedule = LogLinear()
    for vocabulary, length, seed in JOINTS:
        joint = Joint.random(vocabulary, length, seed=seed)
        clipping = max(clipping, schedule.rates[0] * length * math.log(vocabulary))
        for tilt in (TILT, -TILT) if source != "none" else (0.0,):
            score = SOURCES.get((source, sees), frequency_example)
            law = importance_law(score, sees=sees, tilt=tilt, weighting=weighting)
            sums = [0.0] * (length + 1)
            for k in range(1, length + 1):
                for hidden, weight in law(joint.sequences, k).items():
                    value, wrong = weighted_cross_entropy(joint, hidden, weight)
                    sums[k], off = sums[k] + value, max(off, wrong)
            for masking in MASKINGS:
                factors = count_factors(length, masking, weighting, schedule)
                above = sum(f * s for f, s in zip(factors, sums, strict=True)) - joint.entropy()
                low[masking], high[masking] = min(low[masking], above), max(high[masking], above)
    return Finding(source, sees, weighting, low, high, off, clipping)


def findings() -> list[Finding]:
    """Every combination of settings that a run can have."""
    plain = [audit("none", "visible", weighting) for weighting in ("uniform", "ce")]
    weightings = ("uniform", "order", "importance", "ce")
    return plain + [audit(source, sees, weighting) for source, sees in SOURCES for weighting in weightings]


def table() -> str:
    """The findings as a table for docs/atat.md."""
    lines = [
        "| source | sees | weighting | exact: value - entropy | bernoulli: value - entropy | bound | best model off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in findings():
        spans = [f"{number(f.low[m])} to {number(f.high[m])}" for m in MASKINGS]
        held = [f.is_bound(m) for m in MASKINGS]
        exact = max(abs(f.low["exact"]), abs(f.high["exact"])) < ROUNDING
        loose = "yes, loose" if f.source == "none" else "not below it here"
        bound = "yes, with equality" if exact else loose if all(held) else "no"
        off = "0: p(token given visible)" if f.learns_the_posterior else f"up to {f.off:.3f}"
        sees = "-" if f.source == "none" else f.sees
        lines.append(f"| {f.source} | {sees} | {f.weighting} | {spans[0]} | {spans[1]} | {bound} | {off} |")
    return "\n".join(lines)


def gap_law(spread: float, power: float) -> WeightedLaw:
    """`spread_law` with the weights of diffusion/gaps.py, for expected losses that grow with a token's distances (an example)."""

    def law(sequences: Tensor, k: int) -> dict[tuple[int, ...], Tensor]:
        length, gaps = sequences.shape[1], GapTable(power, sequences.device)
        cell = torch.arange(CELLS)
        gaps.sums[1] = 1.0
        gaps.sums[0] = 0.2 * (1 + cell // DISTANCES) * (1 + cell % DISTANCES)
        weighted = {}
        for hidden, chance in spread_law(spread)(sequences, k).items():
            mask = torch.zeros(1, length, dtype=torch.bool)
            mask[0, list(hidden)] = True
            weighted[hidden] = chance[:, None] * gaps.weights(cells_of(mask)[0, list(hidden)]).double()
        return weighted

    return law


BLIND = (
    ("evenly spread", 1.0, 0.0),
    ("half of them so", 0.5, 0.0),
    ("one span", -1.0, 0.0),
    ("uniform", 0.0, 0.5),
    ("uniform", 0.0, -0.5),
    ("half of them evenly spread", 0.5, 0.5),
)
"""Masks in words, spread, and gap_power, of the table."""


def blind_table() -> str:
    """Masks and weights that depend on the mask alone, as a table for docs/atat.md."""
    lines = ["| masks | gap_power | value - entropy | best model off by |", "|---|---|---|---|"]
    for masks, spread, power in BLIND:
        above, off = [], 0.0
        for vocabulary, length, seed in JOINTS:
            joint = Joint.random(vocabulary, length, seed=seed)
            found = [
                (value / k, wrong)
                for k in range(1, length + 1)
                for hidden, weight in gap_law(spread, power)(joint.sequences, k).items()
                for value, wrong in [weighted_cross_entropy(joint, hidden, weight)]
                if float(weight.sum()) > 0
            ]
            above.append(sum(value for value, _ in found) - joint.entropy())
            off = max(off, *(wrong for _, wrong in found))
        sure = "0: p(token given visible)" if off < ROUNDING else f"up to {off:.3f}"
        lines.append(f"| {masks} | {power:g} | {number(min(above))} to {number(max(above))} | {sure} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """`value` to three places with its sign; 0 has none."""
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text
