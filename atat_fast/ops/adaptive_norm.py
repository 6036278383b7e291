"""adaptive_layer_norm and gated_residual_norm: the memory-bound chain between the matrix products of a DiT block.

    adaptive_layer_norm:   y = LN(x) * weight * (1 + scale) + shift
    gated_residual_norm:   r = residual + gate * dropout(branch),   y = LN(r) * weight * (1 + scale) + shift

Conditioning (shift, scale, gate) is [B, D], one row a sample, or [1, D] if the model is not told the time. With one row,
modulation is free: it is a LayerNorm with weight * (1 + scale) as its weight and shift as its bias.
Statistics are fp32 (fp64 for fp64 inputs) in every dtype of the stream. A backward runs on the backend of its forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.philox import STREAM_DROPOUT, random_words
from atat_fast.ops.registry import Cost, again, as_ids, autocast_dtype, backends, choose_backend, dispatch, pull, register, scalar

EPS = 1e-5
WIDEST = 4096
"""Most columns the Triton kernels take: they hold a row in registers."""


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
    return _NORM(x, shift, scale, weight, eps, out_dtype, chosen)[0]  # type: ignore[no-any-return]


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
    return _GATED(  # type: ignore[no-any-return]
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


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _statistics_dtype(x)
    x, shift, gain = x.to(wide), shift.to(wide), 1 + scale.to(wide)
    gain = gain if weight is None else gain * weight.to(wide)
    if shift.shape[0] == 1:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain[0], shift[0], eps)
    else:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        y = torch.addcmul(shift[:, None], y, gain[:, None])
    return y.to(out_dtype), mean, rstd


def _norm_plain(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype, backend: str = "torch"
) -> tuple[Tensor, None, None]:
    """The op in PyTorch's own steps, without its statistics."""
    wide = _statistics_dtype(x)
    weight = None if weight is None else weight.to(wide)
    y = adaptive_layer_norm_reference(x.to(wide), shift.to(wide), scale.to(wide), weight, eps)
    return y.to(out_dtype), None, None


def _norm_outputs(x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    statistic = x.new_empty((batch, length, 1), dtype=_statistics_dtype(x))
    return x.new_empty((batch, length, width), dtype=out_dtype), statistic, torch.empty_like(statistic)


def _norm_fake(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_outputs(x, out_dtype)


@functools.cache
def _kernels() -> Any:
    """kernels/adaptive_norm.py, on first use: triton takes a second to import."""
    from atat_fast.kernels import adaptive_norm

    return adaptive_norm


def _rows(conditioning: Tensor) -> Tensor:
    """Conditioning as kernels read it: each row is contiguous; rows may be apart, as parts of one projection are."""
    return conditioning if conditioning.stride(1) == 1 else conditioning.contiguous()


def _norm_triton(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _norm_outputs(x, out_dtype)
    weight = None if weight is None else weight.contiguous()
    _kernels().norm_forward(x.contiguous(), _rows(shift), _rows(scale), weight, eps, *outputs)
    return outputs


def _norm_cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.atat_fast_c.adaptive_layer_norm.default(*arguments)  # type: ignore[no-any-return]


def _norm_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dshift, dscale [B or 1, D] and dweight [D], in the statistics' dtype."""
    wide = _statistics_dtype(x)
    dy, x, gain = dy.to(wide), x.to(wide), 1 + scale.to(wide)
    full = gain if weight is None else gain * weight.to(wide)
    shape = x.shape[-1:]
    if scale.shape[0] == 1:
        # The backward does not read the bias; passing one asks for its gradient.
        dx, dfull, dshift = torch.ops.aten.native_layer_norm_backward(
            dy, x, shape, mean, rstd, full[0], torch.empty_like(full[0]), [True, True, True]
        )
        dfull, dshift = dfull[None], dshift[None]
    else:
        dx = torch.ops.aten.native_layer_norm_backward(
            dy * full[:, None], x, shape, mean, rstd, None, None, [True, False, False]
        )[0]
        dshift = dy.sum(1)
        dfull = (dy * ((x - mean) * rstd)).sum(1)
    dweight = (dfull * gain).sum(0) if weight is not None else scale.new_empty(0)
    dscale = dfull if weight is None else dfull * weight.to(wide)
    return dx, dshift, dscale, dweight


def _norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dshift, dscale and dweight, each in the dtype of its input."""
    dx, dshift, dscale, dweight = _norm_gradients(dy, x, scale, weight, mean, rstd)
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    return dx.to(x.dtype), dshift.to(shift_dtype), dscale.to(scale.dtype), dweight


def _conditioning_gradients(scale: Tensor, weight: Tensor | None, shift_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dshift = scale.new_empty(scale.shape, dtype=shift_dtype)
    return dshift, scale.new_empty(scale.shape), scale.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _norm_backward_fake(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    shift_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_conditioning_gradients(scale, weight, shift_dtype)


def _norm_backward_triton(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, sums = x.new_empty(x.shape), _conditioning_gradients(scale, weight, shift_dtype)
    weight = None if weight is None else weight.contiguous()
    _kernels().norm_backward(dy.contiguous(), x.contiguous(), _rows(scale), weight, mean, rstd, dx, *sums)
    return dx, *sums


def _norm_backward_cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.atat_fast_c.adaptive_layer_norm_backward.default(*arguments)  # type: ignore[no-any-return]


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, weight, eps, out_dtype, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, weight, *output[1:])
    ctx.shift_dtype, ctx.eps, ctx.out_dtype, ctx.backend = shift.dtype, eps, out_dtype, backend


def _norm_autograd(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 7
    x, scale, weight, mean, rstd = ctx.saved_tensors
    if again():
        return *_norm_pull(ctx, dy, x, scale, weight), None, None, None
    dx, dshift, dscale, dweight = _NORM_BACKWARD(dy, x, scale, weight, mean, rstd, ctx.shift_dtype, ctx.backend)
    return dx, dshift, dscale, None if weight is None else dweight, None, None, None


def _norm_pull(ctx: Any, dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> tuple[Any, ...]:
    """dx, dshift, dscale and dweight by PyTorch's own steps; none of them depends on the value of shift."""
    shift = torch.zeros_like(scale, dtype=ctx.shift_dtype)

    def norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        return _norm_plain(x, shift, scale, weight, ctx.eps, ctx.out_dtype)[0]

    return pull(norm, (x, shift, scale, weight), dy)


def _gated(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _statistics_dtype(residual)
    addend = branch.to(wide)
    if dropout:
        addend = addend * _keep(branch, dropout, seed, step, sample_ids, layer).to(wide)
    total = torch.addcmul(residual.to(wide), gate.to(wide)[:, None], addend).contiguous()
    y, mean, rstd = _norm(total, shift, scale, weight, eps, out_dtype)  # from the sum before it is rounded to bf16
    return total.to(residual.dtype), y, mean, rstd


def _keep(
    branch: Tensor, dropout: float, seed: Tensor | None, step: Tensor | None, sample_ids: Tensor | None, layer: int
) -> Tensor:
    assert seed is not None and step is not None and sample_ids is not None
    return dropout_scale(branch.shape, dropout, seed, step, sample_ids, layer)


def _gated_plain(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op in PyTorch's own steps."""
    wide = _statistics_dtype(residual)
    keep = _keep(branch, dropout, seed, step, sample_ids, layer) if dropout else None
    total = residual.to(wide) + _addend(branch, gate, keep, wide)
    return total.to(residual.dtype), _norm_plain(total, shift, scale, weight, eps, out_dtype)[0]


def _addend(branch: Tensor, gate: Tensor, keep: Tensor | None, wide: torch.dtype) -> Tensor:
    branch = branch.to(wide)
    return gate.to(wide)[:, None] * (branch if keep is None else branch * keep.to(wide))


def _gated_fake(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return residual.new_empty(residual.shape), *_norm_outputs(residual, out_dtype)


def _gated_triton(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = residual.new_empty(residual.shape), *_norm_outputs(residual, out_dtype)
    weight = None if weight is None else weight.contiguous()
    ids = None if sample_ids is None else sample_ids.contiguous()
    _kernels().gated_forward(
        residual.contiguous(),
        branch.contiguous(),
        _rows(gate),
        _rows(shift),
        _rows(scale),
        weight,
        dropout,
        seed,
        step,
        ids,
        STREAM_DROPOUT + (layer << 8),
        eps,
        *outputs,
    )
    return outputs


def _gated_cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, layer, eps, out_dtype = arguments
    return torch.ops.atat_fast_c.gated_residual_norm.default(  # type: ignore[no-any-return]
        *tensors, STREAM_DROPOUT + (layer << 8), eps, out_dtype
    )


def _gated_backward(
    dtotal: Tensor | None,
    dy: Tensor | None,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dresidual, dbranch, dgate, dshift, dscale and dweight, each in the dtype of its input."""
    wide = _statistics_dtype(total)
    dy = torch.zeros_like(total) if dy is None else dy
    dr, dshift, dscale, dweight = _norm_gradients(dy, total, scale, weight, mean, rstd)
    if dtotal is not None:
        dr = dr + dtotal.to(wide)
    dadd = dr * gate.to(wide)[:, None]
    addend = branch.to(wide)
    if dropout:
        keep = _keep(branch, dropout, seed, step, sample_ids, layer).to(wide)
        dadd, addend = dadd * keep, addend * keep
    dgate = (dr * addend).sum(1)
    if gate.shape[0] == 1:
        dgate = dgate.sum(0, keepdim=True)
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    dr, dadd = dr.to(total.dtype, copy=True), dadd.to(branch.dtype)
    return dr, dadd, dgate.to(gate.dtype), dshift.to(shift_dtype), dscale.to(scale.dtype), dweight


def _gated_backward_fake(
    dtotal: Tensor | None,
    dy: Tensor | None,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    shift_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    streams = total.new_empty(total.shape), branch.new_empty(branch.shape)
    return *streams, gate.new_empty(gate.shape), *_conditioning_gradients(scale, weight, shift_dtype)


def _gated_backward_triton(
    dtotal: Tensor | None,
    dy: Tensor | None,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    seed: Tensor | None,
    step: Tensor | None,
    sample_ids: Tensor | None,
    layer: int,
    shift_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = (
        total.new_empty(total.shape),
        branch.new_empty(branch.shape),
        gate.new_empty(gate.shape),
        *_conditioning_gradients(scale, weight, shift_dtype),
    )
    upstream = (None if dtotal is None else dtotal.contiguous(), None if dy is None else dy.contiguous())
    weight = None if weight is None else weight.contiguous()
    ids = None if sample_ids is None else sample_ids.contiguous()
    _kernels().gated_backward(
        *upstream,
        total,
        branch.contiguous(),
        _rows(gate),
        _rows(scale),
        weight,
        mean,
        rstd,
        dropout,
        seed,
        step,
        ids,
        STREAM_DROPOUT + (layer << 8),
        *outputs,
    )
    return outputs


def _gated_backward_cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *tensors, layer, shift_dtype = arguments
    return torch.ops.atat_fast_c.gated_residual_norm_backward.default(  # type: ignore[no-any-return]
        *tensors, STREAM_DROPOUT + (layer << 8), shift_dtype
    )


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, weight, dropout, seed, step, sample_ids, layer, eps, out_dtype, backend = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, branch, gate, scale, weight, mean, rstd, seed, step, sample_ids)
    ctx.dropout, ctx.layer, ctx.shift_dtype, ctx.backend = dropout, layer, shift.dtype, backend
    ctx.eps, ctx.out_dtype = eps, out_dtype


def _gated_autograd(ctx: Any, dtotal: Tensor | None, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dtotal is None and dy is None:
        return (None,) * 14
    total, branch, gate, scale, weight, mean, rstd, seed, step, sample_ids = ctx.saved_tensors
    if again():  # differentiate in the sum: it is an output, whose own graph leads back to the inputs
        dy = torch.zeros_like(total, dtype=ctx.out_dtype) if dy is None else dy
        dr, *conditioning = _norm_pull(ctx, dy, total, scale, weight)
        dr = dr if dtotal is None else dr + dtotal
        keep = _keep(branch, ctx.dropout, seed, step, sample_ids, ctx.layer) if ctx.dropout else None
        wide = _statistics_dtype(total)
        inputs = pull(lambda branch, gate: _addend(branch, gate, keep, wide), (branch, gate), dr.to(wide))
        return dr, *inputs, *conditioning, *(None,) * 8
    dr, db, dgate, dshift, dscale, dweight = _GATED_BACKWARD(
        dtotal,
        dy,
        total,
        branch,
        gate,
        scale,
        weight,
        mean,
        rstd,
        ctx.dropout,
        seed,
        step,
        sample_ids,
        ctx.layer,
        ctx.shift_dtype,
        ctx.backend,
    )
    return (dr, db, dgate, dshift, dscale, None if weight is None else dweight, *(None,) * 8)


backends("adaptive_layer_norm", triton=_norm_triton, cpp=_norm_cpp, torch=_norm)
backends("adaptive_layer_norm_backward", triton=_norm_backward_triton, cpp=_norm_backward_cpp, torch=_norm_backward)
backends("gated_residual_norm", triton=_gated_triton, cpp=_gated_cpp, torch=_gated)
backends("gated_residual_norm_backward", triton=_gated_backward_triton, cpp=_gated_backward_cpp, torch=_gated_backward)
_NORM = register(
    "adaptive_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? weight, float eps, ScalarType out_dtype, str backend) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    dispatch("adaptive_layer_norm"),
    _norm_fake,
    backward=_norm_autograd,
    setup=_norm_setup,
    plain=_norm_plain,
)
_NORM_BACKWARD = register(
    "adaptive_layer_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor? weight, Tensor mean, Tensor rstd, "
    "ScalarType shift_dtype, str backend) -> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight)",
    dispatch("adaptive_layer_norm_backward"),
    _norm_backward_fake,
)
_GATED = register(
    "gated_residual_norm(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, float dropout, "
    "Tensor? seed, Tensor? step, Tensor? sample_ids, int layer, float eps, ScalarType out_dtype, str backend) "
    "-> (Tensor total, Tensor y, Tensor mean, Tensor rstd)",
    dispatch("gated_residual_norm"),
    _gated_fake,
    backward=_gated_autograd,
    setup=_gated_setup,
    plain=_gated_plain,
)
_GATED_BACKWARD = register(
    "gated_residual_norm_backward(Tensor? dtotal, Tensor? dy, Tensor total, Tensor branch, Tensor gate, Tensor scale, "
    "Tensor? weight, Tensor mean, Tensor rstd, float dropout, Tensor? seed, Tensor? step, Tensor? sample_ids, int layer, "
    "ScalarType shift_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    dispatch("gated_residual_norm_backward"),
    _gated_backward_fake,
)


def adaptive_layer_norm_cost(
    rows: int, width: int, *, residual_bytes: int = 4, branch_bytes: int = 2, backward: bool = False
) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    moved = 2 * residual_bytes + branch_bytes if backward else residual_bytes + branch_bytes
    return Cost(flops=(16 if backward else 8) * rows * width, bytes=rows * width * moved)


def gated_residual_norm_cost(
    rows: int, width: int, *, residual_bytes: int = 4, branch_bytes: int = 2, backward: bool = False
) -> Cost:
    """Forward reads residual and branch and writes r' and y; backward reads dy, dr', r' and branch, writes dr and dbranch."""
    moved = 3 * residual_bytes + 3 * branch_bytes if backward else 2 * residual_bytes + 2 * branch_bytes
    return Cost(flops=(20 if backward else 10) * rows * width, bytes=rows * width * moved)
