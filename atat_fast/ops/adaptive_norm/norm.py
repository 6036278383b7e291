"""How adaptive_layer_norm runs on each backend, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.adaptive_norm.reference import adaptive_layer_norm_reference
from atat_fast.ops.registry import Cost, again, backends, dispatch, pull, register


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32, and fp64 for fp64 inputs."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y and its statistics, mean and rstd [B, L, 1], by PyTorch."""
    wide = statistics_dtype(x)
    x, shift, gain = x.to(wide), shift.to(wide), 1 + scale.to(wide)
    gain = gain if weight is None else gain * weight.to(wide)
    if shift.shape[0] == 1:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain[0], shift[0], eps)
    else:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        y = torch.addcmul(shift[:, None], y, gain[:, None])
    return y.to(out_dtype), mean, rstd


def norm_plain(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype, backend: str = "torch"
) -> tuple[Tensor, None, None]:
    """The op in PyTorch's own steps, without its statistics."""
    wide = statistics_dtype(x)
    weight = None if weight is None else weight.to(wide)
    y = adaptive_layer_norm_reference(x.to(wide), shift.to(wide), scale.to(wide), weight, eps)
    return y.to(out_dtype), None, None


def norm_outputs(x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of `norm`."""
    batch, length, width = x.shape
    statistic = x.new_empty((batch, length, 1), dtype=statistics_dtype(x))
    return x.new_empty((batch, length, width), dtype=out_dtype), statistic, torch.empty_like(statistic)


def _norm_fake(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_outputs(x, out_dtype)


@functools.cache
def kernels() -> Any:
    """kernels/adaptive_norm.py, on first use: triton takes a second to import."""
    from atat_fast.kernels import adaptive_norm

    return adaptive_norm


def rows(conditioning: Tensor) -> Tensor:
    """Conditioning as kernels read it: each row is contiguous; rows may be apart, as parts of one projection are."""
    return conditioning if conditioning.stride(1) == 1 else conditioning.contiguous()


def _norm_triton(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = norm_outputs(x, out_dtype)
    weight = None if weight is None else weight.contiguous()
    kernels().norm_forward(x.contiguous(), rows(shift), rows(scale), weight, eps, *outputs)
    return outputs


def _norm_cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.atat_fast_c.adaptive_layer_norm.default(*arguments)  # type: ignore[no-any-return]


def norm_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dshift, dscale [B or 1, D] and dweight [D], in the statistics' dtype."""
    wide = statistics_dtype(x)
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
    dx, dshift, dscale, dweight = norm_gradients(dy, x, scale, weight, mean, rstd)
    dweight = dweight if weight is None else dweight.to(weight.dtype)
    return dx.to(x.dtype), dshift.to(shift_dtype), dscale.to(scale.dtype), dweight


def conditioning_gradients(scale: Tensor, weight: Tensor | None, shift_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Empty dshift, dscale and dweight."""
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
    return x.new_empty(x.shape), *conditioning_gradients(scale, weight, shift_dtype)


def _norm_backward_triton(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, shift_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, sums = x.new_empty(x.shape), conditioning_gradients(scale, weight, shift_dtype)
    weight = None if weight is None else weight.contiguous()
    kernels().norm_backward(dy.contiguous(), x.contiguous(), rows(scale), weight, mean, rstd, dx, *sums)
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
        return *norm_pull(ctx, dy, x, scale, weight), None, None, None
    dx, dshift, dscale, dweight = _NORM_BACKWARD(dy, x, scale, weight, mean, rstd, ctx.shift_dtype, ctx.backend)
    return dx, dshift, dscale, None if weight is None else dweight, None, None, None


def norm_pull(ctx: Any, dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> tuple[Any, ...]:
    """dx, dshift, dscale and dweight by PyTorch's own steps; none of them depends on the value of shift."""
    shift = torch.zeros_like(scale, dtype=ctx.shift_dtype)

    def norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        return norm_plain(x, shift, scale, weight, ctx.eps, ctx.out_dtype)[0]

    return pull(norm, (x, shift, scale, weight), dy)


backends("adaptive_layer_norm", triton=_norm_triton, cpp=_norm_cpp, torch=norm)
backends("adaptive_layer_norm_backward", triton=_norm_backward_triton, cpp=_norm_backward_cpp, torch=_norm_backward)
NORM = register(
    "adaptive_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? weight, float eps, ScalarType out_dtype, str backend) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    dispatch("adaptive_layer_norm"),
    _norm_fake,
    backward=_norm_autograd,
    setup=_norm_setup,
    plain=norm_plain,
)
_NORM_BACKWARD = register(
    "adaptive_layer_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor? weight, Tensor mean, Tensor rstd, "
    "ScalarType shift_dtype, str backend) -> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight)",
    dispatch("adaptive_layer_norm_backward"),
    _norm_backward_fake,
)


def adaptive_layer_norm_cost(
    rows: int, width: int, *, residual_bytes: int = 4, branch_bytes: int = 2, backward: bool = False
) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    moved = 2 * residual_bytes + branch_bytes if backward else residual_bytes + branch_bytes
    return Cost(flops=(16 if backward else 8) * rows * width, bytes=rows * width * moved)
