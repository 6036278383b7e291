"""How gated_residual_norm runs on each backend, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.adaptive_norm.norm import (
    conditioning_gradients,
    kernels,
    norm,
    norm_gradients,
    norm_outputs,
    norm_plain,
    norm_pull,
    rows,
    statistics_dtype,
)
from atat_fast.ops.adaptive_norm.reference import dropout_scale
from atat_fast.ops.philox import STREAM_DROPOUT
from atat_fast.ops.registry import Cost, again, backends, dispatch, pull, register


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
    wide = statistics_dtype(residual)
    addend = branch.to(wide)
    if dropout:
        addend = addend * _keep(branch, dropout, seed, step, sample_ids, layer).to(wide)
    total = torch.addcmul(residual.to(wide), gate.to(wide)[:, None], addend).contiguous()
    y, mean, rstd = norm(total, shift, scale, weight, eps, out_dtype)  # from the sum before it is rounded to bf16
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
    wide = statistics_dtype(residual)
    keep = _keep(branch, dropout, seed, step, sample_ids, layer) if dropout else None
    total = residual.to(wide) + _addend(branch, gate, keep, wide)
    return total.to(residual.dtype), norm_plain(total, shift, scale, weight, eps, out_dtype)[0]


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
    return residual.new_empty(residual.shape), *norm_outputs(residual, out_dtype)


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
    outputs = residual.new_empty(residual.shape), *norm_outputs(residual, out_dtype)
    weight = None if weight is None else weight.contiguous()
    ids = None if sample_ids is None else sample_ids.contiguous()
    kernels().gated_forward(
        residual.contiguous(),
        branch.contiguous(),
        rows(gate),
        rows(shift),
        rows(scale),
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
    wide = statistics_dtype(total)
    dy = torch.zeros_like(total) if dy is None else dy
    dr, dshift, dscale, dweight = norm_gradients(dy, total, scale, weight, mean, rstd)
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
    return *streams, gate.new_empty(gate.shape), *conditioning_gradients(scale, weight, shift_dtype)


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
        *conditioning_gradients(scale, weight, shift_dtype),
    )
    upstream = (None if dtotal is None else dtotal.contiguous(), None if dy is None else dy.contiguous())
    weight = None if weight is None else weight.contiguous()
    ids = None if sample_ids is None else sample_ids.contiguous()
    kernels().gated_backward(
        *upstream,
        total,
        branch.contiguous(),
        rows(gate),
        rows(scale),
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
        dr, *conditioning = norm_pull(ctx, dy, total, scale, weight)
        dr = dr if dtotal is None else dr + dtotal
        keep = _keep(branch, ctx.dropout, seed, step, sample_ids, ctx.layer) if ctx.dropout else None
        wide = statistics_dtype(total)
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


backends("gated_residual_norm", triton=_gated_triton, cpp=_gated_cpp, torch=_gated)
backends("gated_residual_norm_backward", triton=_gated_backward_triton, cpp=_gated_backward_cpp, torch=_gated_backward)
GATED = register(
    "gated_residual_norm(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, float dropout, "
    "Tensor? seed, Tensor? step, Tensor? sample_ids, SymInt layer, float eps, ScalarType out_dtype, str backend) "
    "-> (Tensor total, Tensor y, Tensor mean, Tensor rstd)",
    dispatch("gated_residual_norm"),
    _gated_fake,
    backward=_gated_autograd,
    setup=_gated_setup,
    plain=_gated_plain,
)
_GATED_BACKWARD = register(
    "gated_residual_norm_backward(Tensor? dtotal, Tensor? dy, Tensor total, Tensor branch, Tensor gate, Tensor scale, "
    "Tensor? weight, Tensor mean, Tensor rstd, float dropout, Tensor? seed, Tensor? step, Tensor? sample_ids, SymInt layer, "
    "ScalarType shift_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    dispatch("gated_residual_norm_backward"),
    _gated_backward_fake,
)


def gated_residual_norm_cost(
    rows: int, width: int, *, residual_bytes: int = 4, branch_bytes: int = 2, backward: bool = False
) -> Cost:
    """Forward reads residual and branch and writes r' and y; backward reads dy, dr', r' and branch, writes dr and dbranch."""
    moved = 3 * residual_bytes + 3 * branch_bytes if backward else 2 * residual_bytes + 2 * branch_bytes
    return Cost(flops=(20 if backward else 10) * rows * width, bytes=rows * width * moved)
