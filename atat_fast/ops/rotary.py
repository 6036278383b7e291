"""rotary: turn queries and keys by their position (Su et al., RoFormer, 2021), halves paired as in GPT-NeoX.

(a, b) = halves of the head dimension;   a' = a cos - b sin,   b' = a sin + b cos.   Values pass through.

With `norm`, QK-norm without weights (Henry et al., Query-Key Normalization for Transformers, 2020, with RMSNorm) comes first, in
the same pass:   x' = R (r x),   r = (mean(x^2) + eps)^(-1/2) over the head dimension, R the rotation above.

The backward rotates by the opposite angle and needs the tables only, so the unrotated tensor is freed at once. With `norm` it
reads the op's own output, which attention keeps anyway, and r, one number a head: with g the upstream gradient and y = r x (the
output turned back),   dx = r (R^T g - y mean(R^T g . y)).   docs/ops/rotary.md says why, and why a recorded call is not in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.registry import Cost, again, backends, choose_backend, dispatch, intercepted, library, register, transformed

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOOP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor, *, norm: bool = False, eps: float | None = None) -> Tensor:
    """The specification, differentiable any number of times."""
    turned, c, s = qkv[:, :, :2], cos[:, None, None], sin[:, None, None]
    if norm:
        turned = turned.to(_wide(qkv.dtype))
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + _checked_eps(norm, eps, qkv.dtype))
    a, b = turned.chunk(2, dim=-1)
    rotated = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((rotated.to(qkv.dtype), qkv[:, :, 2:]), dim=2)


def rotary_table(
    length: int, head_dim: int, *, base: float = 10_000.0, device: torch.device | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 j / head_dim), [length, head_dim / 2] fp32 each, for positions from `first` on."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(first, first + length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm: bool = False,
    eps: float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate the queries and keys of a packed projection.

    qkv: [B, L, 3, H, E] fp32, bf16, fp16 or fp64, E even.   cos, sin: [L, E / 2] fp32 (fp64 for fp64 data).
    norm: scale each query and key to unit root-mean-square over E, without weights, before the rotation. Zeros stay zeros.
          For a gradient, no (cos, sin) may be (0, 0).
    eps: added to that norm's mean square, above 0; by default 2^-23 (2^-52 for fp64 data), which is F.rms_norm's default, for
         bf16 and fp16 too: the machine epsilon of the dtype it computes in, not of the data's. So a model trained with one of
         the two gives the same numbers with the other, up to rounding.
    inplace: write into qkv; only if no gradient is recorded. The caller must not use the unrotated values again.
    backend: "triton", "cpp" or "torch"; None for the fastest that can run. On each, products and sums are fp32 (fp64 for fp64
             data), rounded once.
    Returns the packed tensor. Differentiable in qkv. With norm the backward reads the returned tensor: do not write to it before.
    Raises ValueError when shapes disagree, a table requires a gradient, eps is not above 0 or is given without norm, inplace
    would overwrite values that a gradient needs, or the backend cannot run.
    """
    _check(qkv, cos, sin)
    eps = _checked_eps(norm, eps, qkv.dtype)
    chosen = choose_backend("rotary", qkv.device, backend, _without(qkv.dtype, inplace and not _dense(qkv)))
    if inplace:
        if torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("rotary(inplace=True) would overwrite values that a gradient needs; use it under torch.no_grad()")
        if transformed():
            qkv.copy_(rotary_reference(qkv, cos, sin, norm=norm, eps=eps if norm else None))
        elif norm:
            torch.ops.atat_fast.rotary_normed_(qkv, cos, sin, eps, chosen)
        else:
            torch.ops.atat_fast.rotary_(qkv, cos, sin, False, chosen)
        return qkv
    if norm:
        return _NORMED(qkv, cos, sin, eps, chosen)[0]  # type: ignore[no-any-return]
    return _ROTARY(qkv, cos, sin, False, chosen)  # type: ignore[no-any-return]


def rotary_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, norm: bool = False, eps: float | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary` into three tensors, queries, keys and values [B, L, H, E] each, as attention kernels take them.

    The backward reads their three gradients as they are; autograd would first pack those of a packed tensor's parts, a pass over
    all of it. Arguments and numbers are rotary's. Differentiable in qkv.
    """
    _check(qkv, cos, sin)
    given = _checked_eps(norm, eps, qkv.dtype) if norm or eps is not None else None
    chosen = choose_backend("rotary", qkv.device, backend, _without(qkv.dtype, False))
    if chosen == "cpp":  # its loop writes the packed tensor
        q, k, v = rotary(qkv, cos, sin, norm=norm, eps=given, backend=chosen).unbind(2)
    else:
        q, k, v, _ = _SPLIT(qkv, cos, sin, given, chosen)
    return q, k, v


def splits() -> bool:
    """Whether `rotary_split` may be used: not while torch 2.11 or 2.12 compiles.

    For a debug log line their inductor writes out all inputs that lead to an op, once for each of its arguments. Three gradients
    from one place multiply that by about five a block: for twelve blocks it takes hours. 2.13 writes the line only if it is read.
    """
    return _LAZY_LOG or not (torch.compiler.is_compiling() or intercepted())


_LAZY_LOG = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[-1] % 2:
        raise ValueError(f"qkv must be [batch, length, 3, heads, even head dimension], got shape {tuple(qkv.shape)}")
    table = (qkv.shape[1], qkv.shape[-1] // 2)
    if tuple(cos.shape) != table or tuple(sin.shape) != table:
        raise ValueError(f"cos and sin must have shape {table}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if (cos.requires_grad or sin.requires_grad) and not transformed():
        raise ValueError("cos or sin requires a gradient, but tables get none; pass cos.detach() and sin.detach()")


def _checked_eps(norm: bool, eps: float | None, dtype: torch.dtype) -> float:
    """The checked `eps`, or F.rms_norm's default."""
    limits = torch.finfo(_wide(dtype))
    if eps is None:
        return limits.eps
    if not norm:
        raise ValueError(f"eps {eps} is given without norm; pass norm=True, or leave eps out")
    if not limits.tiny <= eps < float("inf"):
        raise ValueError(f"eps must be a number of at least {limits.tiny}, so that a row of zeros has a norm, got {eps}")
    return eps


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products and sums of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _without(dtype: torch.dtype, strided: bool) -> tuple[tuple[str, str], ...]:
    """Backends that cannot take such a tensor, each with its reason."""
    found = []
    for name, dtypes in (("triton", KERNEL_DTYPES), ("cpp", LOOP_DTYPES)):
        if dtype not in dtypes:
            found.append((name, f"it has no kernel for {dtype}"))
        elif strided:
            found.append((name, "in place it needs qkv dense in its last three dimensions"))
    return tuple(found)


def _dense(qkv: Tensor) -> bool:
    """Whether a row's queries, keys and values lie next to each other."""
    _, _, _, heads, size = qkv.shape
    three, head, one = qkv.stride()[2:]
    return (three, one) == (heads * size, 1) and (heads == 1 or head == size)


def _plain(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    return rotary_reference(qkv, cos, -sin if inverse else sin)


def _normed_plain(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str) -> tuple[Tensor, None]:
    return rotary_reference(qkv, cos, sin, norm=True, eps=eps), None


def _split_plain(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float | None, backend: str) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v = rotary_reference(qkv, cos, sin, norm=eps is not None, eps=eps).unbind(2)
    return q, k, v, None


def _pull(grad: Tensor, drstd: Tensor | None, out: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient with a norm, differentiable in grad, out [B, L, 3, H, E] and rstd; out and rstd stand for the input.

    drstd is rstd's upstream, which exists in a second derivative; dr/dx = -r^2 y / E. See docs/ops/rotary.md.
    """
    wide = _wide(grad.dtype)
    c, s = cos[:, None, None].to(wide), sin[:, None, None].to(wide)
    g, turned, r = grad[:, :, :2].to(wide), out[:, :, :2].to(wide), rstd[..., None]

    def back(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * c + b * s, b * c - a * s), dim=-1)

    y = back(turned / torch.cat((c, c), dim=-1).square().add(torch.cat((s, s), dim=-1).square()))
    dx = r * (back(g) - y * (g * turned).mean(-1, keepdim=True))
    if drstd is not None:
        dx = dx - drstd[..., None] * r.square() * y / y.shape[-1]
    return torch.cat((dx.to(grad.dtype), grad[:, :, 2:]), dim=2)


Rstd = Tensor | None
"""The buffer for the norm's scales [B, L, 2, H], or None."""
Packed = Tensor | tuple[Tensor, ...]
"""[B, L, 3, H, E], or a tuple of queries, keys and, if needed, values [B, L, H, E]."""


def _parts(packed: Packed) -> tuple[Tensor, ...]:
    return packed.unbind(2) if isinstance(packed, Tensor) else packed


def _torch(
    out: Packed, qkv: Packed, cos: Tensor, sin: Tensor, inverse: bool, rstd: Rstd = None, eps: float | None = None
) -> None:
    """The specification, written into out. out may be qkv: both halves are computed before either is written."""
    outs, ins = _parts(out), _parts(qkv)
    half, wide = ins[0].shape[-1] // 2, _wide(ins[0].dtype)
    c, s = cos[:, None], (-sin if inverse else sin)[:, None]
    for i in range(2):
        turned = ins[i]
        if eps is not None:
            turned = turned.to(wide)
            scale = torch.rsqrt(turned.square().mean(-1, keepdim=True) + eps)
            turned = turned * scale
            if rstd is not None:
                rstd[:, :, i] = scale[..., 0]
        a, b = turned[..., :half], turned[..., half:]
        first, second = a * c - b * s, a * s + b * c
        outs[i][..., :half] = first
        outs[i][..., half:] = second
    if out is not qkv:
        outs[2].copy_(ins[2])


def _torch_backward(dqkv: Tensor, grad: Packed, out: Packed, rstd: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The gradient of the specification with a norm, into dqkv; docs/ops/rotary.md has the formula.

    Tables may be rounded or scaled, so R^T R = cos^2 + sin^2 may differ from 1: y is R^T out divided by it. The mean is that of
    grad . out for any tables.
    """
    grads, outs = _parts(grad), _parts(out)
    half, wide = dqkv.shape[-1] // 2, _wide(dqkv.dtype)
    c, s = cos[:, None].to(wide), sin[:, None].to(wide)
    for i in range(2):
        g, turned = grads[i].to(wide), outs[i].to(wide)
        share, scale = (g * turned).mean(-1, keepdim=True) / (c.square() + s.square()), rstd[:, :, i, :, None]
        a, b = (scale * (part - of * share) for part, of in zip(g.split(half, -1), turned.split(half, -1), strict=True))
        dqkv[:, :, i, :, :half] = a * c + b * s
        dqkv[:, :, i, :, half:] = b * c - a * s
    dqkv[:, :, 2] = grads[2]


def _tables(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(qkv.dtype)
    return cos.to(wide).contiguous(), sin.to(wide).contiguous()


def _in_rows(packed: Tensor) -> Tensor:
    """The tensor as kernels read it: each row is contiguous; rows may be apart."""
    return packed if _dense(packed) else packed.contiguous()


def _cpp(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rstd: Rstd = None, eps: float | None = None) -> None:
    """csrc/rotary/cpu.cpp."""
    source, tables = qkv if out is qkv else _in_rows(qkv), _tables(qkv, cos, sin)
    if eps is None:
        torch.ops.atat_fast_c.rotary(out, source, *tables, inverse)
    else:
        torch.ops.atat_fast_c.rotary_normed(out, rstd, source, *tables, eps)


def _cpp_backward(dqkv: Tensor, grad: Tensor, out: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor) -> None:
    tables = _tables(grad, cos, sin)
    torch.ops.atat_fast_c.rotary_normed_backward(dqkv, _in_rows(grad), _in_rows(out), rstd, *tables)


def _alike(packed: Packed) -> Packed:
    """As kernels read it: a row's heads are contiguous, and three tensors have equal strides."""
    if isinstance(packed, Tensor):
        return _in_rows(packed)
    heads, size = packed[0].shape[2:]
    fine = all(t.stride(3) == 1 and (heads == 1 or t.stride(2) == size) and t.stride() == packed[0].stride() for t in packed)
    return packed if fine else tuple(t.contiguous() for t in packed)


def _triton(
    out: Packed, qkv: Packed, cos: Tensor, sin: Tensor, inverse: bool, rstd: Rstd = None, eps: float | None = None
) -> None:
    """kernels/rotary.py."""
    from atat_fast.kernels import rotary as kernel  # triton takes a second to import

    tables = _tables(qkv if isinstance(qkv, Tensor) else qkv[0], cos, sin)
    kernel.rotary(out, qkv if out is qkv else _alike(qkv), *tables, inverse, rstd, eps)


def _triton_backward(dqkv: Tensor, grad: Packed, out: Packed, rstd: Tensor, cos: Tensor, sin: Tensor) -> None:
    from atat_fast.kernels import rotary as kernel

    out = out.contiguous() if isinstance(out, Tensor) else tuple(t.contiguous() for t in out)
    kernel.normed_backward(dqkv, _alike(grad), out, rstd, *_tables(dqkv, cos, sin))


backends("rotary", triton=_triton, cpp=_cpp, torch=_torch)
backends("rotary_normed_backward", triton=_triton_backward, cpp=_cpp_backward, torch=_torch_backward)


_rotate_into = dispatch("rotary")
_normed_backward_into = dispatch("rotary_normed_backward")


def _like(qkv: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    out = _like(qkv)
    _rotate_into(out, qkv, cos, sin, inverse, backend)
    return out


def _rotary_(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> None:
    _rotate_into(qkv, qkv, cos, sin, inverse, backend)


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    return _like(qkv)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    back = _plain if again() else _ROTARY
    return back(grad, cos, sin, not ctx.inverse, ctx.backend), None, None, None, None


def _normed_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, _ = qkv.shape
    return _like(qkv), qkv.new_empty((batch, length, 2, heads), dtype=_wide(qkv.dtype))


def _normed(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    out, rstd = _normed_outputs(qkv)
    _rotate_into(out, qkv, cos, sin, False, rstd, eps, backend)
    return out, rstd


def _normed_(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str) -> None:
    _rotate_into(qkv, qkv, cos, sin, False, None, eps, backend)


def _normed_fake(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _normed_outputs(qkv)


def _normed_backward(grad: Tensor, out: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    dqkv = _like(grad)
    _normed_backward_into(dqkv, grad, out, rstd, cos, sin, backend)
    return dqkv


def _normed_backward_fake(grad: Tensor, out: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    return _like(grad)


def _normed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cos, sin, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, cos, sin)


def _normed_autograd(ctx: Any, grad: Tensor | None, drstd: Tensor | None) -> tuple[Any, ...]:
    out, rstd, cos, sin = ctx.saved_tensors
    if drstd is not None or again():  # only a second derivative has drstd
        if grad is None and drstd is None:
            return (None,) * 5
        return _pull(torch.zeros_like(out) if grad is None else grad, drstd, out, rstd, cos, sin), None, None, None, None
    return None if grad is None else _NORMED_BACKWARD(grad, out, rstd, cos, sin, ctx.backend), None, None, None, None


Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _split_outputs(qkv: Tensor, eps: float | None) -> Split:
    """q, k, v, and the norm's scales, an empty tensor without a norm."""
    batch, length, _, heads, size = qkv.shape
    q, k, v = (qkv.new_empty((batch, length, heads, size)) for _ in range(3))
    return q, k, v, qkv.new_empty((batch, length, 2, heads) if eps is not None else (0,), dtype=_wide(qkv.dtype))


def _split(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float | None, backend: str) -> Split:
    *out, rstd = outputs = _split_outputs(qkv, eps)
    _rotate_into(tuple(out), qkv, cos, sin, False, None if eps is None else rstd, eps, backend)
    return outputs


def _split_fake(qkv: Tensor, cos: Tensor, sin: Tensor, eps: float | None, backend: str) -> Split:
    return _split_outputs(qkv, eps)


def _split_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    rstd: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    backend: str,
) -> Tensor:
    dqkv = _split_backward_fake(dq)
    if q is None or k is None or rstd is None:
        _rotate_into(dqkv, (dq, dk, dv), cos, sin, True, backend)
    else:
        _normed_backward_into(dqkv, (dq, dk, dv), (q, k), rstd, cos, sin, backend)
    return dqkv


def _split_backward_fake(dq: Tensor, *_: Any) -> Tensor:
    batch, length, heads, size = dq.shape
    return dq.new_empty((batch, length, 3, heads, size))


def _split_setup(ctx: Any, inputs: tuple[Any, ...], output: Split) -> None:
    _, cos, sin, eps, ctx.backend = inputs
    q, k, _, rstd = output if eps is not None else (None,) * 4
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, rstd, cos, sin)


def _split_autograd(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *parts, drstd = upstream
    q, k, rstd, cos, sin = ctx.saved_tensors
    like = next((t for t in (*parts, q) if t is not None), None)
    if like is None:
        return (None,) * 5
    grads = [torch.zeros_like(like) if t is None else t for t in parts]
    if drstd is None and not again():
        return _SPLIT_BACKWARD(*grads, q, k, rstd, cos, sin, ctx.backend), None, None, None, None
    packed = torch.stack(grads, dim=2)
    if rstd is None:
        return _plain(packed, cos, sin, True, ctx.backend), None, None, None, None
    return _pull(packed, drstd, torch.stack((q, k), dim=2), rstd, cos, sin), None, None, None, None


_ROTARY = register(
    "rotary(Tensor qkv, Tensor cos, Tensor sin, bool inverse, str backend) -> Tensor",
    _rotary,
    _fake,
    backward=_backward,
    setup=_setup,
    plain=_plain,
)
_NORMED = register(
    "rotary_normed(Tensor qkv, Tensor cos, Tensor sin, float eps, str backend) -> (Tensor out, Tensor rstd)",
    _normed,
    _normed_fake,
    backward=_normed_autograd,
    setup=_normed_setup,
    plain=_normed_plain,
)
_NORMED_BACKWARD = register(
    "rotary_normed_backward(Tensor grad, Tensor out, Tensor rstd, Tensor cos, Tensor sin, str backend) -> Tensor",
    _normed_backward,
    _normed_backward_fake,
)
_SPLIT = register(
    "rotary_split(Tensor qkv, Tensor cos, Tensor sin, float? eps, str backend) -> (Tensor q, Tensor k, Tensor v, Tensor rstd)",
    _split,
    _split_fake,
    backward=_split_autograd,
    setup=_split_setup,
    plain=_split_plain,
)
_SPLIT_BACKWARD = register(
    "rotary_split_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? q, Tensor? k, Tensor? rstd, Tensor cos, Tensor sin, "
    "str backend) -> Tensor",
    _split_backward,
    _split_backward_fake,
)
for _schema, _write in (
    ("rotary_(Tensor(a!) qkv, Tensor cos, Tensor sin, bool inverse, str backend) -> ()", _rotary_),
    ("rotary_normed_(Tensor(a!) qkv, Tensor cos, Tensor sin, float eps, str backend) -> ()", _normed_),
):
    _name = _schema.split("(", 1)[0]
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _write, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atat_fast::{_name}", lambda *arguments: None, lib=library)


def rotary_cost(
    rows: int,
    heads: int,
    head_dim: int,
    *,
    element_size: int = 2,
    inplace: bool = True,
    norm: bool = False,
    backward: bool = False,
) -> Cost:
    """Queries and keys are read and written once, and out of place the values too. Three operations an element of q and k.

    norm: three more for the mean square and the scale; out of place, four bytes a query and key for its scale. Its backward
          takes eight operations, and reads the scales and the rotated queries and keys again.
    """
    elements = rows * heads * head_dim
    moved, operations, kept = 2 * (2 if inplace else 3), 3, 0
    if norm:
        moved, operations = moved + 2 * backward, 8 if backward else 6
        kept = 0 if inplace and not backward else 2 * rows * heads * 4
    return Cost(flops=operations * 2 * elements, bytes=moved * elements * element_size + kept)
