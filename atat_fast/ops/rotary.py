"""rotary: turn queries and keys by their position (Su et al., RoFormer, 2021), halves paired as in GPT-NeoX.

(a, b) = halves of the head dimension;   a' = a cos - b sin,   b' = a sin + b cos.   Values pass through.

Where a gradient is recorded the result is a new tensor, although a projection's output is needed by nobody else: torch.library
offers no gradient to an op that writes into its argument, and an autograd.Function that marks it dirty rebases the history of the
view it is given (the packed projection is one), whose backward then copies the whole gradient. So the rotation copies the values
in the same launch: half as many bytes again as in place, one kernel, and the unrotated tensor is freed at once because the
backward, the rotation by the opposite angle, needs only the tables. Without gradients `self_attention` rotates in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.registry import Cost, backends, choose_backend, dispatch, library, register

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOOP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False, backend: str | None = None) -> Tensor:
    """Rotate the queries and keys of a packed projection.

    qkv: [B, L, 3, H, E] fp32, bf16, fp16 or fp64, E even.   cos, sin: [L, E / 2] fp32 (fp64 for fp64 data).
    inplace: write into qkv, where no gradient is being recorded; the caller then must not use the unrotated values again.
    backend: "triton", "cpp" or "torch"; the fastest that can run where the caller does not say. Products and sums are fp32
             (fp64 for fp64 data) and rounded once on each of them.
    Returns the packed tensor. Differentiable in qkv (the backward is the rotation by the opposite angle).
    Raises ValueError when shapes disagree, a gradient needs what would be overwritten, or the backend cannot run.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[-1] % 2:
        raise ValueError(f"qkv must be [batch, length, 3, heads, even head dimension], got shape {tuple(qkv.shape)}")
    table = (qkv.shape[1], qkv.shape[-1] // 2)
    if tuple(cos.shape) != table or tuple(sin.shape) != table:
        raise ValueError(f"cos and sin must have shape {table}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    chosen = choose_backend("rotary", qkv.device, backend, _without(qkv.dtype, inplace and not _dense(qkv)))
    if inplace:
        if torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("rotary(inplace=True) would overwrite values that a gradient needs; use it under torch.no_grad()")
        torch.ops.atat_fast.rotary_(qkv, cos, sin, False, chosen)
        return qkv
    return torch.ops.atat_fast.rotary(qkv, cos, sin, False, chosen)  # type: ignore[no-any-return]


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
    return qkv.stride()[2:] == (heads * size, size, 1)


def rotary_table(
    length: int, head_dim: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2 j / head_dim), [length, head_dim / 2] fp32 each."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification, differentiable as often as wanted."""
    (a, b), c, s = qkv[:, :, :2].chunk(2, dim=-1), cos[:, None, None], sin[:, None, None]
    rotated = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((rotated.to(qkv.dtype), qkv[:, :, 2:]), dim=2)


def _torch(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """The specification's sums, written into out, which may be qkv itself: both are made before either half is written."""
    half = qkv.shape[-1] // 2
    c, s = cos[:, None, None], (-sin if inverse else sin)[:, None, None]
    a, b = qkv[:, :, :2, :, :half], qkv[:, :, :2, :, half:]
    first, second = a * c - b * s, a * s + b * c
    out[:, :, :2, :, :half] = first
    out[:, :, :2, :, half:] = second
    if out is not qkv:
        out[:, :, 2] = qkv[:, :, 2]


def _tables(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    return cos.to(wide).contiguous(), sin.to(wide).contiguous()


def _cpp(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """csrc/rotary.cpp."""
    source = qkv if out is qkv or _dense(qkv) else qkv.contiguous()
    torch.ops.atat_fast_c.rotary(out, source, *_tables(qkv, cos, sin), inverse)


def _triton(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """kernels/rotary.py."""
    from atat_fast.kernels import rotary as kernel  # triton takes a second to import

    source = qkv if out is qkv or _dense(qkv) else qkv.contiguous()
    kernel.rotary(out, source, *_tables(qkv, cos, sin), inverse)


_rotate_into = dispatch("rotary")


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _rotate_into(out, qkv, cos, sin, inverse, backend)
    return out


def _rotary_(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> None:
    _rotate_into(qkv, qkv, cos, sin, inverse, backend)


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return torch.ops.atat_fast.rotary(grad, cos, sin, not ctx.inverse, ctx.backend), None, None, None, None


backends("rotary", triton=_triton, cpp=_cpp, torch=_torch)
register(
    "rotary(Tensor qkv, Tensor cos, Tensor sin, bool inverse, str backend) -> Tensor",
    _rotary,
    _fake,
    backward=_backward,
    setup=_setup,
)
library.define(
    "rotary_(Tensor(a!) qkv, Tensor cos, Tensor sin, bool inverse, str backend) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)
library.impl("rotary_", _rotary_, "CompositeExplicitAutograd")
torch.library.register_fake("atat_fast::rotary_", lambda qkv, cos, sin, inverse, backend: None, lib=library)


def rotary_cost(rows: int, heads: int, head_dim: int, *, element_size: int = 2, inplace: bool = True) -> Cost:
    """Queries and keys are read and written once, and out of place the values too. Three operations an element turned."""
    elements = rows * heads * head_dim
    return Cost(flops=3 * 2 * elements, bytes=2 * (2 if inplace else 3) * elements * element_size)
