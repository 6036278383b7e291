"""Which positions are revealed when: the laws of plans, schedules of counts, and the tools policies are made of."""

from __future__ import annotations

import itertools
import math

import torch
from exact import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.sampling.graphs import rounded_up
from atat_fast.sampling.reveal import (
    POSITIONS,
    TIE,
    ancestral_times,
    even_counts,
    first_hitting_times,
    largest,
    reveal_words,
    surest,
)


def named(batch, length):
    return torch.arange(batch)[:, None] * POSITIONS + torch.arange(length)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 5000))
def test_each_step_has_the_same_share_of_the_random_words(steps):
    """A word w gives step floor(w S / 2^32): the words of each step are consecutive, and as many to within one of 2^32 / S."""
    edges = [-(-(step << 32) // steps) for step in range(steps + 1)]  # the first word of each step
    assert all(abs(b - a - 2**32 / steps) < 1 for a, b in itertools.pairwise(edges))
    words = torch.tensor(edges[:-1] + [e - 1 for e in edges[1:]])
    got = words * steps >> 32
    assert got.tolist() == [*range(steps), *range(steps)]


def test_ancestral_times_are_uniform_and_independent():
    fill, names = torch.ones(400, 25, dtype=torch.bool), named(400, 25)
    fill[:, 3] = False
    times = ancestral_times(fill, names, 8, seed=3)
    assert (times[:, 3] == -1).all()
    for seen in (times[:, 4:].flatten(), times[:, 4] * 8 + times[:, 5]):
        outcomes = 8 if len(seen) > 400 else 64
        assert chi_square(torch.bincount(seen, minlength=outcomes), torch.full((outcomes,), 1 / outcomes)) < 4
    for seed in (3, 4):
        assert torch.equal(times, ancestral_times(fill, names, 8, seed=seed)) == (seed == 3)


def test_first_hitting_is_where_many_ancestral_steps_lead():
    """The same seed, the same order: with so many steps that no two tokens share one, both reveal one after another alike."""
    fill = torch.rand(6, 30) < 0.7
    names = named(6, 30)
    times, clocks, calls = first_hitting_times(fill, names, 1000, seed=1)
    fine = ancestral_times(fill, names, 1 << 30, seed=1)
    hidden = fill.sum(1)
    assert calls == int(hidden.max()) and clocks.shape == (calls, 6)
    for b in range(6):
        own = fine[b][fill[b]].argsort()
        assert torch.equal(times[b][fill[b]][own], torch.arange(hidden[b]))
        clock = clocks[: hidden[b], b]
        hit = (1 - (reveal_words(names, 1)[b][fill[b]][own].double() + 0.5) / 2**32) * hidden[b] / 30
        torch.testing.assert_close(clock, hit)
        assert (clock.diff() < 0).all() and (clocks[hidden[b] :, b] == 0).all()


def test_hitting_times_are_the_order_statistics_of_the_first_hitting_sampler():
    """The first of n times is distributed as u^(1/n), and each next one, over the one before, as u^(1/(n-1)), ..."""
    fill = torch.ones(4000, 3, dtype=torch.bool)
    _, clocks, _ = first_hitting_times(fill, named(4000, 3), 3, seed=5)
    before = torch.ones(4000, dtype=torch.float64)
    for n, clock in zip((3, 2, 1), clocks, strict=True):
        u = ((clock / before) ** n).sort().values
        assert float((u - (torch.arange(4000) + 0.5) / 4000).abs().max()) < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov, 1 %
        before = clock


@settings(max_examples=100, deadline=None)
@given(hidden=st.lists(st.integers(0, 40), min_size=1, max_size=4), steps=st.integers(1, 50))
def test_even_counts(hidden, steps):
    counts = even_counts(torch.tensor(hidden), steps)
    assert counts.shape == (steps, len(hidden)) and counts.sum(0).tolist() == hidden
    for b, n in enumerate(hidden):
        calls = min(steps, n)
        used = counts[:, b]
        assert (used[calls:] == 0).all() and (calls == 0 or int(used[:calls].max() - used[:calls].min()) <= 1)
    fill = torch.arange(40) < torch.tensor(hidden)[:, None]
    times, _, calls = first_hitting_times(fill, named(len(hidden), 40), steps, seed=0)
    for b in range(len(hidden)):
        assert torch.equal(torch.bincount(times[b][fill[b]], minlength=steps)[:steps], counts[:, b])


@settings(max_examples=50, deadline=None)
@given(data=st.data(), length=st.integers(1, 20))
def test_largest_takes_that_many_and_the_first_of_equals(data, length):
    keys = torch.tensor([data.draw(st.lists(st.integers(-3, 3), min_size=length, max_size=length)) for _ in range(3)]).double()
    counts = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=3, max_size=3)))
    for row, count, chosen in zip(keys.tolist(), counts.tolist(), largest(keys, counts), strict=True):
        order = sorted(range(length), key=lambda i, row=row: (-row[i], i))
        assert sorted(order[:count]) == chosen.nonzero()[:, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 16))
def test_the_surest_come_first_and_equals_from_left_to_right(data, length):
    draw = lambda kind: torch.tensor(data.draw(st.lists(kind, min_size=3 * length, max_size=3 * length))).view(3, length)  # noqa: E731
    ties, noise, hidden = draw(st.integers(0, 40)), draw(st.floats(0.05, 0.95)), draw(st.booleans())
    counts = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=3, max_size=3)))
    below = (ties + noise).masked_fill(~hidden, 99)
    below -= below.amin(1, keepdim=True)  # how many TIEs below the surest
    chosen = surest((-below.double() * TIE).float(), hidden, counts)
    for b in range(3):
        places = hidden[b].nonzero()[:, 0].tolist()
        if ((below[b, places] - below[b, places].round()).abs() > 1e-2).logical_or(below[b, places] == 0).all():
            # not where fp32 may round to the other side
            order = sorted(places, key=lambda i, b=b: (float((below[b, i] + 1e-3).floor()), i))
            assert sorted(order[: counts[b]]) == chosen[b].nonzero()[:, 0].tolist()


def test_rounding_does_not_choose_among_equals():
    torch.manual_seed(0)
    for length in (3, 50, 1024):
        certainties = -5.5 + 2e-6 * torch.rand(4, length)
        for count in (1, 3):
            chosen = surest(certainties, torch.ones(4, length, dtype=torch.bool), torch.full((4,), count))
            assert chosen.nonzero()[:, 1].tolist() == 4 * [*range(count)]
    far = torch.tensor([[-200.0, -0.5, -torch.inf, -0.5, torch.nan]])
    hidden = torch.tensor([[True, True, True, True, False]])
    ranks = [surest(far, hidden, torch.tensor([count])).nonzero()[:, 1].tolist() for count in range(6)]
    assert ranks == [[], [1], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_sizes_are_rounded_up_by_at_most_a_half():
    for count in (*range(70), 1000, 32768, 99999):
        assert count <= rounded_up(count) <= 1.5 * count and rounded_up(rounded_up(count)) == rounded_up(count)
    assert len({rounded_up(n) for n in range(1, 1025)}) <= 21
