"""The CUDA kernel of mask_tokens without a GPU: its source, compiled for the CPU, against the specification.

Each CUDA thread is a fiber there, and which one runs next is random: a result that needed a barrier it does not have would change
with the seed. (Taking away any one of the kernel's barriers fails this file.) Outputs have guards around them, and shared memory
is checked past its end.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from atat_fast.ops.masking import LONGEST, WEIGHTINGS, mask_tokens_reference

P = ctypes.c_void_p
GUARD = 16


class Arguments(ctypes.Structure):
    """MaskArguments of csrc/masking/rule.h."""

    _fields_ = [
        *((name, P) for name in ("tokens", "num_masked", "sample_ids", "seed", "step", "scores", "eligible", "frozen")),
        *((name, P) for name in ("noisy", "rows", "weights")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "num_rows", "mask_id")),
        ("tilt", ctypes.c_float),
        ("focus", ctypes.c_float),
        ("weighting", ctypes.c_int),
        ("stream", ctypes.c_uint32),
        ("wide_ids", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernel(compile_source):
    library = compile_source("masking_on_host.cpp", "g++", "-fPIC", "-Wall", "-Werror")
    for function in (library.shared_bytes, library.thread_count, library.argument_bytes):
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] if function is not library.argument_bytes else []
    assert library.argument_bytes() == ctypes.sizeof(Arguments)
    return library


def run(kernel, seed, aligned, tokens, num_masked, num_rows, mask_id, scores, tilt, focus, eligible, frozen, weighting, *rest):
    """The kernel on the arguments of mask_tokens_reference."""
    key, step, sample_ids, stream = rest
    guarded = []

    def guard(count, dtype, value):
        whole = torch.full((count + 2 * GUARD,), value, dtype=dtype)
        guarded.append((whole, count, value))
        return whole[GUARD : GUARD + count]

    noisy, rows = guard(tokens.numel(), tokens.dtype, -77), guard(num_rows, torch.int64, -77)
    weights = guard(num_rows, torch.float32, -77.0)

    def at(tensor):
        return None if tensor is None else tensor.data_ptr()

    arguments = Arguments(
        *(at(t) for t in (tokens, num_masked, sample_ids, key, step, scores, eligible, frozen, noisy, rows, weights)),
        *tokens.shape, num_rows, mask_id, tilt, focus, WEIGHTINGS.index(weighting), stream, tokens.dtype is torch.int64,
    )  # fmt: skip
    assert kernel.run_mask_tokens(ctypes.byref(arguments), int(aligned), ctypes.c_uint(seed)) == 0
    for whole, count, value in guarded:
        assert (whole[:GUARD] == value).all() and (whole[GUARD + count :] == value).all()
    return noisy.view(tokens.shape), rows, weights


def example(
    batch, length, dtype=torch.int64, *, weighting="uniform", tilt=0.0, scored=False, frozen=False, eligible=False, pad=0
):
    may_hide = torch.ones(batch, length, dtype=torch.bool)
    held = torch.rand(batch, length) < 0.3 if frozen else None
    allowed = torch.rand(batch, length) < 0.7 if eligible else None
    may_hide = may_hide if held is None else may_hide & ~held
    may_hide = may_hide if allowed is None else may_hide & allowed
    counts = (torch.rand(batch) * (may_hide.sum(1) + 1)).long()
    counts[0], counts[-1] = 0, may_hide[-1].sum()
    scores = torch.rand(batch, length) if scored else None
    seed, step, ids = torch.tensor(2**40 + 9), torch.tensor(77), torch.arange(batch) * 1_000_003 + 2**33
    return (
        torch.randint(0, 90, (batch, length), dtype=dtype), counts, int(counts.sum()) + pad, 99, scores, tilt, 0.7, allowed, held,
        weighting, seed, step, ids, 0,
    )  # fmt: skip


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {"batch": 4, "length": 1},
        {"batch": 3, "length": 37, "dtype": torch.int32},
        {"batch": 3, "length": 127, "pad": 300},
        {"batch": 4, "length": 1024},
        {"batch": 3, "length": 64, "dtype": torch.int32, "frozen": True, "weighting": "ce"},
        {"batch": 3, "length": 200, "frozen": True, "eligible": True, "pad": 7},
    ],
    ids=str,
)
def test_uniform_masks_are_the_specification_s_bit_for_bit(kernel, case, aligned):
    if aligned and case["length"] % 4:
        pytest.skip("a length that 4 does not divide is never aligned")
    arguments = example(**case)
    want = mask_tokens_reference(*arguments)
    for seed in range(6):
        got = run(kernel, seed, aligned, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("weighting", "tilt"), [("order", 1.5), ("importance", -2.0), ("uniform", 3.0), ("ce", 1.0)])
def test_tilted_masks_and_weights(kernel, weighting, tilt):
    arguments = example(4, 260, scored=True, tilt=tilt, weighting=weighting, frozen=True)
    want = mask_tokens_reference(*arguments)
    first = run(kernel, 0, True, *arguments)
    assert torch.equal(first[0], want[0]) and torch.equal(first[1], want[1])
    torch.testing.assert_close(first[2], want[2], rtol=5e-6, atol=0)
    for seed in range(1, 10):
        again = run(kernel, seed, True, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # bitwise, whatever the order of threads


def test_the_longest_sequence_and_equal_keys(kernel):
    arguments = list(example(1, LONGEST, torch.int32))
    arguments[1] = torch.tensor([LONGEST // 3])
    arguments[2] = LONGEST // 3
    assert all(
        torch.equal(a, b) for a, b in zip(run(kernel, 0, True, *arguments), mask_tokens_reference(*arguments), strict=True)
    )
    # A huge tilt leaves a handful of distinct fp32 keys, so that ties decide, and they go by position.
    arguments = list(example(2, 300, scored=True, tilt=1e9))
    arguments[1], arguments[2] = torch.tensor([120, 7]), 127
    arguments[4] = torch.ones(2, 300)
    noisy, rows, _ = run(kernel, 3, True, *arguments)
    assert (noisy == 99).sum(1).tolist() == [120, 7]
    assert rows.tolist() == [*range(120), *range(300, 307)]


def test_counts_out_of_range_stay_inside_the_outputs(kernel):
    arguments = list(example(4, 50, frozen=True))
    free = (~arguments[8]).sum(1)
    arguments[1] = torch.tensor([-5, 10**12, 3, 50])  # what a GPU's counts can hold, unseen
    for num_rows in (0, 1, 40, 103, 500):
        arguments[2] = num_rows
        noisy, rows, weights = run(kernel, 0, False, *arguments)
        assert (noisy == 99).sum(1).tolist() == [0, int(free[1]), 3, int(free[3])]
        assert not ((noisy == 99) & arguments[8]).any()
        assert ((rows >= 0) & (rows < 200)).all() and (weights >= 0).all()


def test_shared_memory_fits_every_target(kernel):
    assert kernel.shared_bytes(LONGEST) == 70_924  # what tests/aot counts with; an sm_89 has 101,376
    assert [kernel.thread_count(length) for length in (1, 512, 1024, 4096, LONGEST)] == [128, 128, 256, 1024, 1024]
