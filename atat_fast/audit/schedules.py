"""The audit of audit/masks.py for schedules: laws over counts, and rates of tokens. Two more tables of docs/atat.md.

A token-identity schedule is enumerated over sequences and masks, and integrated over time, for three models: one that is told the
time and is otherwise free, the posterior at that time; one with logits l(z) - s w, which `linear_cross_entropy` makes of a
network that is not told the time; and one that is told nothing. The first reaches the entropy, which shows the bound's form to be
right. The others miss it by the price of not knowing the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.audit.masks import (
    JOINTS,
    ROUNDING,
    Joint,
    count_law_value,
    frequency_example,
    gauss_legendre,
    group_of,
    number,
    plackett_luce_law,
)
from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import bound_weights, count_chances

LAWS = {
    "uniform": (DiffusionConfig(), 0.0),
    "bell at 0.35, width 0.2": (DiffusionConfig(counts="bell"), 0.0),
    "bell at 0.22, width 0.3": (DiffusionConfig(counts="bell", counts_centre=0.22, counts_width=0.3), 0.0),
    "the first, half annealed": (DiffusionConfig(counts="bell", counts_anneal_from=0.5), 0.75),
}
STRENGTHS = (1.0, -1.0)
MODELS = ("told the time", "logits less s w", "told nothing")
NODES = 40
POWER = 8
"""The quadrature runs over y with time t = y^POWER, so that powers t^w with fractional w are smooth at 0."""


def count_law_above(joint: Joint, law: str, weighting: str) -> float:
    """The best model's value minus the entropy, nats a sequence, under the law's counts, with its weights or those of ce."""
    config, progress = LAWS[law]
    chances = count_chances(config, joint.length, progress)
    if chances is None:
        chances = torch.full((joint.length + 1,), 1 / (joint.length + 1), dtype=torch.float64)
    weights = bound_weights(chances)
    if weighting == "ce":
        hidden = float((chances * torch.arange(joint.length + 1)).sum())
        weights = torch.full_like(chances, joint.length / hidden)
    return count_law_value(joint, chances, weights) - joint.entropy()


def counts_table() -> str:
    """Laws over counts and their weights, for docs/atat.md."""
    lines = ["| counts | weighting | value - entropy | bound |", "|---|---|---|---|"]
    for law in LAWS:
        for weighting in ("uniform", "ce"):
            found = [count_law_above(Joint.random(v, length, seed=seed), law, weighting) for v, length, seed in JOINTS]
            exact = max(abs(value) for value in found) < ROUNDING
            above = "yes, loose" if law == "uniform" else "not below it here"
            bound = "yes, with equality" if exact else "no" if min(found) < 0 else above
            lines.append(f"| {law} | {weighting} | {number(min(found))} to {number(max(found))} | {bound} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Enumerated:
    """A joint under rates: one group for every (mask, visible tokens, hidden position).

    rates: [V].   times: [Q].
    flow: [G, V, Q], chance of the group with token v there and time s_q, times the quadrature's weight of ds.
    share: [G, V], the same by the race, over all times.   posterior: [G, V], p(v | visible).
    uniform: [G], chance of the group times (1 / k) under exact uniform counts.
    """

    rates: Tensor
    times: Tensor
    flow: Tensor
    share: Tensor
    posterior: Tensor
    uniform: Tensor


def enumerate_joint(joint: Joint, strength: float) -> Enumerated:
    """Every group of a joint whose token v is revealed at rate exp(-strength * v / (V - 1))."""
    x, chance, vocabulary = joint.sequences, joint.chance, int(joint.sequences.max()) + 1
    rates = torch.exp(-strength * torch.arange(vocabulary, dtype=torch.float64) / (vocabulary - 1))
    own = rates[x]
    nodes, weights = (torch.tensor(v, dtype=torch.float64) for v in gauss_legendre(NODES))
    y = (nodes + 1) / 2
    times, ds = -POWER * y.log(), POWER * weights / (2 * y)
    hides = torch.exp(-own[:, :, None] * times)  # [S, L, Q]
    race = plackett_luce_law(lambda s: frequency_example(s, s, 0), strength)
    flow, share, posterior, uniform = [], [], [], []
    for k in range(1, joint.length + 1):
        for hidden, by_race in race(x, k).items():
            seen = [i for i in range(joint.length) if i not in hidden]
            at = chance[:, None] * hides[:, list(hidden)].prod(1) * (1 - hides[:, seen]).prod(1) * ds
            left = chance * by_race / own[:, list(hidden)].sum(1)
            _, group = torch.unique(group_of(x[:, seen]), return_inverse=True)
            for i in hidden:
                place, size = group * vocabulary + x[:, i], (int(group.max()) + 1) * vocabulary

                def add(values: Tensor, place: Tensor = place, size: int = size) -> Tensor:
                    total = torch.zeros(size, *values.shape[1:], dtype=torch.float64).index_add_(0, place, values)
                    return total.view(-1, vocabulary, *values.shape[1:])

                flow.append(add(at))
                share.append(add(left))
                plain = add(chance)
                posterior.append(plain / plain.sum(1, keepdim=True))
                uniform.append(plain.sum(1) / (k * math.comb(joint.length, k)))
    return Enumerated(rates, times, *(torch.cat(parts) for parts in (flow, share, posterior, uniform)))


def schedule_loss(found: Enumerated, log_mu: Tensor) -> Tensor:
    """The bound of a model, nats a sequence: log_mu [G, V, Q], or [G, V, 1] if it does not depend on time."""
    rates = found.rates[:, None]
    speed = (rates * log_mu.exp()).sum(1, keepdim=True)
    loss: Tensor = (found.flow * (speed - rates - rates * log_mu)).sum()
    return loss


def best_tilted(found: Enumerated, steps: int = 60) -> Tensor:
    """l [G, V] whose softmax(l - s w) has the least bound, by LBFGS from the best model that is told nothing."""
    l = torch.log(found.share / found.share.sum(1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [l], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = schedule_loss(found, torch.log_softmax(l[:, :, None] - found.rates[:, None] * found.times, 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return l.detach()


def identity_above(joint: Joint, strength: float) -> dict[str, tuple[float, float, float]]:
    """For each of MODELS at its best, in nats a sequence: its bound minus the entropy; its bound under uniform masks, with logits
    l alone, minus the entropy; and the largest error of its probabilities there against p(v | visible). NaN if a value does not
    apply.
    """
    found, entropy = enumerate_joint(joint, strength), joint.entropy()
    told = torch.log(found.flow / found.flow.sum(1, keepdim=True))
    free = torch.log(found.share / found.share.sum(1, keepdim=True))
    logits = best_tilted(found)
    tilted = torch.log_softmax(logits[:, :, None] - found.rates[:, None] * found.times, 1)

    def plain(log_mu: Tensor) -> tuple[float, float]:
        above = float((found.uniform[:, None] * found.posterior * -log_mu).sum()) - entropy
        return above, float((log_mu.exp() - found.posterior).abs().max())

    def above(log_mu: Tensor) -> float:
        return float(schedule_loss(found, log_mu)) - entropy

    return {
        MODELS[0]: (above(told), math.nan, math.nan),
        MODELS[1]: (above(tilted), *plain(torch.log_softmax(logits, 1))),
        MODELS[2]: (above(free[:, :, None]), *plain(free)),
    }


def identity_table() -> str:
    """What the three models reach, over the joints of the table and rates that prefer either end, for docs/atat.md."""
    lines = [
        "| model | value - entropy | bound | the same model under uniform masks | best model off there by |",
        "|---|---|---|---|---|",
    ]
    found = [identity_above(Joint.random(v, length, seed=seed), s) for v, length, seed in JOINTS for s in STRENGTHS]
    for model in MODELS:
        value, plain, off = (list(column) for column in zip(*(f[model] for f in found), strict=True))
        exact = max(abs(v) for v in value) < ROUNDING
        bound = "yes, with equality" if exact else "yes, loose" if min(value) > -ROUNDING else "no"
        there = "- | -" if math.isnan(plain[0]) else f"{_span(plain)} | up to {max(off):.3f}"
        lines.append(f"| {model} | {_span(value)} | {bound} | {there} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    low, high = (f"{v:+.4f}" for v in (min(values), max(values)))
    return f"{low} to {high}".replace("+0.0000", "0.0000").replace("-0.0000", "0.0000")
