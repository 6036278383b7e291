"""ReMDM's remasking: its chances, its laws against every path of a small chain, and that the share hidden stays on schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import MASK, Exact, chain_law, chi_square

from atat_fast.audit.masks import Joint
from atat_fast.sampling.remask import REMASKING, most_sigma, reveal_chance
from atat_fast.sampling.samplers import sample


@pytest.mark.parametrize("steps", [1, 2, 7, 128])
def test_chances_keep_the_share_that_is_hidden_on_schedule(steps):
    for step in range(steps):
        for strength in (0.0, 0.3, 1.0):
            sigma = strength * most_sigma(step, steps)
            before, after = 1 - step / steps, 1 - (step + 1) / steps
            reveal = reveal_chance(step, steps, sigma)
            assert 0 <= reveal <= 1 and 0 <= sigma <= 1
            assert before * (1 - reveal) + (1 - before) * sigma == pytest.approx(after, abs=1e-12)
    assert most_sigma(steps - 1, steps) == 0 and reveal_chance(0, steps, 0.0) == pytest.approx(1 / steps)


@pytest.mark.parametrize(
    ("sampler", "eta", "steps"),
    [("remdm_cap", 0.4, 4), ("remdm_rescale", 0.7, 4), ("remdm_cap", 0.0, 4)]
    + [(sampler, 0.0, 3) for sampler in ("remdm_rescale", "remdm_confidence", "ancestral")],
)
def test_samples_follow_the_law(sampler, eta, steps):
    """Of the plain sampler, without remasking."""
    joint = Joint.random(3, 2, seed=4)

    def sigma_of(step):
        return min(eta, most_sigma(step, steps)) if sampler == "remdm_cap" else eta * most_sigma(step, steps)

    law = chain_law(joint, steps, sigma_of)
    assert sum(law.values()) == pytest.approx(1) and all(MASK not in x for x in law)
    drawn = sample(Exact(joint), torch.full((4000, 2), MASK), steps=steps, sampler=sampler, eta=eta, seed=2)
    assert chi_square(drawn, law) < 4


@pytest.mark.parametrize("sampler", REMASKING)
def test_the_share_hidden_is_on_schedule_and_tokens_are_hidden_again(sampler):
    joint, steps, start = Joint.random(3, 6, seed=1), 10, torch.full((300, 6), MASK)
    states = [start.clone()]
    sample(Exact(joint), start, steps=steps, sampler=sampler, eta=1.0, seed=1, on_step=lambda _, t: states.append(t.clone()))
    assert sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in itertools.pairwise(states)) > 100
    for step, tokens in enumerate(states):
        assert abs(float((tokens == MASK).float().mean()) - (1 - step / steps)) < 5 * math.sqrt(0.25 / start.numel())
    assert len(states) == 1 + steps


def test_the_least_certain_tokens_are_hidden_again_most_often():
    """Independent tokens of known chances: the first is always 0.98 certain, the others are drawn with chances near a third."""
    p = torch.tensor([[0.98, 0.01, 0.01], *[[0.34, 0.33, 0.33]] * 5], dtype=torch.float64)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=6)))
    joint = Joint(sequences, torch.stack([p[i, sequences[:, i]] for i in range(6)]).prod(0))
    again, expected, spread = torch.zeros(6).double(), torch.zeros(6).double(), torch.zeros(6).double()
    before = torch.full((300, 6), MASK)

    def watch(step, tokens):
        nonlocal before, again, expected, spread
        visible = before != MASK
        chosen = visible & (tokens == MASK)
        assert int(chosen.sum(1).max()) <= 1
        chance = p[torch.arange(6), before.clamp(max=2)]
        odds = torch.where(visible, torch.exp(-chance), 0.0)
        share = (odds / odds.sum(1, keepdim=True).clamp(min=1e-9))[chosen.any(1)]
        again, expected = again + chosen.sum(0), expected + share.sum(0)
        spread += (share * (1 - share)).sum(0)
        before = tokens.clone()

    sample(Exact(joint), before, steps=12, sampler="remdm_confidence", seed=1, on_step=watch)
    assert again.min() > 100 and ((again - expected).abs() < 4 * spread.sqrt()).all()
    assert again[0] < 0.85 * again[1:].mean()
