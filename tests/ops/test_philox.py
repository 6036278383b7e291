"""The random-number contract: Random123's published vectors, and what the package builds on them."""

from __future__ import annotations

import pytest
import torch

from atat_fast.ops.philox import philox4x32, random_words, uniform, uniform64

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


def test_known_answer_through_the_packed_arguments():
    def signed(low, high):
        return (low | high << 32) - (2**64 if high >= 2**31 else 0)

    counter, key, expected = KNOWN[2]
    words = random_words(torch.tensor([signed(*counter[:2])]), signed(*key), counter[2], counter[3])
    assert tuple(int(w) for w in words) == expected


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
