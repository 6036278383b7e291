"""linear_categorical: multiply rows by the vocabulary head, add noise, keep each row's best id; no logit reaches memory.

Bound by the weight, which every block of rows reads once (from the second-level cache after the first block), and by the noise:
for every two logits ten rounds of Philox, about 100 integer operations, and four logarithms. One program owns BLOCK_M rows and a
split of the vocabulary, and goes over its columns in pairs of tiles: ids 2 p and 2 p + 1 share one counter of the generator, so
the even and the odd ids of a tile are two products with one set of random words. Each lane keeps its own best score and id; a
program finds its rows' winners after the last column, and a second, small kernel takes the best of the splits. Results are the
same bits in every run.
"""

import torch
import triton
import triton.language as tl

from .philox import gumbel64, philox4x32

MULTIPROCESSORS = 132  # of the largest GPU this is meant for; only the split of the vocabulary depends on it


@triton.jit
def product(p_hidden, Weight, o_v, m_m, m_v, width, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """hidden [BLOCK_M, D] times the rows o_v of Weight [V, D]: [BLOCK_M, BLOCK_P] fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < width
        b_hidden = tl.load(p_hidden + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(Weight + o_v[None, :] * width + o_d[:, None], mask=m_v[None, :] & m_d[:, None], other=0.0)
        total = tl.dot(b_hidden, b_weight, total, input_precision="ieee")
    return total


@triton.jit
def compete(score, id, m_v, best, winner):
    """Keep each lane's higher score, and of equals the earlier one. NaN is the highest score, with id -1."""
    wrong = score != score
    score = tl.where(m_v[None, :], tl.where(wrong, float("inf"), score), float("-inf"))
    wins = score > best
    return tl.where(wins, score, best), tl.where(wins, tl.where(wrong, -1, id), winner)


@triton.jit(do_not_specialize=["forbidden", "parts_of_split"])
def _linear_categorical_kernel(
    Scores,
    Ids,
    Hidden,
    Weight,
    Bias,
    Index,
    Seed,
    Step,
    rows,
    width,
    vocabulary,
    forbidden,
    parts_of_split,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    split = tl.program_id(1)
    p_hidden = Hidden + o_m.to(tl.int64)[:, None] * width
    index = tl.load(Index + o_m, mask=m_m, other=0)
    seed, step = tl.load(Seed), tl.load(Step)
    first = split * parts_of_split
    last = tl.minimum(first + parts_of_split, (vocabulary + 1) // 2)
    best = tl.full((BLOCK_M, BLOCK_P), float("-inf"), tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_P), -1, tl.int32)
    for part in range(first, last, BLOCK_P):
        o_p = part + tl.arange(0, BLOCK_P)
        # Counter words that a whole row or tile shares stay vectors or scalars until the rounds mix them.
        w0, w1, w2, w3 = philox4x32(
            index.to(tl.uint32)[:, None],
            (index >> 32).to(tl.uint32)[:, None],
            step.to(tl.uint32),
            (5 + (o_p.to(tl.uint32) << 8))[None, :],
            seed.to(tl.uint32),
            (seed >> 32).to(tl.uint32),
        )
        even_noise, odd_noise = gumbel64(w0, w1), gumbel64(w2, w3)
        for odd in tl.static_range(2):
            o_v = 2 * o_p.to(tl.int64) + odd
            m_v = (o_v < vocabulary) & (o_p < last) & (o_v != forbidden)
            score = product(p_hidden, Weight, o_v, m_m, m_v, width, BLOCK_M, BLOCK_P, BLOCK_D)
            if Bias is not None:
                score += tl.load(Bias + o_v, mask=m_v, other=0.0)[None, :]
            noise = odd_noise if odd else even_noise
            id = tl.broadcast_to(o_v.to(tl.int32)[None, :], (BLOCK_M, BLOCK_P))
            best, winner = compete(score * inverse_temperature + noise, id, m_v, best, winner)
    largest = tl.max(best, 1)
    id = tl.min(tl.where(best == largest[:, None], winner, 2147483647), 1)  # of equals the lowest id; NaN's, -1, is below all
    tl.store(Scores + split.to(tl.int64) * rows + o_m, largest, mask=m_m)
    tl.store(Ids + split.to(tl.int64) * rows + o_m, id, mask=m_m)


@triton.jit(do_not_specialize=["splits"])
def _best_of_splits_kernel(Out, Scores, Ids, rows, splits, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < rows
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.full((BLOCK,), 2147483647, tl.int32)
    p_scores, p_ids = Scores + o, Ids + o
    for _ in range(splits):
        score = tl.load(p_scores, mask=m, other=float("-inf"))
        id = tl.load(p_ids, mask=m, other=2147483647)
        wins = (score > best) | ((score == best) & (id < winner))
        best, winner = tl.where(wins, score, best), tl.where(wins, id, winner)
        p_scores += rows
        p_ids += rows
    tl.store(Out + o, tl.where(winner == 2147483647, -1, winner).to(tl.int64), mask=m)


def configuration(rows, width):
    """The compile-time sizes: 16, 32 or 64 rows a program, 32 pairs of ids a tile, and 64 elements of D a product."""
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_d = min(64, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": block_m, "BLOCK_P": 32, "BLOCK_D": block_d, "num_warps": 4 if block_m == 16 else 8, "num_stages": 3}


def linear_categorical(hidden, weight, index, bias, forbidden, inverse_temperature, seed, step):
    """Ids [R] int64. hidden [R, D] and weight [V, D] of one dtype, bias [V] fp32 or None; all contiguous. forbidden may be -1."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    out = torch.full((rows,), -1, dtype=torch.int64, device=hidden.device)
    if rows == 0 or vocabulary == 0:
        return out
    sizes = configuration(rows, width)
    blocks, parts = triton.cdiv(rows, sizes["BLOCK_M"]), (vocabulary + 1) // 2
    tiles = triton.cdiv(parts, sizes["BLOCK_P"])
    splits = max(1, min(tiles, 4 * MULTIPROCESSORS // blocks))
    tiles_of_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, tiles_of_split)
    scores = torch.empty((splits, rows), dtype=torch.float32, device=hidden.device)
    ids = torch.empty((splits, rows), dtype=torch.int32, device=hidden.device)
    _linear_categorical_kernel[(blocks, splits)](
        scores,
        ids,
        hidden,
        weight,
        bias,
        index,
        seed,
        step,
        rows,
        width,
        vocabulary,
        forbidden,
        tiles_of_split * sizes["BLOCK_P"],
        inverse_temperature,
        **sizes,
    )
    _best_of_splits_kernel[(triton.cdiv(rows, 128),)](out, scores, ids, rows, splits, BLOCK=128, num_warps=4)
    return out
