from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.config import DataConfig
from atat_fast.data import SequenceLoader, prepare
from atat_fast.data.loader import mix, permutation
from atat_fast.errors import UsageError


def test_mix_is_splitmix64() -> None:
    # First outputs of the generator seeded with 0 and with 1234567, as published with its reference code.
    golden = np.uint64(0x9E3779B97F4A7C15)
    first = mix(np.arange(3, dtype=np.uint64) * golden)
    assert first.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(np.array([1234567], dtype=np.uint64)).tolist() == [6457827717110365317]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(-(2**40), 2**64 - 1), st.integers(0, 1000))
def test_a_permutation_visits_each_sequence_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_permutations_differ_and_never_change() -> None:
    assert permutation(10, 1, 0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Position and value are unrelated: the mean displacement is that of a random order, n / 3.
    order = permutation(30_000, 3, 7)
    assert abs(np.abs(order - np.arange(30_000)).mean() / 10_000 - 1) < 0.03


@pytest.fixture
def loader(config: DataConfig) -> SequenceLoader:
    return SequenceLoader(prepare(config).train, 64, seed=5)


def test_batches_hold_the_permuted_sequences(loader: SequenceLoader) -> None:
    n = loader.num_sequences
    tokens, ids = loader.batch(n - 3, 6)  # across the end of the first epoch
    assert tokens.dtype == ids.dtype == torch.int64
    assert tokens.shape == (6, 64)
    assert ids.tolist() == list(range(n - 3, n + 3))
    first, second = permutation(n, 5, 0), permutation(n, 5, 1)
    for row, place in zip(tokens.tolist(), [*first[-3:], *second[:3]], strict=True):
        assert row == loader.split.sequence(int(place), 64).tolist()


def test_an_epoch_reads_every_sequence_once(loader: SequenceLoader) -> None:
    n = loader.num_sequences
    for epoch in (0, 1, 3):
        tokens, _ = loader.batch(epoch * n, n)
        want = loader.split.tokens[: n * 64].reshape(n, 64).astype(np.int64)
        assert sorted(tokens.tolist()) == sorted(want.tolist())


def test_calls_may_be_split_in_any_way(loader: SequenceLoader) -> None:
    whole, ids = loader.batch(10, 300)
    fresh = SequenceLoader(loader.split, 64, seed=5)
    for sizes in ([300], [1] * 300, [7, 93, 200], [299, 1]):
        starts = np.cumsum([10, *sizes[:-1]]).tolist()
        parts = [fresh.batch(start, size) for start, size in zip(starts, sizes, strict=True)]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole)
        assert torch.equal(torch.cat([part[1] for part in parts]), ids)
    late, _ = fresh.batch(10**9, 2)
    assert torch.equal(SequenceLoader(loader.split, 64, seed=5).batch(10**9, 2)[0], late)
    assert not torch.equal(SequenceLoader(loader.split, 64, seed=6).batch(10, 300)[0], whole)


def test_too_short_a_split(loader: SequenceLoader) -> None:
    with pytest.raises(UsageError, match="shorter than one sequence of 1,000,000"):
        SequenceLoader(loader.split, 1_000_000, seed=1)
