"""Batches as a function of the step: no state to save, nothing to restore.

Sample s of a run (its running number: step · global_batch + its place in the batch) is sequence `permutation(epoch)[s mod n]` of
epoch `s div n`. With c copies of each, use s div c for s. Every epoch has its own seeded permutation, so any process can produce
any sample of any step.
"""

from __future__ import annotations

import numpy as np
import torch

from atat_fast.data.packing import TokenSplit

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1
EPOCHS_KEPT = 2


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of 64-bit words. words: uint64 of any shape; returns the same shape.

    Written out because the order of the data must not change with NumPy's version. Source: Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014.
    """
    z = words + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64: the order in which epoch `epoch` visits n sequences, the same on every machine and for ever."""
    key = np.array([seed & _WORD], dtype=np.uint64)
    key = mix(mix(key) ^ np.uint64(epoch & _WORD))
    # Index times an odd constant, added to the key, through a bijection: no two words are equal, so no ties.
    words = mix(key + np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(words, kind="stable").astype(np.int64)


class SequenceLoader:
    """Sequences of a split in a seeded order.

    Args:
        split: Where they come from.
        length: Tokens L of each.
        seed: Seed of the order.
        copies: How many consecutive samples are the same sequence.

    Raises UsageError if the split is shorter than one sequence.
    """

    def __init__(self, split: TokenSplit, length: int, seed: int, copies: int = 1) -> None:
        split.require_sequences(length)
        self.split = split
        self.length = length
        self.seed = seed
        self.copies = copies
        self.num_sequences = split.num_sequences(length)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, first_sample: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples first_sample .. first_sample + count - 1.

        Returns (tokens [count, L] int64, sample_ids [count] int64); sample_ids are the running numbers.
        """
        sample_ids = np.arange(first_sample, first_sample + count, dtype=np.int64)
        tokens = np.empty((count, self.length), dtype=np.int64)
        for row, sequence in enumerate(self._sequences(first_sample, count)):
            tokens[row] = self.split.sequence(sequence, self.length)
        return torch.from_numpy(tokens), torch.from_numpy(sample_ids)

    def extents(self, first_sample: int, count: int) -> torch.Tensor | None:
        """Where the responses of these samples begin and end, [count, 2] int64: other tokens are never hidden nor counted. None
        for plain text, all of which may be hidden.
        """
        found = self.split.extents(self._sequences(first_sample, count), self.length)
        return None if found is None else torch.from_numpy(found)

    def _sequences(self, first_sample: int, count: int) -> list[int]:
        samples = range(first_sample, first_sample + count)
        places = (divmod(sample // self.copies, self.num_sequences) for sample in samples)
        return [int(self._order(epoch)[place]) for epoch, place in places]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= EPOCHS_KEPT:  # a batch may straddle two epochs
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = permutation(self.num_sequences, self.seed, epoch)
        return self._orders[epoch]
