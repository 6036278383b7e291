"""Control variates of the held-out bound: no bias, by enumeration of every mask, and less noise where counts explain losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from atat_fast.diffusion.bound import estimate_nll
from atat_fast.diffusion.control import FEATURES, Control, surprisals


def text(sequences=40, length=16, vocabulary=7, seed=0):
    """Tokens with habits: each is mostly a function of the one before."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    habit = torch.rand(sequences, length, generator=generator) < 0.6
    for i in range(1, length):
        x[:, i] = torch.where(habit[:, i], (3 * x[:, i - 1] + 1) % vocabulary, x[:, i])
    return x


def test_surprisals_are_counts_without_their_own_occurrence():
    x = text(6, 5, 4)
    got, n = surprisals(x), x.numel()
    for b, i in itertools.product(range(6), range(5)):
        alone = (int((x == x[b, i]).sum()) - 1 + 1 / (int(x.max()) + 2)) / n
        assert float(got[b, i, 0]) == pytest.approx(-math.log(alone), rel=1e-5)
        for column, step in ((1, -1), (2, 1)):
            pairs = [(int(row[j + step]) if 0 <= j + step < 5 else None, int(row[j])) for row in x for j in range(5)]
            mine = pairs[b * 5 + i]
            both, beside = pairs.count(mine) - 1, [p[0] for p in pairs].count(mine[0]) - 1
            assert float(got[b, i, column]) == pytest.approx(-math.log((both + alone) / (beside + 1)), rel=1e-5)


def adjusted(c, masks, losses):
    """Values of one pass over sequences with these hidden positions, plain and adjusted."""
    k = torch.tensor([len(m) for m in masks])
    rows = torch.tensor([b * c.shape[1] + i for b, m in enumerate(masks) for i in m])
    nll = losses(masks)
    control = Control(len(masks), 1)
    control.add(0, 0, c, rows, nll, k)
    values = torch.zeros(len(masks), 1, dtype=torch.float64).index_add_(0, rows // c.shape[1], nll[:, None].double()) / k[:, None]
    return values, control.adjust(values)


@pytest.mark.parametrize("counts", [(2, 2, 3), (1, 3, 2)])
def test_no_bias_by_enumeration_of_every_mask(counts):
    """Every set of hidden positions of every sequence, with losses that depend on the whole mask: the means are the same, to
    rounding, though hardly any single value is.
    """
    x = text(3, 4, 3)
    c, noise = surprisals(x), torch.rand(3, 16, 4, dtype=torch.float64)

    def losses(masks):
        return torch.cat([noise[b, sum(2**i for i in m), list(m)] + c[b, list(m), 1].double() for b, m in enumerate(masks)])

    plain, ours = [], []
    for masks in itertools.product(*(itertools.combinations(range(4), k) for k in counts)):
        before, after = adjusted(c, masks, losses)
        plain.append(before)
        ours.append(after)
    plain, ours = torch.stack(plain), torch.stack(ours)
    torch.testing.assert_close(plain.mean(0), ours.mean(0), rtol=1e-12, atol=1e-12)
    assert (plain - ours).abs().max() > 0.05


def test_one_fit_for_all_would_be_biased():
    """What the halves are for: applied to the sequences it was fitted on, the fit follows their noise."""
    x = text(2, 4, 3)
    c, noise = surprisals(x), torch.rand(2, 16, 4, dtype=torch.float64)
    plain, own = [], []
    for masks in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        k, rows = torch.tensor([2, 2]), torch.tensor([b * 4 + i for b, m in enumerate(masks) for i in m])
        nll = torch.cat([noise[b, sum(2**i for i in m), list(m)] for b, m in enumerate(masks)])
        control = Control(2, 1)
        control.add(0, 0, c, rows, nll, k)
        control.gram, control.moment = control.gram.flip(0), control.moment.flip(0)
        values = nll.view(2, 2).mean(1, keepdim=True)
        plain.append(values)
        own.append(control.adjust(values))
    assert (torch.stack(plain).mean(0) - torch.stack(own).mean(0)).abs().max() > 1e-3


def losses_of(x, share=0.9):
    """A model that pays for what comes after what, and some noise of its own."""
    c, noise = surprisals(x)[..., 1], torch.rand(x.shape, generator=torch.Generator().manual_seed(5))

    def nll(masked):
        known = masked.noisy.flatten().index_copy(0, masked.rows, masked.target).view_as(masked.noisy)
        place = torch.tensor([int((x == row).all(1).nonzero()[0]) for row in known])
        rows = place[masked.rows // x.shape[1]] * x.shape[1] + masked.rows % x.shape[1]
        return (share * c.flatten()[rows] + noise.flatten()[rows]) * (1 + masked.hidden_share[masked.rows // x.shape[1]])

    return nll


@pytest.mark.parametrize("draws", [1, 2])
def test_less_noise_from_the_same_passes(draws):
    x = text()
    nll = losses_of(x)

    def estimate(seed, control, batch=40):
        found = estimate_nll(
            nll, lambda f, n: x[f : f + n], len(x), mask_id=9, draws=draws, batch=batch, seed=seed, control=control
        )
        return found.nll

    plain, ours = (
        torch.tensor([estimate(seed, control) for seed in range(40)], dtype=torch.float64) for control in (False, True)
    )
    assert float(ours.std()) < 0.6 * float(plain.std())
    error = math.hypot(float(ours.std()), float(plain.std())) / math.sqrt(40)
    assert abs(float((ours - plain).mean())) < 4 * error
    assert estimate(3, True, batch=7) == pytest.approx(float(ours[3]), rel=1e-12)


def test_what_does_not_vary_is_left_alone():
    """Losses that are all the same, one sequence, and masks of everything: nothing to explain, nothing changed."""
    x = text()
    for data in (x, x[:1], torch.zeros(8, 16, dtype=torch.int64)):
        found = estimate_nll(
            lambda m: torch.full((len(m.rows),), 2.5),
            lambda f, n, d=data: d[f : f + n],
            len(data),
            mask_id=9,
            draws=1,
            batch=3,
            seed=0,
        )
        assert found.nll == pytest.approx(2.5, rel=1e-9)
    c = surprisals(x)
    values, after = adjusted(c, [tuple(range(16))] * 40, lambda masks: torch.rand(40 * 16).double())
    torch.testing.assert_close(values, after)
    assert c.shape == (40, 16, FEATURES) and c.isfinite().all() and (c[..., 1:] >= 0).all()
