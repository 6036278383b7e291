"""The bound drawn to a precision: its counts, its masks, its value and its error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.diffusion.bound import estimate_nll
from atat_fast.diffusion.process import MaskedBatch
from atat_fast.errors import UsageError
from atat_fast.evaluation.precision import antithetic_counts, antithetic_pair, estimate_to

MASK = 9


def known_nll(masked):
    """Depends on the token, its place and on how much is hidden around it, as a model's would: [R]."""
    length, rows = masked.noisy.shape[1], masked.rows
    hidden = (masked.noisy == MASK).sum(1)[rows // length].float()
    left = (masked.noisy.flatten()[(rows - 1).clamp(min=0)] == MASK) & (rows % length > 0)
    return masked.target.float() * 0.3 + hidden / length + 0.7 * left.float()


def to(x, *, se=1e-9, most_draws=10_000, batch=16, seed=0, nll=known_nll, **more):
    options = {"mask_id": MASK, "se": se, "most_draws": most_draws, "batch": batch, "seed": seed} | more
    return estimate_to(nll, lambda i, n: x[i : i + n], len(x), **options)


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
    truth, misses = torch.zeros(16, dtype=torch.float64), []
    for k in range(1, 5):
        masks = list(itertools.combinations(range(4), k))
        for chosen, b in itertools.product(map(torch.tensor, masks), range(16)):
            noisy = x[b].index_fill(0, chosen, MASK)[None]
            one = MaskedBatch(noisy, chosen, x[b, chosen], torch.ones(k), torch.tensor([k / 4]), 4)
            truth[b] += known_nll(one).double().sum() / k / len(masks) / 4
    for seed in range(24):
        found = to(x, se=0.015, most_draws=4_000, seed=seed)
        assert found.met and found.estimate.se <= 0.015 and found.draws % 2 == 0
        assert found.se_text > 3 * found.estimate.se  # the sequences differ by far more than their masks do
        misses.append((found.estimate.nll - float(truth.mean())) / found.estimate.se)
        assert torch.allclose(found.estimate.values, truth, atol=0.5)
    assert max(map(abs, misses)) < 4
    assert sum(miss * miss for miss in misses) / len(misses) < 1.8  # 1 in expectation
    wide, narrow, whole = (to(x, se=se, batch=batch) for se, batch in ((0.06, 3), (0.015, 3), (0.015, 16)))
    assert narrow.draws >= 4 * wide.draws and narrow.draws == whole.draws
    assert narrow.estimate.nll == pytest.approx(whole.estimate.nll, rel=1e-12)  # however they are cut


def test_antithetic_pairs_beat_independent_draws():
    """As many forward passes leave less error than the same number of draws, both without control variates."""
    x = torch.randint(0, 8, (1, 8)).expand(16, 8)  # one text: all that varies is masks
    options = {"mask_id": MASK, "draws": 4, "batch": 16, "control": False}
    pairs = torch.tensor([to(x, most_draws=4, seed=seed, control=False).estimate.nll for seed in range(40)])
    plain = [estimate_nll(known_nll, lambda i, n: x[i : i + n], 16, seed=seed, **options).nll for seed in range(40)]
    assert float(pairs.var()) < 0.7 * float(torch.tensor(plain).var())


def test_control_variates_take_off_what_rarity_explains():
    """A loss that is a token's rarity and little else: the same draws, a far smaller error, and the error is still true."""
    x = (torch.rand(24, 12, generator=torch.Generator().manual_seed(2)) ** 3 * 8).long()  # small tokens are common
    rarity = -torch.log(torch.bincount(x.flatten(), minlength=8) / x.numel())
    nll = lambda masked: rarity[masked.target] + 0.1 * known_nll(masked)  # noqa: E731
    plain, ours = (
        [to(x, most_draws=12, batch=7, seed=seed, nll=nll, control=control).estimate for seed in range(12)]
        for control in (False, True)
    )
    assert all(b.se < 0.5 * a.se for a, b in zip(plain, ours, strict=True))
    truth, found = (torch.tensor([e.nll for e in estimates], dtype=torch.float64) for estimates in (plain, ours))
    assert 0.5 < float(found.std()) / (sum(e.se for e in ours) / len(ours)) < 1.7
    assert abs(float(found.mean() - truth.mean())) < 4 * float(truth.std()) / len(truth) ** 0.5


def test_what_cannot_be_reached_is_told():
    x = torch.randint(0, 8, (3, 5))
    short = to(x, se=1e-6, most_draws=6)
    assert not short.met and short.draws == 6 and math.isfinite(short.estimate.se)
    assert to(x, se=100.0, most_draws=60).draws >= 2 * (1 + 60 / 3)  # an error is believed only with some draws behind it
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="must be above 0"):
            to(x, se=bad)
    with pytest.raises(UsageError, match="4 or more, got 3"):
        to(x, most_draws=3)
