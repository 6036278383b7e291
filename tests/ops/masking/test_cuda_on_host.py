"""The CUDA kernel of mask_tokens without a GPU: its source, compiled for the CPU, against the specification.

Each CUDA thread is a fiber there, and which one runs next is random: a result that needed a barrier it does not have would change
with the seed. (Taking away any one of the kernel's barriers fails this file.) Outputs have guards around them, and shared memory
is checked past its end.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from op_checks import Guards, same

from atat_fast.ops.masking import LONGEST, WEIGHTINGS, mask_tokens_reference

P = ctypes.c_void_p


class Arguments(ctypes.Structure):
    """MaskArguments of csrc/masking/rule.h."""

    _fields_ = [
        *((name, P) for name in ("tokens", "num_masked", "sample_ids", "seed", "step", "scores", "eligible", "frozen")),
        *((name, P) for name in ("noisy", "rows", "weights")),
        *((name, ctypes.c_int64) for name in ("batch", "length", "num_rows", "mask_id", "spread")),
        ("tilt", ctypes.c_float),
        ("focus", ctypes.c_float),
        ("weighting", ctypes.c_int),
        ("stream", ctypes.c_uint32),
        ("wide_ids", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernel(compile_source):
    library = compile_source("masking/on_host.cpp", "g++", "-fPIC", "-Wall", "-Werror")
    for function in (library.shared_bytes, library.thread_count, library.argument_bytes):
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] if function is not library.argument_bytes else []
    assert library.argument_bytes() == ctypes.sizeof(Arguments)
    return library


def run(kernel, given, seed=0, aligned=False):
    """The kernel on the arguments of mask_tokens_reference, by name."""
    tokens, count, guards = given["tokens"], given["num_rows"], Guards()
    made = {"noisy": guards.empty(tokens.shape, tokens.dtype)}
    made |= {"rows": guards.empty((count,), torch.int64), "weights": guards.empty((count,), torch.float32)}
    of_kernel = given | made | {
        "weighting": WEIGHTINGS.index(given["weighting"]), "batch": len(tokens), "length": tokens.shape[1],
        "wide_ids": tokens.dtype is torch.int64,
    }  # fmt: skip
    pointers = {k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in of_kernel.items()}
    assert kernel.run_mask_tokens(ctypes.byref(Arguments(**pointers)), int(aligned), ctypes.c_uint(seed)) == 0
    guards.check()
    return tuple(made.values())


def example(
    batch,
    length,
    dtype=torch.int64,
    *,
    weighting="uniform",
    tilt=0.0,
    spread=0,
    scored=False,
    frozen=False,
    eligible=False,
    pad=0,
    counts=None,
):
    may_hide = torch.ones(batch, length, dtype=torch.bool)
    held = torch.rand(batch, length) < 0.3 if frozen else None
    allowed = torch.rand(batch, length) < 0.7 if eligible else None
    may_hide = may_hide if held is None else may_hide & ~held
    may_hide = may_hide if allowed is None else may_hide & allowed
    if counts is None:
        counts = (torch.rand(batch) * (may_hide.sum(1) + 1)).long()
        counts[0], counts[-1] = 0, may_hide[-1].sum()
    counts = torch.as_tensor(counts)
    return {
        "tokens": torch.randint(0, 90, (batch, length), dtype=dtype), "num_masked": counts, "num_rows": int(counts.sum()) + pad,
        "mask_id": 99, "scores": torch.rand(batch, length) if scored else None, "tilt": tilt, "focus": 0.7,
        "spread": spread, "eligible": allowed,
        "frozen": held, "weighting": weighting, "seed": torch.tensor(2**40 + 9), "step": torch.tensor(77),
        "sample_ids": torch.arange(batch) * 1_000_003 + 2**33, "stream": 0,
    }  # fmt: skip


UNIFORM = (
    {"batch": 4, "length": 1},
    {"batch": 3, "length": 37, "dtype": torch.int32},
    {"batch": 3, "length": 127, "pad": 300},
    {"batch": 4, "length": 1024},
    {"batch": 3, "length": 64, "dtype": torch.int32, "frozen": True, "weighting": "ce"},
    {"batch": 3, "length": 200, "frozen": True, "eligible": True, "pad": 7},
    {"batch": 6, "length": 128, "spread": 3 << 30, "weighting": "ce"},
    {"batch": 5, "length": 301, "spread": 1 << 32, "frozen": True},
    {"batch": 5, "length": 76, "spread": -(1 << 31), "eligible": True},
)


@pytest.mark.parametrize(
    ("case", "aligned"), [(c, a) for c in UNIFORM for a in (False, True) if not (a and c["length"] % 4)], ids=str
)
def test_uniform_masks_are_the_specification_s_bit_for_bit(kernel, case, aligned):
    given = example(**case)
    want = mask_tokens_reference(**given)
    assert all(same(run(kernel, given, seed, aligned), want) for seed in range(6))


@pytest.mark.parametrize(("weighting", "tilt"), [("order", 1.5), ("importance", -2.0), ("uniform", 3.0), ("ce", 1.0)])
def test_tilted_masks_and_weights_whatever_the_order_of_threads(kernel, weighting, tilt):
    given = example(4, 260, scored=True, tilt=tilt, weighting=weighting, frozen=True)
    want, first = mask_tokens_reference(**given), run(kernel, given, 0, True)
    assert same(first[:2], want[:2])
    torch.testing.assert_close(first[2], want[2], rtol=5e-6, atol=0)
    assert all(same(first, run(kernel, given, seed, True)) for seed in range(1, 10))


def test_the_longest_sequence_and_equal_keys(kernel):
    given = example(1, LONGEST, torch.int32, counts=[LONGEST // 3])
    assert same(run(kernel, given, 0, True), mask_tokens_reference(**given))
    # A huge tilt leaves a handful of distinct fp32 keys, so that ties decide, and they go by position.
    given = example(2, 300, scored=True, tilt=1e9, counts=[120, 7])
    given["scores"] = torch.ones(2, 300)
    noisy, rows, _ = run(kernel, given, 3, True)
    assert (noisy == 99).sum(1).tolist() == [120, 7]
    assert rows.tolist() == [*range(120), *range(300, 307)]


def test_counts_out_of_range_stay_inside_the_outputs(kernel):
    given = example(4, 50, frozen=True)
    given["num_masked"], free = torch.tensor([-5, 10**12, 3, 50]), (~given["frozen"]).sum(1)  # what a GPU can hold, unseen
    for num_rows in (0, 1, 40, 103, 500):
        noisy, rows, weights = run(kernel, given | {"num_rows": num_rows})
        assert (noisy == 99).sum(1).tolist() == [0, int(free[1]), 3, int(free[3])]
        assert not ((noisy == 99) & given["frozen"]).any()
        assert ((rows >= 0) & (rows < 200)).all() and (weights >= 0).all()


def test_shared_memory_fits_every_target(kernel):
    assert kernel.shared_bytes(LONGEST) == 70_924  # what tests/aot counts with; an sm_89 has 101,376
    assert [kernel.thread_count(length) for length in (1, 512, 1024, 4096, LONGEST)] == [128, 128, 256, 1024, 1024]
