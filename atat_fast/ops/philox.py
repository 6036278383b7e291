"""Random numbers as a function: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    key     = (seed bits 0..31, seed bits 32..63)
    counter = (index bits 0..31, index bits 32..63, step, stream)
    output  = four 32-bit words

`index` names what the number is for (sample * length + position for tokens), so noise does not depend on the rank, the batch or
earlier draws. This file is the specification; words are int64 tensors of 0 .. 2^32 - 1. Ten rounds: seven pass the published
tests, ten leave a margin, and on a GPU memory traffic hides the work of either.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF

STREAM_MASK = 0
"""Which tokens are hidden."""
STREAM_REVEAL = 1
"""Which hidden tokens are shown again, if importance scores visible tokens."""
STREAM_DROPOUT = 2
"""Dropout; the layer is in the stream's bits 8 and up."""
STREAM_SAMPLE = 3
"""When a sampler reveals a position."""
STREAM_COUNT = 4
"""How many tokens are hidden."""
STREAM_TOKEN = 5
"""What a revealed position becomes: 64 bits for each id of the vocabulary; v // 2 is in the stream's bits 8 and up."""
STREAM_REMASK = 6
"""Whether a sampler hides a position again, or reveals it, at a step."""
STREAM_ORDER = 7
"""The order in which a sampler that draws its order reveals positions at a step."""
STREAM_SPREAD = 8
"""Which position of its cell is hidden, if a sequence's hidden tokens are spread out; of cell 0 also whether and from where."""
STREAM_MOMENTS = 16
"""Rounding of an optimizer's bf16 moments; the parameter's number is in the stream's bits 8 and up."""


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product. Wrapping int64 arithmetic gives the same bits as unsigned."""
    wide = b * a
    return (wide >> 32) & WORD, wide & WORD


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each counter. Arguments are int64 tensors of words that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIER_0, c0)
        high1, low1 = _product(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def random_words(
    index: Tensor, seed: int | Tensor, step: int | Tensor, stream: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for every element of `index` (int64, any shape) at this seed (64 bits), step and stream (32 bits each).

    step and stream may be tensors that broadcast with index.
    """

    def word(value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(index.device, torch.int64)
        return torch.full((), value, dtype=torch.int64, device=index.device)  # a copy from the host would wait for a GPU

    seed, step = word(seed), word(step)
    counter = (index & WORD, (index >> 32) & WORD, step & WORD, word(stream) & WORD)
    words = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    _, *spread = torch.broadcast_tensors(index, *words)
    return spread[0], spread[1], spread[2], spread[3]


def uniform(word: Tensor) -> Tensor:
    """A word as fp64 in the open interval (0, 1), symmetric about a half: (word + 0.5) / 2^32."""
    return (word.to(torch.float64) + 0.5) * 2.0**-32


def uniform64(high: Tensor, low: Tensor) -> Tensor:
    """Two words as fp64 in (0, 1], in steps of 2^-53 at most and exact near 0, as rare draws need."""
    return (high.to(torch.float64) * 2.0**32 + low.to(torch.float64) + 0.5) * 2.0**-64


def gumbel64(high: Tensor, low: Tensor) -> Tensor:
    """Standard Gumbel -log(-log u) of u = (high * 2^32 + low + 0.5) / 2^64, fp64, with both tails.

    From u = 1/2 upwards, 1 - u is computed exactly from the complement of the integer: values up to the largest, 45.05, have the
    right chance. 24 bits stop at 16.6, which makes tokens of chance 6e-8 and below impossible.
    """
    upper = high >> 31 == 1
    high, low = torch.where(upper, WORD - high, high), torch.where(upper, WORD - low, low)
    small = (high.to(torch.float64) * 2.0**32 + low.to(torch.float64) + 0.5) * 2.0**-64
    return -torch.log(torch.where(upper, -torch.log1p(-small), -torch.log(small)))
