"""Which objectives bound the likelihood, by enumeration over every sequence, mask and exact posterior."""

from __future__ import annotations

import math

import pytest
import torch

from atat_fast.diffusion.audit import (
    Joint,
    bernoulli_value,
    exact_count_value,
    masked_cross_entropy,
    plackett_luce_law,
    subsets,
    uniform_law,
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
