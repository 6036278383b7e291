"""ReMDM's remasking: its chances, its laws against every path of a small chain, and that the share hidden stays on schedule."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from exact import MASK, Exact, chi_square

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


def remasked_law(joint, steps, sigma_of):
    """Every path of ReMDM with exact posteriors and a chance sigma_of(step) that does not look at tokens."""
    model, length = Exact(joint), joint.length
    states = {(MASK,) * length: 1.0}
    for step in range(steps):
        after: dict = {}
        sigma = sigma_of(step)
        reveal = reveal_chance(step, steps, sigma)
        for state, chance in states.items():
            p = torch.softmax(model.logits(model.features(torch.tensor([state]))), -1)
            moves = []
            for i, v in enumerate(state):
                if v == MASK:
                    moves.append([(MASK, 1 - reveal), *((w, reveal * float(p[i, w])) for w in range(MASK))])
                else:
                    moves.append([(MASK, sigma), (v, 1 - sigma)])
            for path in itertools.product(*moves):
                weight = chance * math.prod(w for _, w in path)
                if weight:
                    new = tuple(v for v, _ in path)
                    after[new] = after.get(new, 0.0) + weight
        states = after
    return states


@pytest.mark.parametrize(("sampler", "eta"), [("remdm_cap", 0.4), ("remdm_rescale", 0.7), ("remdm_cap", 0.0)])
def test_samples_follow_the_law(sampler, eta):
    joint, steps, trials = Joint.random(3, 2, seed=4), 4, 4000

    def sigma_of(step):
        return min(eta, most_sigma(step, steps)) if sampler == "remdm_cap" else eta * most_sigma(step, steps)

    law = remasked_law(joint, steps, sigma_of)
    assert sum(law.values()) == pytest.approx(1) and all(MASK not in x for x in law)
    drawn = sample(Exact(joint), torch.full((trials, 2), MASK), steps=steps, sampler=sampler, eta=eta, seed=2)
    assert chi_square(drawn, law) < 4


@pytest.mark.parametrize("sampler", REMASKING)
def test_the_share_hidden_is_on_schedule_and_tokens_are_hidden_again(sampler):
    joint, steps, trials, length = Joint.random(3, 6, seed=1), 10, 300, 6
    hidden, back = [], 0
    before = torch.full((trials, length), MASK)

    def watch(step, tokens):
        nonlocal before, back
        back += int(((before != MASK) & (tokens == MASK)).sum())
        hidden.append(float((tokens == MASK).float().mean()))
        before = tokens.clone()

    sample(Exact(joint), before, steps=steps, sampler=sampler, eta=1.0, seed=1, on_step=watch)
    assert back > 100 and len(hidden) == steps
    for step, share in enumerate(hidden):
        assert abs(share - (1 - (step + 1) / steps)) < 5 * math.sqrt(0.25 / (trials * length))


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


def test_without_remasking_it_is_the_plain_sampler_in_law():
    joint, trials = Joint.random(3, 2, seed=4), 4000
    law = remasked_law(joint, 3, lambda step: 0.0)
    for sampler in ("remdm_rescale", "remdm_confidence", "ancestral"):
        drawn = sample(Exact(joint), torch.full((trials, 2), MASK), steps=3, sampler=sampler, eta=0.0, seed=3)
        assert chi_square(drawn, law) < 4
