"""Exact posteriors of a joint distribution as a model, and how far frequencies are from a law."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import torch

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

    def nll(self, masked):
        """Loss of each hidden token of a MaskedBatch."""
        logp = torch.log_softmax(self.logits(self.features(masked.noisy, rows=masked.rows)), 1)
        return -logp.gather(1, masked.target[:, None])[:, 0].float()


class ExactOfBlocks(Exact):
    """The exact posterior of each block given its visible tokens and all blocks before it."""

    def __init__(self, joint, block):
        super().__init__(joint)
        self.block = block

    def nll(self, masked):
        """Loss of each hidden token of a MaskedBatch of whole sequences."""
        noisy, length = masked.noisy, masked.noisy.shape[1]
        clean = noisy.flatten().index_copy(0, masked.rows, masked.target).view_as(noisy)
        out = torch.zeros(len(masked.rows))
        for start in range(0, length, self.block):
            end = start + self.block
            seen = torch.cat((clean[:, :start], noisy[:, start:end], torch.full_like(noisy[:, end:], MASK)), 1)
            inside = (masked.rows % length >= start) & (masked.rows % length < end)
            logp = torch.log_softmax(self.logits(self.features(seen, rows=masked.rows[inside])), 1)
            out[inside] = -logp.gather(1, masked.target[inside, None])[:, 0].float()
        return out


def chi_square(seen, law):
    """The statistic in standard deviations: of counts [N] under chances [N], or of samples [N, L] under {sequence: chance}."""
    if isinstance(law, dict):
        found = Counter(map(tuple, seen.tolist()))
        assert found.keys() <= law.keys(), "a sample that the law excludes"
        seen, law = torch.tensor([found[x] for x in law]), torch.tensor([*law.values()], dtype=torch.float64)
    some, expected = law > 0, law.double() * int(seen.sum())
    assert int(seen[~some].sum()) == 0, "a sample that the law excludes"
    freedom = int(some.sum()) - 1
    return (float(((seen - expected)[some] ** 2 / expected[some]).sum()) - freedom) / math.sqrt(2 * max(1, freedom))


def chain_law(joint, steps, sigma_of=lambda step: 0.0):
    """{sequence: chance} of a sampler with exact posteriors, by following every path.

    Visible tokens are hidden again with chance sigma_of(step), and hidden ones revealed so often that the share hidden falls
    evenly to 0. It is the ancestral sampler if nothing is hidden again.
    """
    model, states = Exact(joint), {(MASK,) * joint.length: 1.0}
    for step in range(steps):
        sigma, share, after = sigma_of(step), 1 - step / steps, {}
        reveal = (1 / steps + (1 - share) * sigma) / share
        for state, chance in states.items():
            p = torch.softmax(model.logits(model.features(torch.tensor([state]))), -1)
            moves = [[(MASK, sigma), (v, 1 - sigma)] for v in state]
            for i, _ in (item for item in enumerate(state) if item[1] == MASK):
                moves[i] = [(MASK, 1 - reveal), *((v, reveal * float(p[i, v])) for v in range(MASK))]
            for path in itertools.product(*moves):
                new, weight = tuple(v for v, _ in path), chance * math.prod(w for _, w in path)
                if weight > 1e-15:
                    after[new] = after.get(new, 0.0) + weight
        states = after
    return states
