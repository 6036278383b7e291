"""Samplers: their law on an alphabet that can be listed, what stays fixed, and draws with the right tail."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from atat_fast.diffusion.audit import Joint
from atat_fast.diffusion.samplers import draw_categorical, sample
from atat_fast.errors import UsageError

MASK = 3


class Exact:
    """The exact posterior of a joint as a model: features are the tokens around each position."""

    def __init__(self, joint):
        self.joint, self.mask_id, self.calls = joint, MASK, 0

    def features(self, tokens, hidden_share=None, *, rows=None):
        self.calls += 1
        length = tokens.shape[1]
        place = torch.arange(length).repeat(len(tokens))[:, None]
        features = torch.cat((place, tokens.repeat_interleave(length, 0)), 1)
        return features if rows is None else features[rows]

    def logits(self, features):
        out = torch.full((len(features), MASK + 1), -torch.inf, dtype=torch.float64)
        for row, (i, *z) in enumerate(features.tolist()):
            fits = ((torch.tensor(z) == MASK) | (self.joint.sequences == torch.tensor(z))).all(1)
            for v in range(MASK):
                out[row, v] = self.joint.chance[fits & (self.joint.sequences[:, i] == v)].sum().log()
        return out


def ancestral_law(joint, steps, start=None):
    """The distribution over sequences of the ancestral sampler with exact posteriors, by following every path."""
    length = joint.length
    states = {tuple(start or [MASK] * length): 1.0}
    model = Exact(joint)
    for step in range(steps):
        reveal = 1 / (steps - step)
        after: dict = {}
        for state, chance in states.items():
            hidden = [i for i in range(length) if state[i] == MASK]
            p = torch.softmax(model.logits(model.features(torch.tensor([state]))), -1)
            for r in range(len(hidden) + 1):
                for chosen in itertools.combinations(hidden, r):
                    pattern = reveal**r * (1 - reveal) ** (len(hidden) - r)
                    if pattern == 0:
                        continue
                    for values in itertools.product(range(MASK), repeat=r):
                        weight = chance * pattern * math.prod(float(p[i, v]) for i, v in zip(chosen, values, strict=True))
                        new = list(state)
                        for i, v in zip(chosen, values, strict=True):
                            new[i] = v
                        after[tuple(new)] = after.get(tuple(new), 0.0) + weight
        states = after
    return states


@pytest.mark.parametrize("sampler", ["ancestral", "ddpm_cache"])
def test_samples_follow_the_ancestral_law(sampler):
    joint, steps, trials = Joint.random(3, 3, seed=4), 2, 6000
    law = ancestral_law(joint, steps)
    assert sum(law.values()) == pytest.approx(1.0)
    drawn = sample(Exact(joint), torch.full((trials, 3), MASK), steps=steps, sampler=sampler, seed=1)
    codes = (drawn * torch.tensor([9, 3, 1])).sum(1)
    chi2 = 0.0
    for state, p in law.items():
        seen = int((codes == state[0] * 9 + state[1] * 3 + state[2]).sum())
        chi2 += (seen - trials * p) ** 2 / (trials * p)
    assert chi2 < (len(law) - 1) + 4 * math.sqrt(2 * (len(law) - 1))


def test_the_law_comes_close_to_the_joint_as_steps_grow():
    joint = Joint.random(3, 3, seed=4)

    def distance(steps):
        law = ancestral_law(joint, steps)
        return sum(abs(law[tuple(x)] - float(p)) for x, p in zip(joint.sequences.tolist(), joint.chance, strict=True)) / 2

    one, four, sixteen = distance(1), distance(4), distance(16)
    assert sixteen < 0.3 * four < 0.3 * one


def test_fixed_tokens_stay_and_no_mask_is_left():
    joint = Joint.random(3, 4, seed=5)
    start = torch.tensor([[MASK, 1, MASK, 2], [0, MASK, MASK, MASK], [2, 1, 0, 1]])
    drawn = sample(Exact(joint), start, steps=3)
    fixed = start != MASK
    assert torch.equal(drawn[fixed], start[fixed]) and (drawn != MASK).all()
    assert torch.equal(start[2], drawn[2])


def test_the_cache_gives_the_same_samples_with_fewer_calls():
    joint = Joint.random(3, 4, seed=6)
    start = torch.full((1, 4), MASK)
    plain, cached = Exact(joint), Exact(joint)
    a = sample(plain, start, steps=50, sampler="ancestral", seed=2)
    b = sample(cached, start, steps=50, sampler="ddpm_cache", seed=2)
    assert torch.equal(a, b)
    assert plain.calls == 50 and cached.calls <= 4


def test_a_sample_does_not_depend_on_its_batch():
    joint = Joint.random(3, 4, seed=7)
    together = sample(Exact(joint), torch.full((5, 4), MASK), steps=6, seed=3)
    alone = sample(Exact(joint), torch.full((1, 4), MASK), steps=6, seed=3, sample_ids=torch.tensor([3]))
    assert torch.equal(together[3:4], alone)


def test_rare_tokens_come_as_rarely_as_they_should():
    """Chances of 1e-9 and 1e-12 by inverting the distribution at chosen points; 24-bit uniforms would lose both."""
    p = torch.tensor([1e-12, 1e-9, 0.3, 0.0], dtype=torch.float64)
    p[3] = 1 - p.sum()
    logits = p.log().expand(5, 4)
    points = torch.tensor([0.5e-12, 2e-12, 0.5, 1.0, 1.1e-9], dtype=torch.float64)
    assert draw_categorical(logits, points).tolist() == [0, 1, 3, 3, 2]


def test_draws_follow_their_distribution_and_never_take_an_impossible_token():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    trials = 50_000
    noise = (torch.randperm(trials).double() + 0.5) / trials
    drawn = draw_categorical(p.log().expand(trials, 5), noise)
    assert torch.bincount(drawn, minlength=5).tolist() == [25_000, 0, 10_000, 15_000, 0]
    assert draw_categorical(p.log()[None], torch.ones(1, dtype=torch.float64)).item() == 3
    hot = draw_categorical(p.log().expand(trials, 5), noise, temperature=2.0)
    shares = torch.softmax(p.log() / 2, 0)
    torch.testing.assert_close(torch.bincount(hot, minlength=5) / trials, shares, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"sampler": "ddpm"}, "did you mean ddpm_cache"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UsageError, match=message):
        sample(Exact(Joint.random(3, 2, seed=0)), torch.full((1, 2), MASK), **options)


def test_the_cache_is_refused_for_a_model_that_is_told_the_time():
    model = Exact(Joint.random(3, 2, seed=0))
    model.time_conditioning = True
    with pytest.raises(UsageError, match="use sampler ancestral"):
        sample(model, torch.full((1, 2), MASK), sampler="ddpm_cache")
