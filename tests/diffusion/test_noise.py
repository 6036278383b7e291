"""Counts and schedules: uniform each, even together, the same on any split of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import mask_counts
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.noise import LogLinear, stratified_uniforms


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 10**6))
def test_pairs_add_up_to_the_length(length, pairs, seed, step):
    k = mask_counts(length, 0, 2 * pairs, 2 * pairs, seed=seed, step=step)
    assert ((k[::2] + k[1::2]) == length).all()
    assert (k >= 0).all() and (k <= length).all()
    assert int(k.sum()) == pairs * length


@given(st.integers(1, 9), st.integers(1, 30), st.sampled_from(["antithetic", "independent"]), st.data())
def test_any_slice_of_the_batch_is_the_same_as_the_whole(length, total, pairing, data):
    first = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - first))
    options = {"seed": 5, "step": 9, "pairing": pairing}
    whole = mask_counts(length, 0, total, total, **options)
    assert torch.equal(whole[first : first + count], mask_counts(length, first, count, total, **options))


@pytest.mark.parametrize("pairing", ["antithetic", "independent"])
@pytest.mark.parametrize(("length", "total"), [(4, 6), (5, 6), (3, 1), (6, 5)])
def test_each_slot_is_uniform_over_all_counts(length, total, pairing):
    """Over many steps, averaged over the slots of a batch, every count 0..L comes equally often."""
    steps = 1500
    counts = torch.stack([mask_counts(length, 0, total, total, seed=2, step=s, pairing=pairing) for s in range(steps)])
    seen = torch.bincount(counts.flatten(), minlength=length + 1).double() / counts.numel()
    error = (seen - 1 / (length + 1)).abs().max()
    assert error < 5 * math.sqrt(1 / (length + 1) / steps)


def test_a_batch_covers_the_range_evenly():
    u = stratified_uniforms(0, 64, 64, seed=3, step=1).sort().values
    cells = (u * 64).long()
    assert torch.equal(cells, torch.arange(64))


def test_the_schedule_is_the_log_linear_one_within_its_clipping():
    schedule = LogLinear(1e-4, 20.0)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = schedule.sigma(t)
    assert sigma[0] == pytest.approx(1e-4, rel=1e-9) and sigma[-1] == pytest.approx(20.0, rel=1e-9)
    torch.testing.assert_close(-torch.expm1(-sigma), schedule.rate(t), rtol=1e-12, atol=1e-12)
    t = t[1:-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    torch.testing.assert_close(schedule.weight(t).detach(), slope / torch.expm1(schedule.sigma(t).detach()), rtol=1e-7, atol=0)
    middle = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(schedule.weight(middle), 1 / middle.double(), rtol=2e-3, atol=0)  # 1 / t up to the clipping


def batch(config, first=0, count=32, total=32, length=50, step=0):
    tokens = torch.randint(0, 90, (total, length), generator=torch.Generator().manual_seed(1))[first : first + count]
    ids = torch.arange(first, first + count)
    return hide_for_training(tokens, config, first=first, total=total, mask_id=99, sample_ids=ids, seed=4, step=step), tokens


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("weighting", ["uniform", "ce"])
def test_a_masked_batch_says_what_it_hid(masking, weighting):
    masked, tokens = batch(DiffusionConfig(masking=masking, weighting=weighting))
    hidden = masked.noisy == 99
    assert torch.equal(hidden.flatten().nonzero().flatten(), masked.rows)
    assert torch.equal(tokens.flatten()[masked.rows], masked.target)
    assert masked.weights.dtype is torch.float32 and len(masked.weights) == len(masked.rows) and masked.tokens == tokens.numel()
    if masking == "exact":
        assert len(masked.rows) == tokens.numel() // 2
        torch.testing.assert_close(masked.hidden_share, hidden.float().mean(1))
    if weighting == "ce" and masking == "exact":
        torch.testing.assert_close(masked.weights.sum(), torch.tensor(float(masked.tokens)))


@pytest.mark.parametrize("masking", ["exact", "bernoulli"])
@pytest.mark.parametrize("weighting", ["uniform", "ce"])
@pytest.mark.parametrize("pairing", ["antithetic", "independent"])
def test_masks_and_weights_are_the_same_however_the_batch_is_cut(masking, weighting, pairing):
    config = DiffusionConfig(masking=masking, weighting=weighting, pairing=pairing)
    whole = batch(config)[0]
    for size in (1, 8):
        parts = [batch(config, first, size)[0] for first in range(0, 32, size)]
        assert torch.equal(whole.noisy, torch.cat([part.noisy for part in parts]))
        assert torch.equal(whole.weights, torch.cat([part.weights for part in parts]))


def test_bernoulli_hides_each_token_on_its_own_at_the_schedules_rate():
    config = DiffusionConfig(masking="bernoulli", pairing="independent")
    shares, rates, both = [], [], []
    for step in range(400):
        masked, _ = batch(config, step=step)
        hidden = (masked.noisy == 99).double()
        shares.append(hidden.mean(1))
        rates.append(masked.hidden_share.double())
        both.append((hidden[:, 0] * hidden[:, 1] - masked.hidden_share.double() ** 2).mean())
    share, rate = torch.cat(shares), torch.cat(rates)
    z = (share - rate) / (rate * (1 - rate) / 50).sqrt().clamp(min=1e-9)
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z)) and abs(float(z.var()) - 1) < 0.1
    assert abs(float(torch.stack(both).mean())) < 0.02
    assert abs(float(rate.mean()) - 0.5) < 0.02


@pytest.mark.parametrize(("masking", "tolerance"), [("exact", 0.02), ("bernoulli", 0.03)])
def test_the_weighted_loss_of_a_constant_model_is_its_constant(masking, tolerance):
    """A model that pays c nats for every token has a bound of c nats a token, so weights must sum to the number of tokens."""
    config = DiffusionConfig(masking=masking)
    sums = [float(batch(config, step=s)[0].weights.sum()) / (32 * 50) for s in range(300)]
    mean = sum(sums) / len(sums)
    expected = 1.0 if masking == "bernoulli" else 51 / 50 * 50 / 51  # E over k of (L + 1) / k * k, k = 0 giving 0
    assert mean == pytest.approx(expected, abs=tolerance)
