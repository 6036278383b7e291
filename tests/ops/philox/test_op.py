"""The random-number contract: Random123's published vectors, and what the package builds on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from op_checks import interpreted, on_gpu

from atat_fast.ops import library
from atat_fast.ops.philox import philox4x32, random_words, uniform, uniform64

ROOT = Path(__file__).resolve().parents[3]

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


def in_library(index, seed, step, stream):
    if not library.load():
        pytest.skip(library.problem())
    if index.is_cuda and not library.build_flags() & library.CUDA_KERNELS:
        pytest.skip("the library was built without CUDA kernels")
    return torch.ops.atat_fast_c.philox(index, torch.tensor(seed).to(index), torch.tensor(step).to(index), stream)


def in_triton(index, seed, step, stream):
    from atat_fast.kernels.philox import words

    out = torch.empty(*index.shape, 4, dtype=torch.int64, device=index.device)
    block = {} if index.is_cuda else {"block": 64}
    return words(index, torch.tensor(seed).to(index), torch.tensor(step).to(index), stream, out, **block)


implementations = pytest.mark.parametrize(
    ("words", "device"),
    [
        pytest.param(in_pytorch, "cpu", id="torch"),
        pytest.param(in_library, "cpu", id="cpp"),
        pytest.param(in_triton, "cpu", id="triton-interpreted", marks=interpreted),
        pytest.param(in_library, "cuda", id="tiny-cuda-gpu", marks=on_gpu),
        pytest.param(in_triton, "cuda", id="tiny-triton-gpu", marks=on_gpu),
    ],
)


@implementations
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_through_the_packed_arguments(words, device, counter, key, expected):
    got = words(torch.tensor([signed(*counter[:2])], device=device), signed(*key), counter[2], signed(counter[3], 0))
    assert tuple(got[0].tolist()) == expected


@implementations
def test_every_implementation_gives_the_same_words(words, device):
    for shape in ((0,), (257,), (3, 50), *[(5000,)] * (device == "cuda")):
        index = torch.randint(-(2**63), 2**63 - 1, shape)
        for seed, step, stream in ((0, 0, 0), (-1, 2**32 - 1, 4), (2**62 + 3, 1, 1), (-(2**63), 123456, 2 | 7 << 8)):
            got = words(index.to(device), seed, step, stream).cpu()
            assert got.shape == (*shape, 4) and torch.equal(got, in_pytorch(index, seed, step, stream))


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
