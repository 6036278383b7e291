"""Counts and their laws: the bound is kept, draws follow the law evenly, the same on any cut of the batch, alone or in pairs."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from exact import MASK, Exact, chi_square
from hypothesis import given
from hypothesis import strategies as st

from atat_fast.audit.masks import Joint, count_law_value
from atat_fast.config import Config, DiffusionConfig, ModelConfig, TrainConfig
from atat_fast.data.loader import SequenceLoader
from atat_fast.diffusion.counts import bell, bound_weights, count_chances, draw_counts, expected_share, mask_counts, weighting_at
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.noise import LogLinear, stratified_uniforms
from atat_fast.diffusion.uniform import hide
from atat_fast.errors import UsageError
from atat_fast.training.plan import check

BELL = DiffusionConfig(counts="bell", counts_centre=0.3, counts_width=0.25)
MIRROR = DiffusionConfig(mirror=True)
PAIRINGS = ("antithetic", "stratified", "independent")


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 10**6))
def test_pairs_add_up_to_the_length(length, pairs, seed, step):
    k = mask_counts(length, 0, 2 * pairs, 2 * pairs, seed=seed, step=step)
    assert ((k[::2] + k[1::2]) == length).all() and (k >= 0).all() and (k <= length).all()


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(PAIRINGS), st.booleans(), st.data())
def test_any_slice_of_the_batch_is_the_same_as_the_whole(length, total, pairing, bells, data):
    first = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - first))
    options = {"seed": 5, "step": 9, "pairing": pairing, "chances": bell(length, 0.3, 0.2) if bells else None}
    whole = mask_counts(length, 0, total, total, **options)
    assert torch.equal(whole[first : first + count], mask_counts(length, first, count, total, **options))


@pytest.mark.parametrize("bells", [False, True])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("length", "total"), [(7, 6), (20, 5), (3, 1)])
def test_each_count_comes_as_often_as_the_law_says(pairing, length, total, bells):
    """Over steps, one slot a step picked so that every slot takes part: draws are then independent and chi-square applies."""
    chances = bell(length, 0.3, 0.25) if bells else None
    seen, options = torch.zeros(length + 1), {"seed": 3, "pairing": pairing, "chances": chances}
    for step in range(1200):
        seen[mask_counts(length, (step * 7919) % total, 1, total, step=step, **options)] += 1
    far = chi_square(seen, torch.full((length + 1,), 1 / (length + 1)) if chances is None else chances)
    assert far < 5 and (far > -5 or (total > 1 and pairing != "independent"))  # slots that hold other strata may come closer


def test_a_batch_follows_the_law_as_evenly_as_it_can():
    """Sorted counts of a stratified batch of 64 are within one stratum of the law's quantiles."""
    chances = bell(100, 0.3, 0.2)
    cumulated = torch.cat([torch.zeros(1), chances.cumsum(0)])
    counts = mask_counts(100, 0, 64, 64, seed=1, step=5, chances=chances).sort().values
    place = torch.arange(64, dtype=torch.float64)
    assert (cumulated[counts] <= (place + 1) / 64 + 1e-12).all() and (cumulated[counts + 1] >= place / 64 - 1e-12).all()
    assert torch.equal((stratified_uniforms(0, 64, 64, seed=3, step=1).sort().values * 64).long(), torch.arange(64))


@pytest.mark.parametrize(("vocabulary", "length", "seed"), [(3, 4, 0), (2, 5, 1), (4, 3, 2)])
@pytest.mark.parametrize("progress", [0.0, 0.6, 0.9, 0.999])
def test_weights_keep_the_bound_under_any_law(vocabulary, length, seed, progress):
    """Equal to the entropy at the best model, under the bell, under uniform counts and under every mixture between."""
    joint = Joint.random(vocabulary, length, seed=seed)
    config = DiffusionConfig(counts="bell", counts_centre=0.3, counts_width=0.15, counts_anneal_from=0.5)
    chances = count_chances(config, length, progress)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
    assert count_law_value(joint, chances, bound_weights(chances)) == pytest.approx(joint.entropy(), rel=1e-10)
    unweighted = torch.tensor([0.0, *((length + 1) / k for k in range(1, length + 1))])
    if progress < 0.9:
        assert abs(count_law_value(joint, chances, unweighted) - joint.entropy()) > 0.01  # the audit would notice


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0.05, 3.0))
def test_the_bell_is_a_distribution_over_counts_that_hide_something(length, centre, width):
    chances = bell(length, centre, width)
    assert chances.dtype is torch.float64 and len(chances) == length + 1
    assert float(chances[0]) == 0 and float(chances.sum()) == pytest.approx(1, abs=1e-12)
    ratio = math.exp(-0.5 * (((1 - centre) / width) ** 2 - ((1 / length - centre) / width) ** 2))
    assert float(chances[length]) == pytest.approx(ratio * float(chances[1]), rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40).filter(lambda c: sum(c) > 0.1), st.data())
def test_draws_are_the_laws_quantiles(raw, data):
    chances = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    u = torch.tensor(data.draw(st.lists(st.floats(1e-9, 1 - 1e-9), min_size=1, max_size=20)), dtype=torch.float64)
    for value, k in zip(u.tolist(), draw_counts(u, chances).tolist(), strict=True):
        assert float(chances[k]) > 0
        assert float(chances[:k].sum()) <= value + 1e-12 and value - 1e-12 <= float(chances[: k + 1].sum())


def test_the_bell_gives_way_to_uniform_counts_where_it_is_told_to():
    config = DiffusionConfig(counts="bell", counts_anneal_from=0.6)
    start, end = bell(10, 0.35, 0.2), torch.full((11,), 1 / 11, dtype=torch.float64)
    assert torch.equal(count_chances(config, 10, 0.0), start) and torch.equal(count_chances(config, 10, 0.6), start)
    torch.testing.assert_close(count_chances(config, 10, 0.8), (start + end) / 2)
    assert count_chances(config, 10, 1.0) is None and count_chances(DiffusionConfig(), 10, 0.5) is None
    assert torch.equal(count_chances(DiffusionConfig(counts="bell"), 10, 1.0), start)
    counts = mask_counts(10, 0, 2000, 2000, seed=1, step=0, chances=start)
    assert expected_share(config, 10) == pytest.approx(float(counts.double().mean()) / 10, abs=1e-3)
    assert expected_share(config, 10, 1.0) == expected_share(DiffusionConfig(), 10) == 0.5


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


def batch(config, first=0, count=32, total=32, length=50, step=0, progress=0.0):
    sequences = torch.randint(0, 90, (total, length), generator=torch.Generator().manual_seed(1))
    if config.mirror:
        sequences = sequences[: total // 2].repeat_interleave(2, 0)
    tokens, ids = sequences[first : first + count], torch.arange(first, first + count)
    options = {"first": first, "total": total, "mask_id": 99, "sample_ids": ids, "seed": 4, "step": step, "progress": progress}
    return hide_for_training(tokens, config, **options), tokens


CUT = [BELL, MIRROR] + [
    DiffusionConfig(**settings)
    for settings in (
        {}, {"weighting": "ce"}, {"masking": "bernoulli"}, {"masking": "bernoulli", "weighting": "ce"}, {"pairing": "stratified"},
        {"pairing": "independent"}, {"masking": "bernoulli", "pairing": "independent"}, {"mirror": True, "weighting": "ce"},
        {"counts": "bell", "weighting": "ce"},
    )
]  # fmt: skip


@pytest.mark.parametrize("config", CUT)
def test_a_batch_says_what_it_hid_and_is_the_same_however_it_is_cut(config):
    whole, tokens = batch(config)
    hidden = whole.noisy == 99
    assert torch.equal(hidden.flatten().nonzero().flatten(), whole.rows)
    assert torch.equal(tokens.flatten()[whole.rows], whole.target) and torch.equal(whole.noisy[~hidden], tokens[~hidden])
    assert whole.weights.dtype is torch.float32 and len(whole.weights) == len(whole.rows) and whole.tokens == tokens.numel()
    if config.masking == "exact":
        assert config.counts == "bell" or config.pairing != "antithetic" or len(whole.rows) == tokens.numel() // 2
        torch.testing.assert_close(whole.hidden_share, hidden.float().mean(1))
        if config.weighting == "ce":
            torch.testing.assert_close(whole.weights.sum(), torch.tensor(float(tokens.numel())))
    for size in (1, 2, 8):
        parts = [batch(config, first, size)[0] for first in range(0, 32, size)]
        for name in ("noisy", "weights", "target"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_bernoulli_hides_each_token_on_its_own_at_the_schedules_rate():
    config, shares, rates, both = DiffusionConfig(masking="bernoulli", pairing="independent"), [], [], []
    for step in range(400):
        masked, _ = batch(config, step=step)
        hidden, rate = (masked.noisy == 99).double(), masked.hidden_share.double()
        shares.append(hidden.mean(1))
        rates.append(rate)
        both.append((hidden[:, 0] * hidden[:, 1] - rate**2).mean())
    share, rate = torch.cat(shares), torch.cat(rates)
    z = (share - rate) / (rate * (1 - rate) / 50).sqrt().clamp(min=1e-9)
    assert abs(float(z.mean())) < 5 / math.sqrt(len(z)) and abs(float(z.var()) - 1) < 0.1
    assert abs(float(torch.stack(both).mean())) < 0.02 and abs(float(rate.mean()) - 0.5) < 0.02


@pytest.mark.parametrize("config", [DiffusionConfig(), DiffusionConfig(masking="bernoulli"), BELL])
def test_the_weighted_loss_of_a_constant_model_is_its_constant(config):
    """A model that pays c nats for every token has a bound of c nats a token, so weights must sum to the number of tokens."""
    sums = [float(batch(config, step=s)[0].weights.sum()) / (32 * 50) for s in range(300)]
    assert sum(sums) / len(sums) == pytest.approx(1, abs=0.03 if config.masking == "bernoulli" else 0.02)
    if config is BELL:
        masked, _ = batch(config)
        counts = (masked.noisy == 99).sum(1)
        of_law = bound_weights(bell(50, 0.3, 0.25))[counts].float().repeat_interleave(counts)
        torch.testing.assert_close(masked.weights, of_law)


def test_the_weighting_switches_exactly_once():
    config = DiffusionConfig(weighting="uniform", ce_until=0.3)
    assert [weighting_at(config, step / 50) for step in range(50)] == ["ce"] * 15 + ["uniform"] * 35
    for step, weighting in ((14, "ce"), (15, "uniform")):
        want = batch(DiffusionConfig(weighting=weighting))[0].weights
        assert torch.equal(batch(config, progress=step / 50)[0].weights, want)


def test_a_mirrored_pair_hides_every_token_once_and_a_count_of_nothing_meets_all():
    for step in range(20):
        masked, tokens = batch(MIRROR, step=step)
        hidden = masked.noisy == 99
        assert (hidden[::2] ^ hidden[1::2]).all() and torch.equal(tokens[::2], tokens[1::2])
    masked, _ = batch(MIRROR, total=2, count=2, length=1)  # one token: hidden in one slot, visible in the other
    assert len(masked.rows) == 1


def test_each_slot_of_a_mirrored_pair_draws_uniform_masks():
    """P(M) = 1 / (L + 1) / C(L, |M|) for the drawn slot and for its complement: so each slot alone is the bound's estimate."""
    length = 4
    law = torch.tensor([1 / (length + 1) / math.comb(length, code.bit_count()) for code in range(2**length)])
    seen = torch.zeros(2, 2**length)
    for step in range(1500):
        masked, _ = batch(MIRROR, count=2, total=2, length=length, step=step)
        seen[torch.arange(2), ((masked.noisy == 99) * 2 ** torch.arange(length)).sum(1)] += 1
    folded = lambda t: (t + t.flip(0))[: 2 ** (length - 1)]  # a mask and its complement  # noqa: E731
    for slot in range(2):  # with two slots a pair's u lies in (0, 1/2) for the first and beyond for the second
        assert chi_square(folded(seen[slot]), folded(law)) < 5
    assert chi_square(seen.sum(0), law) < 5


@pytest.mark.parametrize("config", [MIRROR, BELL, DiffusionConfig(pairing="stratified")])
def test_the_training_loss_of_the_best_model_is_the_entropy(config):
    """One step after another, on batches of 8 slots drawn from the joint."""
    joint = Joint.random(3, 4, seed=0)
    model, values = Exact(joint), []
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.multinomial(joint.chance, 8, replacement=True, generator=generator)
        tokens = joint.sequences[chosen[:4].repeat_interleave(2) if config.mirror else chosen]
        place = {"first": 0, "total": 8, "mask_id": MASK, "sample_ids": torch.arange(8) + 8 * step, "seed": 1, "step": step}
        masked = hide_for_training(tokens, config, **place)
        values.append(float((masked.weights * model.nll(masked)).sum()) / masked.tokens)
    found = torch.tensor(values, dtype=torch.float64)
    assert abs(float(found.mean()) - joint.entropy() / 4) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("config", [DiffusionConfig(), BELL, DiffusionConfig(masking="bernoulli"), DiffusionConfig(spread=1.0)])
def test_with_prompts_the_best_models_loss_is_the_conditional_entropy(config):
    """Sorted by length: prompts of one token, then of two. (H(x | x1) + H(x | x1 x2)) / 2 over the mean of 3 and 2 tokens."""
    joint = Joint.random(3, 4, seed=0)
    model, values, frozen = Exact(joint), [], torch.arange(4) < torch.tensor([1, 2]).repeat_interleave(4)[:, None]
    choose = functools.partial(hide, spread=config.spread)
    for step in range(150):
        generator = torch.Generator().manual_seed(step)
        tokens = joint.sequences[torch.multinomial(joint.chance, 8, replacement=True, generator=generator)]
        place = {"first": 0, "total": 8, "mask_id": MASK, "sample_ids": torch.arange(8) + 8 * step, "seed": 1, "step": step}
        masked = hide_for_training(tokens, config, frozen=frozen, choose=choose, **place)
        assert masked.tokens == 20 and not (masked.noisy == MASK)[frozen].any()
        values.append(float((masked.weights * model.nll(masked)).sum()) / masked.tokens)

    def entropy_of_prompt(tokens):
        chance = torch.zeros(3**tokens, dtype=torch.float64)
        place = (joint.sequences[:, :tokens] * 3 ** torch.arange(tokens)).sum(1)
        return float(torch.special.entr(chance.index_add(0, place, joint.chance.double())).sum())

    want = joint.entropy() - (entropy_of_prompt(1) + entropy_of_prompt(2)) / 2
    found = torch.tensor(values, dtype=torch.float64)
    assert abs(float(found.mean()) - want / 2.5) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("config", [c for c in CUT if not c.mirror])
def test_nothing_frozen_changes_nothing_and_lengths_may_be_cut(config):
    plain, tokens = batch(config)
    options = {"mask_id": 99, "seed": 4, "step": 0, "total": 32}
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    same = hide_for_training(tokens, config, first=0, sample_ids=torch.arange(32), frozen=nothing, **options)
    assert same.tokens == plain.tokens  # the same counts and weights, dealt to other sequences
    if config.masking == "exact":
        torch.testing.assert_close(same.hidden_share.sort().values, plain.hidden_share.sort().values)
        torch.testing.assert_close(same.weights.sort().values, plain.weights.sort().values)
    frozen = torch.arange(50) < torch.arange(0, 64, 2)[:, None]  # up to a sequence of nothing but a prompt
    lengths = (~frozen).sum(1)
    whole = hide_for_training(tokens, config, first=0, sample_ids=torch.arange(32), frozen=frozen, **options)
    parts = []
    for i in range(0, 32, 8):
        own = {"first": i, "sample_ids": torch.arange(i, i + 8), "frozen": frozen[i : i + 8], "lengths": lengths}
        parts.append(hide_for_training(tokens[i : i + 8], config, **own, **options))
    assert torch.equal(torch.cat([p.noisy for p in parts]), whole.noisy)
    assert torch.equal(torch.cat([p.weights for p in parts]), whole.weights)
    assert sum(p.tokens for p in parts) == whole.tokens == int(lengths.sum())
    if config.masking == "exact" and config.weighting == "ce":
        assert float(whole.weights.sum()) == pytest.approx(whole.tokens, rel=1e-5)


class Numbered:
    """A split whose sequence i is the number i, repeated."""

    def require_sequences(self, length):
        pass

    def num_sequences(self, length):
        return 10

    def sequence(self, i, length):
        return [i] * length


def test_the_loader_gives_each_sequence_twice_whatever_the_cut():
    plain, twice = SequenceLoader(Numbered(), 3, 1), SequenceLoader(Numbered(), 3, 1, copies=2)
    tokens, ids = twice.batch(0, 24)
    assert torch.equal(ids, torch.arange(24)) and torch.equal(tokens[::2], tokens[1::2])
    assert torch.equal(tokens[::2], plain.batch(0, 12)[0])
    for size in (1, 3, 8):
        assert torch.equal(tokens, torch.cat([twice.batch(first, size)[0] for first in range(0, 24, size)]))


@pytest.mark.parametrize(
    ("settings", "batch_size", "message"),
    [
        ({"mirror": True}, 5, "train.global_batch 5 is odd; use 4 or 6"),
        ({"mirror": True, "counts": "bell", "weighting": "ce"}, 4, "diffusion.mirror"),
        ({"mirror": True, "pairing": "independent"}, 4, "diffusion.pairing antithetic"),
        ({"mirror": True, "masking": "bernoulli"}, 4, "exact counts"),
        ({"counts": "bell", "masking": "bernoulli"}, 4, "exact counts"),
        ({"counts": "bell", "counts_width": 0.0}, 4, "counts_width above 0"),
        ({"counts": "bell", "counts_centre": 1.5}, 4, "counts_centre"),
        ({"counts": "bell", "counts_centre": 0.1, "counts_width": 0.05}, 4, "too rarely for uniform weights"),
        ({"counts_anneal_from": -0.1}, 4, "counts_anneal_from"),
        ({"ce_until": 1.1}, 4, "ce_until"),
        ({"ce_until": 0.5, "weighting": "ce"}, 4, "changes nothing"),
    ],
)
def test_settings_that_make_no_sense_together(settings, batch_size, message):
    diffusion, train = DiffusionConfig(**settings), TrainConfig(global_batch=batch_size)
    config = Config(model=ModelConfig(length=64), diffusion=diffusion, train=train)
    with pytest.raises(UsageError, match=message):
        check(config)
    if settings.get("counts_width") == 0.05:  # fine if nothing has to be made up for
        config.diffusion.weighting = "ce"
        check(config)
