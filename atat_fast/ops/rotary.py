"""rotary: turn queries and keys by their position (Su et al., RoFormer, 2021), halves paired as in GPT-NeoX.

(a, b) = halves of the head dimension;   a' = a cos - b sin,   b' = a sin + b cos.   Values pass through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.registry import Cost, backends, choose_backend, register


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, inplace: bool = False, backend: str | None = None) -> Tensor:
    """Rotate the queries and keys of a packed projection.

    qkv: [B, L, 3, H, E] fp32, bf16 or fp64, E even.   cos, sin: [L, E / 2], computed in qkv's dtype or wider.
    inplace: write into qkv, where no gradient is being recorded; the caller then must not use the unrotated values again.
    Returns the packed tensor. Differentiable in qkv (the backward is the rotation by the opposite angle).
    Raises ValueError when shapes disagree.
    """
    choose_backend("rotary", qkv.device, backend)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[-1] % 2:
        raise ValueError(f"qkv must be [batch, length, 3, heads, even head dimension], got shape {tuple(qkv.shape)}")
    table = (qkv.shape[1], qkv.shape[-1] // 2)
    if tuple(cos.shape) != table or tuple(sin.shape) != table:
        raise ValueError(f"cos and sin must have shape {table}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if inplace:
        if torch.is_grad_enabled() and qkv.requires_grad:
            raise ValueError("rotary(inplace=True) would overwrite values that a gradient needs; use it under torch.no_grad()")
        _rotate_into(qkv, qkv, cos, sin)
        return qkv
    return torch.ops.atat_fast.rotary(qkv, cos, sin, False)  # type: ignore[no-any-return]


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


def _rotate_into(out: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """out may be qkv itself: both products are made before either half is written."""
    half = qkv.shape[-1] // 2
    c, s = cos[:, None, None], sin[:, None, None]
    a, b = qkv[:, :, :2, :, :half], qkv[:, :, :2, :, half:]
    first, second = a * c - b * s, a * s + b * c
    out[:, :, :2, :, :half] = first
    out[:, :, :2, :, half:] = second


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    out[:, :, 2] = qkv[:, :, 2]
    _rotate_into(out, qkv, cos, -sin if inverse else sin)
    return out


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return torch.ops.atat_fast.rotary(grad, cos, sin, not ctx.inverse), None, None, None


backends("rotary", torch=_rotary)
register("rotary(Tensor qkv, Tensor cos, Tensor sin, bool inverse) -> Tensor", _rotary, _fake, backward=_backward, setup=_setup)


def rotary_cost(rows: int, heads: int, head_dim: int, *, element_size: int = 2) -> Cost:
    """In place: queries and keys are read and written once."""
    elements = 2 * rows * heads * head_dim
    return Cost(flops=3 * elements, bytes=2 * elements * element_size)
