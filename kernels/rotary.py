"""rotary: turn queries and keys of a packed projection by their position, in place or into a copy. One launch.

Bound by memory: in place, queries and keys are read and written once; out of place the values are copied in the same launch.
One program owns a few heads of BLOCK_R rows: of each its query, its key and, out of place, its value. They share one load of
the tables, whose fp32 words would otherwise be half as many bytes as the data. A row's halves are next to each other, so both
are read with 16-byte accesses wherever half a head is 16 bytes or more, and the two together fill whole cache lines. Both are
loaded before either is stored, which is what lets Out be the input itself. The backward is the same kernel with INVERSE.
"""

import triton
import triton.language as tl


@triton.jit
def turn(Out, In, out, at, cos, sin, o_e, m, HALF: tl.constexpr):
    """Rotate the halves at In + at by the angle of (cos, sin) into Out + out."""
    a = tl.load(In + at + o_e, mask=m, other=0.0)
    b = tl.load(In + at + HALF + o_e, mask=m, other=0.0)
    first = a.to(tl.float32) * cos - b.to(tl.float32) * sin
    second = a.to(tl.float32) * sin + b.to(tl.float32) * cos
    tl.store(Out + out + o_e, first.to(a.dtype), mask=m)
    tl.store(Out + out + HALF + o_e, second.to(a.dtype), mask=m)


@triton.jit
def _rotary_kernel(
    Out, In, Cos, Sin, rows, L, H, in_batch, in_row, out_batch, out_row,
    INVERSE: tl.constexpr, COPY: tl.constexpr, HALF: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m = o_r < rows
    if BLOCK_E != HALF:
        m = m & (o_e < HALF)
    b = o_r // L
    position = o_r - b * L
    table = position * HALF + o_e
    cos = tl.load(Cos + table, mask=m, other=0.0)
    sin = tl.load(Sin + table, mask=m, other=0.0)
    if INVERSE:
        sin = -sin
    source = b.to(tl.int64) * in_batch + position.to(tl.int64) * in_row
    target = b.to(tl.int64) * out_batch + position.to(tl.int64) * out_row
    first = tl.program_id(1) * HEADS
    for i in tl.static_range(HEADS):
        query = (first + i) * 2 * HALF
        key = query + H * 2 * HALF
        turn(Out, In, target + query, source + query, cos, sin, o_e, m, HALF)
        turn(Out, In, target + key, source + key, cos, sin, o_e, m, HALF)
        if COPY:
            value = key + H * 2 * HALF
            tl.store(Out + target + value + o_e, tl.load(In + source + value + o_e, mask=m), mask=m)
            tl.store(Out + target + value + HALF + o_e, tl.load(In + source + value + HALF + o_e, mask=m), mask=m)


def rotary(out, qkv, cos, sin, inverse):
    """Rotate qkv [B, L, 3, H, E] into out, which may be qkv itself; otherwise values are copied too.

    Both are dense in their last three dimensions. cos, sin: [L, E / 2] fp32, contiguous.
    """
    batch, length, _, heads, size = qkv.shape
    rows = batch * length
    if rows == 0 or heads == 0:
        return
    sizes = configuration(heads, size)
    grid = (triton.cdiv(rows, sizes["BLOCK_R"]), heads // sizes["HEADS"])
    _rotary_kernel[grid](
        out, qkv, cos, sin, rows, length, heads, qkv.stride(0), qkv.stride(1), out.stride(0), out.stride(1),
        INVERSE=inverse, COPY=out is not qkv, HALF=size // 2, **sizes,
    )  # fmt: skip


def configuration(heads, size):
    """The compile-time sizes: a load of half a head by four warps is 1,024 elements, 16 bytes of bf16 a thread, and up to four
    heads share the tables. Loads of one head wait for the stores of the one before, which may be to the same place; at the 48
    registers this takes, ten programs on a multiprocessor keep 40 kB in flight, twice what the memory's latency asks for.
    """
    block = triton.next_power_of_2(size // 2)
    shared = next(n for n in (4, 2, 1) if heads % n == 0)
    return {"BLOCK_E": block, "BLOCK_R": max(1, 1024 // block), "HEADS": shared, "num_warps": 4}
