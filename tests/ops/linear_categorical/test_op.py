"""linear_categorical against its specification and against the law it draws from, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import BF16, F32, backends, compiled_whole, for_gpu, interprets

from atat_fast.ops import linear_categorical, linear_categorical_cost, linear_categorical_reference
from atat_fast.ops.linear_categorical import token_noise, vocabulary_noise
from atat_fast.ops.philox import STREAM_TOKEN, gumbel64, random_words

every = backends("linear_categorical", gpu=False)
quick = backends("linear_categorical", gpu=False, quick=True)

# Index, id and noise of the largest among 7e8 numbers with seed 0 and step 0: at odds of 1 to 5e8, 3e8 and below.
RARE = (
    (16_689_135_616, 21_088, 20.033207345471546),
    (1_669_332_992, 21_233, 19.58795317892289),
    (20_990_394_368, 26_601, 18.906191523893366),
    (2_191_523_840, 16_033, 18.767797039823364),
    (13_200_523_264, 966, 18.524710332108334),
)


def head(rows, width, vocabulary, dtype=torch.float32, scale=1.0):
    hidden, weight = torch.randn(rows, width).to(dtype), (scale * torch.randn(vocabulary, width)).to(dtype)
    return hidden, weight, torch.randn(vocabulary).to(dtype)


def margin(hidden, weight, index, bias, forbidden, temperature, seed, step):
    """How far the best sum is above the next, [R]: where it is next to nothing, backends may disagree."""
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if forbidden is not None:
        logits[:, forbidden] = -torch.inf
    two = (logits / temperature + vocabulary_noise(index, weight.shape[0], seed, step)).topk(min(2, weight.shape[0])).values
    return two[:, 0] - two[:, -1] if two.shape[1] > 1 else torch.ones(len(two))


@quick
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 20),
    vocabulary=st.integers(1, 1100),
    bias=st.booleans(),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    first=st.integers(-(2**63), 2**63 - 100),
    data=st.data(),
)
def test_it_matches_the_specification(backend, device, rows, width, vocabulary, bias, temperature, seed, step, first, data):
    hidden, weight, b = head(rows, width, vocabulary)
    b = b if bias else None
    index = first + torch.arange(rows)
    forbidden = data.draw(st.none() | st.integers(0, vocabulary - 1))
    got = linear_categorical(
        hidden, weight, index, bias=b, forbidden=forbidden, temperature=temperature, seed=seed, step=step, backend=backend
    )
    want = linear_categorical_reference(hidden, weight, index, b, forbidden, temperature, seed=seed, step=step)
    sure = margin(hidden, weight, index, b, forbidden, temperature, seed, step) > 1e-4
    assert got.dtype is torch.int64 and torch.equal(got[sure], want[sure]) and int(sure.sum()) >= rows - 2
    assert forbidden is None or (got != forbidden).all()
    if vocabulary == 1 and forbidden == 0:
        assert (got == -1).all()


@backends("linear_categorical")
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 130),
        (5, 33, 257),
        (17, 48, 515),
        (3, 70, 3),
        (0, 8, 9),
        pytest.param((7, 32, 131), id="tiny"),
        for_gpu((256, 768, 50_257), id="model"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_drawn_is_the_best_in_fp64_to_within_rounding(poisoned, backend, device, shape, dtype):
    rows, width, vocabulary = shape
    hidden, weight, bias = head(rows, width, vocabulary, dtype, scale=1.0 if width < 100 else width**-0.5)
    index = torch.arange(rows) * 1_000_003
    there = [t.to(device) for t in (hidden, weight, index)]
    options = {"forbidden": 1, "temperature": 0.8, "seed": 5, "step": 7, "backend": backend}
    got = linear_categorical(*there, bias=bias.to(device), **options).cpu()
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    tolerance = 1e-4 if dtype is F32 else 2**-7 * float(logits.abs().max() if logits.numel() else 0) / 0.8
    sums = logits / 0.8 + vocabulary_noise(index, vocabulary, 5, 7)
    sums[:, 1] = -torch.inf
    if rows:  # a stored logit is rounded to bf16; what was chosen is the best to within that
        assert (sums.amax(1) - sums.gather(1, got[:, None])[:, 0] <= tolerance).all()
    assert (got != 1).all() and (got >= 0).all() and (got < vocabulary).all()


@every
def test_rows_are_independent_of_each_other(backend, device):
    hidden, weight, bias = head(9, 32, 150)
    index = torch.tensor([7, 1, 7, 2**40, 5, 0, 3, 8, 9])
    hidden[2] = hidden[0]
    options = {"bias": bias, "seed": 3, "step": 1, "backend": backend}
    whole = linear_categorical(hidden, weight, index, **options)
    assert whole[0] == whole[2]
    order = torch.randperm(9)
    assert torch.equal(linear_categorical(hidden[order], weight, index[order], **options), whole[order])
    assert torch.equal(linear_categorical(hidden, weight, index, chunk_bytes=1, **options), whole)
    seed, step = torch.tensor(3), torch.tensor(1)
    assert torch.equal(linear_categorical(hidden, weight, index, **(options | {"seed": seed, "step": step})), whole)
    for other in ({"seed": 4}, {"step": 2}):
        assert not torch.equal(linear_categorical(hidden, weight, index, **(options | other)), whole)


@every
def test_what_is_not_a_number(backend, device):
    weight, hidden = torch.randn(40, 8), torch.randn(5, 8)
    hidden[1] = torch.nan
    bias = torch.zeros(40)
    got = linear_categorical(hidden, weight, torch.arange(5), bias=bias, seed=0, backend=backend)
    assert got[1] == -1 and (got[[0, 2, 3, 4]] >= 0).all()
    assert (linear_categorical(hidden[2:], weight, torch.arange(3), bias=bias - torch.inf, seed=0, backend=backend) == -1).all()
    bias[33] = torch.inf
    assert (linear_categorical(hidden[2:], weight, torch.arange(3), bias=bias, seed=0, backend=backend) == 33).all()
    bias[33] = torch.nan
    drawn = linear_categorical(hidden[2:], weight, torch.arange(3), bias=bias, forbidden=33, seed=0, backend=backend)
    assert (drawn >= 0).all() and (drawn != 33).all()


@quick
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(backend, device, temperature):
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02])
    trials = 20_000
    hidden, weight = torch.ones(trials, 1), p.log()[:, None]
    drawn = linear_categorical(hidden, weight, torch.arange(trials), temperature=temperature, seed=1, backend=backend)
    expected = trials * torch.softmax(p.log().double() / temperature, 0)
    seen = torch.bincount(drawn, minlength=7)
    assert float(((seen - expected) ** 2 / expected).sum()) < 6 + 4 * math.sqrt(12)


@every
def test_rare_tokens_come_where_their_noise_says(backend, device):
    """Known places where an id's noise is so large that it wins from far below, at a chance of a few 1e-9, and just so far.

    Noise from 24 random bits ends at 16.6 and never draws them; noise from 32 bits is coarse there.
    """
    width = 2
    for index, id, noise in (
        RARE[-1:] if interprets(backend, device) else RARE
    ):  # the interpreter takes seconds for a thousand ids
        hidden, weight, bias = torch.zeros(1, width), torch.zeros(id + 2, width), torch.full((id + 2,), -torch.inf)
        rival = id + 1
        own = float(vocabulary_noise(torch.tensor([index]), id + 2, 0, 0)[0, rival])
        assert noise > 18 and own - noise < -15
        for by, winner in ((1e-3, id), (-1e-3, rival)):
            bias[id], bias[rival] = own - noise + by, 0.0
            drawn = linear_categorical(hidden, weight, torch.tensor([index]), bias=bias, seed=0, backend=backend)
            assert drawn.item() == winner


def test_the_tail_of_the_noise_against_fp64():
    """Of numbers that are all above a high bound, how many are above a higher one: chi-square at chances from 1e-6 to 1e-14."""
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    for zeros in (20, 26, 31):  # that many leading ones: u above 1 - 2^-zeros
        high = (2**32 - 1) - torch.randint(0, 2 ** (32 - zeros), (count,), generator=generator)
        low = torch.randint(0, 2**32, (count,), generator=generator)
        noise = gumbel64(high, low)
        bound = -math.log(-math.log1p(-(2.0**-zeros)))
        assert float(noise.min()) >= bound - 1e-9
        edges = torch.tensor([bound + k for k in range(1, 8)], dtype=torch.float64)
        tail = -torch.expm1(-torch.exp(-edges)) / -math.expm1(-math.exp(-bound))  # P(G > edge given G > bound)
        shares = torch.cat((1 - tail[:1], tail[:-1] - tail[1:], tail[-1:]))
        seen = torch.bincount(torch.bucketize(noise, edges), minlength=8)
        chi2 = float(((seen - count * shares) ** 2 / (count * shares)).sum())
        assert chi2 < 7 + 4 * math.sqrt(14), zeros
    ends = gumbel64(torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**32 - 1]))
    assert float(ends[1]) == pytest.approx(45.054566) and float(ends[0]) == pytest.approx(-math.log(45.054566))


def test_the_noise_is_what_the_page_says():
    """docs/philox.md: 64 bits for each id, in part v // 2 of stream 5."""
    index, ids = torch.tensor([5, 2**41 + 3]), torch.tensor([[0, 7, 12], [3, 3, 101]])
    got = token_noise(index, ids, 11, 4)
    torch.testing.assert_close(got[0], vocabulary_noise(index, 200, 11, 4)[0, ids[0]])
    for r in range(2):
        for k in range(3):
            v = int(ids[r, k])
            words = [int(w) for w in random_words(index[r], 11, 4, STREAM_TOKEN + (v // 2 << 8))]
            u = (words[2 * (v % 2)] * 2**32 + words[2 * (v % 2) + 1] + 0.5) / 2**64
            assert float(got[r, k]) == pytest.approx(-math.log(-math.log(u)), abs=1e-9)


@quick
def test_autocast_takes_its_dtype(backend, device):
    hidden, weight, bias = head(12, 64, 500)
    index = torch.arange(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_categorical(hidden, weight, index, bias=bias, seed=1, backend=backend)
    want = linear_categorical(hidden.bfloat16(), weight.bfloat16(), index, bias=bias.bfloat16(), seed=1, backend=backend)
    assert torch.equal(got, want)


@quick
def test_opcheck_compile_and_no_gradient(backend, device):
    hidden, weight, bias = head(5, 16, 40)
    given = (hidden.requires_grad_(), weight.requires_grad_(), torch.arange(5), bias, 3, 0.9, torch.tensor(1), torch.tensor(2))
    arguments = (hidden.detach(), weight.detach(), *given[2:], 1 << 20, backend)
    torch.library.opcheck(torch.ops.atat_fast.linear_categorical, arguments)

    def drawn(hidden, weight, index, bias, forbidden, temperature, seed, step):
        options = {"bias": bias, "forbidden": forbidden, "temperature": temperature, "seed": seed, "step": step}
        return linear_categorical(hidden, weight, index, **options, backend=backend)

    want = drawn(*given)
    assert torch.equal(compiled_whole(drawn, "eager")(*given), want) and not want.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden must be \[R, D\] and weight \[V, D\]"),
        ({"hidden": torch.zeros(3, 4).half()}, "pass bfloat16 or float32"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, r"index must have shape \(3,\)"),
        ({"index": torch.zeros(3)}, "index is torch.float32; pass integers"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(6,\)"),
        ({"forbidden": 6}, "forbidden is 6, outside the vocabulary of 6"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"backend": "cuda"}, "has no backend 'cuda'"),
    ],
)
def test_bad_input(changes, message):
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "index": torch.arange(3), "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        linear_categorical(**given)


def test_cost():
    cost = linear_categorical_cost(256, 768, 50_304)
    assert cost.flops == 2 * 256 * 768 * 50_304
    assert cost.bytes == 2 * 768 * (256 + 50_304) + 4 * 50_304 + 16 * 256
