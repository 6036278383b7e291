"""attention and adaptive_attention: bidirectional attention from a packed projection, and the whole branch around it.

No attention kernel is written here: the fastest library present is called. Today that is PyTorch's own
scaled_dot_product_attention, which itself picks cuDNN, flash or the CPU's blocked kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.adaptive_norm import EPS, adaptive_layer_norm
from atat_fast.ops.registry import Cost, backends, choose_backend, register_composite
from atat_fast.ops.rotary import rotary


def attention(qkv: Tensor, *, backend: str | None = None) -> Tensor:
    """Softmax attention of every position over every position, scale 1 / sqrt(E).

    qkv: [B, L, 3, H, E].   Returns [B, L, H * E] in qkv's dtype.   Differentiable.
    """
    choose_backend("attention", qkv.device, backend)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [batch, length, 3, heads, head dimension], got shape {tuple(qkv.shape)}")
    return torch.ops.atat_fast.attention(qkv)  # type: ignore[no-any-return]


def attention_reference(qkv: Tensor) -> Tensor:
    """The specification: softmax(q k^T / sqrt(E)) v, written out."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    shares = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def self_attention(
    x: Tensor, qkv_weight: Tensor, out_weight: Tensor, cos: Tensor, sin: Tensor, *, heads: int, qk_norm: bool = False
) -> Tensor:
    """qkv projection, rotation, attention and output projection of an already normalised x: [B, L, D] to [B, L, D].

    qkv_weight: [3 * D, D], packed (three, heads, head dimension).   out_weight: [D, D].   cos, sin: [L, D / heads / 2].
    qk_norm: queries and keys are scaled to unit root-mean-square, without weights, before the rotation.
    """
    width = x.shape[-1]
    if heads < 1 or width % heads or width // heads % 2:
        raise ValueError(f"width {width} does not divide into {heads} heads of an even size")
    if tuple(qkv_weight.shape) != (3 * width, width) or tuple(out_weight.shape) != (width, width):
        raise ValueError(
            f"qkv_weight must be {(3 * width, width)} and out_weight {(width, width)}, "
            f"got {tuple(qkv_weight.shape)} and {tuple(out_weight.shape)}"
        )
    return torch.ops.atat_fast.self_attention(x, qkv_weight, out_weight, cos, sin, heads, qk_norm)  # type: ignore[no-any-return]


def adaptive_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    qk_norm: bool = False,
    eps: float = EPS,
) -> Tensor:
    """A DiT block's attention branch in one call: norm, modulate, project, rotate, attend, project. [B, L, D] to [B, L, D].

    Arguments are those of `adaptive_layer_norm` and `self_attention`. The gate and the residual sum are left to
    `gated_residual_norm`, which joins them to the norm that follows.
    """
    normed = adaptive_layer_norm(x, shift, scale, norm_weight, eps=eps)
    return self_attention(normed, qkv_weight, out_weight, cos, sin, heads=heads, qk_norm=qk_norm)


def _attention(qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _self_attention(
    x: Tensor, qkv_weight: Tensor, out_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, qk_norm: bool
) -> Tensor:
    batch, length, width = x.shape
    qkv = F.linear(x, qkv_weight).view(batch, length, 3, heads, width // heads)
    if qk_norm:
        queries_keys, values = qkv.split((2, 1), dim=2)
        qkv = torch.cat((F.rms_norm(queries_keys, (width // heads,)).to(values.dtype), values), dim=2)
    return F.linear(attention(rotary(qkv, cos, sin)), out_weight)


backends("attention", torch=_attention)
register_composite("attention(Tensor qkv) -> Tensor", _attention)
register_composite(
    "self_attention(Tensor x, Tensor qkv_weight, Tensor out_weight, Tensor cos, Tensor sin, int heads, bool qk_norm) -> Tensor",
    _self_attention,
)


def attention_cost(batch: int, length: int, width: int, *, element_size: int = 2, backward: bool = False) -> Cost:
    """Two products of L x L x D a sequence forward, five backward; tensors of [B, L, D] read and written once."""
    products, tensors = (5, 8) if backward else (2, 4)
    return Cost(flops=2 * products * batch * length * length * width, bytes=tensors * batch * length * width * element_size)
