"""Philox4x32-10 on blocks of counters: docs/philox.md, in Triton. Words are uint32.

A round is two 32 x 32 -> 64 products, each a multiply-high and a wrapping multiply; this integer work hides behind the memory
traffic of the kernels that call it.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four words for each counter; all arguments are uint32 and broadcast together."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_words(index, seed, step, stream):
    """Four words for every element of `index` (a block of int64) at a scalar seed and step (int64) and stream (int32)."""
    zero = index.to(tl.uint32) * 0
    return philox4x32(
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        zero + step.to(tl.uint32),
        (zero + stream).to(tl.uint32),
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )


@triton.jit
def log1p_of_minus(x):
    """log(1 - x) for 0 < x <= 1/2 to a few units in the last place: the rounding of 1 - x is divided out (Kahan)."""
    y = 1.0 - x
    return tl.where(y == 1.0, -x, tl.log(y) * (x / (1.0 - y)))


@triton.jit
def gumbel(word):
    """Standard Gumbel of u = (word + 0.5) / 2^32 in fp32, with both tails: from u = 1/2 upwards 1 - u comes from the integer."""
    low = word < 0x80000000
    small = (tl.where(low, word, word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -tl.log(tl.where(low, -tl.log(small), -log1p_of_minus(small)))


@triton.jit
def gumbel64(high, low):
    """The same for u = (high * 2^32 + low + 0.5) / 2^64: values reach 45; with 32 bits they end at 22.9."""
    under = high < 0x80000000
    top = tl.where(under, high, high ^ 0xFFFFFFFF).to(tl.float32)
    small = (
        top + (tl.where(under, low, low ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    ) * 2.3283064365386963e-10
    return -tl.log(tl.where(under, -tl.log(small), -log1p_of_minus(small)))


@triton.jit
def _words_kernel(Out, Index, Seed, Step, stream, N, BLOCK: tl.constexpr):
    """Bound by the 40 bytes an index takes in and out. One program owns BLOCK indices and their four words."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    w0, w1, w2, w3 = random_words(tl.load(Index + o, mask=m, other=0), tl.load(Seed), tl.load(Step), stream)
    tl.store(Out + o * 4, w0.to(tl.int64), mask=m)
    tl.store(Out + o * 4 + 1, w1.to(tl.int64), mask=m)
    tl.store(Out + o * 4 + 2, w2.to(tl.int64), mask=m)
    tl.store(Out + o * 4 + 3, w3.to(tl.int64), mask=m)


def words(index, seed, step, stream, out, block=1024):
    """Fill out [..., 4] int64 with the words of index (int64, contiguous); seed and step are int64 tensors of one element."""
    n = index.numel()
    if n:
        _words_kernel[(triton.cdiv(n, block),)](out, index, seed, step, stream, n, BLOCK=block)
    return out
