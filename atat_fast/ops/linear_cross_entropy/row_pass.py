"""The row pass of linear_cross_entropy: turn a slab of logits into its own gradient, and write each row's loss.

    p = softmax(z),   nll = -log p_target,   dz_j = w p_j,   dz_target = -w (sum of p without the target)

With rates u of the vocabulary, the loss of a hidden token under a schedule in which token v is revealed at rate u_v:

    p = softmax(z - elapsed u),   loss = u_target nll + velocity,   velocity = sum_v u_v p_v - u_target,
    dz_j = w p_j (u_j - velocity)      (all rates 1: velocity is 0, and nothing changes)

linear_cross_entropy calls this between its matrix products. It is not an op: the caller owns every buffer, and nothing here is
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.registry import on_device


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gradient: bool,
    nll: Tensor,
    max_probability: Tensor | None,
    entropy: Tensor | None,
    bias_gradient: Tensor | None,
    rates: Tensor | None,
    elapsed: Tensor | None,
    velocity: Tensor | None,
    backend: str,
) -> None:
    """Losses of a slab of logits and, in its place, the gradient of sum_i token_weight[i] nll[i].

    logits:           [C, columns] bf16 or fp32, fp64 for "torch"; unit stride within a row. Overwritten if `gradient`, else
                      read only. A column at -inf has probability 0 and a gradient of exactly 0.
    target:           [C] int64 in [0, columns), and in [0, rows) if weight is given. A target out of range gives its row a nll
                      of NaN, and as gradient the row's weight times p, with no column as target (with rates: the gradient of
                      its weight times sum_v u_v p_v). Memory outside the arguments is never touched, for any target.
    token_weight:     [C] fp32, or None for ones. A row of weight 0 gets zeros everywhere, whatever its logits are.
    hidden, weight:   [C, D] and [rows, D] of logits' dtype, contiguous, or both None. If given, a target's logit is computed
                      again in fp32, as hidden[i] . weight[target] + bias[target], because a logit in bf16 is rounded.
    bias:             [columns] of logits' dtype, or None. The logits contain it already; it is read for the target only.
    nll:              [C] fp32, the loss in nats, not weighted.   max_probability, entropy: [C] fp32 or None, of p, in nats.
    bias_gradient:    [columns] fp32 or None; if `gradient`, the gradient's column sums are added to it.
    rates, velocity:  [columns] fp32, finite, and [C] fp32, or both None. If given, velocity is written, and the gradient is that
                      of sum_i token_weight[i] (rates[target[i]] nll[i] + velocity[i]).
    elapsed:          [C] fp32, finite, or None for zeros; only with rates.
    backend:          a name in ROW_PASS.

    A row that holds NaN or +inf has a nll of NaN. With fp64 logits every fp32 above is fp64.
    """
    ROW_PASS[backend](
        logits,
        target,
        token_weight,
        hidden,
        weight,
        bias,
        gradient,
        nll,
        max_probability,
        entropy,
        bias_gradient,
        rates,
        elapsed,
        velocity,
    )


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gradient: bool,
    nll: Tensor,
    max_probability: Tensor | None,
    entropy: Tensor | None,
    bias_gradient: Tensor | None,
    rates: Tensor | None = None,
    elapsed: Tensor | None = None,
    velocity: Tensor | None = None,
) -> None:
    """The specification, in fp32, or fp64 for fp64 logits.

    The target is kept apart from the other ids: if p_target is near 1, the sum of the others, q, still has its digits, and
    p_target - 1 has not. So log(1 + others) and the target's gradient stay precise. With m the others' mean rate times q,
    velocity = m - u_target q and dz_target = -w (u_target q^2 + m p_target).
    """
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    columns = logits.shape[1]
    inside = (target >= 0) & (target < (columns if weight is None else min(columns, weight.shape[0])))
    column = torch.where(inside, target, 0)[:, None]

    z = logits.to(wide, copy=True)
    if rates is not None and elapsed is not None:
        z -= elapsed.to(wide)[:, None] * rates.to(wide)
    at_target = z.gather(1, column)[:, 0]
    z.scatter_(1, column, torch.where(inside, -torch.inf, at_target)[:, None])  # now without the target
    if hidden is not None and weight is not None:
        at_target = (hidden.to(wide) * weight[column[:, 0]].to(wide)).sum(1)
        if bias is not None:
            at_target += bias.to(wide)[column[:, 0]]
        if rates is not None and elapsed is not None:
            at_target -= elapsed.to(wide) * rates.to(wide)[column[:, 0]]
    at_target = torch.where(inside, at_target, -torch.inf)

    of_others = z.amax(1)
    largest = torch.maximum(of_others, at_target)
    z.sub_(largest[:, None])
    moment = None if entropy is None else (z.exp() * z.clamp(min=-1e4)).sum(1)  # e^z z goes to 0 where z goes to -inf
    z.exp_()
    own, rest = (at_target - largest).exp(), z.sum(1)
    total = rest + own
    log_total = torch.where(at_target >= of_others, rest.log1p(), total.log())

    empty = torch.zeros_like(inside) if token_weight is None else token_weight == 0
    losses = torch.where(inside, log_total + (largest - at_target), torch.nan)
    nll.copy_(losses.masked_fill(empty, 0.0))
    if max_probability is not None:
        max_probability.copy_((1 / total).masked_fill(empty, 0.0))
    if entropy is not None:
        assert moment is not None
        moment += own * (at_target - largest).clamp(min=-1e4)
        entropy.copy_((log_total - moment / total).clamp(min=0).masked_fill(empty, 0.0))
    scale = torch.ones_like(total) if token_weight is None else token_weight.to(wide)
    of_target = -scale * (rest / total)
    speed = None
    if rates is not None:
        assert velocity is not None
        own_rate = torch.where(inside, rates.to(wide)[column[:, 0]], 0.0)
        of_rest = (z * rates.to(wide)).sum(1) / total
        speed = of_rest - own_rate * (rest / total)
        of_target = -scale * (own_rate * (rest / total) ** 2 + of_rest * (own / total))
        velocity.copy_(torch.where(inside, speed, torch.nan).masked_fill(empty, 0.0))
    if not gradient:
        return

    z.mul_((scale / total)[:, None])
    if rates is not None and speed is not None:
        z.mul_(rates.to(wide) - speed[:, None])
    z.scatter_(1, column, torch.where(inside, of_target, z.gather(1, column)[:, 0])[:, None])
    logits.copy_(z.masked_fill_(empty[:, None], 0.0))
    if bias_gradient is not None:
        bias_gradient += logits.sum(0, dtype=bias_gradient.dtype)


def _compiled(*arguments: Any) -> None:
    """cpu.cpp and launch.cu in csrc/cross_entropy/, by the device of the logits."""
    torch.ops.atat_fast_c.cross_entropy_(*arguments)


def _triton(*arguments: Any) -> None:
    """kernels/cross_entropy.py."""
    from atat_fast.kernels import cross_entropy  # triton takes a second to import

    with on_device(arguments[0]):
        cross_entropy.cross_entropy_(*arguments)


ROW_PASS: dict[str, Callable[..., None]] = {
    "cuda": _compiled,
    "triton": _triton,
    "cpp": _compiled,
    "torch": cross_entropy_reference,
}
"""The pass on each backend. All take cross_entropy_'s arguments except the last."""
