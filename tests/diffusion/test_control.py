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


def adjusted(c, masks, losses, swap=False):
    """Values of one pass over sequences with these hidden positions, plain and adjusted. swap: by the fit on the sequences
    themselves, not on the others.
    """
    k = torch.tensor([len(m) for m in masks])
    rows = torch.tensor([b * c.shape[1] + i for b, m in enumerate(masks) for i in m])
    nll, control = losses(masks), Control(len(masks), 1)
    control.add(0, 0, c, rows, nll, k)
    if swap:
        control.gram, control.moment = control.gram.flip(0), control.moment.flip(0)
    values = torch.zeros(len(masks), 1, dtype=torch.float64).index_add_(0, rows // c.shape[1], nll[:, None].double()) / k[:, None]
    return values, control.adjust(values)


@pytest.mark.parametrize(("counts", "swap"), [((2, 2, 3), False), ((1, 3, 2), False), ((2, 2), True)])
def test_no_bias_by_enumeration_of_every_mask_and_one_fit_for_all_would_have_some(counts, swap):
    """Every set of hidden positions of every sequence, with losses that depend on the whole mask: the means are the same, to
    rounding, though hardly any single value is. Applied to the sequences it was fitted on, a fit follows their noise.
    """
    c, noise = surprisals(text(len(counts), 4, 3)), torch.rand(len(counts), 16, 4, dtype=torch.float64)

    def losses(masks):
        pay = 0 if swap else c[..., 1].double()
        return torch.cat([(noise[b, sum(2**i for i in m)] + (pay if swap else pay[b]))[list(m)] for b, m in enumerate(masks)])

    every = itertools.product(*(itertools.combinations(range(4), k) for k in counts))
    plain, ours = (torch.stack(values) for values in zip(*(adjusted(c, m, losses, swap) for m in every), strict=True))
    bias = float((plain.mean(0) - ours.mean(0)).abs().max())
    assert bias > 1e-3 if swap else bias < 1e-12
    assert (plain - ours).abs().max() > 0.05


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


@pytest.mark.parametrize("draws", [1, 2])
def test_less_noise_from_the_same_passes(draws):
    """For a model that pays for what comes after what, and some noise of its own."""
    x = text()
    c, noise = surprisals(x)[..., 1], torch.rand(x.shape, generator=torch.Generator().manual_seed(5))

    def nll(masked):
        known = masked.noisy.flatten().index_copy(0, masked.rows, masked.target).view_as(masked.noisy)
        place = torch.tensor([int((x == row).all(1).nonzero()[0]) for row in known])
        rows = place[masked.rows // x.shape[1]] * x.shape[1] + masked.rows % x.shape[1]
        return (0.9 * c.flatten()[rows] + noise.flatten()[rows]) * (1 + masked.hidden_share[masked.rows // x.shape[1]])

    def estimate(seed, control, batch=40):
        options = {"mask_id": 9, "draws": draws, "batch": batch, "seed": seed, "control": control}
        return estimate_nll(nll, lambda f, n: x[f : f + n], len(x), **options).nll

    plain, ours = (torch.tensor([estimate(s, control) for s in range(40)], dtype=torch.float64) for control in (False, True))
    assert float(ours.std()) < 0.6 * float(plain.std())
    error = math.hypot(float(ours.std()), float(plain.std())) / math.sqrt(40)
    assert abs(float((ours - plain).mean())) < 4 * error
    assert estimate(3, True, batch=7) == pytest.approx(float(ours[3]), rel=1e-12)


def test_what_does_not_vary_is_left_alone():
    """Losses that are all the same, one sequence, and masks of everything: nothing to explain, nothing changed."""
    x, options = text(), {"mask_id": 9, "draws": 1, "batch": 3, "seed": 0}
    for data in (x, x[:1], torch.zeros(8, 16, dtype=torch.int64)):
        constant = lambda m: torch.full((len(m.rows),), 2.5)  # noqa: E731
        found = estimate_nll(constant, lambda f, n, d=data: d[f : f + n], len(data), **options)
        assert found.nll == pytest.approx(2.5, rel=1e-9)
    c = surprisals(x)
    torch.testing.assert_close(*adjusted(c, [tuple(range(16))] * 40, lambda masks: torch.rand(40 * 16).double()))
    assert c.shape == (40, 16, FEATURES) and c.isfinite().all() and (c[..., 1:] >= 0).all()
