"""The CUDA kernels of the row pass without a GPU: their source, compiled for the CPU, against the specification.

Each CUDA thread is a fiber there, and which one runs next is random: see cuda_on_host.h. What lies between and around the rows of
logits must stay as it was, and shared memory is checked past its end.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from atat_fast.ops.linear_cross_entropy.row_pass import cross_entropy_reference

P = ctypes.c_void_p
GUARD = 16
NAN = math.nan
SHARED_OF_CTA = {89: 101_376, 90: 232_448}
SHARED_OF_MULTIPROCESSOR = {89: 102_400, 90: 233_472}


class Arguments(ctypes.Structure):
    """RowArguments of csrc/cross_entropy/rule.h."""

    _fields_ = [
        *((name, P) for name in ("logits", "target", "token_weight", "hidden", "weight", "bias")),
        *((name, P) for name in ("nll", "max_probability", "entropy", "bias_gradient", "rates", "elapsed", "velocity")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "width", "vocabulary")),
        ("gradient", ctypes.c_bool),
        ("half", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernel(compile_source):
    library = compile_source("cross_entropy_on_host.cpp", "g++", "-fPIC", "-Wall", "-Werror")
    for name in ("bytes_of_row", "threads_of_kept_row", "splits_of", "argument_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    library.bytes_of_row.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    library.threads_of_kept_row.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    library.splits_of.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.run_cross_entropy.argtypes = [P, ctypes.c_int, ctypes.c_int, ctypes.c_int, P, ctypes.c_uint]
    assert library.argument_bytes() == ctypes.sizeof(Arguments)
    return library


def example(rows, columns, dtype, *, weighted=True, recomputed=True, width=40):
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(columns, width) / 4).to(dtype)
    bias, target = torch.randn(columns).to(dtype), torch.randint(0, columns, (rows,))
    bias[columns // 2] = -torch.inf
    target[target == columns // 2] = columns - 1
    logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
    token_weight = torch.randn(rows) if weighted else None
    if token_weight is not None and rows > 2:
        token_weight[1] = 0
    given = (hidden, weight, bias) if recomputed else (None, None, None)
    return [logits, target, token_weight, *given]


def specified(arguments, gradient=True, rates=None, elapsed=None):
    """The specification in fp64: logits or their gradient, nll, max_probability, entropy, bias_gradient; with rates velocity."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    wide[0] = arguments[0].double().clone()
    rows, columns = wide[0].shape
    nll, max_probability, entropy = (torch.empty(rows, dtype=torch.float64) for _ in range(3))
    sums = torch.zeros(columns, dtype=torch.float64)
    if rates is None:
        cross_entropy_reference(*wide, gradient, nll, max_probability, entropy, sums)
        return wide[0], nll, max_probability, entropy, sums
    velocity = torch.empty_like(nll)
    cross_entropy_reference(
        *wide, gradient, nll, max_probability, entropy, sums, rates.double(), elapsed.double(), velocity
    )  # fmt: skip
    return wide[0], nll, max_probability, entropy, sums, velocity


def run(
    kernel, arguments, *, seed=0, kept=True, threads=64, offset=0, gap=0, aligned=None, gradient=True, reports=True, sums=True,
    rates=None, elapsed=None,
):  # fmt: skip
    """The kernels on a copy of the logits that lies `offset` elements into guarded memory, its rows `gap` elements apart."""
    logits, target, token_weight, hidden, weight, bias = arguments
    rows, columns = logits.shape
    stride, half = columns + gap, logits.dtype is torch.bfloat16
    memory = torch.full((GUARD + offset + rows * stride + GUARD,), 33.0, dtype=logits.dtype)
    view = memory.as_strided((rows, columns), (stride, 1), GUARD + offset)
    view.copy_(logits)
    mine = torch.zeros_like(memory, dtype=torch.bool)
    mine.as_strided((rows, columns), (stride, 1), GUARD + offset).fill_(True)
    per_row = torch.full((4, rows + 2 * GUARD), 77.0)
    bias_gradient = torch.full((columns + 2 * GUARD,), 77.0)
    bias_gradient[GUARD:-GUARD] = 0
    partial = torch.full((kernel.splits_of(rows, columns, half) * columns + GUARD,), NAN)
    partial[-GUARD:] = 77

    def at(tensor):
        return None if tensor is None else tensor.data_ptr()

    if aligned is None:
        aligned = view.data_ptr() % 16 == 0 and stride * logits.element_size() % 16 == 0
    assert not aligned or view.data_ptr() % 16 == 0
    outputs = [at(part[GUARD:]) for part in per_row]
    call = Arguments(
        view.data_ptr(), at(target), at(token_weight), at(hidden), at(weight), at(bias),
        outputs[0], *(outputs[1:3] if reports else (None, None)), at(bias_gradient[GUARD:]) if sums else None,
        at(rates), at(elapsed), None if rates is None else outputs[3],
        rows, columns, stride, 0 if hidden is None else hidden.shape[1],
        columns if weight is None else min(columns, len(weight)), gradient, half,
    )  # fmt: skip
    assert kernel.run_cross_entropy(ctypes.byref(call), int(aligned), int(kept), threads, partial.data_ptr(), seed) == 0
    assert (memory[~mine] == 33).all() and (partial[-GUARD:] == 77).all()
    for guarded in (*per_row, bias_gradient):
        assert (guarded[:GUARD] == 77).all() and (guarded[-GUARD:] == 77).all()
    nll, max_probability, entropy, velocity = per_row[:, GUARD:-GUARD].clone()
    found = view.clone(), nll, max_probability, entropy, bias_gradient[GUARD:-GUARD].clone()
    return found if rates is None else (*found, velocity)


def compare(got, want, dtype):
    """fp32's rounding, and for bf16 gradients one rounding more. The column sums are of rounded gradients."""
    for ours, theirs in zip(got[1:4], want[1:4], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-6, atol=5e-6 if theirs is want[3] else 0, equal_nan=True)
    rounding = 2**-8 * 1.001 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(got[0].double(), want[0], rtol=rounding + 6e-6, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(got[4].double(), got[0].double().sum(0), rtol=1e-5, atol=1e-6, equal_nan=True)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
kinds = pytest.mark.parametrize("kept", [True, False], ids=["kept", "read-twice"])


@kinds
@dtypes
@pytest.mark.parametrize("columns", [1, 7, 8, 64, 255, 1031, 4096])
def test_against_the_specification(kernel, dtype, kept, columns):
    arguments = example(3, columns, dtype) if columns > 1 else [torch.randn(3, 1).to(dtype), torch.zeros(3).long(), *[None] * 4]
    want = specified(arguments)
    compare(run(kernel, arguments, kept=kept), want, dtype)


@kinds
@dtypes
@pytest.mark.parametrize(("columns", "gap", "recomputed"), [(7, 1, True), (64, 0, True), (255, 3, False), (1032, 8, True)])
def test_rates(kernel, dtype, kept, columns, gap, recomputed):
    arguments = example(4, columns, dtype, recomputed=recomputed)
    arguments[1][3] = columns + 5  # no target
    rates, elapsed = 0.2 + 3 * torch.rand(columns + 16), 3 * torch.rand(4)
    rates[columns:] = NAN  # what is past the last column is not read
    rates = rates[:columns]
    want = specified(arguments, rates=rates, elapsed=elapsed)
    found = [run(kernel, arguments, kept=kept, gap=gap, rates=rates, elapsed=elapsed, seed=seed) for seed in range(3)]
    assert all(torch.equal(a[:3], b[:3]) for other in found[1:] for a, b in zip(found[0], other, strict=True) if len(a) == 4)
    got = found[0]
    for place in (1, 2, 3):
        torch.testing.assert_close(got[place].double(), want[place], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got[5].double(), want[5], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[5][1] == 0 and got[5][3].isnan() and (got[0][1] == 0).all()  # weight 0, and no target
    torch.testing.assert_close(got[0].double(), want[0], rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=4e-6)
    torch.testing.assert_close(got[4].double(), got[0].double().sum(0), rtol=1e-5, atol=1e-6)
    alone = run(kernel, arguments, kept=False, gap=gap, gradient=False, rates=rates, elapsed=elapsed)
    assert torch.equal(alone[0], arguments[0])
    torch.testing.assert_close(alone[5], got[5], rtol=1e-6, atol=1e-6, equal_nan=True)


@kinds
@dtypes
@pytest.mark.parametrize(("offset", "gap"), [(0, 1), (1, 0), (0, 8), (3, 5), (8, 16)])
@pytest.mark.parametrize("columns", [77, 128])
def test_rows_anywhere_in_memory(kernel, dtype, kept, offset, gap, columns):
    arguments = example(3, columns, dtype, weighted=False, recomputed=False)
    compare(run(kernel, arguments, kept=kept, offset=offset, gap=gap, threads=32), specified(arguments), dtype)


@kinds
@dtypes
@pytest.mark.parametrize("columns", [515, 520])
def test_the_same_bits_whatever_the_order_of_threads(kernel, dtype, kept, columns):
    """Odd seeds let one warp run as far ahead as barriers allow."""
    arguments = example(3, columns, dtype)
    first = run(kernel, arguments, kept=kept, threads=128)
    compare(first, specified(arguments), dtype)
    for seed in range(1, 6):
        again = run(kernel, arguments, kept=kept, threads=128, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@dtypes
@pytest.mark.parametrize("columns", [7, 300])
def test_column_sums_in_splits(kernel, dtype, columns):
    rows = 130
    assert kernel.splits_of(rows, columns, dtype is torch.bfloat16) == 3
    arguments = example(rows, columns, dtype, recomputed=False)
    arguments[2] = torch.zeros(rows)  # zeros are written without a sum: quick, and most of the slab
    arguments[2][::13] = 2.0
    first = run(kernel, arguments, threads=32)
    compare(first, specified(arguments), dtype)
    assert torch.equal(first[4], run(kernel, arguments, threads=32, seed=3)[4])


@kinds
def test_long_rows_with_the_launch_s_own_threads(kernel, kept):
    """BERT's vocabulary padded to 128, and as it is: rows that are not aligned."""
    for columns in (30_592, 30_522):
        arguments = example(2, columns, torch.bfloat16, width=65)
        arguments[0][:, 30_522:] = -torch.inf
        threads = kernel.threads_of_kept_row(columns, 1, SHARED_OF_MULTIPROCESSOR[90]) if kept else 512
        assert threads == (320 if kept else 512)
        got = run(kernel, arguments, kept=kept, threads=threads)
        compare(got, specified(arguments), torch.bfloat16)
        assert (got[0][:, 30_522:] == 0).all()


@kinds
@dtypes
def test_rows_of_weight_zero_and_targets_outside(kernel, dtype, kept):
    arguments = example(9, 100, dtype)
    logits, target, token_weight = arguments[:3]
    token_weight[:] = torch.tensor([0.0, 0.0, 0.0, 1.0, -2.0, 1.0, 1.0, 1.0, 3.0])
    for row, value in enumerate((torch.inf, NAN, -torch.inf)):
        logits[row] = value
    target[2:9] = torch.tensor([2**62, -1, 100, 2**40, -(2**63), 85, 3])
    arguments[4] = arguments[4][:80].contiguous()
    want = specified(arguments)
    assert want[1].isnan().tolist() == [False] * 3 + [True] * 5 + [False]
    got = run(kernel, arguments, kept=kept)
    compare(got, want, dtype)
    assert all((part[:3] == 0).all() for part in got[:4])


@kinds
@dtypes
def test_what_is_no_number_is_seen(kernel, dtype, kept):
    arguments = example(6, 70, dtype, weighted=False, recomputed=False)
    logits, target = arguments[:2]
    target[:] = 7
    logits[0, 8], logits[1, 7], logits[2, 8], logits[3, 7] = NAN, NAN, torch.inf, torch.inf
    logits[4] = -torch.inf
    got = run(kernel, arguments, kept=kept)
    assert got[1].isnan().tolist() == [True] * 5 + [False]
    compare(
        [part[5:] for part in got[:4]] + [got[0][5:].sum(0, dtype=torch.float32)],
        [part[5:] for part in specified(arguments)],
        dtype,
    )


@kinds
def test_nearly_certain_rows(kernel, kept):
    gaps = torch.tensor([5.0, 20.0, 28.0, 60.0, 80.0])
    logits = (torch.randn(5, 600) * 64).round() / 256  # differences are exact
    target = torch.arange(5) * 149
    logits.scatter_(1, target[:, None], gaps[:, None])
    arguments = [logits, target, *[None] * 4]
    got, want = run(kernel, arguments, kept=kept), specified(arguments)
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)


@dtypes
def test_losses_alone(kernel, dtype):
    arguments = example(4, 210, dtype)
    whole = run(kernel, arguments, kept=False)
    alone = run(kernel, arguments, kept=False, gradient=False, reports=False)
    assert torch.equal(alone[0], arguments[0]) and torch.equal(alone[1], whole[1]) and (alone[4] == 0).all()
    assert (alone[2] == 77).all() and (alone[3] == 77).all()


def test_bf16_is_rounded_as_torch_and_the_device_round(kernel):
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    edges = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x7F800001, 0x00000001, 0x80008000 - 2**32]
    bits[: len(edges)] = torch.tensor(edges, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    one, pairs = torch.empty(len(bits), dtype=torch.int16), torch.empty(len(bits) // 2, dtype=torch.int32)
    kernel.round_to_bfloat16(P(values.data_ptr()), ctypes.c_int64(len(bits)), P(one.data_ptr()), P(pairs.data_ptr()))
    assert torch.equal(pairs.view(torch.int16), one)
    number = ~values.isnan()
    assert torch.equal(one[number], values.to(torch.bfloat16).view(torch.int16)[number]) and (one[~number] == 0x7FFF).all()


def test_shared_memory_and_threads_of_every_target(kernel):
    assert kernel.bytes_of_row(50_304, 1, 0) == 101_120 < kernel.bytes_of_row(50_304, 1, 1) == 101_248 <= SHARED_OF_CTA[89]
    assert kernel.bytes_of_row(131_072, 1, 0) > SHARED_OF_CTA[90]
    threads = {
        target: [kernel.threads_of_kept_row(columns, 1, size) for columns in (384, 30_592, 50_304, 100_000)]
        for target, size in SHARED_OF_MULTIPROCESSOR.items()
    }
    assert threads == {89: [256, 1024, 1024, 1024], 90: [256, 320, 512, 1024]}
