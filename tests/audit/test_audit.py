"""Which objectives bound the likelihood, by enumeration over every sequence, mask and exact posterior."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from atat_fast.audit.masks import (
    MASKINGS,
    SOURCES,
    Joint,
    audit,
    bernoulli_value,
    count_factors,
    exact_count_value,
    frequency_example,
    importance_law,
    learned_example,
    masked_cross_entropy,
    plackett_luce_law,
    subsets,
    table,
    uniform_law,
    weighted_cross_entropy,
)
from atat_fast.diffusion.noise import LogLinear

JOINTS = [(3, 4, 0), (2, 5, 1), (4, 3, 2)]


@pytest.mark.parametrize(("vocabulary", "length", "seed"), JOINTS)
def test_the_exact_count_bound_is_the_entropy_at_the_best_model(vocabulary, length, seed):
    joint = Joint.random(vocabulary, length, seed=seed)
    assert exact_count_value(joint) == pytest.approx(joint.entropy(), abs=1e-10)


@pytest.mark.parametrize(("vocabulary", "length", "seed"), JOINTS)
def test_the_bernoulli_bound_is_the_entropy_up_to_the_clipping(vocabulary, length, seed):
    joint = Joint.random(vocabulary, length, seed=seed)
    wide = bernoulli_value(joint, LogLinear(1e-12, 40.0))
    assert wide == pytest.approx(joint.entropy(), abs=1e-10)
    clipped = bernoulli_value(joint, LogLinear(1e-4, 20.0))
    missing = joint.entropy() - clipped  # rates below 1e-4: at most a token's entropy for each position there
    assert 0 < missing < 1e-4 * length * math.log(vocabulary)


def test_the_masked_cross_entropy_of_everything_is_the_sum_of_marginal_entropies():
    joint = Joint.random(3, 4, seed=3)
    ones = torch.ones(len(joint.chance), dtype=torch.float64)
    total = 0.0
    for i in range(4):
        p = torch.zeros(3, dtype=torch.float64).index_add_(0, joint.sequences[:, i], joint.chance)
        total -= float((p * p.log()).sum())
    assert masked_cross_entropy(joint, (0, 1, 2, 3), ones) == pytest.approx(total, abs=1e-12)
    assert masked_cross_entropy(joint, (), ones) == 0.0


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
    joint = Joint.random(3, 4, seed=0)
    score = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    tilt = 3.0
    law = plackett_luce_law(lambda s: score.expand(s.shape), tilt)
    assert abs(exact_count_value(joint, law) - joint.entropy()) > 0.01
    ordered = 0.0
    for k in range(1, 5):
        for hidden, chance in law(joint.sequences, k).items():
            odds = torch.exp(-tilt * score[list(hidden)])
            next_one = odds / odds.sum()
            whole = {i: masked_cross_entropy_of(joint, hidden, i, chance) for i in hidden}
            ordered += sum(float(next_one[j]) * whole[i] for j, i in enumerate(hidden))
    assert ordered == pytest.approx(joint.entropy(), abs=1e-10)


def masked_cross_entropy_of(joint, hidden, i, chance):
    """The share of one hidden position: with the others hidden too, but only i counted."""
    rest = tuple(j for j in hidden if j != i)
    visible = [j for j in range(joint.length) if j not in hidden]
    weight = joint.chance * chance
    total = 0.0
    for x in range(len(weight)):
        same = (joint.sequences[:, visible] == joint.sequences[x, visible]).all(1)
        both = same & (joint.sequences[:, i] == joint.sequences[x, i])
        total -= float(weight[x] * (weight[both].sum() / weight[same].sum()).log())
    assert rest == tuple(sorted(rest))
    return total


@pytest.mark.parametrize("law", [uniform_law, plackett_luce_law(context_score, 1.5)])
def test_laws_are_distributions_over_masks(law):
    joint = Joint.random(3, 4, seed=0)
    for k in range(5):
        chances = law(joint.sequences, k)
        assert set(chances) <= set(subsets(4, k))
        torch.testing.assert_close(sum(chances.values()), torch.ones(len(joint.chance), dtype=torch.float64))


def test_the_kernel_follows_the_law_that_is_audited():
    """mask_tokens' tilted masks have the frequencies of the audit's Plackett-Luce law."""
    from atat_fast.ops import mask_tokens

    joint, tilt, k, trials = Joint.random(3, 4, seed=0), 2.0, 2, 4000
    law = plackett_luce_law(context_score, tilt)(joint.sequences, k)
    for which in (0, 17, 80):
        x = joint.sequences[which].expand(trials, 4)
        noisy, _, _ = mask_tokens(
            x, [k] * trials, mask_id=9, seed=which, step=0, sample_ids=torch.arange(trials), scores=context_score(x), tilt=tilt
        )
        codes = ((noisy == 9) * 2 ** torch.arange(4)).sum(1)
        for hidden, chance in law.items():
            p = float(chance[which])
            seen = float((codes == sum(2**i for i in hidden)).double().mean())
            assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / trials) + 1e-9


def test_the_table_in_the_docs_is_in_step():
    text = (Path(__file__).resolve().parents[2] / "docs" / "atat.md").read_text(encoding="utf-8")
    assert f"<!-- audit -->\n{table()}\n<!-- /audit -->" in text, "run python bench/report.py"


def test_two_stage_laws_are_distributions_and_uniform_without_a_tilt():
    joint = Joint.random(3, 4, seed=0)
    for sees in ("visible", "clean"):
        for k in range(1, 5):
            for tilt in (0.0, 2.0):
                law = importance_law(learned_example, sees=sees, tilt=tilt)(joint.sequences, k)
                torch.testing.assert_close(sum(law.values()), torch.ones(81, k, dtype=torch.float64))
                if tilt == 0:
                    torch.testing.assert_close(
                        torch.stack(list(law.values())), torch.full((len(law), 81, k), 1 / len(law)).double()
                    )


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
    from atat_fast.config import DiffusionConfig
    from atat_fast.diffusion.masking import hide_for_training

    length, total, steps = 4, 512, 6
    x, ids = torch.zeros(total, length, dtype=torch.int64), torch.arange(total)
    config = DiffusionConfig(masking=masking, weighting=weighting)
    by_count = torch.zeros(length + 1, dtype=torch.float64)
    for step in range(steps):
        batch = hide_for_training(x, config, first=0, total=total, mask_id=1, sample_ids=ids, seed=0, step=step)
        k = (batch.noisy == 1).sum(1)
        by_count.index_add_(0, k[batch.rows // length], batch.weights.double())
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
