"""Draws: top-k, top-p and temperature, what can never be drawn, and how sure a row is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.config import ModelConfig
from atat_fast.models import DiT
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
    rows=st.integers(1, 4), ids=st.integers(1, 30), top_k=st.integers(0, 35), top_p=st.floats(0.01, 0.99) | st.just(1.0),
    temperature=st.sampled_from([0.3, 1.0, 2.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_shortlist_is_the_fewest_likeliest(rows, ids, top_k, top_p, temperature, seed):
    logits = 3 * torch.randn(rows, ids, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values, kept = shortlist(logits, Cut(temperature, top_k, top_p))
    for row in range(rows):
        order = sorted(range(ids), key=lambda v, row=row: -float(logits[row, v]))[: top_k or ids]
        shares = torch.softmax(logits[row, order] / temperature, 0)
        count = (
            len(order)
            if top_p == 1
            else next((n for n in range(1, len(order) + 1) if float(shares[:n].sum()) >= top_p - 1e-12), len(order))
        )
        got = kept[row][values[row] > -torch.inf].tolist()
        assert got == order[: len(got)] and abs(len(got) - count) <= (abs(float(shares[:count].sum()) - top_p) < 1e-9)
        torch.testing.assert_close(values[row, : len(got)], logits[row, got] / temperature)


@pytest.mark.parametrize("cut", [Cut(top_k=3), Cut(top_p=0.8), Cut(0.5, 4, 0.9), Cut(2.0)])
def test_draws_follow_what_is_left(cut):
    p = torch.tensor([0.4, 0.0, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    trials = 20_000
    drawn = draw_shortlisted(p.log().expand(trials, 6), torch.arange(trials), cut, SEED, STEP)
    values, ids = shortlist(p.log()[None], cut)
    law = torch.zeros(6, dtype=torch.float64).index_add_(0, ids[0], torch.softmax(values[0], 0))
    seen = torch.bincount(drawn, minlength=6)
    assert (seen[law == 0] == 0).all() and law[1] == 0
    expected = trials * law[law > 0]
    chi2 = float(((seen[law > 0] - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * max(1, degrees))


def test_what_is_cut_off_does_not_change_the_noise_of_the_rest():
    logits = torch.randn(200, 50)
    names = torch.arange(200)
    every = draw_shortlisted(logits, names, Cut(), SEED, STEP)
    few = draw_shortlisted(logits, names, Cut(top_k=10), SEED, STEP)
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
    logits = p.log() + 5
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(certainty_of(logits, "confidence").double(), p.amax(1).log(), **close)
    entropy = -torch.where(p > 0, p * p.clamp(min=1e-30).log(), 0.0).sum(1)
    torch.testing.assert_close(certainty_of(logits, "entropy").double(), -entropy, **close)
    torch.testing.assert_close(certainty_of(logits, "margin").double(), torch.tensor([0.5, 0.25, 1.0]).double(), **close)


def test_a_head_that_is_shown_stores_no_logits_and_says_the_same():
    torch.manual_seed(0)
    model = DiT(50, 0, **vars(ModelConfig(dim=16, layers=1, heads=2, length=8, conditioning_dim=8)))
    torch.nn.init.normal_(model.head.weight)
    features = torch.randn(40, 16)
    head = output_head(model, features)
    for order in ("confidence", "entropy", "margin"):
        torch.testing.assert_close(
            certainty(model, features, order, head), certainty(model, features, order), rtol=1e-5, atol=1e-5
        )
    names, ids = torch.arange(40), torch.randint(1, 50, (40,))
    with torch.no_grad():
        fused = make_drawer(model, Cut(0.7), SEED)(features, names, STEP)
        stored = draw_shortlisted(model.logits(features), names, Cut(0.7), SEED, STEP)
        assert torch.equal(fused, stored) and (fused != 0).all()
        want = torch.log_softmax(model.logits(features), 1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(log_chance(model, features, ids), want)
