"""Draws: top-k, top-p and temperature, what can never be drawn, and how sure a row is."""

from __future__ import annotations

import pytest
import torch
from exact import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_dit

from atat_fast.sampling.categorical import (
    Cut,
    certainty,
    certainty_of,
    draw_shortlisted,
    likeliest,
    log_chance,
    make_drawer,
    output_head,
    shortlist,
)

SEED, STEP = torch.tensor(3), torch.tensor(0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    ids=st.integers(1, 30),
    top_k=st.integers(0, 35),
    top_p=st.floats(0.01, 0.99) | st.just(1.0),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    seed=st.integers(0, 99),
)
def test_the_shortlist_is_the_fewest_likeliest(rows, ids, top_k, top_p, temperature, seed):
    logits = 3 * torch.randn(rows, ids, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, kept = shortlist(logits, Cut(temperature, top_k, top_p))
    for row in range(rows):
        order = sorted(range(ids), key=lambda v, row=row: -float(logits[row, v]))[: top_k or ids]
        sums = torch.softmax(logits[row, order] / temperature, 0).cumsum(0)
        count = len(order) if top_p == 1 else min(1 + int((sums < top_p - 1e-12).sum()), len(order))
        got = kept[row][values[row] > -torch.inf].tolist()
        assert got == order[: len(got)] and abs(len(got) - count) <= (abs(float(sums[count - 1]) - top_p) < 1e-9)
        torch.testing.assert_close(values[row, : len(got)], logits[row, got] / temperature)


@pytest.mark.parametrize("cut", [Cut(top_k=3), Cut(top_p=0.8), Cut(0.5, 4, 0.9), Cut(2.0)])
def test_draws_follow_what_is_left(cut):
    p = torch.tensor([0.4, 0.0, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    drawn = draw_shortlisted(p.log().expand(20_000, 6), torch.arange(20_000), cut, SEED, STEP)
    values, ids = shortlist(p.log()[None], cut)
    law = torch.zeros(6, dtype=torch.float64).index_add_(0, ids[0], torch.softmax(values[0], 0))
    assert law[1] == 0 and chi_square(torch.bincount(drawn, minlength=6), law) < 5


def test_what_is_cut_off_does_not_change_the_noise_of_the_rest():
    logits, names = torch.randn(200, 50), torch.arange(200)
    every, few = (draw_shortlisted(logits, names, cut, SEED, STEP) for cut in (Cut(), Cut(top_k=10)))
    inside = (logits.topk(10).indices == every[:, None]).any(1)
    assert 20 < int(inside.sum()) < 200 and torch.equal(every[inside], few[inside])


def test_rows_that_hold_no_numbers():
    logits = torch.tensor([[0.0, torch.nan, 1.0], [-torch.inf] * 3, [0.0, 1.0, 2.0]])
    for cut in (Cut(), Cut(top_k=2), Cut(top_p=0.9)):
        drawn = draw_shortlisted(logits, torch.arange(3), cut, SEED, STEP)
        assert drawn[:2].tolist() == [-1, -1] and drawn[2] >= 0


def test_the_likeliest_of_equals_is_the_lowest_id():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [torch.nan, 1.0, 0.0, 0.0], [-torch.inf] * 4, [-torch.inf, -9.0, -9.0, -10.0]])
    assert likeliest(logits).tolist() == [1, -1, -1, 1]


def test_certainty():
    p = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    top = p.sort(1, descending=True).values
    want = {"confidence": top[:, 0].log(), "entropy": torch.special.xlogy(p, p).sum(1), "margin": top[:, 0] - top[:, 1]}
    for order, value in want.items():
        torch.testing.assert_close(certainty_of(p.log() + 5, order).double(), value, rtol=0, atol=1e-6)


def test_a_head_that_is_shown_stores_no_logits_and_says_the_same():
    model = small_dit(50, 0)
    torch.nn.init.normal_(model.head.weight)
    features, names, ids = torch.randn(40, 16), torch.arange(40), torch.randint(1, 50, (40,))
    head = output_head(model, features)
    for order in ("confidence", "entropy", "margin"):
        shown = certainty(model, features, order, head)
        torch.testing.assert_close(shown, certainty(model, features, order), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        fused = make_drawer(model, Cut(0.7), SEED)(features, names, STEP)
        stored = draw_shortlisted(model.logits(features), names, Cut(0.7), SEED, STEP)
        assert torch.equal(fused, stored) and (fused != 0).all()
        want = torch.log_softmax(model.logits(features), 1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(log_chance(model, features, ids), want)
