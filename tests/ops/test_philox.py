"""The random-number contract: Random123's published vectors, and what the package builds on them."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import pytest
import torch

from atat_fast.ops import library
from atat_fast.ops.philox import philox4x32, random_words, uniform, uniform64

ROOT = Path(__file__).resolve().parents[2]

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected


def signed(low, high):
    return (low | high << 32) - (2**64 if high >= 2**31 else 0)


def in_pytorch(index, seed, step, stream):
    return torch.stack(random_words(index, seed, step, stream), dim=-1)


def in_cpp(index, seed, step, stream):
    if not library.load():
        pytest.skip(library.problem())
    return torch.ops.atat_fast_c.philox(index, torch.tensor(seed), torch.tensor(step), stream)


def in_triton(index, seed, step, stream):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a Triton kernel takes CPU tensors with TRITON_INTERPRET=1 only; test_interpreted.py sets it")
    from atat_fast.kernels.philox import words

    out = torch.empty(*index.shape, 4, dtype=torch.int64)
    return words(index, torch.tensor(seed), torch.tensor(step), stream, out, block=64)


implementations = pytest.mark.parametrize("words", [in_pytorch, in_cpp, in_triton])


@implementations
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_through_the_packed_arguments(words, counter, key, expected):
    got = words(torch.tensor([signed(*counter[:2])]), signed(*key), counter[2], signed(counter[3], 0))
    assert tuple(got[0].tolist()) == expected


@implementations
def test_every_implementation_gives_the_same_words(words):
    for shape in ((0,), (257,), (3, 50)):
        index = torch.randint(-(2**63), 2**63 - 1, shape)
        for seed, step, stream in ((0, 0, 0), (-1, 2**32 - 1, 4), (2**62 + 3, 1, 1), (-(2**63), 123456, 2 | 7 << 8)):
            got = words(index, seed, step, stream)
            assert got.shape == (*shape, 4) and torch.equal(got, in_pytorch(index, seed, step, stream))


@pytest.fixture(scope="module", params=["g++", "nvcc"])
def on_host(request, compile_source):
    """csrc/common/philox.h and csrc/masking/rule.h compiled for the host, by the host's compiler and as CUDA code by nvcc."""
    flags = ("-x", "c++", "-fPIC") if request.param == "g++" else ("-x", "cu", "-Xcompiler", "-fPIC", "-arch", "sm_90")
    native = compile_source("rules_on_host.cu", request.param, *flags)
    native.gumbel.restype = ctypes.c_float
    native.gumbel.argtypes = [ctypes.c_uint32]
    native.ordered.restype = ctypes.c_uint32
    native.ordered.argtypes = [ctypes.c_float]
    return native


def test_device_code_compiled_for_the_host(on_host):
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


def test_python_integers_agree_with_tensors():
    def plain(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    index = torch.randint(0, 2**62, (200,))
    words = random_words(index, 987654321987, 77, 3)
    for row, i in enumerate(index.tolist()):
        want = plain((i & 0xFFFFFFFF, i >> 32, 77, 3), (987654321987 & 0xFFFFFFFF, 987654321987 >> 32))
        assert [int(w[row]) for w in words] == want


def test_the_page_shows_the_same_vectors():
    page = (ROOT / "docs" / "philox.md").read_text()
    for counter, key, expected in KNOWN:
        for word in (*counter, *key, *expected):
            assert f"{word:08x}" in page


def test_streams_steps_and_seeds_differ():
    index = torch.arange(64)
    base = random_words(index, 1, 1, 0)[0]
    for other in (random_words(index, 2, 1, 0), random_words(index, 1, 2, 0), random_words(index, 1, 1, 1)):
        assert (other[0] != base).all()


def test_uniforms_stay_inside_and_keep_the_tail():
    edge = torch.tensor([0, 2**32 - 1])
    assert uniform(edge).tolist() == [2.0**-33, 1 - 2.0**-33]
    tiny = uniform64(torch.tensor([0]), torch.tensor([0]))
    assert tiny.item() == 2.0**-65
    assert uniform64(edge[1:], edge[1:]).item() <= 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_words_on_a_gpu():
    from atat_fast.kernels.philox import words

    index = torch.randint(-(2**63), 2**63 - 1, (5000,))
    seed, step = torch.tensor(-9, device="cuda"), torch.tensor(2**32 - 1, device="cuda")
    want = in_pytorch(index, -9, 2**32 - 1, 3)
    out = torch.empty(5000, 4, dtype=torch.int64, device="cuda")
    assert torch.equal(words(index.cuda(), seed, step, 3, out).cpu(), want)
    if library.build_flags() & library.CUDA_KERNELS:
        assert torch.equal(torch.ops.atat_fast_c.philox(index.cuda(), seed, step, 3).cpu(), want)
