"""mask_tokens: exact counts, the right distributions, and noise that is a function of its arguments alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import mask_tokens, registry
from atat_fast.ops.masking import LONGEST, WEIGHTINGS, reveal_keys
from atat_fast.ops.philox import random_words

MASK = 99
REASONS = registry.explain("mask_tokens", torch.device("cpu"))
# With TRITON_INTERPRET=1 that includes triton, in an interpreter: see test_interpreted.py.
READY = [name for name, reason in REASONS.items() if reason is None]
QUICK = [name for name in READY if name != "triton"]
KERNELS = [name for name in READY if name != "torch"]


def on(names):
    """For each backend; without the compiled library its tests are skipped with the reason."""
    absent = pytest.param("cpp", marks=pytest.mark.skip(reason=str(REASONS["cpp"])))
    return pytest.mark.parametrize("backend", names if "cpp" in READY else [*names, absent])


every, quick, kernels = on(READY), on(QUICK), on(KERNELS)


def draw(tokens, counts, **options):
    given_ids = options.pop("sample_ids", torch.arange(len(tokens)))
    settings_ = {"mask_id": MASK, "seed": 1, "step": 0, "sample_ids": given_ids} | options
    return mask_tokens(tokens, counts, **settings_)


@quick
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 41), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.booleans(), st.data())
def test_exactly_k_are_hidden_and_named(backend, batch, length, seed, step, scored, data):
    counts = data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    tokens = torch.randint(0, 50, (batch, length))
    scores = torch.rand(batch, length) if scored else None
    noisy, rows, weights = draw(
        tokens, torch.tensor(counts, dtype=torch.int64), seed=seed, step=step, scores=scores, tilt=2.0 * scored, backend=backend
    )
    hidden = noisy == MASK
    assert hidden.sum(1).tolist() == counts
    assert torch.equal(noisy[~hidden], tokens[~hidden])
    assert torch.equal(rows, hidden.flatten().nonzero().flatten())
    expected = torch.tensor([(length + 1) / k for k in counts for _ in range(k)])
    torch.testing.assert_close(weights, expected)


@every
def test_all_and_none(backend):
    tokens = torch.arange(12).view(2, 6)
    noisy, rows, weights = draw(tokens, [0, 6], backend=backend)
    assert torch.equal(noisy[0], tokens[0]) and (noisy[1] == MASK).all()
    assert rows.tolist() == [6, 7, 8, 9, 10, 11]
    assert weights.tolist() == pytest.approx([7 / 6] * 6)


@every
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 1)])
def test_tiny_shapes(shape, backend):
    noisy, rows, weights = draw(torch.zeros(shape, dtype=torch.int32), [0] * shape[0], backend=backend)
    assert noisy.dtype is torch.int32 and noisy.shape == shape and rows.numel() == weights.numel() == 0


@quick
def test_uniform_masks_hide_every_subset_equally_often(backend):
    length, k, trials = 6, 3, 20_000
    noisy, _, _ = draw(torch.zeros(trials, length, dtype=torch.int64), [k] * trials, backend=backend)
    codes = ((noisy == MASK) * 2 ** torch.arange(length)).sum(1)
    counts = torch.bincount(codes, minlength=2**length)
    subsets = [sum(2**i for i in s) for s in itertools.combinations(range(length), k)]
    observed = counts[subsets].double()
    assert observed.sum() == trials
    expected = trials / len(subsets)
    chi2 = ((observed - expected) ** 2 / expected).sum()
    degrees = len(subsets) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@quick
@pytest.mark.parametrize("tilt", [-2.0, 1.5])
def test_tilted_masks_follow_plackett_luce(tilt, backend):
    scores, trials, k = torch.tensor([0.0, 0.3, 0.6, 1.0]), 40_000, 2
    weight = torch.exp(-tilt * scores.double())
    chance = {}
    for order in itertools.permutations(range(4)):  # the order in which tokens are revealed
        p, left = 1.0, list(range(4))
        for i in order:
            p *= float(weight[i] / weight[left].sum())
            left.remove(i)
        hidden = frozenset(order[4 - k :])
        chance[hidden] = chance.get(hidden, 0.0) + p
    noisy, _, _ = draw(
        torch.zeros(trials, 4, dtype=torch.int64), [k] * trials, scores=scores.expand(trials, 4), tilt=tilt, backend=backend
    )
    chi2 = 0.0
    codes = ((noisy == MASK) * 2 ** torch.arange(4)).sum(1)
    for hidden, p in chance.items():
        seen = int((codes == sum(2**i for i in hidden)).sum())
        chi2 += (seen - trials * p) ** 2 / (trials * p)
    assert chi2 < (len(chance) - 1) + 4 * math.sqrt(2 * (len(chance) - 1))


@quick
def test_tilt_zero_hides_what_uniform_hides(backend):
    tokens = torch.zeros(32, 37, dtype=torch.int64)
    counts = torch.randint(0, 38, (32,))
    plain = draw(tokens, counts, backend=backend)[0]
    assert torch.equal(plain, draw(tokens, counts, scores=torch.rand(32, 37), tilt=0.0, backend=backend)[0])


@every
def test_masks_do_not_depend_on_the_batch_they_come_in(backend):
    tokens, counts, ids = torch.randint(0, 50, (8, 33)), torch.randint(0, 34, (8,)), torch.tensor([5, 2**40, 7, 1, 0, 3, 11, 2])
    whole = draw(tokens, counts, sample_ids=ids, backend=backend)[0]
    shuffled = torch.randperm(8)
    again = draw(tokens[shuffled], counts[shuffled], sample_ids=ids[shuffled], backend=backend)[0]
    assert torch.equal(whole[shuffled], again)
    parts = (slice(0, 4), slice(4, 8))
    halves = [draw(tokens[part], counts[part], sample_ids=ids[part], backend=backend)[0] for part in parts]
    assert torch.equal(whole, torch.cat(halves))


@every
def test_frozen_tokens_are_never_hidden_and_not_counted(backend):
    tokens, frozen = torch.zeros(4, 20, dtype=torch.int64), torch.rand(4, 20) < 0.5
    counts = (~frozen).sum(1)
    noisy, _, weights = draw(tokens, counts, frozen=frozen, backend=backend)
    assert torch.equal(noisy == MASK, ~frozen)
    torch.testing.assert_close(weights, ((counts + 1) / counts).repeat_interleave(counts).float())


@every
def test_only_eligible_tokens_are_hidden(backend):
    tokens, eligible = torch.zeros(4, 20, dtype=torch.int64), torch.rand(4, 20) < 0.6
    noisy, _, weights = draw(tokens, [3] * 4, eligible=eligible, scores=torch.rand(4, 20), tilt=1.0, backend=backend)
    hidden = noisy == MASK
    assert hidden.sum(1).tolist() == [3] * 4 and not (hidden & ~eligible).any()
    torch.testing.assert_close(weights, torch.full((12,), 21 / 3))


@every
def test_weights_of_every_kind(backend):
    scores, counts, length = torch.rand(3, 10), torch.tensor([2, 10, 5]), 10
    tokens = torch.zeros(3, length, dtype=torch.int64)
    options = {"scores": scores, "tilt": 1.5, "focus": 0.7, "backend": backend}
    rows = draw(tokens, counts, **options)[1]
    picked, sequence = scores.flatten()[rows].double(), rows // length
    for b in range(3):
        mine = sequence == b
        order = draw(tokens, counts, weighting="order", **options)[2][mine].double()
        torch.testing.assert_close(order, (length + 1) * torch.softmax(-1.5 * picked[mine], 0), rtol=1e-6, atol=0)
        focused = draw(tokens, counts, weighting="importance", **options)[2][mine].double()
        factor = torch.exp(0.7 * picked[mine])
        torch.testing.assert_close(focused, (length + 1) / counts[b] * factor / factor.mean(), rtol=1e-6, atol=0)
    assert draw(tokens, counts, weighting="ce", backend=backend)[2].tolist() == pytest.approx([30 / 17] * 17)


@every
def test_padding_rows_weigh_nothing(backend):
    _, rows, weights = draw(torch.zeros(2, 5, dtype=torch.int64), [2, 1], num_rows=6, backend=backend)
    assert rows[3:].tolist() == [0, 0, 0] and weights[3:].tolist() == [0.0] * 3 and (weights[:3] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_masked": [7]}, r"num_masked\[0\] is 7, but sequence 0 has 6 tokens"),
        ({"num_masked": [-1]}, r"num_masked\[0\] is -1"),
        ({"num_masked": [1, 2]}, r"num_masked must have shape \(1,\)"),
        ({"num_masked": [3], "num_rows": 2}, "num_rows is 2, but num_masked adds up to 3"),
        ({"num_masked": [3], "weighting": "unifrom"}, "did you mean uniform"),
        ({"num_masked": [3], "weighting": "order"}, "needs scores"),
        ({"num_masked": [3], "scores": torch.zeros(1, 5)}, "scores must have shape"),
        ({"num_masked": [3], "backend": "tritn"}, "has no backend 'tritn'"),
        ({"num_masked": [3], "backend": "cuda"}, "cannot use backend 'cuda' here: it runs on CUDA tensors"),
        ({"num_masked": [3], "scores": torch.full((1, 6), torch.nan)}, "scores hold NaN"),
        ({"num_masked": [3], "sample_ids": torch.zeros(1)}, "sample_ids is torch.float32; pass integers"),
        ({"num_masked": [2.7]}, "num_masked is torch.float32; pass integers"),
        ({"num_masked": [3], "sample_ids": torch.zeros(1, dtype=torch.int64, device="meta")}, "sample_ids is on meta"),
        ({"num_masked": [3], "seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one number"),
        ({"num_masked": [3], "frozen": torch.zeros(1, 6)}, "frozen must be bool"),
    ],
)
def test_bad_input(options, message):
    counts = options.pop("num_masked")
    with pytest.raises(ValueError, match=message):
        draw(torch.zeros(1, 6, dtype=torch.int64), counts, **options)


@quick
def test_opcheck(backend):
    tensors = (torch.zeros(3, 7, dtype=torch.int64), torch.tensor([1, 2, 7]))
    seed, step, ids = torch.tensor(1), torch.tensor(2), torch.arange(3)
    for scores, weighting in ((None, "uniform"), (torch.rand(3, 7), "order")):
        torch.library.opcheck(
            torch.ops.atat_fast.mask_tokens.default,
            (
                *tensors,
                12,
                MASK,
                scores,
                1.0 if scores is not None else 0.0,
                0.0,
                None,
                None,
                weighting,
                seed,
                step,
                ids,
                0,
                backend,
            ),
        )


@quick
def test_compiles_whole_and_once(backend):
    calls = []

    def counting(graph, inputs):
        calls.append(graph)
        return graph

    def f(tokens, counts, step):
        noisy, rows, weights = mask_tokens(
            tokens, counts, mask_id=MASK, seed=1, step=step, sample_ids=torch.arange(4), num_rows=12, backend=backend
        )
        return noisy, rows, weights

    compiled = torch.compile(f, fullgraph=True, backend=counting)
    tokens = torch.zeros(4, 9, dtype=torch.int64)
    for i, counts in enumerate(([3, 3, 3, 3], [0, 6, 1, 5], [9, 0, 0, 3])):
        got = compiled(tokens, torch.tensor(counts), torch.tensor(i))
        want = f(tokens, torch.tensor(counts), torch.tensor(i))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
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


@kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "case",
    [
        *({"batch": b, "length": n} for b, n in ((0, 8), (3, 0), (4, 1), (3, 37), (2, 64), (2, 1024))),
        {"batch": 3, "length": 127, "frozen": True, "eligible": True, "pad": 200},
        *({"batch": 3, "length": 40, "frozen": True, "weighting": weighting, "focus": -0.8} for weighting in WEIGHTINGS),
        {"batch": 2, "length": 1500, "weighting": "importance", "focus": 2.0},
    ],
    ids=str,
)
def test_uniform_masks_are_the_same_bits_on_every_backend(poisoned, backend, dtype, case):
    inputs, options = example(dtype=dtype, **case)
    ids = torch.arange(case["batch"]) * 10**9
    want = draw(*inputs, sample_ids=ids, seed=-(2**40), step=2**31, backend="torch", **options)
    got = draw(*inputs, sample_ids=ids, seed=-(2**40), step=2**31, backend=backend, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    if options["scores"] is None:
        assert torch.equal(got[2], want[2])
    torch.testing.assert_close(got[2], want[2], rtol=2e-6, atol=0)


@kernels
@pytest.mark.parametrize("tilt", [-3.0, 0.5, 6.0])
def test_tilted_masks_swap_only_tokens_whose_keys_nearly_tie(backend, tilt):
    """Keys are fp64 in the specification and fp32 in kernels."""
    batch, length = (4, 256) if backend == "triton" else (256, 1024)
    (tokens, counts), options = example(batch, length, torch.int64, scored=True, tilt=tilt)
    want = draw(tokens, counts, backend="torch", **options)[0] == MASK
    got = draw(tokens, counts, backend=backend, **options)[0] == MASK
    assert torch.equal(got.sum(1), want.sum(1))
    word = random_words(torch.arange(batch)[:, None] * length + torch.arange(length), 1, 0, 0)[0]
    keys = reveal_keys(word, options["scores"], tilt)
    swapped = got != want
    for b in swapped.any(1).nonzero().flatten().tolist():
        mine = keys[b][swapped[b]]
        assert mine.max() - mine.min() <= 1e-6 * max(1.0, float(mine.abs().max()))
    assert swapped.sum() <= 2 + batch * length * 2e-5


@every
def test_inputs_need_not_be_contiguous_or_of_one_dtype(backend):
    tokens, frozen = torch.randint(0, MASK, (11, 3)).t(), (torch.rand(11, 3) < 0.3).t()
    scores, ids = torch.rand(3, 22)[:, ::2].double(), torch.arange(6)[::2]
    counts = torch.tensor([2, 0, 3, 0, 4, 0], dtype=torch.int32)[::2]
    options = {"tilt": 1.0, "weighting": "order", "backend": backend}
    got = draw(tokens, counts, sample_ids=ids, frozen=frozen, scores=scores, **options)
    packed = (t.contiguous() for t in (tokens, counts))
    want = draw(*packed, sample_ids=ids.contiguous(), frozen=frozen.contiguous(), scores=scores.float(), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every
def test_counts_beyond_what_may_be_hidden_stop_there(backend):
    """What the wrapper refuses where it can see counts, and an op has to survive where it cannot."""
    tokens, frozen = torch.zeros(3, 20, dtype=torch.int64), torch.rand(3, 20) < 0.4
    counts, free = torch.tensor([-4, 10**10, 5]), (~frozen).sum(1).tolist()
    arguments = (tokens, counts, 22, MASK, None, 0.0, 0.0, None, frozen, "uniform")
    noisy, rows, weights = torch.ops.atat_fast.mask_tokens(
        *arguments, torch.tensor(1), torch.tensor(2), torch.arange(3), 0, backend
    )
    assert (noisy == MASK).sum(1).tolist() == [0, free[1], 5] and not ((noisy == MASK) & frozen).any()
    assert ((rows >= 0) & (rows < 60)).all() and (weights >= 0).all()


def test_sequences_longer_than_a_gpu_takes():
    tokens = torch.zeros(1, LONGEST + 1, dtype=torch.int64)
    assert int((draw(tokens, [99])[0] == MASK).sum()) == 99
    with pytest.raises(ValueError, match="more than 16,384 tokens"):
        draw(tokens, [99], backend="triton")


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("ATAT_FAST_BACKEND", "torch")
    assert registry.choose_backend("mask_tokens", torch.device("cpu")) == "torch"
    monkeypatch.setenv("ATAT_FAST_BACKEND", "cuda")  # no backend of this device: the fastest one runs
    assert registry.choose_backend("mask_tokens", torch.device("cpu")) == QUICK[0]
    monkeypatch.setenv("ATAT_FAST_BACKEND", "cudda")
    with pytest.raises(ValueError, match="did you mean cuda"):
        draw(torch.zeros(1, 6, dtype=torch.int64), [3])


@quick
def test_threads_do_not_change_the_bits(backend):
    (tokens, counts), options = example(64, 512, torch.int64, weighting="order", tilt=1.0)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(draw(tokens, counts, backend=backend, **options))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(inputs, options):
    move = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return [t.cuda() for t in inputs], move | {"sample_ids": torch.arange(len(inputs[0]), device="cuda")}


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    @pytest.mark.parametrize("length", [1, 37, 1024, 4096, 5000, LONGEST])
    @pytest.mark.parametrize("weighting", WEIGHTINGS)
    def test_against_the_specification(self, poisoned, backend, dtype, length, weighting):
        inputs, options = example(9, length, dtype, weighting=weighting, frozen=length > 1, eligible=length == 1024, pad=77)
        want = draw(*inputs, backend="torch", **options)
        gpu_inputs, gpu_options = on_gpu(inputs, options)
        first = draw(*gpu_inputs, backend=backend, **gpu_options)
        again = draw(*gpu_inputs, backend=backend, **gpu_options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(first[0].cpu(), want[0]) and torch.equal(first[1].cpu(), want[1])
        torch.testing.assert_close(first[2].cpu(), want[2], rtol=2e-5 if options["scores"] is not None else 0, atol=0)

    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_tilted_masks(self, backend):
        inputs, options = example(64, 1024, torch.int64, scored=True, tilt=2.0)
        want = draw(*inputs, backend="torch", **options)[0]
        gpu_inputs, gpu_options = on_gpu(inputs, options)
        got = draw(*gpu_inputs, backend=backend, **gpu_options)[0].cpu()
        assert torch.equal((got == MASK).sum(1), (want == MASK).sum(1)) and int((got != want).sum()) <= 4

    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_a_captured_graph_draws_anew(self, backend):
        tokens, ids = torch.zeros(4, 300, dtype=torch.int64, device="cuda"), torch.arange(4, device="cuda")
        counts = torch.full((4,), 100, device="cuda")
        seed, step = torch.tensor(5, device="cuda"), torch.tensor(0, device="cuda")

        def call():
            return draw(tokens, counts, num_rows=400, sample_ids=ids, seed=seed, step=step, backend=backend)

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        seen = []
        for now in range(3):
            step.fill_(now)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))
            seen.append(captured[0].clone())
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
