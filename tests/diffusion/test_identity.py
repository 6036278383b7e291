"""Token-identity schedules: the process is the one audited, its bound is a bound, and equal rates are the uniform process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atat_fast.audit.masks import Joint, frequency_example, plackett_luce_law
from atat_fast.audit.schedules import (
    LAWS,
    MODELS,
    count_law_above,
    counts_table,
    enumerate_joint,
    identity_above,
    identity_table,
    schedule_loss,
)  # fmt: skip
from atat_fast.comparison.recipes import with_recipe
from atat_fast.config import Config, DiffusionConfig, ImportanceConfig, load_preset
from atat_fast.diffusion.bound import estimate_nll
from atat_fast.diffusion.counts import bell, bound_weights, mask_counts
from atat_fast.diffusion.identity import IdentitySchedule, identity_rates
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.uniform import UNIFORM, hide
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.models import DiT
from atat_fast.training.loss import Objective
from atat_fast.training.plan import check, describe_schedule

JOINTS = [(3, 4, 0), (2, 4, 2)]
MASK = 9


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


def test_time_integrates_out_to_the_race():
    """The chance of a mask over all times is that of the race to leave it, times the mean time it is left for."""
    found = enumerate_joint(Joint.random(3, 4, seed=0), 1.0)
    torch.testing.assert_close(found.flow.sum(2), found.share, rtol=1e-7, atol=1e-10)


def test_no_other_model_is_better_than_the_posterior():
    """Bounds of random models, whether they know the time or not, are above the entropy."""
    joint = Joint.random(3, 4, seed=0)
    found = enumerate_joint(joint, 1.0)
    for times in (1, len(found.times)):
        for spread in (0.01, 0.1, 1.0):
            best = torch.log(found.flow.sum(2, keepdim=True) if times == 1 else found.flow)
            log_mu = torch.log_softmax(best + spread * torch.randn(*best.shape[:2], times, dtype=torch.float64), 1)
            assert float(schedule_loss(found, log_mu)) > joint.entropy() + 1e-6


def test_the_tables_in_the_docs_are_in_step():
    text = (Path(__file__).resolve().parents[2] / "docs" / "atat.md").read_text(encoding="utf-8")
    for name, table in (("audit_counts", counts_table()), ("audit_identity", identity_table())):
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text, "run python bench/report.py"


@pytest.mark.parametrize("law", LAWS)
def test_weights_divided_by_the_law_keep_the_bound_and_ce_is_none(law):
    for vocabulary, length, seed in JOINTS:
        joint = Joint.random(vocabulary, length, seed=seed)
        assert count_law_above(joint, law, "uniform") == pytest.approx(0, abs=1e-9)
        assert abs(count_law_above(joint, law, "ce")) > 1e-3


def rates_of(strength, vocabulary=3):
    return torch.exp(-strength * torch.arange(vocabulary) / (vocabulary - 1))


def posterior(joint):
    """A model of logits: log p(v | visible) [B * L, V] of a batch's noisy sequences, under uniform masks."""

    def logits(noisy):
        fits = ((noisy[:, None, :] == MASK) | (joint.sequences[None] == noisy[:, None, :])).all(2).double() * joint.chance
        own = torch.nn.functional.one_hot(joint.sequences, int(joint.sequences.max()) + 1).double()
        return torch.log(torch.einsum("bs,slv->blv", fits, own) / fits.sum(1)[:, None, None]).flatten(0, 1)

    return logits


def losses(masked, logits):
    """Loss of each hidden token under the schedule, straight from the definition."""
    rates = masked.tilt.rates.double()
    log_mu = torch.log_softmax(logits(masked.noisy)[masked.rows] - masked.tilt.elapsed.double()[:, None] * rates, 1)
    own = rates[masked.target]
    return -own * log_mu.gather(1, masked.target[:, None])[:, 0] + (log_mu.exp() * rates).sum(1) - own


@pytest.mark.parametrize("strength", [1.0, -1.0])
@pytest.mark.parametrize("law", ["uniform", "bell"])
def test_what_is_drawn_estimates_what_is_audited(strength, law):
    """Masks, weights and times of the schedule against the integral over time, for a model that needs all three."""
    joint, total = Joint.random(3, 4, seed=0), 24_000
    schedule, config = IdentitySchedule(rates_of(strength)), DiffusionConfig(counts=law, counts_width=0.4)
    found = enumerate_joint(joint, strength)
    log_mu = torch.log_softmax(found.posterior.log()[:, :, None] - found.rates[:, None] * found.times, 1)
    want = float(schedule_loss(found, log_mu))
    assert want > joint.entropy()
    x = joint.sequences[torch.multinomial(joint.chance, total, replacement=True)]
    masked = hide_for_training(
        x, config, first=0, total=total, mask_id=MASK, sample_ids=torch.arange(total), seed=1, step=0, choose=schedule.hide
    )
    values = torch.zeros(total, dtype=torch.float64)
    values.index_add_(0, masked.rows // 4, masked.weights.double() * losses(masked, posterior(joint)))
    assert abs(float(values.mean()) - want) < 4.5 * float(values.std()) / math.sqrt(total)
    flat = values.new_zeros(total).index_add_(0, masked.rows // 4, losses(masked, posterior(joint)) * 5 / 2)
    assert abs(float(flat.mean()) - want) > 4.5 * float(flat.std()) / math.sqrt(total)  # the test would notice wrong weights


def test_masks_follow_the_race_and_times_follow_their_law_given_the_mask():
    joint, trials, k = Joint.random(3, 4, seed=0), 6000, 2
    schedule, rates = IdentitySchedule(rates_of(1.5)), rates_of(1.5).double()
    s = torch.linspace(0, 60, 60_001, dtype=torch.float64)
    law = plackett_luce_law(lambda x: frequency_example(x, x, 0), 1.5)(joint.sequences, k)
    for which in (5, 17, 48):
        x = joint.sequences[which].expand(trials, 4)
        counts = torch.full((trials,), k)
        masked = schedule.hide(x, counts, mask_id=MASK, sample_ids=torch.arange(trials), seed=which, step=0)
        codes, elapsed = ((masked.noisy == MASK) * 2 ** torch.arange(4)).sum(1), masked.tilt.elapsed[::k].double()
        assert torch.equal(masked.tilt.elapsed[::k], masked.tilt.elapsed[1::k])
        own = rates[x[0]]
        for hidden, chance in law.items():
            here, p = codes == sum(2**i for i in hidden), float(chance[which])
            assert abs(float(here.double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / trials)
            total = float(own[list(hidden)].sum())
            torch.testing.assert_close(masked.weights.view(-1, k)[here], torch.full((int(here.sum()), k), 5 / total))
            seen = [i for i in range(4) if i not in hidden]
            density = torch.exp(-s * total) * (1 - torch.exp(-s[:, None] * own[seen])).prod(1)
            for moment in (lambda s: torch.exp(-s), lambda s: s):
                want = float((moment(s) * density).sum() / density.sum())
                got = moment(elapsed[here])
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
    order = torch.argsort(scores)
    assert ((rates[order].diff() * -strength) >= -1e-6 * rates.max()).all()
    schedule = IdentitySchedule(rates)
    back = torch.exp(-schedule.tilt * schedule.scores.double())
    torch.testing.assert_close(back / back.sum(), rates.double() / rates.double().sum(), rtol=1e-4, atol=1e-9)


SMALL = {"dim": 16, "layers": 1, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}


def objective(strength=None, **diffusion):
    config = Config()
    for name, value in SMALL.items():
        setattr(config.model, name, value)
    config.diffusion = DiffusionConfig(**diffusion, schedule="log_linear" if strength is None else "token_identity")
    torch.manual_seed(0)
    model = DiT(11, 10, **vars(config.model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    identity = UNIFORM if strength is None else IdentitySchedule(identity_rates(torch.rand(11), torch.ones(11), strength))
    return Objective(model, config, Compute(torch.device("cpu"), torch.float32, False), seed=3, total=8, process=identity)


@pytest.mark.parametrize("diffusion", [{}, {"weighting": "ce"}, {"counts": "bell", "counts_width": 0.4}], ids=str)
def test_equal_rates_are_the_uniform_process(diffusion):
    """The same masks bit for bit, the same weights, and the same loss and gradient but for rounding."""
    plain, equal, tilted = objective(**diffusion), objective(0.0, **diffusion), objective(1.0, **diffusion)
    x, ids = torch.randint(0, 10, (8, 12)), torch.arange(8)
    masks = [o.hide(x, ids, first=0, step=5) for o in (plain, equal, tilted)]
    assert torch.equal(masks[0].noisy, masks[1].noisy) and not torch.equal(masks[0].noisy, masks[2].noisy)
    torch.testing.assert_close(masks[0].weights, masks[1].weights)
    results = [o.loss(x, ids, first=0, step=5)[0] for o in (plain, equal, tilted)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=0)
    assert abs((results[0] - results[2]).item()) > 1e-3
    for loss in results:
        loss.backward()
    grads = [[p.grad for p in o.parameters()] for o in (plain, equal, tilted)]
    for a, b in zip(*grads[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    cut = [tilted.loss(x[i : i + 4], ids[i : i + 4], first=i, step=5)[0] for i in (0, 4)]
    torch.testing.assert_close(sum(cut), results[2])


@pytest.mark.parametrize("counts", ["uniform", "bell"])
def test_ce_weighs_by_the_count_and_the_rates_alone(counts):
    o = objective(1.0, weighting="ce", counts=counts)
    x, ids = torch.randint(0, 10, (8, 12)), torch.arange(8)
    masked = o.hide(x, ids, first=0, step=2)
    k = (masked.noisy == 10).sum(1)
    total = torch.where(masked.noisy == 10, o.process.rates[x], 0.0).sum(1)
    own = masked.rows // 12
    torch.testing.assert_close(masked.weights, (96 / len(masked.rows) * k / total)[own])


def test_bell_weights_are_divided_by_the_law():
    o = objective(1.0, counts="bell", counts_width=0.4)
    x, ids = torch.randint(0, 10, (8, 12)), torch.arange(8)
    masked = o.hide(x, ids, first=0, step=2)
    chances = bell(12, 0.35, 0.4)
    k = mask_counts(12, 0, 8, 8, seed=3, step=2, chances=chances)
    assert torch.equal(k, (masked.noisy == 10).sum(1))
    total = torch.where(masked.noisy == 10, o.process.rates[x], 0.0).sum(1)
    torch.testing.assert_close(masked.weights, (bound_weights(chances)[k] * k / total).float()[masked.rows // 12])


def test_the_schedules_own_bound_with_equal_rates_is_the_uniform_one():
    x = torch.randint(0, 10, (30, 12))
    model = objective().model

    def nll(masked):
        with torch.no_grad():
            return model.nll(masked.noisy, masked.rows, masked.target, tilt=masked.tilt)

    def estimate(**options):
        return estimate_nll(nll, lambda f, c: x[f : f + c], 30, mask_id=10, draws=2, batch=7, seed=4, **options)

    plain, equal = estimate(control=False), estimate(process=IdentitySchedule(torch.ones(11)).hide)
    torch.testing.assert_close(plain.values, equal.values, rtol=1e-5, atol=1e-6)
    assert abs(plain.nll - estimate(process=IdentitySchedule(rates_of(1.0, 11)).hide).nll) > 1e-3


def test_nothing_and_everything_hidden():
    schedule = IdentitySchedule(rates_of(2.0))
    x = torch.randint(0, 3, (3, 5))
    masked = schedule.hide(x, torch.tensor([0, 5, 1]), mask_id=MASK, sample_ids=torch.arange(3), seed=0, step=0)
    assert (
        len(masked.rows) == 6
        and masked.weights.isfinite().all()
        and (masked.tilt.elapsed > 0).all()
        and masked.tilt.elapsed.isfinite().all()
    )
    none = schedule.hide(x, torch.zeros(3, dtype=torch.long), mask_id=MASK, sample_ids=torch.arange(3), seed=0, step=0)
    assert len(none.rows) == len(none.tilt.elapsed) == 0
    assert torch.equal(
        hide(x, torch.zeros(3, dtype=torch.long), mask_id=MASK, sample_ids=torch.arange(3), seed=0, step=0).noisy, x
    )


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
    config = Config(
        diffusion=DiffusionConfig(schedule="token_identity", **diffusion), importance=ImportanceConfig(**importance)
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        check(config)


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
