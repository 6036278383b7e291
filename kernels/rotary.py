"""rotary: turn queries and keys of a projection by their position, in place, into a copy or into three tensors. One launch.

Bound by memory: in place, queries and keys are read and written once; out of place the values are copied in the same launch.
One program owns a few heads of BLOCK_R rows: the query, the key and, out of place, the value of each. They share one load of the
tables, whose fp32 words would otherwise be half as many bytes as the data. A row's halves are next to each other, so both are
read with 16-byte accesses if half a head is 16 bytes or more, and together they fill whole cache lines. Both are loaded before
either is stored, so the output may be the input. The backward is the same kernel with INVERSE. Queries, keys and values have
their own pointers: a packed tensor is passed as three views, and three tensors need no packing.

With NORM each query and key is scaled to unit root-mean-square before it is turned. The mean square is a sum over a few threads
of one warp. The only extra traffic is its reciprocal root, 4 bytes, which the backward reads.
"""

import triton
import triton.language as tl


@triton.jit
def places(rows, L, HALF: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's rows and elements of half a head, their masks, and each row's sequence and position."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_r = o_r < rows
    m = m_r
    if BLOCK_E != HALF:
        m = m & (o_e < HALF)
    b = o_r // L
    return o_r, o_e, m_r, m, b, o_r - b * L


@triton.jit
def turn(Out, In, Rstd, out, at, rstd, cos, sin, o_e, m, m_r, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """Rotate the halves at In + at by the angle of (cos, sin) into Out + out; if NORM, scale them first."""
    a = tl.load(In + at + o_e, mask=m, other=0.0)
    b = tl.load(In + at + HALF + o_e, mask=m, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1, keep_dims=True) / (2 * HALF) + eps)
        if Rstd is not None:
            tl.store(Rstd + rstd, scale, mask=m_r)
        x, y = x * scale, y * scale
    tl.store(Out + out + o_e, (x * cos - y * sin).to(a.dtype), mask=m)
    tl.store(Out + out + HALF + o_e, (x * sin + y * cos).to(a.dtype), mask=m)


@triton.jit
def _rotary_kernel(
    OutQ,
    OutK,
    OutV,
    InQ,
    InK,
    InV,
    Rstd,
    Cos,
    Sin,
    rows,
    L,
    H,
    in_batch,
    in_row,
    out_batch,
    out_row,
    eps,
    INVERSE: tl.constexpr,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    o_r, o_e, m_r, m, b, position = places(rows, L, HALF, BLOCK_E, BLOCK_R)
    table = position * HALF + o_e
    cos = tl.load(Cos + table, mask=m, other=0.0)
    sin = tl.load(Sin + table, mask=m, other=0.0)
    if INVERSE:
        sin = -sin
    source = b.to(tl.int64) * in_batch + position.to(tl.int64) * in_row
    target = b.to(tl.int64) * out_batch + position.to(tl.int64) * out_row
    rstd = o_r.to(tl.int64) * 2 * H
    first = tl.program_id(1) * HEADS
    for i in tl.static_range(HEADS):
        head = first + i
        out, at = target + head * 2 * HALF, source + head * 2 * HALF
        turn(OutQ, InQ, Rstd, out, at, rstd + head, cos, sin, o_e, m, m_r, eps, NORM, HALF)
        turn(OutK, InK, Rstd, out, at, rstd + H + head, cos, sin, o_e, m, m_r, eps, NORM, HALF)
        if COPY:
            tl.store(OutV + out + o_e, tl.load(InV + at + o_e, mask=m), mask=m)
            tl.store(OutV + out + HALF + o_e, tl.load(InV + at + HALF + o_e, mask=m), mask=m)


@triton.jit
def turn_back(Dx, Grad, Out, Rstd, dx, grad, out, rstd, cos, sin, inverse, o_e, m, m_r, HALF: tl.constexpr):
    """The gradient of `turn` with NORM into Dx + dx, from its output at Out + out and the upstream gradient at Grad + grad.

    dx = r (R^T g - y <g . out>) with y = R^T out / (cos^2 + sin^2) and <> the mean over a head: see docs/ops/rotary.md. Masked
    elements are 0 in g and in out.
    """
    ga = tl.load(Grad + grad + o_e, mask=m, other=0.0)
    gb = tl.load(Grad + grad + HALF + o_e, mask=m, other=0.0)
    a = tl.load(Out + out + o_e, mask=m, other=0.0).to(tl.float32)
    b = tl.load(Out + out + HALF + o_e, mask=m, other=0.0).to(tl.float32)
    r = tl.load(Rstd + rstd, mask=m_r, other=0.0)
    x, y = ga.to(tl.float32), gb.to(tl.float32)
    share = tl.sum(x * a + y * b, 1, keep_dims=True) / (2 * HALF) * inverse
    x, y = (x - a * share) * r, (y - b * share) * r
    tl.store(Dx + dx + o_e, (x * cos + y * sin).to(ga.dtype), mask=m)
    tl.store(Dx + dx + HALF + o_e, (y * cos - x * sin).to(ga.dtype), mask=m)


@triton.jit
def _rotary_backward_kernel(
    DxQ,
    DxK,
    DxV,
    GradQ,
    GradK,
    GradV,
    OutQ,
    OutK,
    Rstd,
    Cos,
    Sin,
    rows,
    L,
    H,
    grad_batch,
    grad_row,
    out_row,
    HALF: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    o_r, o_e, m_r, m, b, position = places(rows, L, HALF, BLOCK_E, BLOCK_R)
    table = position * HALF + o_e
    cos = tl.load(Cos + table, mask=m, other=1.0)
    sin = tl.load(Sin + table, mask=m, other=0.0)
    inverse = 1.0 / (cos * cos + sin * sin)
    grad = b.to(tl.int64) * grad_batch + position.to(tl.int64) * grad_row
    dx = o_r.to(tl.int64) * (6 * HALF) * H
    out = o_r.to(tl.int64) * out_row
    rstd = o_r.to(tl.int64) * 2 * H
    first = tl.program_id(1) * HEADS
    for i in tl.static_range(HEADS):
        head = first + i
        o = head * 2 * HALF
        turn_back(DxQ, GradQ, OutQ, Rstd, dx + o, grad + o, out + o, rstd + head, cos, sin, inverse, o_e, m, m_r, HALF)
        turn_back(DxK, GradK, OutK, Rstd, dx + o, grad + o, out + o, rstd + H + head, cos, sin, inverse, o_e, m, m_r, HALF)
        tl.store(DxV + dx + o + o_e, tl.load(GradV + grad + o + o_e, mask=m), mask=m)
        tl.store(DxV + dx + o + HALF + o_e, tl.load(GradV + grad + o + HALF + o_e, mask=m), mask=m)


def parts(tensor):
    """Queries, keys and values [B, L, H, E]: views of a packed tensor [B, L, 3, H, E], or the given tensors."""
    return tensor.unbind(2) if hasattr(tensor, "unbind") else tensor


IN_PLACE = {"maxnreg": 64}
"""Without the limit ptxas spills some of fp32's 64 registers to fit one more program."""


def rotary(out, qkv, cos, sin, inverse, rstd=None, eps=None):
    """Rotate qkv into out, which may be qkv itself; if not, values are copied too.

    Each is packed, [B, L, 3, H, E], or three tensors [B, L, H, E] of equal strides; a row's heads are dense.
    cos, sin: [L, E / 2] fp32, contiguous.
    eps: if given, queries and keys are scaled to unit root-mean-square first. rstd: None, or [B, L, 2, H] fp32, contiguous, a
         buffer for the scales.
    """
    outs, ins = parts(out), parts(qkv)
    batch, length, heads, size = ins[0].shape
    rows = batch * length
    if rows == 0 or heads == 0:
        return
    sizes = configuration(heads, size)
    grid = (triton.cdiv(rows, sizes["BLOCK_R"]), heads // sizes["HEADS"])
    _rotary_kernel[grid](
        *outs,
        *ins,
        rstd,
        cos,
        sin,
        rows,
        length,
        heads,
        *ins[0].stride()[:2],
        *outs[0].stride()[:2],
        eps,
        INVERSE=inverse,
        NORM=eps is not None,
        COPY=out is not qkv,
        HALF=size // 2,
        **sizes,
        **(IN_PLACE if out is qkv else {}),
    )


def normed_backward(dqkv, grad, out, rstd, cos, sin):
    """The gradient of `rotary` with eps, into dqkv, from its output, its rstd and the upstream gradient.

    dqkv [B, L, 3, H, E] is contiguous. out's queries and keys have equal strides, and its values are not read. grad is as qkv in
    `rotary`.
    """
    grads, outs = parts(grad), parts(out)
    batch, length, heads, size = grads[0].shape
    rows = batch * length
    if rows == 0 or heads == 0:
        return
    sizes = configuration(heads, size)
    grid = (triton.cdiv(rows, sizes["BLOCK_R"]), heads // sizes["HEADS"])
    _rotary_backward_kernel[grid](
        *parts(dqkv),
        *grads,
        *outs[:2],
        rstd,
        cos,
        sin,
        rows,
        length,
        heads,
        *grads[0].stride()[:2],
        outs[0].stride(1),
        HALF=size // 2,
        **sizes,
    )


def configuration(heads, size):
    """The compile-time sizes: four warps load 1,024 elements at a time, 16 bytes of bf16 a thread, and up to four heads share
    the tables. A head's loads wait for the stores of the head before, which may be to the same place. At 48 registers, ten
    programs on a multiprocessor keep 40 kB in flight, twice what the memory's latency needs; with a norm it is nine at 56
    registers, and in its backward six at 80, with twice as many loads each.
    """
    block = triton.next_power_of_2(size // 2)
    shared = next(n for n in (4, 2, 1) if heads % n == 0)
    return {"BLOCK_E": block, "BLOCK_R": max(1, 1024 // block), "HEADS": shared, "num_warps": 4}
