"""What tests of samplers share: exact posteriors as a model, the ancestral sampler's law, and a sampler's own law by
enumeration."""

from __future__ import annotations

import itertools
import math

import torch

from atat_fast.sampling import samplers

MASK = 3


class Exact:
    """The exact posterior of a joint as a model: features are the tokens around each position."""

    def __init__(self, joint):
        self.joint, self.mask_id, self.calls, self.known = joint, MASK, 0, {}

    def features(self, tokens, hidden_share=None, *, rows=None):
        self.calls += 1
        length = tokens.shape[1]
        place = torch.arange(length).repeat(len(tokens))[:, None]
        features = torch.cat((place, tokens.repeat_interleave(length, 0)), 1)
        return features if rows is None else features[rows]

    def logits(self, features):
        out = torch.full((len(features), MASK + 1), -torch.inf, dtype=torch.float64)
        for row, key in enumerate(map(tuple, features.tolist())):
            if key not in self.known:
                i, *z = key
                fits = ((torch.tensor(z) == MASK) | (self.joint.sequences == torch.tensor(z))).all(1)
                sums = [self.joint.chance[fits & (self.joint.sequences[:, i] == v)].sum().log() for v in range(MASK)]
                self.known[key] = torch.stack(sums)
            out[row, :MASK] = self.known[key]
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


def law_of_draws(monkeypatch, model, start, **options):
    """The distribution of `sample`'s result over everything its draws can come out as, its choice of positions being as it is.

    The sampler itself runs, once for each way: its draws are taken from a script, and weighed with the chances of the model's
    logits at the rows it asked for.
    """
    law: dict = {}
    waiting = [()]
    while waiting:
        script, weight, place = waiting.pop(), 1.0, 0

        def draw(features, names, step):
            nonlocal weight, place, script
            p = torch.softmax(model.logits(features), -1)
            if place == len(script):
                first, *others = itertools.product(range(MASK), repeat=len(features))
                waiting.extend((*script, other) for other in others)
                script = (*script, first)
            values = script[place]
            weight *= math.prod(float(p[i, v]) for i, v in enumerate(values))
            place += 1
            return torch.tensor(values, dtype=torch.int64)

        with monkeypatch.context() as patch:
            patch.setattr(samplers, "make_drawer", lambda *_: draw)
            out = tuple(samplers.sample(model, start, **options)[0].tolist())
        law[out] = law.get(out, 0.0) + weight
    return law


def distance(law, other):
    """The largest difference of a probability."""
    return max(abs(law.get(x, 0.0) - other.get(x, 0.0)) for x in law.keys() | other.keys())


def law_of(joint):
    """A joint as a dictionary."""
    return {tuple(x): float(p) for x, p in zip(joint.sequences.tolist(), joint.chance, strict=True)}


def chi_square(drawn, law):
    """How far samples [N, L] are from a law, in standard deviations of the statistic."""
    total, degrees, counts = 0.0, -1, {}
    for x in map(tuple, drawn.tolist()):
        counts[x] = counts.get(x, 0) + 1
    assert counts.keys() <= {x for x, p in law.items() if p > 0}, "a sample that the law excludes"
    for x, p in law.items():
        if p > 0:
            expected = len(drawn) * p
            total, degrees = total + (counts.get(x, 0) - expected) ** 2 / expected, degrees + 1
    return (total - degrees) / math.sqrt(2 * degrees)
