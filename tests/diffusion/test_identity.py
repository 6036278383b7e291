"""Token-identity schedules: the process is the one audited, its bound is a bound, and equal rates are the uniform process."""

from __future__ import annotations

import math

import pytest
import torch
from exact import MASK, Exact, chi_square
from hypothesis import given
from hypothesis import strategies as st
from small import SIZE, small_dit

from atat_fast.audit.masks import Joint, frequency_example, plackett_luce_law
from atat_fast.audit.schedules import LAWS, MODELS, count_law_above, enumerate_joint, identity_above, schedule_loss
from atat_fast.comparison.recipes import with_recipe
from atat_fast.config import Config, DiffusionConfig, ImportanceConfig, load_preset
from atat_fast.diffusion.bound import estimate_nll
from atat_fast.diffusion.counts import bell, bound_weights, mask_counts
from atat_fast.diffusion.identity import IdentitySchedule, identity_rates
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.uniform import UNIFORM, hide
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.training.loss import Objective
from atat_fast.training.plan import check, describe_schedule

JOINTS = [(3, 4, 0), (2, 4, 2)]


@pytest.mark.parametrize(("vocabulary", "length", "seed"), JOINTS)
@pytest.mark.parametrize("strength", [1.0, -1.0, 0.0])
def test_a_model_that_is_told_the_time_meets_the_entropy_and_others_do_not_fall_below(vocabulary, length, seed, strength):
    found = identity_above(Joint.random(vocabulary, length, seed=seed), strength)
    assert found[MODELS[0]][0] == pytest.approx(0, abs=1e-9)
    if strength == 0:
        assert all(abs(value) < 1e-9 for model in MODELS[1:] for value in found[model])
    else:
        assert 1e-3 < found[MODELS[1]][0] < 0.25 * found[MODELS[2]][0]
        assert 1e-3 < found[MODELS[1]][1] < 0.25 * found[MODELS[2]][1] and found[MODELS[1]][2] < found[MODELS[2]][2]


def test_no_other_model_is_better_than_the_posterior():
    """Bounds of random models, whether they know the time or not, are above the entropy. Over all times the chance of a mask is
    that of the race to leave it, times the mean time it is left for.
    """
    joint = Joint.random(3, 4, seed=0)
    found = enumerate_joint(joint, 1.0)
    torch.testing.assert_close(found.flow.sum(2), found.share, rtol=1e-7, atol=1e-10)
    for best in (found.flow.sum(2, keepdim=True).log(), found.flow.log()):
        for spread in (0.01, 0.1, 1.0):
            log_mu = torch.log_softmax(best + spread * torch.randn(best.shape, dtype=torch.float64), 1)
            assert float(schedule_loss(found, log_mu)) > joint.entropy() + 1e-6


@pytest.mark.parametrize("law", LAWS)
def test_weights_divided_by_the_law_keep_the_bound_and_ce_is_none(law):
    for vocabulary, length, seed in JOINTS:
        joint = Joint.random(vocabulary, length, seed=seed)
        assert count_law_above(joint, law, "uniform") == pytest.approx(0, abs=1e-9)
        assert abs(count_law_above(joint, law, "ce")) > 1e-3


def rates_of(strength, vocabulary=3):
    return torch.exp(-strength * torch.arange(vocabulary) / (vocabulary - 1))


@pytest.mark.parametrize("strength", [1.0, -1.0])
@pytest.mark.parametrize("law", ["uniform", "bell"])
def test_what_is_drawn_estimates_what_is_audited(strength, law):
    """Masks, weights and times of the schedule against the integral over time, for a model that needs all three."""
    joint, total = Joint.random(3, 4, seed=0), 24_000
    schedule, config = IdentitySchedule(rates_of(strength)), DiffusionConfig(counts=law, counts_width=0.4)
    found, model = enumerate_joint(joint, strength), Exact(joint)
    log_mu = torch.log_softmax(found.posterior.log()[:, :, None] - found.rates[:, None] * found.times, 1)
    want = float(schedule_loss(found, log_mu))
    assert want > joint.entropy()
    x = joint.sequences[torch.multinomial(joint.chance, total, replacement=True)]
    place = {"first": 0, "total": total, "mask_id": MASK, "sample_ids": torch.arange(total), "seed": 1, "step": 0}
    masked = hide_for_training(x, config, choose=schedule.hide, **place)
    # the loss of each hidden token, straight from the definition
    rates, logits = masked.tilt.rates.double()[:3], model.logits(model.features(masked.noisy, rows=masked.rows))[:, :3]
    log_mu, own = torch.log_softmax(logits - masked.tilt.elapsed.double()[:, None] * rates, 1), rates[masked.target]
    losses = -own * log_mu.gather(1, masked.target[:, None])[:, 0] + (log_mu.exp() * rates).sum(1) - own
    for weights, right in ((masked.weights.double(), True), (5 / 2, False)):  # wrong weights are noticed
        values = torch.zeros(total, dtype=torch.float64).index_add_(0, masked.rows // 4, weights * losses)
        assert (abs(float(values.mean()) - want) < 4.5 * float(values.std()) / math.sqrt(total)) == right


@pytest.mark.parametrize(
    ("counts", "weighting"), [("uniform", "uniform"), ("uniform", "ce"), ("bell", "ce"), ("bell", "uniform")]
)
def test_blocks_keep_the_schedules_own_weights(counts, weighting):
    """Whole sequences, and blocks whose counts are dealt: a token's weight is the same function of its count."""
    x = torch.randint(0, 3, (40, 4))
    config, schedule = DiffusionConfig(counts=counts, weighting=weighting), IdentitySchedule(rates_of(1.0))
    place = {"first": 0, "total": 40, "mask_id": MASK, "sample_ids": torch.arange(40), "seed": 1, "step": 0}
    relative = []
    for lengths in (None, torch.full((40,), 4)):
        masked = hide_for_training(x, config, lengths=lengths, choose=schedule.hide, **place)
        k = (masked.noisy == MASK).sum(1)
        own = schedule.hide(x, k, mask_id=MASK, sample_ids=torch.arange(40), seed=1, step=0)
        assert torch.equal(own.rows, masked.rows)
        relative.append(
            {int(k[row // 4]): float(w / o) for row, w, o in zip(masked.rows, masked.weights, own.weights, strict=True)}
        )
    assert relative[0].keys() == relative[1].keys() and len(relative[0]) > 2
    assert relative[0] == pytest.approx(relative[1], rel=1e-5)


def test_masks_follow_the_race_and_times_follow_their_law_given_the_mask():
    joint, trials, k = Joint.random(3, 4, seed=0), 6000, 2
    schedule, rates = IdentitySchedule(rates_of(1.5)), rates_of(1.5).double()
    s = torch.linspace(0, 60, 60_001, dtype=torch.float64)
    law = plackett_luce_law(lambda x: frequency_example(x, x, 0), 1.5)(joint.sequences, k)
    for which in (5, 17, 48):
        x = joint.sequences[which].expand(trials, 4)
        masked = schedule.hide(x, torch.full((trials,), k), mask_id=MASK, sample_ids=torch.arange(trials), seed=which, step=0)
        chosen, elapsed, own = masked.noisy == MASK, masked.tilt.elapsed[::k].double(), rates[x[0]]
        assert torch.equal(masked.tilt.elapsed[::k], masked.tilt.elapsed[1::k])
        assert chi_square(chosen, {tuple(i in m for i in range(4)): float(p[which]) for m, p in law.items()}) < 5
        for hidden in law:
            here = chosen[:, list(hidden)].all(1)
            total = float(own[list(hidden)].sum())
            torch.testing.assert_close(masked.weights.view(-1, k)[here], torch.full((int(here.sum()), k), 5 / total))
            seen = [i for i in range(4) if i not in hidden]
            density = torch.exp(-s * total) * (1 - torch.exp(-s[:, None] * own[seen])).prod(1)
            for moment in (lambda s: torch.exp(-s), lambda s: s):
                want, got = float((moment(s) * density).sum() / density.sum()), moment(elapsed[here])
                assert abs(float(got.mean()) - want) < 5 * float(got.std()) / math.sqrt(len(got)) + 1e-3


@given(st.integers(2, 40), st.floats(-5, 5), st.data())
def test_rates_average_to_one_over_the_text(vocabulary, strength, data):
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 1000), min_size=vocabulary, max_size=vocabulary)))
    scores = torch.rand(vocabulary)
    if int(counts.sum()) == 0:
        with pytest.raises(ValueError, match="all counts are 0"):
            identity_rates(scores, counts, strength)
        return
    rates = identity_rates(scores, counts, strength)
    assert (rates > 0).all() and float((rates.double() * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)
    assert ((rates[torch.argsort(scores)].diff() * -strength) >= -1e-6 * rates.max()).all()
    schedule = IdentitySchedule(rates)
    back = torch.exp(-schedule.tilt * schedule.scores.double())
    torch.testing.assert_close(back / back.sum(), rates.double() / rates.double().sum(), rtol=1e-4, atol=1e-9)


def objective(strength=None, **diffusion):
    config = Config(diffusion=DiffusionConfig(**diffusion, schedule="log_linear" if strength is None else "token_identity"))
    vars(config.model).update(SIZE)
    model = small_dit(layers=1)
    identity = UNIFORM if strength is None else IdentitySchedule(identity_rates(torch.rand(11), torch.ones(11), strength))
    return Objective(model, config, Compute(torch.device("cpu"), torch.float32, False), seed=3, total=8, process=identity)


X, IDS = torch.randint(0, 10, (8, 12), generator=torch.Generator().manual_seed(0)), torch.arange(8)


@pytest.mark.parametrize("diffusion", [{}, {"weighting": "ce"}, {"counts": "bell", "counts_width": 0.4}], ids=str)
def test_equal_rates_are_the_uniform_process(diffusion):
    """The same masks bit for bit, the same weights, and the same loss and gradient but for rounding."""
    plain, equal, tilted = three = [objective(strength, **diffusion) for strength in (None, 0.0, 1.0)]
    masks = [o.hide(X, IDS, first=0, step=5) for o in three]
    assert torch.equal(masks[0].noisy, masks[1].noisy) and not torch.equal(masks[0].noisy, masks[2].noisy)
    torch.testing.assert_close(masks[0].weights, masks[1].weights)
    results = [o.loss(X, IDS, first=0, step=5)[0] for o in three]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=0)
    assert abs((results[0] - results[2]).item()) > 1e-3
    for loss in results:
        loss.backward()
    for a, b in zip(plain.parameters(), equal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    cut = [tilted.loss(X[i : i + 4], IDS[i : i + 4], first=i, step=5)[0] for i in (0, 4)]
    torch.testing.assert_close(sum(cut), results[2])


@pytest.mark.parametrize("weighting", ["uniform", "ce"])
@pytest.mark.parametrize("counts", ["uniform", "bell"])
def test_weights_are_the_laws_or_constant_over_the_mean_rate_of_what_is_hidden(weighting, counts):
    o = objective(1.0, weighting=weighting, counts=counts, counts_width=0.4)
    masked = o.hide(X, IDS, first=0, step=2)
    hidden, chances = masked.noisy == 10, bell(12, 0.35, 0.4) if counts == "bell" else torch.full((13,), 1 / 13).double()
    k = hidden.sum(1)
    assert counts == "uniform" or torch.equal(k, mask_counts(12, 0, 8, 8, seed=3, step=2, chances=chances))
    by_count = 96 / len(masked.rows) if weighting == "ce" else bound_weights(chances)[k]
    want = by_count * k / torch.where(hidden, o.process.rates[X], 0.0).sum(1)
    torch.testing.assert_close(masked.weights, want.float()[masked.rows // 12])


def test_the_schedules_own_bound_with_equal_rates_is_the_uniform_one():
    x, model = torch.randint(0, 10, (30, 12)), small_dit(layers=1)

    @torch.no_grad()
    def nll(masked):
        return model.nll(masked.noisy, masked.rows, masked.target, tilt=masked.tilt)

    def estimate(**options):
        return estimate_nll(nll, lambda f, c: x[f : f + c], 30, mask_id=10, draws=2, batch=7, seed=4, **options)

    plain, equal = estimate(control=False), estimate(process=IdentitySchedule(torch.ones(11)).hide)
    torch.testing.assert_close(plain.values, equal.values, rtol=1e-5, atol=1e-6)
    assert abs(plain.nll - estimate(process=IdentitySchedule(rates_of(1.0, 11)).hide).nll) > 1e-3


def test_nothing_and_everything_hidden():
    x, place = torch.randint(0, 3, (3, 5)), {"mask_id": MASK, "sample_ids": torch.arange(3), "seed": 0, "step": 0}
    zeros = torch.zeros(3, dtype=torch.long)
    masked, none = (IdentitySchedule(rates_of(2.0)).hide(x, counts, **place) for counts in (torch.tensor([0, 5, 1]), zeros))
    assert len(masked.rows) == 6 and masked.weights.isfinite().all()
    assert (masked.tilt.elapsed > 0).all() and masked.tilt.elapsed.isfinite().all()
    assert len(none.rows) == len(none.tilt.elapsed) == 0 and torch.equal(hide(x, zeros, **place).noisy, x)


@pytest.mark.parametrize(
    ("diffusion", "importance", "message"),
    [
        ({"identity_strength": 6.0}, {}, "identity_strength 6.0 makes rates differ"),
        ({"identity_strength": math.nan}, {}, "identity_strength nan"),
        ({"masking": "bernoulli"}, {}, "diffusion.masking bernoulli hides every token alike"),
        ({"mirror": True}, {}, "diffusion.mirror hides every token alike"),
        ({}, {"source": "frequency"}, "importance.source frequency and diffusion.schedule token_identity both choose"),
    ],
)
def test_settings_that_cannot_be(diffusion, importance, message):
    diffusion = DiffusionConfig(schedule="token_identity", **diffusion)
    with pytest.raises(UsageError, match=message):
        check(Config(diffusion=diffusion, importance=ImportanceConfig(**importance)))


def test_the_recipe_and_the_plan_say_what_is_done():
    config = with_recipe(load_preset("demo"), "identity")
    assert config.diffusion.schedule == "token_identity" and config.diffusion.weighting == load_preset("demo").diffusion.weighting
    check(config)
    assert describe_schedule(config) == ["schedule     token identity: revealed at rates exp(-1 * log-rank of the token)"]
    plain = with_recipe(config, "uniform")
    assert plain.diffusion.schedule == "log_linear" and describe_schedule(plain) == []


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rates_that_are_none(bad):
    with pytest.raises(ValueError, match="finite and above 0"):
        IdentitySchedule(torch.tensor([1.0, bad]))
