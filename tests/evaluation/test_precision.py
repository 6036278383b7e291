"""The bound drawn to a precision: its counts, its masks, its value and its error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.diffusion.bound import estimate_nll
from atat_fast.errors import UsageError
from atat_fast.evaluation.precision import antithetic_counts, antithetic_pair, estimate_to

MASK = 9


def known_nll(masked):
    """Depends on the token, its place and on how much is hidden around it, as a model's would: [R]."""
    length = masked.noisy.shape[1]
    rows = masked.rows
    hidden = (masked.noisy == MASK).sum(1)[rows // length].float()
    left = torch.where(rows % length > 0, masked.noisy.flatten()[(rows - 1).clamp(min=0)], 0) == MASK
    return masked.target.float() * 0.3 + hidden / length + 0.7 * left.float() * (rows % length > 0)


def exact(x):
    """The bound of each sequence, nats a token, over every mask there is."""
    from atat_fast.diffusion.process import MaskedBatch

    length, values = x.shape[1], torch.zeros(len(x), dtype=torch.float64)
    for k in range(1, length + 1):
        masks = list(itertools.combinations(range(length), k))
        for chosen in masks:
            for b in range(len(x)):
                rows = torch.tensor(chosen)
                noisy = x[b : b + 1].clone()
                noisy[0, rows] = MASK
                one = MaskedBatch(noisy, rows, x[b, rows], torch.ones(k), torch.tensor([k / length]), length)
                values[b] += known_nll(one).double().sum() / k / len(masks) / length
    return values


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_counts_fill_the_strata(sequences, length, seed, step):
    k = antithetic_counts(sequences, length, seed=seed, step=step)
    assert k.min() >= 1 and k.max() <= length
    order = torch.sort(k).values
    strata = torch.arange(sequences, dtype=torch.float64) / sequences * length
    assert bool((order >= 1 + strata.floor()).all()) and bool((order <= 1 + (strata + length / sequences)).all())
    if sequences % length == 0:
        assert torch.equal(torch.bincount(k, minlength=length + 1)[1:], torch.full((length,), sequences // length))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 6), st.data())
def test_the_two_masks_of_a_pair_cover_the_sequence_and_share_one_token(length, batch, data):
    x = torch.randint(0, 8, (batch, length))
    k = torch.tensor(data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch)))
    first, second = antithetic_pair(x, k, mask_id=MASK, sample_ids=torch.arange(batch), seed=3, step=data.draw(st.integers(0, 9)))
    one, two = first.noisy == MASK, second.noisy == MASK
    assert torch.equal(one.sum(1), k) and torch.equal(two.sum(1), length + 1 - k)
    assert bool((one | two).all()) and torch.equal((one & two).sum(1), torch.ones(batch, dtype=torch.int64))
    for masked, hidden in ((first, one), (second, two)):
        assert torch.equal(masked.noisy, x.masked_fill(hidden, MASK))
        assert torch.equal(masked.rows, hidden.flatten().nonzero().flatten())
        assert torch.equal(masked.target, x.flatten()[masked.rows])
        assert torch.allclose(masked.hidden_share, hidden.float().mean(1))


def test_the_value_is_the_bounds_and_the_error_is_the_masks():
    """Against every mask there is: errors are asked for, met, and true; the text's own spread is no part of them."""
    x = torch.randint(0, 8, (16, 4), generator=torch.Generator().manual_seed(1))
    truth = exact(x)
    misses = []
    for seed in range(24):
        found = estimate_to(
            known_nll, lambda i, n: x[i : i + n], len(x), mask_id=MASK, se=0.015, most_draws=4_000, batch=16, seed=seed
        )
        assert found.met and found.estimate.se <= 0.015 and found.draws % 2 == 0
        assert found.se_text > 3 * found.estimate.se  # the sequences differ by far more than their masks do
        misses.append((found.estimate.nll - float(truth.mean())) / found.estimate.se)
        assert torch.allclose(found.estimate.values, truth, atol=0.5)
    assert max(map(abs, misses)) < 4
    assert sum(miss * miss for miss in misses) / len(misses) < 1.8  # 1 in expectation


def test_a_smaller_error_takes_more_draws_and_batches_do_not_matter():
    x = torch.randint(0, 8, (10, 6))
    runs = [
        estimate_to(known_nll, lambda i, n: x[i : i + n], 10, mask_id=MASK, se=se, most_draws=10_000, batch=batch, seed=0)
        for se, batch in ((0.06, 3), (0.015, 3), (0.015, 10))
    ]
    assert runs[1].draws >= 4 * runs[0].draws and runs[1].estimate.se <= 0.015
    assert runs[1].draws == runs[2].draws and runs[1].estimate.nll == pytest.approx(runs[2].estimate.nll, rel=1e-12)


def test_antithetic_pairs_beat_independent_draws():
    """As many forward passes leave less error than the same number of draws, both without control variates."""
    x = torch.randint(0, 8, (1, 8)).expand(16, 8)  # one text: all that varies is masks

    def tokens(i, n):
        return x[i : i + n]

    def spread(one):
        return float(torch.tensor([one(seed) for seed in range(40)], dtype=torch.float64).var())

    def pairs(seed):
        return estimate_to(
            known_nll, tokens, 16, mask_id=MASK, se=1e-9, most_draws=4, batch=16, seed=seed, control=False
        ).estimate.nll

    def plain(seed):
        return estimate_nll(known_nll, tokens, 16, mask_id=MASK, draws=4, batch=16, seed=seed, control=False).nll

    assert spread(pairs) < 0.7 * spread(plain)


def test_control_variates_take_off_what_rarity_explains():
    """A loss that is a token's rarity and little else: the same draws, a far smaller error, and the error is still true."""
    x = (torch.rand(24, 12, generator=torch.Generator().manual_seed(2)) ** 3 * 8).long()  # small tokens are common

    rarity = -torch.log(torch.bincount(x.flatten(), minlength=8) / x.numel())

    def nll(masked):
        return rarity[masked.target] + 0.1 * known_nll(masked)

    def run(seed, control):
        return estimate_to(
            nll, lambda i, n: x[i : i + n], 24, mask_id=MASK, se=1e-9, most_draws=12, batch=7, seed=seed, control=control
        ).estimate

    plain, ours = ([run(seed, control) for seed in range(12)] for control in (False, True))
    assert all(b.se < 0.5 * a.se for a, b in zip(plain, ours, strict=True))
    spread = torch.tensor([e.nll for e in ours], dtype=torch.float64)
    assert 0.5 < float(spread.std()) / (sum(e.se for e in ours) / len(ours)) < 1.7
    truth = torch.tensor([e.nll for e in plain], dtype=torch.float64)
    assert abs(float(spread.mean() - truth.mean())) < 4 * float(truth.std()) / len(truth) ** 0.5


def test_what_cannot_be_reached_is_told():
    x = torch.randint(0, 8, (3, 5))

    def run(**changes):
        options = {"se": 0.01, "most_draws": 60, "batch": 3, "seed": 0} | changes
        return estimate_to(known_nll, lambda i, n: x[i : i + n], 3, mask_id=MASK, **options)

    short = run(se=1e-6, most_draws=6)
    assert not short.met and short.draws == 6 and math.isfinite(short.estimate.se)
    assert run(se=100.0).draws >= 2 * (1 + 60 / 3)  # an error is believed only with some draws behind it
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="must be above 0"):
            run(se=bad)
    with pytest.raises(UsageError, match="4 or more, got 3"):
        run(most_draws=3)
