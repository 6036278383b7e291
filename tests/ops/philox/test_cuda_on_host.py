"""csrc/common/philox.h and csrc/masking/rule.h compiled for the host, by the host's compiler and as CUDA code by nvcc."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from philox.test_op import KNOWN, in_pytorch


@pytest.fixture(scope="module", params=["g++", "nvcc"])
def on_host(request, compile_source):
    flags = ("-x", "c++", "-fPIC") if request.param == "g++" else ("-x", "cu", "-Xcompiler", "-fPIC", "-arch", "sm_90")
    native = compile_source("philox/on_host.cu", request.param, *flags)
    native.gumbel.restype = ctypes.c_float
    native.gumbel.argtypes = [ctypes.c_uint32]
    native.ordered.restype = ctypes.c_uint32
    native.ordered.argtypes = [ctypes.c_float]
    return native


def test_words_are_the_specification_s(on_host):
    out = (ctypes.c_uint32 * 4)()
    for counter, key, expected in KNOWN:
        on_host.philox(*(ctypes.c_uint32(c) for c in (*counter, *key)), out)
        assert tuple(out) == expected
    index = torch.randint(-(2**63), 2**63 - 1, (100,))
    want = in_pytorch(index, -5, 77, 3)
    for row, i in enumerate(index.tolist()):
        on_host.words(ctypes.c_int64(i), ctypes.c_int64(-5), ctypes.c_int64(77), ctypes.c_uint32(3), out)
        assert list(out) == want[row].tolist()


def test_gumbel_in_fp32_has_both_tails(on_host):
    edges = [0, 1, 2, 2**20, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**20, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    words = sorted(edges + torch.randint(0, 2**32, (2000,)).tolist())
    values = [on_host.gumbel(word) for word in words]
    for word, value in zip(words, values, strict=True):
        # log1p in fp64: -log(u) of a u next to 1 would lose there what is tested here
        u = (word + 0.5) / 2**32
        exact = -math.log(-math.log1p(-(2**32 - word - 0.5) / 2**32) if word >= 2**31 else -math.log(u))
        assert abs(value - exact) <= 4e-7 * max(1.0, abs(exact))
    assert values == sorted(values)


def test_order_of_keys(on_host):
    values = [-math.inf, -3.5e38, -1.0, -1e-40, 0.0, 1e-40, 2.0, 3.4e38, math.inf, math.nan]
    keys = [on_host.ordered(value) for value in values]
    assert keys == sorted(keys) and keys[-1] == 2**32 - 1


def test_radix_select(on_host):
    for n, spread in ((1, 2), (2, 2), (50, 4), (1000, 40), (1000, 2**32), (5000, 2**20)):
        keys = torch.randint(0, spread, (n,))
        may = torch.rand(n) < 0.8
        may[0] = True
        allowed = sorted(keys[may].tolist())
        native_keys = (ctypes.c_uint32 * n)(*keys.tolist())
        native_may = (ctypes.c_uint8 * n)(*may.tolist())
        key, ties = ctypes.c_uint32(), ctypes.c_int32()
        for wanted in {1, len(allowed) // 2, len(allowed) - 1} - {0, len(allowed)}:
            on_host.radix_select(
                native_keys, native_may, ctypes.c_int64(n), ctypes.c_int32(wanted), ctypes.byref(key), ctypes.byref(ties)
            )
            under = sum(k < key.value for k in allowed)
            assert under + min(ties.value, allowed.count(key.value)) == wanted
