"""linear_cross_entropy: the vocabulary head and its weighted loss, without ever holding the logits.

    z_i = W h_i + bias,  z_i[forbidden] = -inf,   nll_i = logsumexp(z_i) - z_i[target_i],   loss = sum_i w_i nll_i

Only the rows named by `rows` are read. They are taken in slabs whose logits fit a byte budget; a slab is turned into its
own gradient in place, multiplied into dX and dW, and forgotten. The weighted sum therefore needs three matrix products in
all and its backward only scales; the per-row form has to wait for its upstream gradient and computes the slabs again
(four products). dL/dw_i = upstream * nll_i comes for free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.errors import nearest
from atat_fast.ops.registry import Cost, autocast_dtype, backends, choose_backend, register

REDUCTIONS = ("sum", "none")
CHUNK_BYTES_GPU = 256 << 20
CHUNK_BYTES_CPU = 16 << 20  # a slab that stays near the last-level cache


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    forbidden: int | None = None,
    reduction: str = "sum",
    return_nll: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Weighted cross-entropy of a linear head over the rows that count.

    hidden:       [N, D] fp32, bf16 or fp64, rows of the final norm. Under autocast it is taken in autocast's dtype.
    weight:       [V, D] fp32 or hidden's dtype; a master copy in fp32 is cast inside, and its gradient comes back in fp32.
    target:       [N] int64, or [R] with rows.      token_weight: the same length, fp32, or None for ones.
    bias:         [V] or None.                      rows: [R] int64, the rows of hidden that count, or None for all.
    forbidden:    a vocabulary id whose probability is zero (the mask token): its row of dW is exactly 0.
    reduction:    "sum" gives the fp32 scalar sum_i w_i nll_i in nats; "none" gives the [R] fp32 vector of w_i nll_i.
    return_nll:   also return the unweighted nll [R], detached ("sum" only).
    chunk_bytes:  budget for a slab of logits; 256 MB on a GPU and 16 MB on a CPU where the caller does not say.

    Differentiable in hidden, weight, bias and token_weight, once. A row of weight 0 gives exact zeros whatever its logits.
    Raises ValueError when shapes disagree, or (on CPU) a target is outside [0, V) or forbidden.
    """
    choose_backend("linear_cross_entropy", hidden.device, backend)
    _check(hidden, weight, target, bias, token_weight, rows, forbidden, reduction)
    hidden = hidden.to(autocast_dtype(hidden))
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
    if reduction == "none":
        nll = torch.ops.atat_fast.linear_cross_entropy_rows(hidden, weight, target, bias, rows, forbidden, chunk_bytes)
        return nll if token_weight is None else torch.where(token_weight == 0, 0.0, token_weight * nll)
    track = torch.is_grad_enabled()
    loss, nll, *_ = torch.ops.atat_fast.linear_cross_entropy_sum(
        hidden, weight, target, bias, token_weight, rows, forbidden, chunk_bytes,
        track and hidden.requires_grad, track and weight.requires_grad, track and bias is not None and bias.requires_grad,
    )  # fmt: skip
    return (loss, nll.detach()) if return_nll else loss


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None, rows: Tensor | None,
    forbidden: int | None, reduction: str,
) -> None:  # fmt: skip
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown{nearest(reduction, REDUCTIONS)}; choose {' or '.join(REDUCTIONS)}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if type(weight).__name__ == "DTensor":
        raise ValueError("weight is a DTensor; pass weight.full_tensor(), gathered once for forward and backward")
    vocabulary, count = weight.shape[0], (hidden if rows is None else rows).shape[0]
    for name, tensor, length in (("target", target, count), ("token_weight", token_weight, count), ("bias", bias, vocabulary)):
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    if forbidden is not None and not 0 <= forbidden < vocabulary:
        raise ValueError(f"forbidden is {forbidden}, outside the vocabulary of {vocabulary}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= vocabulary:
            raise ValueError(f"target has id {low if low < 0 else high}, outside the vocabulary of {vocabulary}")
        if forbidden is not None and bool((target == forbidden).any()):
            raise ValueError(f"target has the forbidden id {forbidden}: its loss would be infinite")


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, token_weight: Tensor | None = None,
    rows: Tensor | None = None, forbidden: int | None = None,
) -> Tensor:  # fmt: skip
    """The specification: w_i nll_i for each row, through the whole matrix of logits, differentiable as often as wanted."""
    logits = torch.nn.functional.linear(hidden if rows is None else hidden[rows], weight, bias)
    if forbidden is not None:
        logits = logits.index_fill(1, torch.tensor([forbidden], device=logits.device), -torch.inf)
    nll = -torch.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return nll if token_weight is None else token_weight * nll


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def rows_per_chunk(chunk_bytes: int, vocabulary: int, element_size: int) -> int:
    """Rows whose logits fit the budget. It depends on V alone, never on D, and is at least 16 whatever the budget."""
    return max(16, chunk_bytes // max(1, vocabulary * element_size))


def _sum(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None, rows: Tensor | None,
    forbidden: int | None, chunk_bytes: int, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and nll, and where needed the gradients of the weighted sum: dhidden for the rows that count, dweight, dbias."""
    wide = _accumulation_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    w = weight.to(hidden.dtype)
    b = _bias_with_forbidden(bias, forbidden, w)
    nll = hidden.new_empty(count, dtype=wide)
    dhidden = hidden.new_empty((count if need_hidden else 0, width))
    dweight = hidden.new_zeros((vocabulary if need_weight else 0, width), dtype=wide)
    dbias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=wide)
    step = rows_per_chunk(chunk_bytes, vocabulary, wide.itemsize)

    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        x = hidden[part] if rows is None else hidden[rows[part]]
        y = target[part][:, None]
        scale = None if token_weight is None else token_weight[part][:, None].to(wide)
        if scale is not None:  # a row of weight 0 is emptied here, so that an infinite or NaN one cannot leak through 0 * inf
            x = torch.where(scale == 0, torch.zeros((), dtype=x.dtype, device=x.device), x)
        z = (torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())).to(wide)
        at_target = z.gather(1, y)
        log_total = torch.logsumexp(z, dim=1, keepdim=True)
        losses = (log_total - at_target)[:, 0]
        nll[part] = losses if scale is None else torch.where(scale[:, 0] == 0, 0.0, losses)
        if not (need_hidden or need_weight or need_bias):
            continue
        z.sub_(log_total).exp_()  # now the probabilities; the slab becomes its own gradient
        z.scatter_add_(1, y, torch.full_like(at_target, -1.0))
        if scale is not None:
            z.mul_(scale)
        if need_bias:
            dbias += z.sum(0)
        dz = z.to(hidden.dtype)
        if need_hidden:
            torch.mm(dz, w, out=dhidden[part])
        if need_weight:
            if hidden.dtype is wide:
                dweight.addmm_(dz.t(), x)
            else:
                dweight += torch.mm(dz.t(), x)
    loss = (nll if token_weight is None else nll * token_weight.to(wide)).sum()
    return loss, nll, dhidden, dweight, dbias


def _bias_with_forbidden(bias: Tensor | None, forbidden: int | None, weight: Tensor) -> Tensor | None:
    if forbidden is None:
        return None if bias is None else bias.to(weight.dtype)
    column = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(weight.dtype, copy=True)
    column[forbidden] = -torch.inf
    return column


def _sum_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None, rows: Tensor | None,
    forbidden: int | None, chunk_bytes: int, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _accumulation_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty((count if need_hidden else 0, width)),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=wide),
        hidden.new_empty(vocabulary if need_bias else 0, dtype=wide),
    )


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, token_weight, rows, *_ = inputs
    _, nll, dhidden, dweight, dbias = output
    ctx.set_materialize_grads(False)  # the gradient outputs have no upstream; zeros for them would cost V * D a step
    # Not marked as non-differentiable: a second derivative then arrives at linear_cross_entropy_scale, which refuses it.
    ctx.save_for_backward(nll, dhidden, dweight, dbias, rows)
    ctx.num_hidden = hidden.shape[0]
    ctx.needed = inputs[-3:]
    ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype, None if token_weight is None else token_weight.dtype)


def _sum_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none: tuple[Any, ...] = (None,) * 11
    if grad is None:
        return none
    nll, dhidden, dweight, dbias, rows = ctx.saved_tensors
    weight_dtype, bias_dtype, token_dtype = ctx.dtypes
    dh, dw, db, dnll = torch.ops.atat_fast.linear_cross_entropy_scale(grad, dhidden, dweight, dbias, nll, rows, ctx.num_hidden)
    need_hidden, need_weight, need_bias = ctx.needed
    return (
        dh if need_hidden else None,
        dw.to(weight_dtype) if need_weight else None,
        None,
        db.to(bias_dtype) if need_bias else None,
        None if token_dtype is None else dnll.to(token_dtype),
        *none[5:],
    )


def _scale(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, nll: Tensor, rows: Tensor | None, num_hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scaled = dhidden * grad.to(dhidden.dtype)
    if rows is not None and dhidden.shape[0]:
        scaled = dhidden.new_zeros((num_hidden, dhidden.shape[1])).index_add_(0, rows, scaled)
    elif rows is not None:
        scaled = dhidden.new_zeros((num_hidden, dhidden.shape[1]))
    return scaled, dweight * grad, dbias * grad, nll * grad


def _scale_fake(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, nll: Tensor, rows: Tensor | None, num_hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh = torch.empty_like(dhidden) if rows is None else dhidden.new_empty((num_hidden, dhidden.shape[1]))
    return dh, torch.empty_like(dweight), torch.empty_like(dbias), torch.empty_like(nll)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    forbidden: int | None,
    chunk_bytes: int,
) -> Tensor:
    return _sum(hidden, weight, target, bias, None, rows, forbidden, chunk_bytes, False, False, False)[1]


def _rows_fake(hidden: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty(target.shape[0], dtype=_accumulation_dtype(hidden))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, target, bias, rows, forbidden, chunk_bytes = inputs
    ctx.save_for_backward(hidden, weight, target, bias, rows)
    ctx.forbidden, ctx.chunk_bytes = forbidden, chunk_bytes


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, target, bias, rows = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dh, dw, db = torch.ops.atat_fast.linear_cross_entropy_rows_backward(
        grad, hidden, weight, target, bias, rows, ctx.forbidden, ctx.chunk_bytes, need_hidden, need_weight, need_bias
    )
    return (
        dh if need_hidden else None,
        dw.to(weight.dtype) if need_weight else None,
        None,
        db.to(bias.dtype) if need_bias else None,
        None,
        None,
        None,
    )


def _rows_grad(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Tensor | None, forbidden: int | None,
    chunk_bytes: int, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An upstream vector is a token weight: the weighted sum's gradients are this form's backward."""
    _, nll, dh, dw, db = _sum(
        hidden, weight, target, bias, grad, rows, forbidden, chunk_bytes, need_hidden, need_weight, need_bias
    )
    one = torch.ones((), dtype=dh.dtype, device=dh.device)
    return _scale(one, dh, dw, db, nll, rows, hidden.shape[0])[0] if need_hidden else dh, dw, db


def _rows_grad_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Tensor | None, forbidden: int | None,
    chunk_bytes: int, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _accumulation_dtype(hidden)
    vocabulary, width = weight.shape
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, width)),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=wide),
        hidden.new_empty(vocabulary if need_bias else 0, dtype=wide),
    )


backends("linear_cross_entropy", torch=_sum)
register(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? token_weight, Tensor? rows, "
    "int? forbidden, int chunk_bytes, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor loss, Tensor nll, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _sum,
    _sum_fake,
    backward=_sum_backward,
    setup=_sum_setup,
)
register(
    "linear_cross_entropy_scale(Tensor grad, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor nll, Tensor? rows, "
    "SymInt num_hidden) -> (Tensor, Tensor, Tensor, Tensor)",
    _scale,
    _scale_fake,
)
register(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? rows, int? forbidden, "
    "int chunk_bytes) -> Tensor",
    _rows,
    _rows_fake,
    backward=_rows_backward,
    setup=_rows_setup,
)
register(
    "linear_cross_entropy_rows_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? rows, "
    "int? forbidden, int chunk_bytes, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _rows_grad,
    _rows_grad_fake,
)


def linear_cross_entropy_cost(
    rows: int, width: int, vocabulary: int, *, element_size: int = 2, backward: bool = True, recompute: bool = False
) -> Cost:
    """One product forward, two more for gradients, a fourth where logits are recomputed. Bytes: the slab is written by the
    product, read and rewritten by the row pass, and read by the two gradient products; the weight's fp32 gradient is written.
    """
    products = (1 + 2 * backward) + (backward and recompute)
    slab = rows * vocabulary * element_size
    passes = 2 + (3 if backward else 0) + (2 if backward and recompute else 0)
    edges = (rows * width + vocabulary * width) * element_size
    return Cost(
        flops=2 * products * rows * width * vocabulary,
        bytes=slab * passes + edges * products + (4 * vocabulary * width if backward else 0),
    )
