"""Samplers: their law on an alphabet that can be listed, what stays fixed, and that a sample does not depend on its batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import MASK, Exact, chain_law, chi_square
from small import small_dit

from atat_fast.audit.masks import Joint
from atat_fast.config import ImportanceConfig
from atat_fast.errors import UsageError
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.sampling import samplers
from atat_fast.sampling.samplers import BY_CERTAINTY, SAMPLERS, cut_at_end, sample

ORDERED = (*BY_CERTAINTY, "importance")


def masks(batch, length):
    return torch.full((batch, length), MASK)


def by_position(tokens, share):
    """Importance that depends on what is visible, on the position and on the time."""
    length = tokens.shape[1]
    return torch.remainder(tokens.roll(1, 1) * 5 + 3 * torch.arange(length) + (share * length).long()[:, None], 7) / 6


def options_of(sampler):
    return {"sampler": sampler} | ({"importance": by_position} if sampler == "importance" else {})


def dit():
    return small_dit(11, MASK, scale=0.3).eval()


def law_of_draws(monkeypatch, model, start, **options):
    """The distribution of `sample`'s result over everything its draws can come out as, its choice of positions being as it is.

    The sampler itself runs, once for each way: its draws are taken from a script, and weighed with the chances of the model's
    logits at the rows it asked for.
    """
    law, waiting = {}, [()]
    while waiting:
        script, weight, place = waiting.pop(), 1.0, 0

        def draw(features, names, step):
            nonlocal weight, place, script
            p = torch.softmax(model.logits(features), -1)
            if place == len(script):
                first, *others = itertools.product(range(MASK), repeat=len(features))
                waiting.extend((*script, other) for other in others)
                script = (*script, first)
            weight *= math.prod(float(p[i, v]) for i, v in enumerate(script[place]))
            place += 1
            return torch.tensor(script[place - 1], dtype=torch.int64)

        with monkeypatch.context() as patch:
            patch.setattr(samplers, "make_drawer", lambda *_: draw)
            out = tuple(samplers.sample(model, start, **options)[0].tolist())
        law[out] = law.get(out, 0.0) + weight
    return law


def law_of(joint):
    return {tuple(x): float(p) for x, p in zip(joint.sequences.tolist(), joint.chance, strict=True)}


def distance(law, other):
    """The largest difference of a probability."""
    return max(abs(law.get(x, 0.0) - other.get(x, 0.0)) for x in law.keys() | other.keys())


@pytest.mark.parametrize(("length", "steps"), [(3, 1), (3, 2), (2, 3), (2, 5)])
def test_the_law_is_the_ancestral_one(length, steps, monkeypatch):
    """Every plan of reveal times, weighed equally (test_reveal.py shows that they are), and every outcome of every draw."""
    joint, law = Joint.random(3, length, seed=4), {}
    model, plans = Exact(joint), list(itertools.product(range(steps), repeat=length))
    for times in plans:
        monkeypatch.setattr(samplers, "ancestral_times", lambda *_, times=times: torch.tensor([times]))
        for x, p in law_of_draws(monkeypatch, model, masks(1, length), steps=steps).items():
            law[x] = law.get(x, 0.0) + p / len(plans)
    assert distance(law, chain_law(joint, steps)) < 1e-12


@pytest.mark.parametrize("sampler", ["first_hitting", *ORDERED])
def test_one_token_at_a_time_gives_the_joint_exactly(sampler, monkeypatch):
    """Whatever chooses the positions, products of exact conditionals are the joint."""
    joint = Joint.random(3, 3, seed=4)
    for seed in range(3):
        law = law_of_draws(monkeypatch, Exact(joint), masks(1, 3), steps=3, seed=seed, **options_of(sampler))
        assert distance(law, law_of(joint)) < 1e-12


@pytest.mark.parametrize("sampler", ["ancestral", "ddpm_cache", "first_hitting", "confidence", "importance"])
def test_samples_follow_the_law(sampler):
    joint, ancestral = Joint.random(3, 3, seed=4), sampler in ("ancestral", "ddpm_cache")
    drawn = sample(Exact(joint), masks(5000, 3), steps=2 if ancestral else 3, seed=5, **options_of(sampler))
    assert chi_square(drawn, chain_law(joint, 2) if ancestral else law_of(joint)) < 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fixed_tokens_stay_and_no_mask_is_left(sampler):
    joint = Joint.random(3, 4, seed=5)
    start = torch.tensor([[MASK, 1, MASK, 2], [0, MASK, MASK, MASK], [2, 1, 0, 1], [MASK] * 4])
    for steps in (1, 3, 9):
        drawn = sample(Exact(joint), start, steps=steps, eta=0.5 if "remdm" in sampler else None, **options_of(sampler))
        fixed = start != MASK
        assert torch.equal(drawn[fixed], start[fixed]) and (drawn != MASK).all()
    assert (start == MASK).sum() == 9, "the caller's tensor is not written to"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_are_the_fewer_of_steps_and_hidden_tokens(sampler):
    """Steps that reveal nothing cost nothing."""
    model = Exact(Joint.random(3, 5, seed=6))
    for nothing in (torch.tensor([[2, 1, 0, 1, 2]]), torch.empty(0, 5, dtype=torch.int64)):
        assert torch.equal(sample(model, nothing, **options_of(sampler)), nothing) and model.calls == 0
    start = torch.tensor([[MASK] * 4 + [0], [MASK, 1, 0, 1, MASK]])
    for steps in (1, 2, 3, 4, 50) if "remdm" not in sampler else ():
        model.calls, seen = 0, []
        sample(model, start, steps=steps, on_step=lambda *now, seen=seen: seen.append(now), **options_of(sampler))
        if sampler in ("ancestral", "ddpm_cache"):  # tokens of both texts come when they come
            assert model.calls == len(seen) <= min(steps, 6)
        else:
            assert model.calls == min(steps, 4)
        assert [step for step, _ in seen] == sorted({step for step, _ in seen}) and seen[-1][0] < steps


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    joint, start = Joint.random(3, 4, seed=7), masks(5, 4)
    start[1, 0], start[4, 2] = 2, 1
    together = sample(Exact(joint), start, steps=6, seed=3, **options_of(sampler))
    for i in (3, 4):
        alone = sample(Exact(joint), start[i : i + 1], steps=6, seed=3, sample_ids=torch.tensor([i]), **options_of(sampler))
        assert torch.equal(together[i : i + 1], alone)
    assert not torch.equal(together, sample(Exact(joint), start, steps=6, seed=4, **options_of(sampler)))


@pytest.mark.parametrize("sampler", ["ddpm_cache", "first_hitting", "entropy", "remdm_cap"])
def test_lengths_of_their_own(sampler):
    """A short sequence among long ones is what it is alone, and its padding comes back untouched. In fp64: products of other
    sizes round otherwise, and a rounding may decide which of two equally certain positions comes first.
    """
    model = dit().double()
    start = masks(3, 9)
    start[1, 2], start[1, 6:] = 5, 7
    lengths = torch.tensor([9, 6, 4])
    together = sample(model, start, steps=5, sampler=sampler, lengths=lengths, seed=1)
    assert torch.equal(together[1, 6:], start[1, 6:]) and (together[2, 4:] == MASK).all()
    for i, length in enumerate(lengths.tolist()):
        alone = sample(model, start[i : i + 1, :length], steps=5, sampler=sampler, seed=1, sample_ids=torch.tensor([i]))
        assert torch.equal(together[i, :length], alone[0])


@pytest.mark.parametrize("sampler", ["ddpm_cache", "confidence", "remdm_confidence"])
def test_blocks_go_from_left_to_right_past_the_models_length(sampler):
    model, start, seen = dit(), masks(2, 30), []
    start[:, :2], start[0, 20] = 1, 9
    options = {"steps": 4, "block": 5, "sampler": sampler, "seed": 2}
    drawn = sample(model, start, on_step=lambda step, t: seen.append((step, t.clone())), **options)
    assert (drawn != MASK).all() and torch.equal(drawn[:, :2], start[:, :2]) and int(drawn[0, 20]) == 9
    for step, tokens in seen:
        block = step // 4
        assert (tokens[:, : 5 * block] != MASK).all()
        assert torch.equal(tokens[:, 5 * (block + 1) :], start[:, 5 * (block + 1) :])
    # Text of another length around it changes nothing: the shorter text is the longer one's beginning.
    assert torch.equal(sample(model, start[:, :27], **options)[:, :25], drawn[:, :25])
    one = sample(model, masks(2, 12), **options | {"block": 12})  # one block is no blocks
    assert torch.equal(one, sample(model, masks(2, 12), **options | {"block": 0}))


def test_the_clock_of_a_model_that_is_told_the_time():
    joint, told = Joint.random(3, 4, seed=6), []

    class Timed(Exact):
        time_conditioning = True

        def features(self, tokens, hidden_share=None, *, rows=None):
            told.append((hidden_share.clone(), (tokens == MASK).float().mean(1)))
            return super().features(tokens, hidden_share, rows=rows)

    start = torch.cat((masks(1, 4), torch.tensor([[MASK, 0, 1, MASK]])))
    for sampler in ("ancestral", "confidence"):
        told.clear()
        sample(Timed(joint), start, steps=7, sampler=sampler)
        for share, hidden in told:
            assert torch.equal(share, hidden)
    told.clear()
    sample(Timed(joint), start, steps=4, sampler="first_hitting")
    clocks = torch.stack([share for share, _ in told])
    assert clocks.shape == (4, 2) and (clocks[:2].diff(dim=0) < 0).all() and (clocks[:, 0].diff() < 0).all()
    assert (clocks[:2, 1] < 0.5).all() and (clocks[2:, 1] == 0).all()  # its two tokens are done after two calls


def test_the_cache_is_refused_for_a_model_that_is_told_the_time():
    model = Exact(Joint.random(3, 2, seed=0))
    model.time_conditioning = True
    with pytest.raises(UsageError, match="use sampler ancestral"):
        sample(model, masks(1, 2), sampler="ddpm_cache")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_that_are_padded_give_the_same_samples(sampler, monkeypatch):
    """On a GPU numbers of rows are rounded up so that few graphs serve all steps; the same code runs here, without the graphs."""
    model = dit()
    start = masks(3, 12)
    start[1, :5] = 2
    want = sample(model, start, steps=5, seed=1, **options_of(sampler))
    monkeypatch.setattr(samplers, "Replay", lambda advance: advance)
    monkeypatch.setattr(samplers, "rounded_up", lambda count: count and count + 7)
    assert torch.equal(sample(model, start, steps=5, seed=1, graphs=True, **options_of(sampler)), want)


def states_of(model, start, **options):
    """The tokens before the first step and after each."""
    seen = [start.clone()]
    sample(model, start, on_step=lambda _, tokens: seen.append(tokens.clone()), **options)
    return seen


@pytest.mark.parametrize("cut", [{}, {"top_k": 2, "top_p": 0.5}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_temperature_0_takes_the_likeliest_token_of_every_position(sampler, cut):
    model = dit().double()
    start = masks(3, 12)
    start[1, 3:7] = 5
    options = options_of(sampler) | ({"eta": 0.5} if "remdm" in sampler else {}) | {"steps": 5, "temperature": 0.0, "seed": 2}
    states = states_of(model, start, **options, **cut)
    for before, after in itertools.pairwise(states):
        shown = (before == MASK) & (after != MASK)
        likeliest = model.logits(model.features(before)).argmax(1).view_as(before)
        assert shown.any() and torch.equal(after[shown], likeliest[shown])
    assert torch.equal(sample(model, start, **options), states[-1])
    assert torch.equal(sample(model, start, **options | {"temperature": 1e-320}), states[-1])


@pytest.mark.parametrize("sampler", ["ancestral", "ddpm_cache", "first_hitting", "remdm_cap", "remdm_confidence"])
def test_which_positions_are_left_to_chance_stay_so_at_temperature_0(sampler):
    model = dit()
    start = masks(2, 12)
    cold, other = (states_of(model, start, sampler=sampler, steps=6, temperature=0.0, seed=seed) for seed in (1, 2))
    hidden = [(state == MASK).tolist() for state in cold]
    assert hidden != [(state == MASK).tolist() for state in other]
    if sampler != "remdm_confidence":  # which goes by the chances of what was drawn
        warm = states_of(model, start, sampler=sampler, steps=6, seed=1)
        assert hidden == [(state == MASK).tolist() for state in warm]


END = 7


@pytest.fixture
def often_ends():
    model = dit().double()
    with torch.no_grad():
        model.head.bias[END] += 1.5
    return model


@pytest.mark.parametrize("sampler", ["ddpm_cache", "confidence", "remdm_cap"])
@pytest.mark.parametrize(("block", "length"), [(0, 12), (4, 12), (5, 33)])
def test_texts_stop_at_their_end_and_are_what_they_would_be_up_to_it(sampler, block, length, often_ends):
    start = masks(6, length)
    start[0, :3] = torch.tensor([1, END, 2])  # an end that was given is no end
    start[1, 9] = 1  # and nothing that was given comes behind one
    start[2, length - 1] = 1
    lengths = torch.tensor([length, length, length, length - 2, length, length])
    options = {"sampler": sampler, "block": block, "steps": 4, "lengths": lengths, "seed": 3}
    whole, stopped = sample(often_ends, start, **options), sample(often_ends, start, **options, stop_at=END)
    given, ended = [3, 10, length, 0, 0, 0], 0
    for was, now, first, end in zip(whole.tolist(), stopped.tolist(), given, lengths.tolist(), strict=True):
        text = cut_at_end(was[:end], first, END)
        assert now[:end] == text + [END] * (end - len(text)) and now[end:] == was[end:]
        ended += len(text) < end
    assert ended >= 3 and torch.equal(stopped[2], whole[2])


def test_blocks_that_nobody_would_read_are_not_filled(often_ends):
    start, options = masks(2, 40), {"block": 4, "steps": 4, "sampler": "confidence", "stop_at": END, "seed": 1}
    steps = []
    drawn = sample(often_ends, start, on_step=lambda step, tokens: steps.append((step, tokens.clone())), **options)
    last = max(row.index(END) for row in drawn.tolist())
    assert last < 30 and steps[-1][0] // 4 == last // 4 and torch.equal(steps[-1][1], drawn)
    assert torch.equal(sample(often_ends, start[1:], sample_ids=torch.tensor([1]), **options), drawn[1:])


@pytest.mark.parametrize(
    ("ids", "prompt", "kept"),
    [
        ([1, 2, 9, 3, 9], 0, [1, 2]),
        ([1, 2, 9, 3, 9], 2, [1, 2]),
        ([1, 2, 9, 3, 9], 3, [1, 2, 9, 3]),
        ([1, 2, 9], 3, [1, 2, 9]),
        ([1, 2], 0, [1, 2]),
        ([9, 1], 0, []),
        ([], 0, []),
    ],
)
def test_what_stands_behind_an_end_is_cut_off(ids, prompt, kept):
    assert cut_at_end(ids, prompt, 9) == kept


def test_estimators_give_an_order():
    model, config = dit(), ImportanceConfig(source="learned", width=16, layers=1, heads=2)
    estimator = ImportanceEstimator(config, 16, 12)
    torch.nn.init.normal_(estimator.network.head.weight, std=0.5)
    start = torch.randint(0, 11, (2, 12)).masked_fill(torch.rand(2, 12) < 0.6, MASK)
    hidden, scores = start[0] == MASK, estimator.scorer(model)
    known = scores(start, (start == MASK).float().mean(1))[0]
    odds = {1e6: known.masked_fill(~hidden, 2).argmin(), -1e6: known.masked_fill(~hidden, -1).argmax()}  # nothing left to chance
    for tilt, first in odds.items():
        states = states_of(model, start, steps=12, sampler="importance", importance=scores, tilt=tilt)
        assert (hidden & (states[1][0] != MASK)).nonzero().tolist() == [[int(first)]]
    counted = ImportanceEstimator(ImportanceConfig(source="frequency"), 16, 12, torch.arange(11))
    with pytest.raises(UsageError, match="needs learned scores"):
        counted.scorer(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5; 0 takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite"),
        ({"sampler": "ddpm"}, "did you mean ddpm_cache"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be at least 1"),
        ({"eta": 2.0, "sampler": "remdm_cap"}, "eta must be in 0..1"),
        ({"sampler": "importance"}, "needs an importance estimator"),
        ({"block": 13}, "block must be in 1..12"),
        *(({"stop_at": end}, f"other than its mask, got {end}") for end in (3, 11, -1)),
        ({"tokens": masks(1, 13)}, r"13 tokens, but this model takes at most 12; .* in blocks"),
        ({"tokens": torch.tensor([[3, 11]])}, "token id 11, outside the model's vocabulary of 11"),
        ({"tokens": torch.tensor([[3, -1]])}, "token id -1, outside"),
        ({"lengths": torch.tensor([6])}, r"lengths must be 1 numbers in 0\.\.5"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError if {"stop_at", "lengths"} & options.keys() else UsageError, match=message):
        sample(dit(), **{"tokens": masks(1, 5)} | options)


def test_a_model_that_has_diverged_is_named():
    model = dit()
    with torch.no_grad():
        model.head.bias[4] = float("nan")
    for sampler in ("ddpm_cache", "confidence"):
        with pytest.raises(UsageError, match="logits are not numbers"):
            sample(model, masks(1, 5), steps=3, sampler=sampler)
