"""Masks by importance: exactly k, the two-stage law, what it may depend on, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from exact import chi_square
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from atat_fast.audit.masks import frequency_example, importance_law, learned_example
from atat_fast.config import CurriculumConfig, DiffusionConfig, ImportanceConfig
from atat_fast.diffusion.adaptive import (
    MOST_TILT,
    BadScores,
    bias,
    check_importance,
    context_counts,
    hide_by_importance,
    relative_weights,
)
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.process import Scored
from atat_fast.errors import UsageError

MASK = 99


def scorer(seen, clean, share):
    """A function of what may be seen, with the mask as another id."""
    left, right = seen.roll(1, 1), seen.roll(-1, 1)
    return Scored(torch.remainder(3 * seen + 5 * left + 7 * right + (10 * share[:, None]).long(), 11).float() / 10)


def hide(tokens, counts, *, sees="visible", rho=0.5, tilt=3.0, focus=1.0, score=scorer, ids=None, step=0, weighting="uniform"):
    counts = torch.as_tensor(counts)
    ids = torch.arange(len(tokens)) if ids is None else ids
    return hide_by_importance(
        tokens,
        counts,
        score=score,
        sees=sees,
        rho=rho,
        tilt=tilt,
        focus=focus,
        mask_id=MASK,
        sample_ids=ids,
        seed=5,
        step=step,
        weighting=weighting,
    )


@given(
    st.integers(1, 24),
    st.floats(0.01, 1.0),
    st.sampled_from(["visible", "clean"]),
    st.sampled_from([-4.0, 0.0, 2.0, 40.0]),
    st.integers(0, 10**6),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_exactly_k_are_hidden(length, rho, sees, tilt, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (5, length), generator=generator)
    counts = torch.randint(0, length + 1, (5,), generator=generator)
    counts[:2] = torch.tensor([0, length])
    batch = hide(tokens, counts, sees=sees, rho=rho, tilt=tilt, step=seed)
    hidden = batch.noisy == MASK
    assert torch.equal(hidden.sum(1), counts) and batch.hidden == int(counts.sum()) == len(batch.rows)
    assert torch.equal(hidden.flatten().nonzero().flatten(), batch.rows)
    assert torch.equal(batch.target, tokens.flatten()[batch.rows]) and torch.equal(tokens[~hidden], batch.noisy[~hidden])
    outer = context_counts(counts, length, rho)
    assert (outer >= counts).all() and (outer <= length).all()


@pytest.mark.parametrize("tilt", [0.0, 2.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_two_stage_law_is_the_one_that_is_audited(tilt, k):
    """Frequencies of 6,000 masks against enumeration; with tilt 0 that law is uniform."""
    trials, length = 6000, 4
    x = torch.tensor([0, 2, 1, 2])
    score = lambda seen, clean, share: Scored(learned_example(torch.where(seen == MASK, -1, seen), clean, k).float())  # noqa: E731
    batch = hide(x.expand(trials, length), [k] * trials, tilt=tilt, score=score)
    law = importance_law(learned_example, sees="visible", tilt=tilt)(x[None], k)
    assert tilt or all(float(p[0, 0]) == pytest.approx(1 / math.comb(length, k)) for p in law.values())
    chances = {tuple(i in hidden for i in range(length)): float(p[0, 0]) for hidden, p in law.items()}
    assert chi_square(batch.noisy == MASK, chances) < 5


@pytest.mark.parametrize("sees", ["visible", "clean", "a frequency"])
def test_masks_depend_on_hidden_tokens_only_where_scores_are_clean(sees):
    """Every hidden token's id is changed: the same masks, unless the scores looked. A frequency is of a clean token."""
    tokens, counts = torch.randint(0, 11, (64, 20)), torch.randint(1, 20, (64,))
    known = lambda seen, clean, share: Scored(clean.float() / 10)  # noqa: E731
    options = {"score": known} if sees == "a frequency" else {"sees": sees}
    before = hide(tokens, counts, **options)
    hidden = before.noisy == MASK
    after = hide(torch.where(hidden, (tokens + 4) % 11, tokens), counts, **options)
    same = torch.equal(hidden, after.noisy == MASK)
    assert same == (sees == "visible") == torch.equal(before.importance.scores, after.importance.scores)


def test_masks_are_a_function_of_seed_step_sample_and_position():
    tokens, counts, ids = torch.randint(0, 11, (8, 20)), torch.arange(4, 12), torch.arange(100, 108)
    whole = hide(tokens, counts, ids=ids, step=3)
    parts = [hide(tokens[i : i + 2], counts[i : i + 2], ids=ids[i : i + 2], step=3) for i in range(0, 8, 2)]
    assert torch.equal(whole.noisy, torch.cat([part.noisy for part in parts]))
    for change in ({"step": 4}, {"ids": ids + 8}):
        assert not torch.equal(whole.noisy, hide(tokens, counts, **{"ids": ids, "step": 3} | change).noisy)


def test_the_stages_draw_from_streams_of_their_own():
    """With one stream for both, the tokens that stay hidden would be those of the lowest words, as in one stage."""
    from atat_fast.ops import mask_tokens

    tokens, counts = torch.zeros(200, 20, dtype=torch.int64), torch.full((200,), 8)
    nothing = lambda seen, clean, share: Scored(torch.zeros_like(seen, dtype=torch.float32))  # noqa: E731
    two = hide(tokens, counts, tilt=0.0, score=nothing)
    one, _, _ = mask_tokens(tokens, counts, mask_id=MASK, seed=5, step=0, sample_ids=torch.arange(200))
    both = ((two.noisy == MASK) & (one == MASK)).sum(1).double().mean()
    # One stage keeps the 8 lowest of 20; two keep 8 of the 14 lowest at random: 8 * 8 / 14 in common.
    assert float(both) == pytest.approx(64 / 14, abs=0.35)


def test_a_positive_tilt_hides_hard_tokens_and_a_negative_one_easy_ones():
    tokens, counts, means = torch.arange(20).expand(300, 20) % 10, torch.full((300,), 6), {}
    score = lambda seen, clean, share: Scored(torch.arange(20).expand(300, 20) / 20)  # noqa: E731
    ones = lambda seen, clean, share: Scored(torch.ones_like(seen, dtype=torch.float32))  # noqa: E731
    for tilt in (-MOST_TILT, -4.0, 0.0, 4.0, MOST_TILT):
        batch = hide(tokens, counts, tilt=tilt, score=score)
        means[tilt] = float(batch.importance.scores.flatten()[batch.rows].mean())
        # and it is still chance between equal scores, at the limit too, where keys in fp32 are coarse
        equal = hide(torch.zeros(400, 64, dtype=torch.int64), torch.full((400,), 32), tilt=tilt, score=ones).noisy == MASK
        assert float(equal[:, :32].double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(400 * 32))
    assert means[-4.0] < means[0.0] - 0.1 and means[4.0] > means[0.0] + 0.1
    assert means[0.0] == pytest.approx(0.475, abs=0.03)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5, math.inf])
def test_scores_that_are_invalid_are_refused(bad):
    score = lambda seen, clean, share: Scored(torch.where(torch.arange(12).view(2, 6) == 0, bad, 0.5))  # noqa: E731
    words = "hold NaN" if math.isnan(bad) else "run from"
    with pytest.raises(BadScores, match=f"importance scores {words}.*must lie in 0 to 1"):
        hide(torch.zeros(2, 6, dtype=torch.int64), [1, 2], score=score)


@pytest.mark.parametrize(("weighting", "tilt", "focus"), [("importance", 2.0, 1.5), ("order", 2.0, 0.0), ("order", -3.0, 0.0)])
def test_weights_are_relative_to_the_bounds_own(weighting, tilt, focus):
    tokens, counts = torch.randint(0, 11, (8, 20)), torch.tensor([0, 1, 5, 10, 15, 19, 20, 3])
    batch = hide(tokens, counts, tilt=tilt, focus=focus, weighting=weighting)
    plain = hide(tokens, counts, tilt=tilt, focus=focus)
    exponent = focus if weighting == "importance" else -tilt
    relative = relative_weights(batch.importance.scores, batch.noisy == MASK, exponent)
    torch.testing.assert_close(batch.weights, plain.weights * relative.flatten()[batch.rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relative.sum(1), counts.float(), rtol=1e-5, atol=1e-5)
    assert relative.isfinite().all()


def test_bernoulli_weights_have_the_rate_in_the_place_of_the_count():
    tokens = torch.randint(0, 11, (6, 20))
    place = {"first": 0, "total": 6, "mask_id": MASK, "sample_ids": torch.arange(6), "seed": 1, "step": 2}

    def choose(tokens, counts, **settings):
        return hide_by_importance(tokens, counts, score=scorer, sees="visible", rho=0.5, tilt=2.0, focus=1.0, **settings)

    plain = hide_for_training(tokens, DiffusionConfig(masking="bernoulli"), **place)
    for weighting, exponent in (("uniform", 0.0), ("importance", 1.0), ("order", -2.0), ("ce", None)):
        config = DiffusionConfig(masking="bernoulli", weighting=weighting)
        batch = hide_for_training(tokens, config, choose=choose, **place)
        hidden = batch.noisy == MASK
        assert torch.equal(hidden.sum(1), (plain.noisy == MASK).sum(1))  # the same counts, other tokens
        assert torch.equal(batch.hidden_share, plain.hidden_share)
        if weighting == "uniform":
            uniform = batch.weights
        elif weighting == "ce":
            assert len(set(batch.weights.tolist())) == 1
        else:
            relative = relative_weights(batch.importance.scores, hidden, exponent).flatten()[batch.rows]
            torch.testing.assert_close(batch.weights, uniform * relative, rtol=1e-5, atol=1e-6)


BAD = [
    ({"source": "none"}, {"weighting": "importance"}, {}, "diffusion.weighting importance needs scores"),
    ({"source": "none"}, {"weighting": "order"}, {}, "diffusion.weighting order needs scores"),
    ({"source": "none"}, {}, {"kind": "linear"}, "has nothing to change"),
    ({"rho": 0.0}, {}, {}, "importance.rho must be above 0 and at most 1, got 0.0"),
    ({"rho": 1.1}, {}, {}, "importance.rho must be above 0"),
    ({"tilt": 41.0}, {}, {}, r"importance.tilt 41.0 .* beyond 40, where fp32 keys .* use at most 40"),
    ({"tilt": 21.0}, {}, {"kind": "step", "levels": [-2.0, 0.0, 1.0]}, "use at most 20"),
    ({"tilt": math.nan}, {}, {}, "importance.tilt nan"),
    ({"focus": -50.0}, {}, {}, "importance.focus -50.0"),
    ({"loss_weight": -1.0}, {}, {}, "importance.loss_weight must be at least 0"),
    ({"width": 30}, {}, {}, "importance.width 30 does not divide into 4 heads"),
    ({"layers": 0}, {}, {}, "importance.layers must be at least 1"),
    ({"differentiable_weights": True}, {}, {}, "needs weights that come from scores, and diffusion.weighting is uniform"),
    ({"differentiable_weights": True, "source": "frequency"}, {"weighting": "order"}, {}, "needs a learned score"),
]


@pytest.mark.parametrize(("importance", "diffusion", "curriculum", "message"), BAD)
def test_settings_that_cannot_be_trained_with(importance, diffusion, curriculum, message):
    config = ImportanceConfig(**{"source": "learned"} | importance), DiffusionConfig(**diffusion), CurriculumConfig(**curriculum)
    with pytest.raises(UsageError, match=message) as caught:
        check_importance(*config)
    assert "\n" not in str(caught.value)


def test_what_is_biased_says_so():
    assert bias(ImportanceConfig()) is None and bias(ImportanceConfig(source="learned")) is None
    assert "importance.sees clean" in bias(ImportanceConfig(source="learned", sees="clean"))
    for source in ("frequency", "full"):
        for sees in ("visible", "clean"):
            assert f"importance.source {source}" in bias(ImportanceConfig(source=source, sees=sees))


def test_the_examples_of_the_audit_see_what_they_say():
    clean = torch.randint(0, 3, (5, 4))
    assert torch.equal(learned_example(clean, clean, 2), learned_example(clean, (clean + 1) % 3, 2))
    assert not torch.equal(frequency_example(clean, clean, 2), frequency_example(clean, (clean + 1) % 3, 2))
