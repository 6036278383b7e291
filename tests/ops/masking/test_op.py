"""mask_tokens: exact counts, the right distributions, and noise that is a function of its arguments alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import CPU, backends, bits_of, compiled_whole, for_gpu, interprets, same

from atat_fast.audit.masks import spread_law
from atat_fast.ops import mask_tokens, registry
from atat_fast.ops.masking import LONGEST, WEIGHTINGS, reveal_keys
from atat_fast.ops.philox import random_words

MASK = 99
every = backends("mask_tokens", gpu=False)
quick = backends("mask_tokens", gpu=False, quick=True)
kernels = backends("mask_tokens", without="torch")


def draw(tokens, counts, **options):
    given_ids = options.pop("sample_ids", torch.arange(len(tokens), device=tokens.device))
    settings_ = {"mask_id": MASK, "seed": 1, "step": 0, "sample_ids": given_ids} | options
    return mask_tokens(tokens, counts, **settings_)


@quick
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 41), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.booleans(), st.data())
def test_exactly_k_are_hidden_and_named_and_padding_weighs_nothing(backend, device, batch, length, seed, step, scored, data):
    counts = data.draw(st.lists(st.sampled_from([0, length]) | st.integers(0, length), min_size=batch, max_size=batch))
    pad = data.draw(st.integers(0, 3))
    tokens = torch.randint(0, 50, (batch, length), dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    noisy, rows, weights = draw(
        tokens,
        torch.tensor(counts, dtype=torch.int64),
        num_rows=sum(counts) + pad,
        seed=seed,
        step=step,
        scores=torch.rand(batch, length) if scored else None,
        tilt=2.0 * scored,
        backend=backend,
    )
    hidden = noisy == MASK
    assert noisy.dtype is tokens.dtype and hidden.sum(1).tolist() == counts
    assert torch.equal(noisy[~hidden], tokens[~hidden])
    assert rows.tolist() == hidden.flatten().nonzero().flatten().tolist() + [0] * pad
    expected = torch.tensor([(length + 1) / k for k in counts for _ in range(k)] + [0.0] * pad)
    torch.testing.assert_close(weights, expected)


@quick
@pytest.mark.parametrize(("length", "k", "tilt"), [(6, 3, 0.0), (4, 2, -2.0), (4, 2, 1.5)])
def test_subsets_are_hidden_as_often_as_plackett_luce_says(backend, device, length, k, tilt):
    """Without a tilt that is every subset equally often."""
    scores, trials = torch.tensor([0.0, 0.3, 0.6, 1.0, 0.2, 0.7])[:length], 40_000
    weight = torch.exp(-tilt * scores.double())
    chance = {}
    for order in itertools.permutations(range(length)):  # the order in which tokens are revealed
        p, left = 1.0, list(range(length))
        for i in order:
            p *= float(weight[i] / weight[left].sum())
            left.remove(i)
        code = sum(2**i for i in order[length - k :])
        chance[code] = chance.get(code, 0.0) + p
    options = {"scores": scores.expand(trials, length), "tilt": tilt} if tilt else {}
    noisy, _, _ = draw(torch.zeros(trials, length, dtype=torch.int64), [k] * trials, backend=backend, **options)
    seen = torch.bincount(((noisy == MASK) * 2 ** torch.arange(length)).sum(1), minlength=2**length)
    expected = trials * torch.tensor([chance.get(code, 0.0) for code in range(2**length)], dtype=torch.float64)
    possible = expected > 0
    assert (seen[~possible] == 0).all() and len(chance) == math.comb(length, k)
    chi2, degrees = float(((seen - expected)[possible] ** 2 / expected[possible]).sum()), len(chance) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@quick
@pytest.mark.parametrize("spread", [1.0, 0.4, -1.0, -0.3])
@pytest.mark.parametrize(("length", "k"), [(6, 2), (5, 3), (4, 4), (7, 1)])
def test_spread_subsets_are_hidden_as_often_as_the_law_says(backend, device, spread, length, k):
    """The law of the audit: evenly spread with chance `spread`, one span with chance -spread, else any subset."""
    trials, law = 40_000, spread_law(spread)(torch.zeros(1, length, dtype=torch.int64), k)
    noisy, _, _ = draw(torch.zeros(trials, length, dtype=torch.int64), [k] * trials, spread=spread, backend=backend)
    seen = torch.bincount(((noisy == MASK) * 2 ** torch.arange(length)).sum(1), minlength=2**length)
    expected = torch.zeros(2**length, dtype=torch.float64)
    for hidden, chance in law.items():
        expected[sum(2**i for i in hidden)] = trials * chance[0]
    possible = expected > 0
    assert (seen[~possible] == 0).all()
    degrees = max(1, int(possible.sum()) - 1)
    chi2 = float(((seen - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@every
def test_spread_tokens_lie_one_in_a_cell_and_frozen_ones_are_passed_over(backend, device):
    tokens, length, k = torch.zeros(8, 60, dtype=torch.int64), 60, 15
    hidden = draw(tokens, [k] * 8, spread=1.0, backend=backend)[0] == MASK
    gaps = [(row.nonzero()[:, 0].roll(-1) - row.nonzero()[:, 0]) % length for row in hidden]
    assert all(int(gap.max()) <= 2 * length // k - 1 and int(gap.sum()) == length for gap in gaps)
    frozen = torch.rand(8, 60) < 0.5
    noisy, _, _ = draw(tokens, [20] * 8, spread=1.0, frozen=frozen, backend=backend)
    assert (noisy == MASK).sum(1).tolist() == [20] * 8 and not ((noisy == MASK) & frozen).any()
    span = draw(tokens, [k] * 8, spread=-1.0, backend=backend)[0] == MASK
    assert ((span != span.roll(1, 1)).sum(1) == 2).all()


@quick
def test_tilt_zero_hides_what_uniform_hides(backend, device):
    tokens = torch.zeros(32, 37, dtype=torch.int64)
    counts = torch.randint(0, 38, (32,))
    plain = draw(tokens, counts, backend=backend)[0]
    assert torch.equal(plain, draw(tokens, counts, scores=torch.rand(32, 37), tilt=0.0, backend=backend)[0])


@every
def test_masks_do_not_depend_on_the_batch_they_come_in(backend, device):
    tokens, counts, ids = torch.randint(0, 50, (8, 33)), torch.randint(0, 34, (8,)), torch.tensor([5, 2**40, 7, 1, 0, 3, 11, 2])
    whole = draw(tokens, counts, sample_ids=ids, backend=backend)[0]
    shuffled = torch.randperm(8)
    for part in (shuffled[:3], shuffled[3:]):
        assert torch.equal(whole[part], draw(tokens[part], counts[part], sample_ids=ids[part], backend=backend)[0])


@quick
def test_frozen_tokens_are_never_hidden_and_not_counted_and_others_have_to_be_eligible(backend, device):
    tokens, frozen = torch.zeros(4, 20, dtype=torch.int64), torch.rand(4, 20) < 0.5
    counts = (~frozen).sum(1)
    noisy, _, weights = draw(tokens, counts, frozen=frozen, backend=backend)
    assert torch.equal(noisy == MASK, ~frozen)
    torch.testing.assert_close(weights, ((counts + 1) / counts).repeat_interleave(counts).float())
    eligible = torch.rand(4, 20) < 0.6
    noisy, _, weights = draw(tokens, [3] * 4, eligible=eligible, scores=torch.rand(4, 20), tilt=1.0, backend=backend)
    hidden = noisy == MASK
    assert hidden.sum(1).tolist() == [3] * 4 and not (hidden & ~eligible).any()
    torch.testing.assert_close(weights, torch.full((12,), 21 / 3))


@every
def test_weights_of_every_kind(backend, device):
    scores, counts, length = torch.rand(3, 10), torch.tensor([2, 10, 5]), 10
    tokens = torch.zeros(3, length, dtype=torch.int64)
    options = {"scores": scores, "tilt": 1.5, "focus": 0.7, "backend": backend}
    _, rows, by_order = draw(tokens, counts, weighting="order", **options)
    by_importance = draw(tokens, counts, weighting="importance", **options)[2].double()
    picked, sequence = scores.flatten()[rows].double(), rows // length
    for b in range(3):
        mine = sequence == b
        order = (length + 1) * torch.softmax(-1.5 * picked[mine], 0)
        torch.testing.assert_close(by_order[mine].double(), order, rtol=1e-6, atol=0)
        factor = torch.exp(0.7 * picked[mine])
        focused = (length + 1) / counts[b] * factor / factor.mean()
        torch.testing.assert_close(by_importance[mine], focused, rtol=1e-6, atol=0)
    assert draw(tokens, counts, weighting="ce", backend=backend)[2].tolist() == pytest.approx([30 / 17] * 17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_masked": [7]}, r"num_masked\[0\] is 7, but sequence 0 has 6 tokens"),
        ({"num_masked": [-1]}, r"num_masked\[0\] is -1"),
        ({"num_masked": [1, 2]}, r"num_masked must have shape \(1,\)"),
        ({"num_rows": 2}, "num_rows is 2, but num_masked adds up to 3"),
        ({"weighting": "unifrom"}, "did you mean uniform"),
        ({"weighting": "order"}, "needs scores"),
        ({"spread": 1.5}, r"spread must be in \[-1, 1\], got 1.5"),
        ({"spread": 0.5, "scores": torch.zeros(1, 6)}, "spread 0.5 is blind and scores choose tokens"),
        ({"scores": torch.zeros(1, 5)}, "scores must have shape"),
        ({"backend": "tritn"}, "has no backend 'tritn'"),
        ({"backend": "cuda"}, "cannot use backend 'cuda' here: it runs on CUDA tensors"),
        ({"scores": torch.full((1, 6), torch.nan)}, "scores hold NaN"),
        ({"sample_ids": torch.zeros(1)}, "sample_ids is torch.float32; pass integers"),
        ({"num_masked": [2.7]}, "num_masked is torch.float32; pass integers"),
        ({"sample_ids": torch.zeros(1, dtype=torch.int64, device="meta")}, "sample_ids is on meta"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one number"),
        ({"frozen": torch.zeros(1, 6)}, "frozen must be bool"),
    ],
)
def test_bad_input(options, message):
    options = {"num_masked": [3]} | options
    with pytest.raises(ValueError, match=message):
        draw(torch.zeros(1, 6, dtype=torch.int64), options.pop("num_masked"), **options)


@quick
def test_opcheck(backend, device):
    tensors = (torch.zeros(3, 7, dtype=torch.int64), torch.tensor([1, 2, 7]), 12, MASK)
    named = (torch.tensor(1), torch.tensor(2), torch.arange(3), 0, backend)
    for scores, tilt, weighting in ((None, 0.0, "uniform"), (torch.rand(3, 7), 1.0, "order")):
        arguments = (*tensors, scores, tilt, 0.0, 0, None, None, weighting, *named)
        torch.library.opcheck(torch.ops.atat_fast.mask_tokens.default, arguments)


@quick
def test_compiles_whole_and_once(backend, device):
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph

    def f(tokens, counts, step):
        return draw(tokens, counts, step=step, sample_ids=torch.arange(4), num_rows=12, backend=backend)

    compiled, tokens = compiled_whole(f, counting), torch.zeros(4, 9, dtype=torch.int64)
    for i, counts in enumerate(([3, 3, 3, 3], [0, 6, 1, 5], [9, 0, 0, 3])):
        arguments = (tokens, torch.tensor(counts), torch.tensor(i))
        assert same(compiled(*arguments), f(*arguments))
    assert len(calls) == 1


def example(batch, length, dtype, *, weighting="uniform", scored=False, frozen=False, eligible=False, pad=0, **options):
    may_hide = torch.ones(batch, length, dtype=torch.bool)
    for name, wanted, share in (("frozen", frozen, 0.3), ("eligible", eligible, 0.7)):
        if wanted:
            chosen = torch.rand(batch, length) < share
            may_hide &= chosen if name == "eligible" else ~chosen
            options[name] = chosen
    counts = (torch.rand(batch) * (may_hide.sum(1) + 1)).long()
    if batch > 1:
        counts[0], counts[-1] = 0, may_hide[-1].sum()
    scores = torch.rand(batch, length) if scored or weighting in ("order", "importance") else None
    options |= {"num_rows": int(counts.sum()) + pad, "weighting": weighting, "scores": scores}
    return (torch.randint(0, MASK, (batch, length), dtype=dtype), counts), options


def moved(inputs, options, device):
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    return [move(t) for t in inputs], {name: move(value) for name, value in options.items()}


I32, I64 = torch.int32, torch.int64
CASES = [
    *(pytest.param({"batch": b, "length": n}, t, id=f"{b}x{n}") for b, n, t in (
        (0, 8, I32), (3, 0, I64), (4, 1, I32), (3, 37, I32), (2, 64, I64), (2, 1024, I64), (3, 1024, I32))),
    pytest.param({"batch": 3, "length": 127, "frozen": True, "eligible": True, "pad": 200}, I64, id="tiny"),
    pytest.param({"batch": 3, "length": 40, "frozen": True, "weighting": "ce"}, I32, id="tiny-ce"),
    *(pytest.param({"batch": 3, "length": 40, "frozen": True, "weighting": weighting, "focus": -0.8}, I64, id=weighting)
      for weighting in WEIGHTINGS),
    *(pytest.param({"batch": 6, "length": n, "spread": s, **more}, I64, id=f"spread{s}-{n}") for n, s, more in (
        (1, 1.0, {}), (37, 0.6, {"weighting": "ce"}), (40, -0.7, {"frozen": True}), (1024, 0.5, {}),
        (127, 1.0, {"frozen": True, "eligible": True}))),
    pytest.param({"batch": 2, "length": 1500, "weighting": "importance", "focus": 2.0}, I64, id="two tiles"),
    for_gpu({"batch": 3, "length": 509, "pad": 77}, I64, id="prime"),
    *(for_gpu({"batch": 9, "length": length, "weighting": weighting, "frozen": True, "pad": 77}, dtype,
              id=f"{length}-{weighting}", slow=length != 4096)
      for length in (4096, 5000, LONGEST) for weighting, dtype in zip(WEIGHTINGS, (I32, I64, I32, I64), strict=True)),
]  # fmt: skip


@kernels
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_uniform_masks_are_the_specification_s_bit_for_bit(poisoned, backend, device, case, dtype):
    inputs, options = example(dtype=dtype, **case)
    options |= {"sample_ids": torch.arange(case["batch"]) * 10**9, "seed": -(2**40), "step": 2**31}
    want = draw(*inputs, backend="torch", **options)
    there, with_ = moved(inputs, options, device)
    got = draw(*there, backend=backend, **with_)
    assert got[0].dtype is dtype and same([t.cpu() for t in got[:2]], want[:2])
    exact = options["scores"] is None
    torch.testing.assert_close(got[2].cpu(), want[2], rtol=0 if exact else 2e-5 if device == "cuda" else 2e-6, atol=0)
    assert interprets(backend, device) or same(got, draw(*there, backend=backend, **with_))


@kernels
@pytest.mark.parametrize("tilt", [pytest.param(-3.0, id="tiny"), 0.5, 6.0])
def test_tilted_masks_swap_only_tokens_whose_keys_nearly_tie(backend, device, tilt):
    """Keys are fp64 in the specification and fp32 in kernels."""
    batch, length = (3, 150) if interprets(backend, device) else (256, 1024)
    inputs, options = example(batch, length, torch.int64, scored=True, tilt=tilt)
    want = draw(*inputs, backend="torch", **options)[0] == MASK
    there, with_ = moved(inputs, options, device)
    got = draw(*there, backend=backend, **with_)[0].cpu() == MASK
    assert torch.equal(got.sum(1), want.sum(1))
    word = random_words(torch.arange(batch)[:, None] * length + torch.arange(length), 1, 0, 0)[0]
    keys = reveal_keys(word, options["scores"], tilt)
    swapped = got != want
    for b in swapped.any(1).nonzero().flatten().tolist():
        mine = keys[b][swapped[b]]
        assert mine.max() - mine.min() <= 1e-6 * max(1.0, float(mine.abs().max()))
    assert swapped.sum() <= 2 + batch * length * 2e-5


@every
def test_inputs_need_not_be_contiguous_or_of_one_dtype(backend, device):
    tokens, frozen = torch.randint(0, MASK, (11, 3)).t(), (torch.rand(11, 3) < 0.3).t()
    scores, ids = torch.rand(3, 22)[:, ::2].double(), torch.arange(6)[::2]
    counts = torch.tensor([2, 0, 3, 0, 4, 0], dtype=torch.int32)[::2]
    options = {"tilt": 1.0, "weighting": "order", "backend": backend}
    got = draw(tokens, counts, sample_ids=ids, frozen=frozen, scores=scores, **options)
    packed = (t.contiguous() for t in (tokens, counts))
    want = draw(*packed, sample_ids=ids.contiguous(), frozen=frozen.contiguous(), scores=scores.float(), **options)
    assert same(got, want)


@every
def test_counts_beyond_what_may_be_hidden_stop_there(backend, device):
    """What the wrapper refuses where it can see counts, and an op has to survive where it cannot."""
    tokens, frozen = torch.zeros(3, 20, dtype=torch.int64), torch.rand(3, 20) < 0.4
    counts, free = torch.tensor([-4, 10**10, 5]), (~frozen).sum(1).tolist()
    arguments = (tokens, counts, 22, MASK, None, 0.0, 0.0, 0, None, frozen, "uniform")
    named = (torch.tensor(1), torch.tensor(2), torch.arange(3), 0, backend)
    noisy, rows, weights = torch.ops.atat_fast.mask_tokens(*arguments, *named)
    assert (noisy == MASK).sum(1).tolist() == [0, free[1], 5] and not ((noisy == MASK) & frozen).any()
    assert ((rows >= 0) & (rows < 60)).all() and (weights >= 0).all()


def test_sequences_longer_than_a_gpu_takes():
    tokens = torch.zeros(1, LONGEST + 1, dtype=torch.int64)
    assert int((draw(tokens, [99])[0] == MASK).sum()) == 99
    with pytest.raises(ValueError, match="more than 16,384 tokens"):
        draw(tokens, [99], backend="triton")


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("ATAT_FAST_BACKEND", "torch")
    assert registry.choose_backend("mask_tokens", CPU) == "torch"
    monkeypatch.setenv("ATAT_FAST_BACKEND", "cuda")  # no backend of this device: the fastest one runs
    fastest = next(name for name, reason in registry.explain("mask_tokens", CPU).items() if reason is None)
    assert registry.choose_backend("mask_tokens", CPU) == fastest
    monkeypatch.setenv("ATAT_FAST_BACKEND", "cudda")
    with pytest.raises(ValueError, match="did you mean cuda"):
        draw(torch.zeros(1, 6, dtype=torch.int64), [3])


@quick
def test_threads_do_not_change_the_bits(backend, device):
    inputs, options = example(64, 512, torch.int64, weighting="order", tilt=1.0)
    one, three = bits_of(lambda: draw(*inputs, backend=backend, **options), (1, 3))
    assert same(one, three)
