"""adaptive_layer_norm and gated_residual_norm: the memory-bound chain between the matrix products of a DiT block.

    adaptive_layer_norm:   y = LN(x) * weight * (1 + scale) + shift
    gated_residual_norm:   r = residual + gate * dropout(branch),   y = LN(r) * weight * (1 + scale) + shift

Conditioning (shift, scale, gate) is [B, D], one row a sample, or [1, D] if the model is not told the time. With one row,
modulation is free: it is a LayerNorm with weight * (1 + scale) as its weight and shift as its bias.
Statistics are fp32 (fp64 for fp64 inputs) in every dtype of the stream. A backward runs on the backend of its forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.ops.adaptive_norm.gated import GATED
from atat_fast.ops.adaptive_norm.norm import NORM
from atat_fast.ops.adaptive_norm.reference import EPS
from atat_fast.ops.registry import as_ids, autocast_dtype, choose_backend, scalar

WIDEST = 4096
"""Most columns the Triton kernels take: they hold a row in registers."""


def adaptive_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None = None, *, eps: float = EPS, backend: str | None = None
) -> Tensor:
    """LayerNorm without bias over the last dimension, then modulation.

    x: [B, L, D] fp32, bf16 or fp64.   shift, scale: [B, D] or [1, D].   weight: [D] or None for ones.
    backend: "triton", "cpp" or "torch"; None for the fastest that can run. The kernels take fp32 and bf16, and on a GPU D up to
             4,096; other tensors run on PyTorch.
    Returns [B, L, D], in autocast's dtype if autocast is on, else in x's. Differentiable in every tensor.
    Raises ValueError when shapes or devices disagree, for fp16, or for a backend that cannot run.
    """
    out_dtype = autocast_dtype(x)
    without = _check(x, (("x", x), ("shift", shift), ("scale", scale), ("weight", weight)), 1, out_dtype)
    chosen = choose_backend("adaptive_layer_norm", x.device, backend, without)
    return NORM(x, shift, scale, weight, eps, out_dtype, chosen)[0]  # type: ignore[no-any-return]


def gated_residual_norm(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    layer: int = 0,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalise the sum for the next branch.

    residual: [B, L, D] fp32, bf16 or fp64.   branch: [B, L, D], any of these.   gate, shift, scale: [B, D] or [1, D].
    dropout:  chance in [0, 1) of dropping an element of branch. The mask is a function of (seed, step, sample_ids [B],
              position, element, layer) and is never stored.
    seed, step: integers, or 0-d int64 tensors on residual's device (a captured CUDA graph then draws anew on each replay).
    sample_ids: [B] integers, the number of each sequence in the run; needed only with dropout.
    backend:  as for `adaptive_layer_norm`.
    Returns (residual' in residual's dtype, y in autocast's dtype or residual's). Differentiable in every tensor.
    Raises ValueError when shapes or devices disagree, for fp16, for a backend that cannot run, when dropout is out of range, or
    when dropout is given without sample_ids.
    """
    out_dtype = autocast_dtype(residual)
    tensors = (("residual", residual), ("branch", branch), ("gate", gate), ("shift", shift), ("scale", scale), ("weight", weight))
    without = _check(residual, tensors, 2, out_dtype)
    if branch.shape != residual.shape:
        raise ValueError(f"branch must have residual's shape {tuple(residual.shape)}, got {tuple(branch.shape)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if dropout and sample_ids is None:
        raise ValueError("dropout needs sample_ids, the number of each sequence in the run, to draw its mask")
    chosen = choose_backend("gated_residual_norm", residual.device, backend, without)
    random: tuple[Tensor | None, ...] = (None, None, None)
    if dropout and sample_ids is not None:
        random = (scalar(seed, residual), scalar(step, residual), as_ids("sample_ids", sample_ids))
        _check_random(residual, *random)
    return GATED(  # type: ignore[no-any-return]
        residual, branch, gate, shift, scale, weight, dropout, *random, layer, eps, out_dtype, chosen
    )[:2]


_TOO_WIDE = (("triton", f"rows are wider than {WIDEST:,}"),)
_EMPTY = tuple((name, "rows are empty") for name in ("triton", "cpp"))
_NOT_ITS_DTYPES = tuple((name, "its kernels take fp32 and bf16 only") for name in ("triton", "cpp"))


def _check(
    x: Tensor, tensors: tuple[tuple[str, Tensor | None], ...], dense: int, out_dtype: torch.dtype
) -> tuple[tuple[str, str], ...]:
    """Raise ValueError if the tensors do not fit together. The first `dense` tensors are [B, L, D], the last is the weight.

    Returns the backends that cannot take these tensors, each with its reason, for `choose_backend`.
    """
    if x.dim() != 3:
        raise ValueError(f"the residual stream must be [batch, length, width], got shape {tuple(x.shape)}")
    batch, _, width = x.shape
    first = None
    for name, c in tensors[dense:-1]:
        assert c is not None
        shape = c.shape
        if shape != (batch, width) and shape != (1, width):
            raise ValueError(f"{name} must be [{batch}, {width}] or [1, {width}], got shape {tuple(shape)}")
        first = first or shape
        if shape != first:
            shapes = ", ".join(f"{name} {tuple(c.shape)}" for name, c in tensors[dense:-1] if c is not None)
            raise ValueError(f"conditioning must have one number of rows, 1 or {batch}; got {shapes}")
    device, without = x.device, _TOO_WIDE if width > WIDEST else () if width else _EMPTY
    for name, t in tensors:
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} and {tensors[0][0]} on {device}; move one of them")
        dtype = t.dtype
        if dtype is not torch.float32 and dtype is not torch.bfloat16:
            if dtype is torch.float16:
                raise ValueError(f"{name} is fp16, whose range a residual stream exceeds; use bf16 or fp32")
            without = _NOT_ITS_DTYPES
    if out_dtype is torch.float16:
        raise ValueError("autocast asks for fp16, whose range a residual stream exceeds; use torch.autocast with bf16")
    weight = tensors[-1][1]
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight must have shape ({width},), got {tuple(weight.shape)}")
    return without


def _check_random(x: Tensor, *random: Tensor | None) -> None:
    for name, t, count in zip(("seed", "step", "sample_ids"), random, (1, 1, x.shape[0]), strict=True):
        assert t is not None
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and residual on {x.device}; move one of them")
        if t.dtype is not torch.int64 or t.numel() != count:
            raise ValueError(f"{name} must be int64 of {count} number(s), got shape {tuple(t.shape)} of {t.dtype}")
