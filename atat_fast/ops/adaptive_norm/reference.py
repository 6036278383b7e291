"""The specification of the norm chains, and the dropout mask that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.ops.philox import STREAM_DROPOUT, random_words

EPS = 1e-5


def adaptive_layer_norm_reference(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """The specification, differentiable any number of times."""
    mean = x.mean(-1, keepdim=True)
    normed = (x - mean) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)
    return normed * (1 if weight is None else weight) * (1 + scale[:, None]) + shift[:, None]


def gated_residual_norm_reference(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    keep: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The specification; keep [B, L, D] holds 0 or 1 / (1 - dropout) for each element."""
    residual = residual + gate[:, None] * (branch if keep is None else branch * keep)
    return residual, adaptive_layer_norm_reference(residual, shift, scale, weight, eps)


def dropout_scale(shape: torch.Size, dropout: float, seed: Tensor, step: Tensor, sample_ids: Tensor, layer: int) -> Tensor:
    """[B, L, D] fp32: 0 where an element is dropped, 1 / (1 - dropout) elsewhere.

    Four neighbouring elements share one Philox counter: its index is (sample * L + position) * ceil(D / 4) + element // 4.
    """
    batch, length, width = shape
    groups = -(-width // 4)
    position = torch.arange(length, device=sample_ids.device)
    index = (sample_ids[:, None] * length + position)[..., None] * groups + torch.arange(groups, device=sample_ids.device)
    words = torch.stack(random_words(index, seed, step, STREAM_DROPOUT + (layer << 8)), dim=-1)
    kept = words.view(batch, length, groups * 4)[..., :width] >= round(dropout * 2**32)
    return kept.to(torch.float32) / (1.0 - dropout)
