"""Sampling block by block from a cache: the samples of a model that computes everything anew, in every sampler."""

from __future__ import annotations

import functools

import pytest
import torch
from exact import MASK as EXACT_MASK
from exact import Exact, chi_square
from small import small_dit

from atat_fast.audit.masks import Joint
from atat_fast.errors import UsageError
from atat_fast.sampling import samplers
from atat_fast.sampling.samplers import SAMPLERS, sample

MASK, END = 10, 9
SIZES = {"length": 12, "dim": 16, "heads": 2, "layers": 2, "block": 4}


class Anew:
    """The same model without a cache: each pass runs on all finished tokens and the block, as training does."""

    def __init__(self, model):
        self.model, self.mask_id, self.vocab_size, self.config = model, model.mask_id, model.vocab_size, model.config
        self.output_head, self.logits = model.output_head, model.logits
        self.passes = 0

    def cache(self, batch):
        other = Anew(self.model)
        other.done = torch.zeros(batch, 0, dtype=torch.int64)
        other.passes = 0
        return other

    def features(self, tokens, hidden_share=None, *, rows=None, documents=None):
        self.passes += 1
        done, width = self.done.shape[1], tokens.shape[1]
        assert tokens.shape[0] == len(self.done)
        pad = self.config.block - width
        text = torch.nn.functional.pad(torch.cat((self.done, tokens), 1), (0, pad), value=MASK)
        if documents is not None or pad:
            return self._alone(tokens, rows, documents)
        whole = self.model.features(text, clean=text).view(len(text), -1, 16)[:, done : done + width].flatten(0, 1)
        return whole if rows is None else whole[rows]

    def _alone(self, tokens, rows, documents):
        """Texts that end inside a block, one by one and cut there."""
        sizes = [tokens.shape[1]] * len(tokens) if documents is None else (documents.ids == 0).sum(1).tolist()
        out = torch.zeros(*tokens.shape, 16)
        for b, size in enumerate(sizes):
            if size:
                cache = self.model.cache(1)
                for start in range(0, self.done.shape[1], self.config.block):
                    cache.append(self.done[b : b + 1, start : start + self.config.block])
                out[b, :size] = cache.features(tokens[b : b + 1, :size]).view(size, 16)
        out = out.flatten(0, 1)
        return out if rows is None else out[rows]

    def append(self, tokens):
        self.done = torch.cat((self.done, tokens), 1)

    def keep(self, which):
        self.done = self.done[which]


def model_of(**changes):
    return small_dit(11, MASK, **SIZES | changes).eval()


def prompts():
    """Prompts of several lengths, one with a hole, one complete."""
    tokens = torch.full((5, 12), MASK)
    for b, size in enumerate((0, 3, 5, 12, 8)):
        tokens[b, :size] = torch.arange(size) % 7
    tokens[4, 2:4] = MASK
    return tokens


def by_place(tokens, share):
    """Importance of a block's tokens, from what is visible, the place and the time."""
    width = tokens.shape[1]
    return torch.remainder(tokens.roll(1, 1) * 5 + 3 * torch.arange(width) + (share * width).long()[:, None], 7) / 6


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_samples_are_those_of_a_model_without_a_cache(sampler, steps):
    model, tokens = model_of(), prompts()
    sample = functools.partial(samplers.sample, importance=by_place if sampler == "importance" else None)
    got = sample(model, tokens, steps=steps, sampler=sampler, seed=3)
    assert torch.equal(got, sample(Anew(model), tokens, steps=steps, sampler=sampler, seed=3))
    given = tokens != MASK
    assert torch.equal(got[given], tokens[given]) and not (got == MASK).any()
    assert torch.equal(got, sample(model, tokens, steps=steps, sampler=sampler, seed=3, block=4))
    alone = [
        sample(model, tokens[b : b + 1], steps=steps, sampler=sampler, seed=3, sample_ids=torch.tensor([b])) for b in range(5)
    ]
    assert torch.equal(torch.cat(alone), got)  # a text does not depend on its batch


@pytest.mark.parametrize("sampler", ["ddpm_cache", "confidence"])
def test_texts_of_several_lengths_are_each_their_own(sampler):
    model, tokens, lengths = model_of(), prompts(), torch.tensor([12, 7, 9, 12, 10])
    got = sample(model, tokens, steps=4, sampler=sampler, seed=1, lengths=lengths)
    assert torch.equal(got, sample(Anew(model), tokens, steps=4, sampler=sampler, seed=1, lengths=lengths))
    for b, size in enumerate(lengths.tolist()):
        assert torch.equal(got[b, size:], tokens[b, size:])
        alone = sample(model, tokens[b : b + 1, :size], steps=4, sampler=sampler, seed=1, sample_ids=torch.tensor([b]))
        assert torch.equal(alone[0], got[b, :size])


def test_a_text_that_ended_leaves_the_batch_and_the_others_stay_as_they_are():
    model, tokens = model_of(), torch.full((8, 12), MASK)
    with torch.no_grad():
        model.head.bias[END] += 2.0
    free = sample(model, tokens, steps=4, seed=5)
    sizes, features = [], model.cache(1).__class__.features

    def counted(self, given, *rest, **more):
        sizes.append(len(given))
        return features(self, given, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.cache(1).__class__, "features", counted)
        got = sample(model, tokens, steps=4, seed=5, stop_at=END)
    ended = 0
    for text, before in zip(got, free, strict=True):
        first = (before == END).nonzero()
        end = int(first[0]) + 1 if len(first) else 12
        ended += end <= 8
        assert torch.equal(text[:end], before[:end]) and (text[end:] == END).all()
    assert ended > 0 and sizes[0] == 8 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)


def test_text_longer_than_the_model_goes_on():
    model = model_of()
    got = sample(model, torch.full((2, 30), MASK), steps=2, seed=0)
    assert got.shape == (2, 30) and not (got == MASK).any()
    short = sample(model, torch.full((2, 12), MASK), steps=2, seed=0)
    assert torch.equal(got[:, :12], short)


def test_the_law_is_the_joints_at_any_block():
    """With exact posteriors one token at a time gives the joint, in blocks and in one."""

    class ByBlock(Exact):
        def __init__(self, joint, block):
            super().__init__(joint)
            self.config = type("Config", (), {"block": block, "length": 4})

        def cache(self, batch):
            self.done = torch.zeros(batch, 0, dtype=torch.int64)
            return self

        def features(self, tokens, hidden_share=None, *, rows=None):
            text = torch.cat((self.done, tokens), 1)
            begin = self.done.shape[1]
            text = torch.nn.functional.pad(text, (0, 4 - text.shape[1]), value=EXACT_MASK)
            index = torch.arange(len(tokens))[:, None] * 4 + torch.arange(begin, begin + tokens.shape[1])
            index = index.flatten() if rows is None else index.flatten()[rows]
            return super().features(text, rows=index)

        def append(self, tokens):
            self.done = torch.cat((self.done, tokens), 1)

        def keep(self, which):
            self.done = self.done[which]

    joint = Joint.random(3, 4, seed=0)
    law = dict(zip(map(tuple, joint.sequences.tolist()), joint.chance.tolist(), strict=True))
    for block in (1, 2):
        drawn = sample(ByBlock(joint, block), torch.full((4000, 4), EXACT_MASK), steps=4, sampler="first_hitting", seed=block)
        assert chi_square(drawn, law) < 5


def test_another_block_is_refused():
    with pytest.raises(UsageError, match="block is 6, but this model was trained on blocks of 4; leave block out"):
        sample(model_of(), torch.full((1, 12), MASK), block=6)
