"""The CUDA kernels of the row pass without a GPU: their source, compiled for the CPU, against the specification.

Each CUDA thread is a fiber there, and which one runs next is random: see cuda_on_host.h. What lies between and around the rows of
logits must stay as it was, and shared memory is checked past its end. The laws of a row are in test_row_pass.py.
"""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from linear_cross_entropy.slab import INF, compare, make, run
from op_checks import BF16, dtypes, same

SHARED_OF_CTA = {89: 101_376, 90: 232_448}
SHARED_OF_MULTIPROCESSOR = {89: 102_400, 90: 233_472}
kinds = pytest.mark.parametrize("kept", [True, False], ids=["kept", "read-twice"])


@kinds
@dtypes
@pytest.mark.parametrize("columns", [515, 520])
@pytest.mark.parametrize("rated", [False, True])
def test_the_same_bits_whatever_the_order_of_threads(on_host, dtype, kept, columns, rated):
    """Odd seeds let one warp run as far ahead as barriers allow."""
    slab = make(3, columns, dtype, rated=rated)
    first = run(functools.partial(on_host, kept=kept, threads=128), slab)
    compare(first, slab, strict=True)
    for seed in range(1, 6):
        assert same(first, run(functools.partial(on_host, kept=kept, threads=128, seed=seed), slab))


@dtypes
@pytest.mark.parametrize("columns", [7, 300])
def test_column_sums_in_splits(on_host, dtype, columns):
    assert on_host.library.splits_of(130, columns, dtype is BF16) == 3
    slab = make(130, columns, dtype, recomputed=False)
    slab.token_weight = torch.zeros(130)  # zeros are written without a sum: quick, and most of the slab
    slab.token_weight[::13] = 2.0
    first = run(functools.partial(on_host, threads=32), slab)
    compare(first, slab, strict=True)
    again = run(functools.partial(on_host, threads=32, seed=3), slab)
    assert torch.equal(first.bias_gradient, again.bias_gradient)


@kinds
@pytest.mark.parametrize("columns", [30_592, 30_522])
def test_long_rows_with_the_launch_s_own_threads(on_host, kept, columns):
    """BERT's vocabulary padded to 128, and as it is: rows that are not aligned."""
    slab = make(2, columns, BF16, width=65)
    slab.logits[:, 30_522:] = -INF
    slab.target.clamp_(max=30_521)
    threads = on_host.library.threads_of_kept_row(columns, 1, SHARED_OF_MULTIPROCESSOR[90]) if kept else 512
    assert threads == (320 if kept else 512)
    got = run(functools.partial(on_host, kept=kept, threads=threads), slab)
    compare(got, slab, strict=True)
    assert (got.logits[:, 30_522:] == 0).all()


def test_bf16_is_rounded_as_torch_and_the_device_round(on_host):
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    edges = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x7F800001, 0x00000001, 0x80008000 - 2**32]
    bits[: len(edges)] = torch.tensor(edges, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    one, pairs = torch.empty(len(bits), dtype=torch.int16), torch.empty(len(bits) // 2, dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, one, pairs)]
    on_host.library.round_to_bfloat16(pointers[0], ctypes.c_int64(len(bits)), *pointers[1:])
    assert torch.equal(pairs.view(torch.int16), one)
    number = ~values.isnan()
    assert torch.equal(one[number], values.to(BF16).view(torch.int16)[number]) and (one[~number] == 0x7FFF).all()


def test_shared_memory_and_threads_of_every_target(on_host):
    bytes_of_row, threads_of = on_host.library.bytes_of_row, on_host.library.threads_of_kept_row
    assert bytes_of_row(50_304, 1, 0) == 101_120 < bytes_of_row(50_304, 1, 1) == 101_248 <= SHARED_OF_CTA[89]
    assert bytes_of_row(131_072, 1, 0) > SHARED_OF_CTA[90]
    threads = {
        target: [threads_of(columns, 1, size) for columns in (384, 30_592, 50_304, 100_000)]
        for target, size in SHARED_OF_MULTIPROCESSOR.items()
    }
    assert threads == {89: [256, 1024, 1024, 1024], 90: [256, 320, 512, 1024]}
