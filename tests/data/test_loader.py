"""The order in which sequences are read, and the batches that come of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.data import SequenceLoader, prepare
from atat_fast.data.loader import mix, permutation
from atat_fast.errors import UsageError


def test_mix_is_splitmix64():
    """First outputs of the generator seeded with 0 and with 1234567, as published with its reference code."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    first = mix(np.arange(3, dtype=np.uint64) * golden)
    assert first.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(np.array([1234567], dtype=np.uint64)).tolist() == [6457827717110365317]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(-(2**40), 2**64 - 1), st.integers(0, 1000))
def test_a_permutation_visits_each_sequence_once(n, seed, epoch):
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_permutations_differ_and_never_change():
    assert permutation(10, 1, 0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]
    assert len({tuple(permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}) == 25
    # Position and value are unrelated: the mean displacement is that of a random order, n / 3.
    order = permutation(30_000, 3, 7)
    assert abs(np.abs(order - np.arange(30_000)).mean() / 10_000 - 1) < 0.03


@pytest.fixture
def loader(config):
    return SequenceLoader(prepare(config).train, 64, seed=5)


def test_batches_hold_the_permuted_sequences_of_each_epoch(loader):
    n = loader.num_sequences
    tokens, ids = loader.batch(n - 3, n + 6)  # the end of the first epoch, the second, the beginning of the third
    assert tokens.dtype == ids.dtype == torch.int64 and tokens.shape == (n + 6, 64)
    assert ids.tolist() == list(range(n - 3, 2 * n + 3))
    order = [*permutation(n, 5, 0)[-3:], *permutation(n, 5, 1), *permutation(n, 5, 2)[:3]]
    assert tokens.tolist() == [loader.split.sequence(int(place), 64).tolist() for place in order]
    assert np.array_equal(loader.split.sequence(1, 64), loader.split.tokens[64:128])


def test_calls_may_be_split_in_any_way(loader):
    whole, ids = loader.batch(10, 300)
    fresh = SequenceLoader(loader.split, 64, seed=5)
    for sizes in ([300], [1] * 300, [7, 93, 200], [299, 1]):
        starts = np.cumsum([10, *sizes[:-1]]).tolist()
        parts = [fresh.batch(start, size) for start, size in zip(starts, sizes, strict=True)]
        assert all(
            torch.equal(torch.cat(found), want) for found, want in zip(zip(*parts, strict=True), (whole, ids), strict=True)
        )
    late, _ = fresh.batch(10**9, 2)
    assert torch.equal(SequenceLoader(loader.split, 64, seed=5).batch(10**9, 2)[0], late)
    assert not torch.equal(SequenceLoader(loader.split, 64, seed=6).batch(10, 300)[0], whole)


def test_a_split_shorter_than_a_sequence_is_refused(loader):
    with pytest.raises(UsageError, match="shorter than one sequence of 1,000,000"):
        SequenceLoader(loader.split, 1_000_000, seed=1)
