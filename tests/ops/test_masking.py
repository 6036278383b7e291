"""mask_tokens: exact counts, the right distributions, and noise that is a function of its arguments alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import mask_tokens

MASK = 99


def draw(tokens, counts, **options):
    given_ids = options.pop("sample_ids", torch.arange(len(tokens)))
    settings_ = {"mask_id": MASK, "seed": 1, "step": 0, "sample_ids": given_ids} | options
    return mask_tokens(tokens, counts, **settings_)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 41), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.booleans(), st.data())
def test_exactly_k_are_hidden_and_named(batch, length, seed, step, scored, data):
    counts = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    tokens = torch.randint(0, 50, (batch, length))
    scores = torch.rand(batch, length) if scored else None
    noisy, rows, weights = draw(
        tokens, torch.tensor(counts, dtype=torch.int64), seed=seed, step=step, scores=scores, tilt=2.0 * scored
    )
    hidden = noisy == MASK
    assert hidden.sum(1).tolist() == counts
    assert torch.equal(noisy[~hidden], tokens[~hidden])
    assert torch.equal(rows, hidden.flatten().nonzero().flatten())
    expected = torch.tensor([(length + 1) / k for k in counts for _ in range(k)])
    torch.testing.assert_close(weights, expected)


def test_all_and_none():
    tokens = torch.arange(12).view(2, 6)
    noisy, rows, weights = draw(tokens, [0, 6])
    assert torch.equal(noisy[0], tokens[0]) and (noisy[1] == MASK).all()
    assert rows.tolist() == [6, 7, 8, 9, 10, 11]
    assert weights.tolist() == pytest.approx([7 / 6] * 6)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 1)])
def test_tiny_shapes(shape):
    noisy, rows, weights = draw(torch.zeros(shape, dtype=torch.int32), [0] * shape[0])
    assert noisy.dtype is torch.int32 and noisy.shape == shape and rows.numel() == weights.numel() == 0


def test_uniform_masks_hide_every_subset_equally_often():
    length, k, trials = 6, 3, 20_000
    noisy, _, _ = draw(torch.zeros(trials, length, dtype=torch.int64), [k] * trials)
    codes = ((noisy == MASK) * 2 ** torch.arange(length)).sum(1)
    counts = torch.bincount(codes, minlength=2**length)
    subsets = [sum(2**i for i in s) for s in itertools.combinations(range(length), k)]
    observed = counts[subsets].double()
    assert observed.sum() == trials
    expected = trials / len(subsets)
    chi2 = ((observed - expected) ** 2 / expected).sum()
    degrees = len(subsets) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("tilt", [-2.0, 1.5])
def test_tilted_masks_follow_plackett_luce(tilt):
    scores, trials, k = torch.tensor([0.0, 0.3, 0.6, 1.0]), 40_000, 2
    weight = torch.exp(-tilt * scores.double())
    chance = {}
    for order in itertools.permutations(range(4)):  # the order in which tokens are revealed
        p, left = 1.0, list(range(4))
        for i in order:
            p *= float(weight[i] / weight[left].sum())
            left.remove(i)
        hidden = frozenset(order[4 - k :])
        chance[hidden] = chance.get(hidden, 0.0) + p
    noisy, _, _ = draw(torch.zeros(trials, 4, dtype=torch.int64), [k] * trials, scores=scores.expand(trials, 4), tilt=tilt)
    chi2 = 0.0
    codes = ((noisy == MASK) * 2 ** torch.arange(4)).sum(1)
    for hidden, p in chance.items():
        seen = int((codes == sum(2**i for i in hidden)).sum())
        chi2 += (seen - trials * p) ** 2 / (trials * p)
    assert chi2 < (len(chance) - 1) + 4 * math.sqrt(2 * (len(chance) - 1))


def test_tilt_zero_hides_what_uniform_hides():
    tokens = torch.zeros(32, 37, dtype=torch.int64)
    counts = torch.randint(0, 38, (32,))
    plain = draw(tokens, counts)[0]
    assert torch.equal(plain, draw(tokens, counts, scores=torch.rand(32, 37), tilt=0.0)[0])


def test_masks_do_not_depend_on_the_batch_they_come_in():
    tokens, counts, ids = torch.randint(0, 50, (8, 33)), torch.randint(0, 34, (8,)), torch.tensor([5, 2**40, 7, 1, 0, 3, 11, 2])
    whole = draw(tokens, counts, sample_ids=ids)[0]
    shuffled = torch.randperm(8)
    assert torch.equal(whole[shuffled], draw(tokens[shuffled], counts[shuffled], sample_ids=ids[shuffled])[0])
    halves = [draw(tokens[part], counts[part], sample_ids=ids[part])[0] for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


def test_frozen_tokens_are_never_hidden_and_not_counted():
    tokens, frozen = torch.zeros(4, 20, dtype=torch.int64), torch.rand(4, 20) < 0.5
    counts = (~frozen).sum(1)
    noisy, _, weights = draw(tokens, counts, frozen=frozen)
    assert torch.equal(noisy == MASK, ~frozen)
    torch.testing.assert_close(weights, ((counts + 1) / counts).repeat_interleave(counts).float())


def test_only_eligible_tokens_are_hidden():
    tokens, eligible = torch.zeros(4, 20, dtype=torch.int64), torch.rand(4, 20) < 0.6
    noisy, _, weights = draw(tokens, [3] * 4, eligible=eligible, scores=torch.rand(4, 20), tilt=1.0)
    hidden = noisy == MASK
    assert hidden.sum(1).tolist() == [3] * 4 and not (hidden & ~eligible).any()
    torch.testing.assert_close(weights, torch.full((12,), 21 / 3))


def test_weights_of_every_kind():
    scores, counts, length = torch.rand(3, 10), torch.tensor([2, 10, 5]), 10
    tokens = torch.zeros(3, length, dtype=torch.int64)
    options = {"scores": scores, "tilt": 1.5, "focus": 0.7}
    rows = draw(tokens, counts, **options)[1]
    picked, sequence = scores.flatten()[rows].double(), rows // length
    for b in range(3):
        mine = sequence == b
        order = draw(tokens, counts, weighting="order", **options)[2][mine].double()
        torch.testing.assert_close(order, (length + 1) * torch.softmax(-1.5 * picked[mine], 0), rtol=1e-6, atol=0)
        focused = draw(tokens, counts, weighting="importance", **options)[2][mine].double()
        factor = torch.exp(0.7 * picked[mine])
        torch.testing.assert_close(focused, (length + 1) / counts[b] * factor / factor.mean(), rtol=1e-6, atol=0)
    assert draw(tokens, counts, weighting="ce")[2].tolist() == pytest.approx([30 / 17] * 17)


def test_padding_rows_weigh_nothing():
    _, rows, weights = draw(torch.zeros(2, 5, dtype=torch.int64), [2, 1], num_rows=6)
    assert rows[3:].tolist() == [0, 0, 0] and weights[3:].tolist() == [0.0] * 3 and (weights[:3] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_masked": [7]}, r"num_masked\[0\] is 7, but sequence 0 has 6 tokens"),
        ({"num_masked": [-1]}, r"num_masked\[0\] is -1"),
        ({"num_masked": [1, 2]}, r"num_masked must have shape \(1,\)"),
        ({"num_masked": [3], "num_rows": 2}, "num_rows is 2, but num_masked adds up to 3"),
        ({"num_masked": [3], "weighting": "unifrom"}, "did you mean uniform"),
        ({"num_masked": [3], "weighting": "order"}, "needs scores"),
        ({"num_masked": [3], "scores": torch.zeros(1, 5)}, "scores must have shape"),
        ({"num_masked": [3], "backend": "tritn"}, "has no backend 'tritn'"),
    ],
)
def test_bad_input(options, message):
    counts = options.pop("num_masked")
    with pytest.raises(ValueError, match=message):
        draw(torch.zeros(1, 6, dtype=torch.int64), counts, **options)


def test_opcheck():
    tensors = (torch.zeros(3, 7, dtype=torch.int64), torch.tensor([1, 2, 7]))
    seed, step, ids = torch.tensor(1), torch.tensor(2), torch.arange(3)
    for scores, weighting in ((None, "uniform"), (torch.rand(3, 7), "order")):
        torch.library.opcheck(
            torch.ops.atat_fast.mask_tokens.default,
            (*tensors, 12, MASK, scores, 1.0 if scores is not None else 0.0, 0.0, None, None, weighting, seed, step, ids, 0, "torch"),
        )


def test_compiles_whole_and_once():
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph

    def f(tokens, counts, step):
        noisy, rows, weights = mask_tokens(
            tokens, counts, mask_id=MASK, seed=1, step=step, sample_ids=torch.arange(4), num_rows=12
        )
        return noisy, rows, weights

    compiled = torch.compile(f, fullgraph=True, backend=counting)
    tokens = torch.zeros(4, 9, dtype=torch.int64)
    for i, counts in enumerate(([3, 3, 3, 3], [0, 6, 1, 5], [9, 0, 0, 3])):
        got = compiled(tokens, torch.tensor(counts), torch.tensor(i))
        want = f(tokens, torch.tensor(counts), torch.tensor(i))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(calls) == 1
