"""Attention whose backward is batched matrix products: fastest for training short sequences on a CPU in bf16.

PyTorch's CPU backward works on tiles, whose products are too small to gain from bf16 instructions. Sequences of a few hundred
tokens need no tiles: their scores fit into a core's cache. So this is the textbook backward, a few sequences at a time:

    dP = dO V^T,   dV = P^T dO,   dS = P * (dP - sum(P * dP)),   dQ = dS K / sqrt(E),   dK = dS^T Q / sqrt(E)

Only the packed projection is kept for it; P is computed again. Scores, P and dS are fp32, rounded once, for the next product.
The forward is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.processor import widens_bf16
from atat_fast.ops.registry import again, pull, register

LONGEST = 256
"""Longest sequence, in tokens, for which this was faster than PyTorch's backward (docs/notes/cpu.md)."""
SCORES = 2**19
"""Most scores held at a time (2 MiB of fp32), but at least one head's."""


def _forward(qkv: Tensor, documents: Tensor | None) -> Tensor:
    if widens_bf16(qkv):
        with torch.autocast("cpu", enabled=False):
            return _forward(qkv.float(), documents).to(qkv.dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=documents).transpose(1, 2).flatten(2)


def _backward(grad: Tensor, qkv: Tensor, documents: Tensor | None) -> Tensor:
    """The gradient of qkv [B, L, 3, H, E], from that of the output [B, L, H * E]."""
    if widens_bf16(qkv):
        with torch.autocast("cpu", enabled=False):
            return _backward(grad.float(), qkv.float(), documents).to(qkv.dtype)
    batch, length, _, heads, size = qkv.shape
    wide, scale = torch.promote_types(qkv.dtype, torch.float32), size**-0.5
    packed = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, size)
    upstream = grad.view(batch, length, heads, size).transpose(1, 2).reshape(batch * heads, length, size)
    found = torch.empty_like(packed)
    step = max(1, SCORES // length**2)
    for i in range(0, batch * heads, step):
        (q, k, v), (dq, dk, dv) = packed[:, i : i + step], found[:, i : i + step]
        given = upstream[i : i + step]
        scores = torch.bmm(q.to(wide) * scale, k.to(wide).transpose(1, 2))
        if documents is not None:
            sequences = torch.arange(i, i + len(q), device=q.device) // heads
            scores.masked_fill_(~documents[sequences, 0], -torch.inf)
        p = torch.softmax(scores, dim=-1)
        ds = torch._softmax_backward_data(torch.bmm(given, v.transpose(1, 2)).to(wide), p, -1, wide).mul_(scale).to(q.dtype)
        torch.bmm(p.to(q.dtype).transpose(1, 2), given, out=dv)
        torch.bmm(ds, k, out=dq)
        torch.bmm(ds.transpose(1, 2), q, out=dk)
    return found.view(3, batch, heads, length, size).permute(1, 3, 0, 2, 4).contiguous()


def written_out(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attention in PyTorch's own steps, differentiable in every mode: [B, L, H, E] each to [B, L, H * E]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (part.to(wide).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if documents is None else scores.masked_fill(~documents, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def _plain(qkv: Tensor, documents: Tensor | None) -> Tensor:
    q, k, v = qkv.unbind(2)
    return written_out(q, k, v, documents).to(qkv.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, documents = inputs
    ctx.save_for_backward(qkv, *(() if documents is None else (documents,)))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    qkv, *documents = ctx.saved_tensors
    documents = documents or [None]
    if again():
        return pull(lambda qkv: _plain(qkv, *documents), (qkv,), grad)[0], None
    return backward(grad.contiguous(), qkv, *documents), None


def _fake(qkv: Tensor, documents: Tensor | None) -> Tensor:
    batch, length, _, heads, size = qkv.shape
    return qkv.new_empty(batch, length, heads * size)


backward = register(
    "attention_products_backward(Tensor grad, Tensor qkv, Tensor? documents) -> Tensor",
    _backward,
    lambda grad, qkv, documents: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)
attend = register(
    "attention_products(Tensor qkv, Tensor? documents) -> Tensor", _forward, _fake, backward=_gradient, setup=_setup, plain=_plain
)
"""From qkv [B, L, 3, H, E], and bool [B, 1, L, L], true where a position may look, or None, to [B, L, H * E]."""
