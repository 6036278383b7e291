"""adaptive_layer_norm and gated_residual_norm: one launch each, forward or backward, and a small second one for sums over rows.

Bound by bytes: every [B, L, D] tensor is read or written once, and there are no temporaries of that size. Registers hold fp32.

A program owns rows of one sample, since its sums for shift, scale and gate are that sample's. A row lies in CHUNKS tiles of CHUNK
columns; a tile gives each lane four neighbours. That is 16 bytes of fp32 or 8 of bf16 in one layout, so both dtypes meet without
a pass through shared memory, and one Philox counter a lane. Blocks of Triton are powers of two: one block for a row of 768 would
idle a quarter of its lanes, six tiles of 128 idle none. A row of up to 768 columns is one warp's, and its sums are shuffles;
wider rows get 2, 4 or 8 warps, so a lane holds at most 24 columns of a row.

A backward keeps its sums over rows in registers until a program ends. They are partials [K, B * splits, D], which the second
stage adds in a fixed order, without atomics: two runs give the same bits. Only D is a compile-time size.
"""

# In Triton a tuple of tiles grows by `+` only.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated", no-warn-unreachable

import functools
import struct

import triton
import triton.language as tl

from .philox import random_words

RESIDENT = 256
"""Programs of a backward: two a multiprocessor of an RTX 4090 (128) or an H100 (132), so that none waits for a second wave."""
BRIEF = 1024
"""Programs of a forward, which has no partial sums: enough to load either GPU evenly."""


@triton.jit
def load_vector(Vector, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """A [D] vector as CHUNKS fp32 tiles, repeated for every row, so each warp has it in its rows' layout."""
    tiles = ()
    for i in tl.static_range(CHUNKS):
        o = tl.broadcast_to(i * CHUNK + tl.arange(0, CHUNK)[None, :], (TILE_ROWS, CHUNK))
        tiles = tiles + (tl.load(Vector + o, mask=o < D, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def load_gain(Scale, Weight, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """weight * (1 + scale) of one sample, as load_vector."""
    scale = load_vector(Scale, D, CHUNK, CHUNKS, TILE_ROWS)
    gain = ()
    if Weight is None:
        for i in tl.static_range(CHUNKS):
            gain = gain + (1.0 + scale[i],)
    else:
        weight = load_vector(Weight, D, CHUNK, CHUNKS, TILE_ROWS)
        for i in tl.static_range(CHUNKS):
            gain = gain + (weight[i] * (1.0 + scale[i]),)
    return gain


@triton.jit
def load_tile(Rows, o_row, m_row, i, D: tl.constexpr, CHUNK: tl.constexpr):
    """Tile i of some rows of [B * L, D], in memory's dtype; 0 past the rows and columns."""
    o = i * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(Rows + o_row * D + o, mask=m_row & (o < D), other=0.0)


@triton.jit
def store_tile(Rows, tile, o_row, m_row, i, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write tile i of some rows of [B * L, D], rounded to memory's dtype."""
    o = i * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(Rows + o_row * D + o, tile.to(Rows.dtype.element_ty), mask=m_row & (o < D))


@triton.jit
def dropout_tile(o_token, i, seed, step, stream, limit, inverse, D: tl.constexpr, CHUNK: tl.constexpr, TILE_ROWS: tl.constexpr):
    """0 for dropped elements of tile i, else `inverse`; o_token is sample * L + position. Four elements share a counter."""
    o_group = i * (CHUNK // 4) + tl.arange(0, CHUNK // 4)[None, :]
    w0, w1, w2, w3 = random_words(o_token * ((D + 3) // 4) + o_group, seed, step, stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (TILE_ROWS, CHUNK))
    return tl.where(words > limit.to(tl.uint32), inverse, 0.0)


@triton.jit
def statistics(tiles, eps, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and reciprocal standard deviation of each row, [TILE_ROWS, 1], in two passes over registers."""
    total = tiles[0]
    for i in tl.static_range(1, CHUNKS):
        total += tiles[i]
    mean = tl.sum(total, 1, keep_dims=True) / D
    spread = tiles[0] * 0.0
    for i in tl.static_range(CHUNKS):
        centred = tiles[i] - mean
        if (i + 1) * CHUNK > D:
            centred = tl.where(i * CHUNK + tl.arange(0, CHUNK)[None, :] < D, centred, 0.0)
        spread += centred * centred
    return mean, tl.rsqrt(tl.sum(spread, 1, keep_dims=True) / D + eps)


@triton.jit
def finish(tiles, gain, shift, Y, Mean, Rstd, o_row, m_row, eps, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Normalise and modulate rows in registers, and write them with their statistics."""
    mean, rstd = statistics(tiles, eps, D, CHUNK, CHUNKS)
    o_lane = tl.arange(0, CHUNK // 4)[
        None, :
    ]  # one lane of a row writes; a [TILE_ROWS, 1] block would pass through shared memory
    m_one = m_row & (o_lane == 0)
    tl.store(Mean + o_row + o_lane, mean + o_lane * 0.0, mask=m_one)
    tl.store(Rstd + o_row + o_lane, rstd + o_lane * 0.0, mask=m_one)
    for i in tl.static_range(CHUNKS):
        store_tile(Y, (tiles[i] - mean) * rstd * gain[i] + shift[i], o_row, m_row, i, D, CHUNK)


@triton.jit(do_not_specialize=["L", "rows"])
def _norm_forward_kernel(
    Y,
    Mean,
    Rstd,
    X,
    Shift,
    Scale,
    Weight,
    shift_stride,
    scale_stride,
    L,
    rows,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, L)
    o_r = tl.arange(0, TILE_ROWS)[:, None]
    gain = load_gain(Scale + b * scale_stride, Weight, D, CHUNK, CHUNKS, TILE_ROWS)
    shift = load_vector(Shift + b * shift_stride, D, CHUNK, CHUNKS, TILE_ROWS)
    for first in range(begin, end, TILE_ROWS):
        o_row = b * L + first + o_r
        m_row = first + o_r < end
        tiles = ()
        for i in tl.static_range(CHUNKS):
            tiles = tiles + (load_tile(X, o_row, m_row, i, D, CHUNK).to(tl.float32),)
        finish(tiles, gain, shift, Y, Mean, Rstd, o_row, m_row, eps, D, CHUNK, CHUNKS)


@triton.jit(do_not_specialize=["L", "rows", "stream", "limit"])
def _gated_forward_kernel(
    Total,
    Y,
    Mean,
    Rstd,
    Residual,
    Branch,
    Gate,
    Shift,
    Scale,
    Weight,
    Seed,
    Step,
    SampleIds,
    gate_stride,
    shift_stride,
    scale_stride,
    L,
    rows,
    stream,
    limit,
    inverse,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_IDS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, L)
    o_r = tl.arange(0, TILE_ROWS)[:, None]
    gate = load_vector(Gate + b * gate_stride, D, CHUNK, CHUNKS, TILE_ROWS)
    gain = load_gain(Scale + b * scale_stride, Weight, D, CHUNK, CHUNKS, TILE_ROWS)
    shift = load_vector(Shift + b * shift_stride, D, CHUNK, CHUNKS, TILE_ROWS)
    if Seed is not None:
        seed = tl.load(Seed)
        step = tl.load(Step)
        if not ROW_IDS:
            token = tl.load(SampleIds + b) * L
    for first in range(begin, end, TILE_ROWS):
        o_row = b * L + first + o_r
        m_row = first + o_r < end
        if Seed is not None:
            o_token = tl.load(SampleIds + first + o_r, mask=m_row, other=0) if ROW_IDS else token + first + o_r
        tiles = ()
        for i in tl.static_range(CHUNKS):
            addend = load_tile(Branch, o_row, m_row, i, D, CHUNK).to(tl.float32)
            if Seed is not None:
                addend *= dropout_tile(o_token, i, seed, step, stream, limit, inverse, D, CHUNK, TILE_ROWS)
            total = load_tile(Residual, o_row, m_row, i, D, CHUNK).to(tl.float32) + gate[i] * addend
            store_tile(Total, total, o_row, m_row, i, D, CHUNK)
            tiles = tiles + (total,)  # statistics are of the sum before it is rounded to bf16
        finish(tiles, gain, shift, Y, Mean, Rstd, o_row, m_row, eps, D, CHUNK, CHUNKS)


@triton.jit
def zeros(CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Tiles of sums, at 0."""
    tiles = ()
    for _ in tl.static_range(CHUNKS):
        tiles = tiles + (tl.zeros((TILE_ROWS, CHUNK), tl.float32),)
    return tiles


@triton.jit
def row_means(x, dy, gain, mean, rstd, D: tl.constexpr, CHUNKS: tl.constexpr):
    """The means over a row of g and of g * normed, with g = dy * gain; dx subtracts them."""
    plain = dy[0].to(tl.float32) * gain[0]
    along = plain * ((x[0].to(tl.float32) - mean) * rstd)
    for i in tl.static_range(1, CHUNKS):
        g = dy[i].to(tl.float32) * gain[i]
        plain += g
        along += g * ((x[i].to(tl.float32) - mean) * rstd)
    return tl.sum(plain, 1, keep_dims=True) / D, tl.sum(along, 1, keep_dims=True) / D


@triton.jit
def store_partials(Partials, sums, k, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A program's row of partials[k]: its sums over its tiles' rows."""
    splits = tl.num_programs(1)
    row = k * tl.num_programs(0).to(tl.int64) * splits + tl.program_id(0).to(tl.int64) * splits + tl.program_id(1)
    o_c = tl.arange(0, CHUNK)
    for i in tl.static_range(CHUNKS):
        tl.store(Partials + row * D + i * CHUNK + o_c, tl.sum(sums[i], 0), mask=i * CHUNK + o_c < D)


@triton.jit(do_not_specialize=["L", "rows"])
def _norm_backward_kernel(
    Dx,
    Partials,
    Dy,
    X,
    Scale,
    Weight,
    Mean,
    Rstd,
    scale_stride,
    L,
    rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, L)
    o_r = tl.arange(0, TILE_ROWS)[:, None]
    gain = load_gain(Scale + b * scale_stride, Weight, D, CHUNK, CHUNKS, TILE_ROWS)
    dshift = zeros(CHUNK, CHUNKS, TILE_ROWS)
    dfull = zeros(CHUNK, CHUNKS, TILE_ROWS)
    for first in range(begin, end, TILE_ROWS):
        o_row = b * L + first + o_r
        m_row = first + o_r < end
        x = ()
        dy = ()
        for i in tl.static_range(CHUNKS):
            x = x + (load_tile(X, o_row, m_row, i, D, CHUNK),)
            dy = dy + (load_tile(Dy, o_row, m_row, i, D, CHUNK),)
        mean = tl.load(Mean + o_row, mask=m_row, other=0.0)
        rstd = tl.load(Rstd + o_row, mask=m_row, other=0.0)
        plain, along = row_means(x, dy, gain, mean, rstd, D, CHUNKS)
        shift_sums = ()
        full_sums = ()
        for i in tl.static_range(CHUNKS):
            d = dy[i].to(tl.float32)
            normed = (x[i].to(tl.float32) - mean) * rstd
            store_tile(Dx, rstd * (d * gain[i] - plain - normed * along), o_row, m_row, i, D, CHUNK)
            shift_sums = shift_sums + (dshift[i] + d,)
            full_sums = full_sums + (dfull[i] + d * normed,)
        dshift = shift_sums
        dfull = full_sums
    store_partials(Partials, dshift, 0, D, CHUNK, CHUNKS)
    store_partials(Partials, dfull, 1, D, CHUNK, CHUNKS)


@triton.jit(do_not_specialize=["L", "rows", "stream", "limit"])
def _gated_backward_kernel(
    Dresidual,
    Dbranch,
    Partials,
    Dtotal,
    Dy,
    Total,
    Branch,
    Gate,
    Scale,
    Weight,
    Mean,
    Rstd,
    Seed,
    Step,
    SampleIds,
    gate_stride,
    scale_stride,
    L,
    rows,
    stream,
    limit,
    inverse,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROW_IDS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, L)
    o_r = tl.arange(0, TILE_ROWS)[:, None]
    gate = load_vector(Gate + b * gate_stride, D, CHUNK, CHUNKS, TILE_ROWS)
    dshift = zeros(CHUNK, CHUNKS, TILE_ROWS)
    dfull = zeros(CHUNK, CHUNKS, TILE_ROWS)
    dgate = zeros(CHUNK, CHUNKS, TILE_ROWS)
    if Dy is not None:
        gain = load_gain(Scale + b * scale_stride, Weight, D, CHUNK, CHUNKS, TILE_ROWS)
    if Seed is not None:
        seed = tl.load(Seed)
        step = tl.load(Step)
        if not ROW_IDS:
            token = tl.load(SampleIds + b) * L
    for first in range(begin, end, TILE_ROWS):
        o_row = b * L + first + o_r
        m_row = first + o_r < end
        if Seed is not None:
            o_token = tl.load(SampleIds + first + o_r, mask=m_row, other=0) if ROW_IDS else token + first + o_r
        if Dy is not None:
            x = ()
            dy = ()
            for i in tl.static_range(CHUNKS):
                x = x + (load_tile(Total, o_row, m_row, i, D, CHUNK),)
                dy = dy + (load_tile(Dy, o_row, m_row, i, D, CHUNK),)
            mean = tl.load(Mean + o_row, mask=m_row, other=0.0)
            rstd = tl.load(Rstd + o_row, mask=m_row, other=0.0)
            plain, along = row_means(x, dy, gain, mean, rstd, D, CHUNKS)
        shift_sums = ()
        full_sums = ()
        gate_sums = ()
        for i in tl.static_range(CHUNKS):
            dr = tl.zeros((TILE_ROWS, CHUNK), tl.float32)
            if Dtotal is not None:
                dr += load_tile(Dtotal, o_row, m_row, i, D, CHUNK).to(tl.float32)
            if Dy is not None:
                d = dy[i].to(tl.float32)
                normed = (x[i].to(tl.float32) - mean) * rstd
                dr += rstd * (d * gain[i] - plain - normed * along)
                shift_sums = shift_sums + (dshift[i] + d,)
                full_sums = full_sums + (dfull[i] + d * normed,)
            store_tile(Dresidual, dr, o_row, m_row, i, D, CHUNK)
            addend = load_tile(Branch, o_row, m_row, i, D, CHUNK).to(tl.float32)
            if Seed is not None:
                dr *= dropout_tile(o_token, i, seed, step, stream, limit, inverse, D, CHUNK, TILE_ROWS)
            store_tile(Dbranch, dr * gate[i], o_row, m_row, i, D, CHUNK)
            gate_sums = gate_sums + (dgate[i] + dr * addend,)
        if Dy is not None:
            dshift = shift_sums
            dfull = full_sums
        dgate = gate_sums
    store_partials(Partials, dshift, 0, D, CHUNK, CHUNKS)
    store_partials(Partials, dfull, 1, D, CHUNK, CHUNKS)
    store_partials(Partials, dgate, 2, D, CHUNK, CHUNKS)


@triton.jit
def sum_rows(Matrix, Scale, scale_stride, first, last, splits, o_d, D: tl.constexpr, TILE_ROWS: tl.constexpr):
    """The sum in order of rows first to last of a [rows, D] matrix, each times 1 + its sample's scale if Scale is given."""
    total = tl.zeros((TILE_ROWS, o_d.shape[0]), tl.float32)
    for r in range(first, last, TILE_ROWS):
        o = r + tl.arange(0, TILE_ROWS)[:, None]
        m = (o < last) & (o_d[None, :] < D)
        part = tl.load(Matrix + o.to(tl.int64) * D + o_d[None, :], mask=m, other=0.0)
        if Scale is not None:
            scale = tl.load(Scale + (o // splits).to(tl.int64) * scale_stride + o_d[None, :], mask=m, other=0.0)
            part *= 1.0 + scale.to(tl.float32)
        total += part
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["groups", "group_rows", "splits"])
def _sums_kernel(
    Dshift,
    Dscale,
    Dgate,
    Dweight,
    Partials,
    Scale,
    Weight,
    scale_stride,
    groups,
    group_rows,
    splits,
    D: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """The second stage. It reads a few megabytes, mostly from the L2 cache: latency bounds it, so programs are small.

    One program owns CHUNK columns of one sum of one group: a sample's rows, or all rows if conditioning is one row. The last
    programs make the weight's gradient over several samples, the sum of the scale's partials times 1 + scale.
    """
    group = tl.program_id(0) // K
    k = tl.program_id(0) % K
    o_d = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    m = o_d < D
    matrix = Partials + k * groups.to(tl.int64) * group_rows * D
    if group < groups:
        first = group * group_rows
        total = sum_rows(matrix, None, 0, first, first + group_rows, splits, o_d, D, TILE_ROWS)
        o = group.to(tl.int64) * D + o_d
        if k == 0:
            tl.store(Dshift + o, total.to(Dshift.dtype.element_ty), mask=m)
        if k == 1:
            dscale = total
            if Weight is not None:
                dscale *= tl.load(Weight + o_d, mask=m, other=0.0).to(tl.float32)
                if groups == 1:
                    dweight = total * (1.0 + tl.load(Scale + o_d, mask=m, other=0.0).to(tl.float32))
                    tl.store(Dweight + o_d, dweight.to(Dweight.dtype.element_ty), mask=m)
            tl.store(Dscale + o, dscale.to(Dscale.dtype.element_ty), mask=m)
        if K == 3 and k == 2:
            tl.store(Dgate + o, total.to(Dgate.dtype.element_ty), mask=m)
    elif Weight is not None:
        matrix = Partials + groups.to(tl.int64) * group_rows * D
        dweight = sum_rows(matrix, Scale, scale_stride, 0, groups * group_rows, splits, o_d, D, TILE_ROWS)
        tl.store(Dweight + o_d, dweight.to(Dweight.dtype.element_ty), mask=m)


REGISTERS = 255
"""A lane's registers in a backward: all of them. Without the limit ptxas spills some to fit a third program beside two."""


@functools.cache
def configuration(width):
    """(CHUNK, CHUNKS, TILE_ROWS, num_warps) for rows of this width. A tile is TILE_ROWS rows of four columns a lane."""
    row_warps = 1
    while width > row_warps * 768:
        row_warps *= 2
    warps = max(4, row_warps)
    chunk = min(row_warps * 128, max(4, triton.next_power_of_2(width)))
    return chunk, triton.cdiv(width, chunk), warps * 128 // chunk, warps


@functools.lru_cache(4096)
def plan(batch, length, width, programs):
    """(grid, rows of a program, *configuration) for at most `programs` programs, but at least one a sample."""
    chunk, chunks, tile_rows, warps = configuration(width)
    tiles = triton.cdiv(length, tile_rows)
    rows = triton.cdiv(tiles, max(1, programs // max(batch, 1))) * tile_rows
    return (batch, triton.cdiv(length, max(rows, 1))), rows, chunk, chunks, tile_rows, warps


@functools.lru_cache(256)
def dropout_arguments(dropout):
    """The largest dropped word as a signed 32-bit integer, or None if none is dropped; and 1 / (1 - dropout) in fp32."""
    words = round(dropout * 2**32)
    (kept,) = struct.unpack("f", struct.pack("f", 1.0 - dropout))
    return (((words - 1) ^ 0x80000000) - 0x80000000 if words else None), 1.0 / kept


def row_stride(conditioning):
    """Elements from one sample's row to the next; 0 if one row serves all."""
    return conditioning.stride(0) if conditioning.shape[0] > 1 else 0


def norm_forward(x, shift, scale, weight, eps, y, mean, rstd):
    """Fill y [B, L, D], mean and rstd [B, L, 1] fp32.

    Here and below tensors are contiguous, except that rows of conditioning may be apart.
    """
    batch, length, width = x.shape
    grid, rows, chunk, chunks, tile_rows, warps = plan(batch, length, width, BRIEF)
    if batch and length:
        _norm_forward_kernel[grid](
            y,
            mean,
            rstd,
            x,
            shift,
            scale,
            weight,
            row_stride(shift),
            row_stride(scale),
            length,
            rows,
            eps,
            width,
            chunk,
            chunks,
            tile_rows,
            num_warps=warps,
        )


def as_one_sample(x, conditioning):
    """Batch, length and width to launch for, and whether each row has its own sample id.

    Single tokens [R, 1, D] with one row of conditioning, as in the last block, run as one sample of R rows. A program and a line
    of partial sums for each would be most of the work.
    """
    batch, length, width = x.shape
    if length == 1 and conditioning.shape[0] == 1:
        return 1, batch, width, True
    return batch, length, width, False


def gated_forward(
    residual, branch, gate, shift, scale, weight, dropout, seed, step, sample_ids, stream, eps, total, y, mean, rstd
):
    """Fill total and y [B, L, D], mean and rstd [B, L, 1] fp32. seed, step and sample_ids are None without dropout."""
    batch, length, width, row_ids = as_one_sample(residual, scale)
    grid, rows, chunk, chunks, tile_rows, warps = plan(batch, length, width, BRIEF)
    limit, inverse = dropout_arguments(dropout)
    if limit is None:
        limit, seed, step, sample_ids = 0, None, None, None
    if batch and length:
        _gated_forward_kernel[grid](
            total,
            y,
            mean,
            rstd,
            residual,
            branch,
            gate,
            shift,
            scale,
            weight,
            seed,
            step,
            sample_ids,
            row_stride(gate),
            row_stride(shift),
            row_stride(scale),
            length,
            rows,
            stream,
            limit,
            inverse,
            eps,
            width,
            chunk,
            chunks,
            tile_rows,
            row_ids and seed is not None,
            num_warps=warps,
        )


def norm_backward(dy, x, scale, weight, mean, rstd, dx, dshift, dscale, dweight):
    """Fill dx [B, L, D], dshift and dscale as scale, and dweight [D] if there is a weight."""
    batch, length, width = x.shape
    grid, rows, chunk, chunks, tile_rows, warps = plan(batch, length, width, RESIDENT)
    partials = mean.new_empty((2, grid[0] * grid[1], width))
    if batch and length:
        _norm_backward_kernel[grid](
            dx,
            partials,
            dy,
            x,
            scale,
            weight,
            mean,
            rstd,
            row_stride(scale),
            length,
            rows,
            width,
            chunk,
            chunks,
            tile_rows,
            num_warps=warps,
            maxnreg=REGISTERS,
        )
    sums(partials, grid[1], scale, weight, dshift, dscale, None, dweight)


def gated_backward(
    dtotal,
    dy,
    total,
    branch,
    gate,
    scale,
    weight,
    mean,
    rstd,
    dropout,
    seed,
    step,
    sample_ids,
    stream,
    dresidual,
    dbranch,
    dgate,
    dshift,
    dscale,
    dweight,
):
    """Fill dresidual and dbranch [B, L, D], dgate, dshift and dscale as scale, and dweight [D] if there is a weight.

    One of dtotal and dy may be None, for zeros.
    """
    batch, length, width, row_ids = as_one_sample(total, scale)
    grid, rows, chunk, chunks, tile_rows, warps = plan(batch, length, width, RESIDENT)
    limit, inverse = dropout_arguments(dropout)
    if limit is None:
        limit, seed, step, sample_ids = 0, None, None, None
    partials = mean.new_empty((3, grid[0] * grid[1], width))
    if batch and length:
        _gated_backward_kernel[grid](
            dresidual,
            dbranch,
            partials,
            dtotal,
            dy,
            total,
            branch,
            gate,
            scale,
            weight,
            mean,
            rstd,
            seed,
            step,
            sample_ids,
            row_stride(gate),
            row_stride(scale),
            length,
            rows,
            stream,
            limit,
            inverse,
            width,
            chunk,
            chunks,
            tile_rows,
            row_ids and seed is not None,
            num_warps=warps,
            maxnreg=REGISTERS,
        )
    sums(partials, grid[1], scale, weight, dshift, dscale, dgate, dweight)


SUM_COLUMNS, SUM_ROWS = 32, 128
"""Columns and rows that a program of the second stage reads at a time: 128 bytes of a row, 32 numbers a lane in flight."""


def sums(partials, splits, scale, weight, dshift, dscale, dgate, dweight):
    """Add up partials [2 or 3, B * splits, D] over each sample, or over all if conditioning is one row."""
    k, programs, width = partials.shape
    groups = scale.shape[0]
    wanted = groups * k + (weight is not None and groups != 1)
    if wanted:
        _sums_kernel[(wanted, -(-width // SUM_COLUMNS))](
            dshift,
            dscale,
            dgate,
            dweight,
            partials,
            scale,
            weight,
            row_stride(scale),
            groups,
            programs if groups == 1 else splits,
            splits,
            width,
            k,
            SUM_COLUMNS,
            SUM_ROWS,
            num_warps=4,
        )
