"""mask_tokens: hide exactly k tokens of each sequence and list the rows that the loss needs. One launch.

It moves little (ids in and out, 12 bytes a hidden token), so launches and latency bound it. One program owns one sequence. First
it holds all keys in registers and finds the k-th smallest bit by bit from the top: 32 compare-and-count passes, no sort, no
memory. Then it goes over the sequence in tiles, makes the keys again (Philox costs less than keeping them) and writes. A
sequence's rows begin at a sum over num_masked, so programs never wait for each other, nothing is atomic, and rows come out in
position order.
"""

import triton
import triton.language as tl

from .philox import gumbel, random_words


@triton.jit
def ordered(value):
    """Unsigned integers in the order of floats; NaN comes last."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(value == value, bits, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def count_under(tiles, limit, TILE: tl.constexpr):
    """The number of keys under the limit."""
    under = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(len(tiles)):
        under += (tiles[i] < limit).to(tl.int32)
    return tl.sum(under, 0)


@triton.jit
def smallest(tiles, wanted, TILE: tl.constexpr):
    """The wanted-th smallest key (from 1): the largest T with fewer than `wanted` keys under it. The highest key never counts."""
    found = wanted.to(tl.uint32) * 0
    for i in range(32):
        bit = (found * 0 + 1) << (31 - i)
        found = tl.where(count_under(tiles, found + bit, TILE) < wanted, found + bit, found)
    return found


@triton.jit
def load_counts(NumMasked, o_b, B, L):
    """The number of rows of each sequence, clamped to its length."""
    counts = tl.load(NumMasked + o_b, mask=o_b < B, other=0)
    return tl.minimum(tl.maximum(counts, 0), L).to(tl.int32)


@triton.jit
def load_free(Eligible, Frozen, start, o, m, ELIGIBLE: tl.constexpr, FROZEN: tl.constexpr):
    """Masks of the positions that are not frozen, and of those that may be hidden."""
    m_free = m
    if FROZEN:
        m_free = m & (tl.load(Frozen + start + o, mask=m, other=1) == 0)
    m_may = m_free
    if ELIGIBLE:
        m_may = m_free & (tl.load(Eligible + start + o, mask=m, other=0) != 0)
    return m_free, m_may


@triton.jit
def make_keys(Scores, start, first, o, m, seed, step, stream, tilt, spread, cells, L, TILTED: tl.constexpr, SPREAD: tl.constexpr):
    """Small keys are hidden first: the random word itself, or the tilted Gumbel in an integer's order. In a sequence whose hidden
    tokens are spread, keys have a first bit that is 0 for the positions that are drawn.
    """
    if SPREAD != 0:
        _, choice, turn, _ = random_words(first, seed, step, 8)  # STREAM_SPREAD
        place = o + (turn.to(tl.uint64) * L >> 32).to(tl.int32)
        place = tl.where(place >= L, place - L, place)
        if SPREAD < 0:
            drawn = place < cells
        else:
            k = tl.maximum(cells, 1)
            cell = place * k // L  # at most 2^28: LONGEST squared
            word, _, _, _ = random_words(first + cell, seed, step, 8)
            begin = (cell * L + k - 1) // k
            size = ((cell + 1) * L + k - 1) // k - begin
            drawn = place - begin == tl.umulhi(word, size.to(tl.uint32)).to(tl.int32)
        passed = tl.where(drawn, 0, 0x80000000).to(tl.uint32)
        chosen = (choice.to(tl.int64) < spread) & (cells > 0)
        tl.debug_barrier()  # one Philox after another: both at once do not fit the registers of long sequences
    keys, _, _, _ = random_words(first + o, seed, step, stream)
    if TILTED:
        keys = ordered(gumbel(keys) - tilt * tl.load(Scores + start + o, mask=m, other=0.0))
    if SPREAD != 0:
        keys = tl.where(chosen, (keys >> 1) | passed, keys)
    return keys


@triton.jit
def hide(keys, m_may, threshold, ties):
    """Mask of the keys under the threshold and the first `ties` of those equal to it; and how many equal it."""
    tie = m_may & (keys == threshold)
    rank = tl.cumsum(tie.to(tl.int32), 0)
    return m_may & ((keys < threshold) | (tie & (rank <= ties))), tl.sum(tie.to(tl.int32), 0)


@triton.jit
def pad(Rows, Weights, begin, end, stride, o_t, TILE: tl.constexpr):
    """Write row 0 with weight 0 in tiles that begin at begin, begin + stride, ..."""
    for p in range(begin, end, stride):
        m = p + o_t < end
        tl.store(Rows + p + o_t, tl.zeros((TILE,), tl.int64), mask=m)
        tl.store(Weights + p + o_t, tl.zeros((TILE,), tl.float32), mask=m)


@triton.jit(do_not_specialize=["num_rows", "mask_id", "spread", "stream"])
def _mask_tokens_kernel(
    Noisy,
    Rows,
    Weights,
    Tokens,
    NumMasked,
    SampleIds,
    Seed,
    Step,
    Scores,
    Eligible,
    Frozen,
    num_rows,
    mask_id,
    tilt,
    focus,
    spread,
    stream,
    B,
    L,
    WEIGHTING: tl.constexpr,
    TILTED: tl.constexpr,
    SPREAD: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    FROZEN: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0)
    start = b.to(tl.int64) * L
    first = tl.load(SampleIds + b) * L
    seed = tl.load(Seed)
    step = tl.load(Step)

    # Counts are clamped, here to the length and below to what may be hidden: no data can lead outside a buffer.
    o_b = tl.arange(0, BLOCK_B)
    counts = load_counts(NumMasked, o_b, B, L)
    offset = tl.sum(tl.where(o_b < b, counts, 0), 0)
    slots = tl.sum(tl.where(o_b == b, counts, 0), 0)

    o_t = tl.arange(0, TILE)
    tiles = ()
    both = tl.zeros((TILE,), tl.int32)  # two counts of at most 16,384 each: not frozen, and may be hidden
    for i in tl.static_range(TILES):
        o = i * TILE + o_t
        m = o < L
        m_free, m_may = load_free(Eligible, Frozen, start, o, m, ELIGIBLE, FROZEN)
        both += m_free.to(tl.int32) + (m_may.to(tl.int32) << 16)
        keys = make_keys(Scores, start, first, o, m, seed, step, stream, tilt, spread, slots, L, TILTED, SPREAD)
        tiles = tiles + (tl.where(m_may, keys, 0xFFFFFFFF).to(tl.uint32),)  # type: ignore[assignment]  # noqa: RUF005
        tl.debug_barrier()  # one tile after another: all at once do not fit the registers
    both = tl.sum(both, 0)
    free = both & 0xFFFF
    wanted = tl.minimum(slots, both >> 16)
    threshold = smallest(tiles, wanted, TILE)
    ties = wanted - count_under(tiles, threshold, TILE)  # 0 if nothing is wanted: the threshold is 0 then

    # Rounded as in PyTorch, so that weights are the same bits everywhere: Triton's `/` is off by a unit in the last place.
    weight = tl.div_rn((free + 1).to(tl.float32), tl.maximum(wanted, 1).to(tl.float32))
    if WEIGHTING == 3:  # ce: a plain mean over the batch
        total = tl.sum(counts, 0)
        all_free = total * 0
        if FROZEN:
            for p in range(0, B * L, TILE):
                all_free += tl.sum((tl.load(Frozen + p + o_t, mask=p + o_t < B * L, other=1) == 0).to(tl.int32), 0)
        else:
            all_free += B * L
        weight = tl.div_rn(all_free.to(tl.float32), tl.maximum(total, 1).to(tl.float32))
    slope = -tilt if WEIGHTING == 1 else focus
    largest = weight * 0.0
    if (WEIGHTING == 1) | (WEIGHTING == 2):  # order and importance: a softmax over hidden tokens
        largest += float("-inf")
        share = weight * 0.0
        left = ties
        for p in tl.range(0, L, TILE, disable_licm=True):
            o = p + o_t
            m = o < L
            _, m_may = load_free(Eligible, Frozen, start, o, m, ELIGIBLE, FROZEN)
            keys = make_keys(Scores, start, first, o, m, seed, step, stream, tilt, spread, slots, L, TILTED, SPREAD)
            hidden, tied = hide(keys, m_may, threshold, left)
            left -= tied
            exponent = tl.where(hidden, slope * tl.load(Scores + start + o, mask=m, other=0.0), float("-inf"))
            higher = tl.maximum(largest, tl.max(exponent, 0))
            base = tl.where(higher > float("-inf"), higher, 0.0)
            share = share * tl.exp(largest - base) + tl.sum(tl.exp(exponent - base), 0)
            largest = higher
        weight = (free + 1).to(tl.float32) / share

    left = ties
    taken = ties * 0
    for p in tl.range(0, L, TILE, disable_licm=True):
        o = p + o_t
        m = o < L
        _, m_may = load_free(Eligible, Frozen, start, o, m, ELIGIBLE, FROZEN)
        keys = make_keys(Scores, start, first, o, m, seed, step, stream, tilt, spread, slots, L, TILTED, SPREAD)
        hidden, tied = hide(keys, m_may, threshold, left)
        left -= tied
        tokens = tl.load(Tokens + start + o, mask=m, other=0)
        tl.store(Noisy + start + o, tl.where(hidden, mask_id.to(tokens.dtype), tokens), mask=m)

        rank = taken + tl.cumsum(hidden.to(tl.int32), 0) - 1
        taken += tl.sum(hidden.to(tl.int32), 0)
        m_out = hidden & (offset + rank < num_rows)
        tl.store(Rows + offset + rank, start + o, mask=m_out)
        weights = tl.full((TILE,), 1.0, tl.float32) * weight
        if (WEIGHTING == 1) | (WEIGHTING == 2):
            weights *= tl.exp(slope * tl.load(Scores + start + o, mask=m, other=0.0) - largest)
        tl.store(Weights + offset + rank, weights, mask=m_out)

    # Padding: slots that a clamped count of this sequence left over, and this program's share of those after the last row.
    pad(Rows, Weights, offset + taken, tl.minimum(offset + slots, num_rows), TILE, o_t, TILE)
    total = tl.sum(load_counts(NumMasked, o_b, B, L), 0)
    pad(Rows, Weights, total + b * TILE, num_rows, B * TILE, o_t, TILE)


def mask_tokens(
    tokens,
    num_masked,
    num_rows,
    mask_id,
    scores,
    tilt,
    focus,
    spread,
    eligible,
    frozen,
    weighting,
    seed,
    step,
    sample_ids,
    stream,
    noisy,
    rows,
    weights,
):
    """Fill noisy [B, L], rows and weights [num_rows]. Every tensor is contiguous; scores fp32, masks bool, counts int64."""
    batch, length = tokens.shape
    if batch == 0 or length == 0:
        rows.zero_(), weights.zero_()
        return
    _mask_tokens_kernel[(batch,)](
        noisy,
        rows,
        weights,
        tokens,
        num_masked,
        sample_ids,
        seed,
        step,
        scores,
        eligible,
        frozen,
        num_rows,
        mask_id,
        tilt,
        focus,
        abs(spread),
        stream,
        batch,
        length,
        WEIGHTING=weighting,
        TILTED=scores is not None and tilt != 0,
        SPREAD=(spread > 0) - (spread < 0),
        ELIGIBLE=eligible is not None,
        FROZEN=frozen is not None,
        BLOCK_B=triton.next_power_of_2(batch),
        **configuration(length),
    )


def configuration(length):
    """The compile-time sizes for sequences of this length: a thread has two keys of a tile. Registers limit them: 128 a thread
    with 16 warps, 64 with 32. The limit is given because ptxas would otherwise spill some, to fit more programs on a
    multiprocessor than there are sequences.
    """
    block = triton.next_power_of_2(length)
    tile = min(block, 1024)
    warps = 32 if block > 8192 else max(4, tile // 64)
    return {"TILES": block // tile, "TILE": tile, "num_warps": warps, "maxnreg": min(255, 2048 // warps)}
