"""Which objectives bound the likelihood, by enumeration over every sequence, mask and exact posterior."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from exact import chi_square

from atat_fast.audit.blocks import BELL, beginning, block_table, block_value
from atat_fast.audit.masks import (
    MASKINGS,
    SOURCES,
    Joint,
    audit,
    bernoulli_value,
    blind_table,
    count_factors,
    exact_count_value,
    frequency_example,
    gap_law,
    importance_law,
    learned_example,
    masked_cross_entropy,
    plackett_luce_law,
    spread_law,
    subsets,
    table,
    uniform_law,
    weighted_cross_entropy,
)
from atat_fast.audit.schedules import counts_table, identity_table
from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.noise import LogLinear
from atat_fast.ops import mask_tokens

SEES = ("visible", "clean")


@pytest.mark.parametrize(("vocabulary", "length", "seed"), [(3, 4, 0), (2, 5, 1), (4, 3, 2)])
def test_bounds_are_the_entropy_at_the_best_model(vocabulary, length, seed):
    joint = Joint.random(vocabulary, length, seed=seed)
    assert exact_count_value(joint) == pytest.approx(joint.entropy(), abs=1e-10)
    assert bernoulli_value(joint, LogLinear(1e-12, 40.0)) == pytest.approx(joint.entropy(), abs=1e-10)
    missing = joint.entropy() - bernoulli_value(joint, LogLinear(1e-4, 20.0))
    assert 0 < missing < 1e-4 * length * math.log(vocabulary)  # rates below 1e-4: at most a token's entropy for each position


def test_the_masked_cross_entropy_of_everything_is_the_sum_of_marginal_entropies():
    joint = Joint.random(3, 4, seed=3)
    ones = torch.ones(len(joint.chance), dtype=torch.float64)
    total = 0.0
    for i in range(4):
        p = torch.zeros(3, dtype=torch.float64).index_add_(0, joint.sequences[:, i], joint.chance)
        total -= float((p * p.log()).sum())
    assert masked_cross_entropy(joint, (0, 1, 2, 3), ones) == pytest.approx(total, abs=1e-12)
    assert masked_cross_entropy(joint, (), ones) == 0.0


@pytest.mark.parametrize(("vocabulary", "length", "seed"), [(3, 4, 0), (2, 6, 1)])
def test_blocks_bound_the_likelihood_and_blocks_of_one_are_the_chain_rule(vocabulary, length, seed):
    joint = Joint.random(vocabulary, length, seed=seed)
    for block in (k for k in range(1, length + 1) if length % k == 0):
        for counts in (None, BELL):
            assert block_value(joint, block, counts=counts) == pytest.approx(joint.entropy(), abs=1e-10)
    steps = [beginning(joint, end) for end in range(1, length + 1)]
    assert steps[-1].entropy() == pytest.approx(joint.entropy()) and float(steps[0].chance.sum()) == pytest.approx(1)
    assert block_value(joint, length) == pytest.approx(exact_count_value(joint))


@pytest.mark.parametrize("spread", [1.0, 0.3, -1.0, -0.4])
@pytest.mark.parametrize("length", [1, 4, 5])
def test_spread_masks_are_a_law_that_hides_every_position_alike_and_keeps_the_best_model(spread, length):
    joint = Joint.random(2, length, seed=4)
    for k in range(length + 1):
        law = spread_law(spread)(joint.sequences, k)
        assert sum(float(chance[0]) for chance in law.values()) == pytest.approx(1)
        for i in range(length):
            assert sum(float(p[0]) for hidden, p in law.items() if i in hidden) == pytest.approx(k / length)
        for hidden, weight in gap_law(spread, 0.7)(joint.sequences, k).items():
            if k and float(weight.sum()) > 0:
                assert weighted_cross_entropy(joint, hidden, weight)[1] < 1e-12


def identity_score(sequences):
    """Importance of a token by what it is."""
    return sequences.double() / sequences.max()


def context_score(sequences):
    """Importance of a token by what it and its neighbours are."""
    left, right = sequences.roll(1, 1), sequences.roll(-1, 1)
    return torch.remainder(sequences * 3 + left * 5 + right * 7, 11).double() / 10


@pytest.mark.parametrize("score", [identity_score, context_score])
@pytest.mark.parametrize("tilt", [4.0, -4.0])
def test_clean_importance_with_uniform_weights_is_no_bound(score, tilt):
    """Masks chosen by looking at the clean tokens tell what they hide: the 'nll' falls below the entropy, which no bound can."""
    joint = Joint.random(3, 4, seed=0)
    value = exact_count_value(joint, plackett_luce_law(score, tilt))
    assert value < joint.entropy() - 0.01


def test_positions_may_be_chosen_freely_by_position_but_then_uniform_weights_are_wrong():
    """Scores of position alone leak nothing, so the posterior is right; the (L + 1) / k weights then no longer add up to the
    entropy: such a policy needs the `order` weights, the chance of being revealed next.
    """
    joint, tilt = Joint.random(3, 4, seed=0), 3.0
    score, x = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64), joint.sequences
    law = plackett_luce_law(lambda s: score.expand(s.shape), tilt)
    assert abs(exact_count_value(joint, law) - joint.entropy()) > 0.01
    ordered = 0.0
    for k in range(1, 5):
        for hidden, chance in law(x, k).items():
            odds, weight = torch.exp(-tilt * score[list(hidden)]), joint.chance * chance
            visible = [j for j in range(4) if j not in hidden]
            same = (x[:, None, visible] == x[None, :, visible]).all(2)
            for i, next_one in zip(hidden, odds / odds.sum(), strict=True):  # the loss of one hidden position
                both = same & (x[:, None, i] == x[None, :, i])
                ordered -= float(next_one * (weight * ((both * weight).sum(1) / (same * weight).sum(1)).log()).sum())
    assert ordered == pytest.approx(joint.entropy(), abs=1e-10)


TWO_STAGE = {(sees, tilt): importance_law(learned_example, sees=sees, tilt=tilt) for sees in SEES for tilt in (0.0, 2.0)}


@pytest.mark.parametrize("law", [uniform_law, plackett_luce_law(context_score, 1.5), *TWO_STAGE.values()])
def test_laws_are_distributions_over_masks_and_uniform_without_a_tilt(law):
    sequences = Joint.random(3, 4, seed=0).sequences
    for k in range(5):
        chances = law(sequences, k)
        total = sum(chances.values())
        assert set(chances) <= set(subsets(4, k))
        torch.testing.assert_close(total, torch.ones_like(total))
        if law in (uniform_law, *(TWO_STAGE[sees, 0.0] for sees in SEES)):
            every = torch.stack([*chances.values()])
            torch.testing.assert_close(every, torch.full_like(every, 1 / len(every)))


def test_the_kernel_follows_the_law_that_is_audited():
    """mask_tokens' tilted masks have the frequencies of the audit's Plackett-Luce law."""
    joint, tilt, k, trials = Joint.random(3, 4, seed=0), 2.0, 2, 4000
    law = plackett_luce_law(context_score, tilt)(joint.sequences, k)
    for which in (0, 17, 80):
        x = joint.sequences[which].expand(trials, 4)
        place = {"mask_id": 9, "seed": which, "step": 0, "sample_ids": torch.arange(trials)}
        noisy, _, _ = mask_tokens(x, [k] * trials, scores=context_score(x), tilt=tilt, **place)
        assert chi_square(noisy == 9, {tuple(i in m for i in range(4)): float(p[which]) for m, p in law.items()}) < 5


def test_the_tables_in_the_docs_are_in_step():
    docs = Path(__file__).resolve().parents[2] / "docs"
    for page, name, made in (
        ("atat", "audit", table()),
        ("atat", "audit_blind", blind_table()),
        ("atat", "audit_counts", counts_table()),
        ("atat", "audit_identity", identity_table()),
        ("blocks", "audit_blocks", block_table()),
    ):
        text = (docs / f"{page}.md").read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{made}\n<!-- /{name} -->" in text, "run python bench/report.py"


def test_clean_scores_give_the_plackett_luce_law():
    sequences = Joint.random(3, 4, seed=0).sequences
    ours = importance_law(frequency_example, sees="clean", tilt=2.0)(sequences, 2)
    plain = plackett_luce_law(identity_score, 2.0)(sequences, 2)
    for hidden, chance in plain.items():
        torch.testing.assert_close(ours[hidden][:, 0], chance)


@pytest.mark.parametrize("weighting", ["uniform", "order", "importance", "ce"])
def test_scores_of_visible_tokens_leave_the_posterior_alone(weighting):
    """Whatever the weights: the best model is p(token | visible tokens), and masks depend on tokens that stay visible only."""
    found = audit("learned", "visible", weighting)
    assert found.off < 1e-12 and found.learns_the_posterior
    sequences = Joint.random(3, 4, seed=0).sequences
    for k in (1, 2, 3):
        for hidden, chance in importance_law(learned_example, sees="visible", tilt=3.0)(sequences, k).items():
            visible = [i for i in range(4) if i not in hidden]
            same = (sequences[:, None, visible] == sequences[None, :, visible]).all(2)
            assert float(((chance[:, None, 0] - chance[None, :, 0]).abs() * same).max()) < 1e-12


@pytest.mark.parametrize(("source", "sees"), [key for key in SOURCES if key != ("learned", "visible")])
def test_scores_of_clean_tokens_mislead_the_model(source, sees):
    found = audit(source, sees, "uniform")
    assert found.off > 0.05 and not found.learns_the_posterior
    assert not found.is_bound("exact") and not found.is_bound("bernoulli")


def test_only_the_plain_process_is_the_bound():
    plain = audit("none", "visible", "uniform")
    assert plain.low["exact"] == pytest.approx(0, abs=1e-10) == plain.high["exact"]
    assert plain.is_bound("bernoulli") and plain.low["bernoulli"] < 0  # the rates that are clipped away
    assert audit("none", "visible", "ce").low["exact"] > 0.1
    assert not audit("learned", "visible", "uniform").is_bound("exact")


@pytest.mark.parametrize("weighting", ["uniform", "ce"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_factors_are_those_of_the_masks_that_are_drawn(masking, weighting):
    """count_factors against weights and counts of hide_for_training: E over steps of sum(weights) / L by k."""
    length, total, steps = 4, 512, 6
    x, place = torch.zeros(total, length, dtype=torch.int64), {"first": 0, "total": total, "mask_id": 1, "seed": 0}
    by_count = torch.zeros(length + 1, dtype=torch.float64)
    for step in range(steps):
        config = DiffusionConfig(masking=masking, weighting=weighting)
        batch = hide_for_training(x, config, sample_ids=torch.arange(total), step=step, **place)
        by_count.index_add_(0, (batch.noisy == 1).sum(1)[batch.rows // length], batch.weights.double())
    factors = count_factors(length, masking, weighting, LogLinear())
    for k in range(1, length + 1):  # of each of the k hidden tokens a share 1 / k
        assert float(by_count[k]) / (total * steps) / k == pytest.approx(factors[k], rel=0.12), k


def test_minimisers_of_weighted_losses():
    """Weights of (visible tokens, position) leave the minimiser; weights of the hidden token tilt it as w_v."""
    joint = Joint.random(3, 3, seed=4)
    x, hidden = joint.sequences, (1, 2)
    honest = torch.stack([1.0 + x[:, 0], 3.0 - x[:, 0]], dim=1).double()
    assert weighted_cross_entropy(joint, hidden, honest)[1] < 1e-12
    tilted = 1.0 + x[:, [1, 2]].double()
    _, off = weighted_cross_entropy(joint, hidden, tilted)
    first = x[:, 0] == 0
    p = torch.zeros(3, dtype=torch.float64).index_add_(0, x[first, 1], joint.chance[first])
    p /= p.sum()
    wrong = p * torch.tensor([1.0, 2.0, 3.0])
    assert off >= float((wrong / wrong.sum() - p).abs().max()) - 1e-12
