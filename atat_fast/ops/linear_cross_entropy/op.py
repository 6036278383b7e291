"""linear_cross_entropy: the vocabulary head and its weighted loss. The matrix of logits is never in memory.

    z_i = W h_i + bias,  z_i[forbidden] = -inf,   nll_i = logsumexp(z_i) - z_i[target_i],   loss = sum_i w_i nll_i

Only the rows named by `rows` are read. They go in slabs whose logits fit a byte budget (slabs.py): a slab becomes its own
gradient in place, is multiplied into dX and dW, and is overwritten by the next. So the weighted sum needs three matrix products
in all, and its backward only scales. The per-row form needs its upstream gradient first, so its backward computes the slabs
again: four products, as with low_memory. dL/dw_i = upstream * nll_i is free.

With rates u of the vocabulary a row's loss is that of a token-identity schedule (diffusion/identity.py), in the same pass:

    p_i = softmax(z_i - elapsed_i u),   loss_i = u_target nll_i + sum_v u_v p_iv - u_target
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.errors import nearest
from atat_fast.ops.linear_cross_entropy.reference import counting, plain_rows, plain_sum
from atat_fast.ops.linear_cross_entropy.slabs import (
    CHUNK_BYTES_LOW,
    LossArguments,
    Totals,
    Wanted,
    accumulation_dtype,
    default_budget,
    run_slabs,
)
from atat_fast.ops.registry import (
    Cost,
    again,
    as_ids,
    autocast_dtype,
    autocast_is_on,
    backends,
    choose_backend,
    pull,
    readable,
    register,
    transformed,
    without_autocast,
)

REDUCTIONS = ("sum", "mean", "none")


class RowStatistics(NamedTuple):
    """Figures of each row's distribution from the row pass: [R] fp32 each, detached, zeros for rows of weight 0."""

    nll: Tensor
    max_probability: Tensor
    entropy: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    forbidden: int | None = None,
    rates: Tensor | None = None,
    elapsed: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    return_nll: bool = False,
    return_statistics: bool = False,
    low_memory: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Any:
    """Weighted cross-entropy of a linear head over the rows that count.

    hidden:       [N, D] fp32, bf16 or fp64, rows of the final norm. Under autocast it is cast to autocast's dtype.
    weight:       [V, D] fp32 or hidden's dtype; an fp32 master copy is cast inside, and its gradient is fp32.
    target:       [N] integers, or [R] with rows.      token_weight: the same length, fp32 of any sign, or None for ones.
    bias:         [V] or None.                      rows: [R] integers, the rows of hidden that count, or None for all.
    forbidden:    a vocabulary id whose probability is zero (the mask token): its row of dW is exactly 0.
    rates:        [V] fp32 above 0, or None: the rate at which each token of the vocabulary is revealed. A row's loss is then
                  rates[target] nll + sum_v rates[v] p_v - rates[target], which for rates of 1 is nll.
    elapsed:      [R] fp32, at least 0, or None for zeros: a row's -log t; elapsed * rates is subtracted from its logits.
    ignore_index: a row with this target does not count: its weight is 0.
    label_smoothing: e in [0, 1]: a row's loss is (1 - e) nll + e mean_v(-log p_v), the mean over the ids that are not forbidden.
                  Not with rates. It adds a gather of weight's rows [R, D], and V x D twice in the backward.
    reduction:    "sum": the fp32 scalar sum_i w_i loss_i in nats, where loss_i is nll_i unless rates or label_smoothing change
                  it. "mean": the sum divided by sum_i w_i without ignored rows; with token_weight None that is the number of
                  rows that count (NaN if none does, as in torch). "none": the [R] fp32 vector of w_i loss_i.
    return_nll:   also return the unweighted nll [R], detached and without smoothing.
    return_statistics: also return `RowStatistics`.
    low_memory:   for "sum" and "mean": keep only the inputs between forward and backward, and use slabs of 32 MB; the backward
                  computes the logits again, a fourth product. False keeps gradients (V x D in fp32, R x D).
    chunk_bytes:  bytes for a slab of logits; None for 64 MB on a CPU and, by its memory, 256 MB to 1 GB on a GPU.
    backend:      "cuda", "triton", "cpp" or "torch" for the row pass between the products; None for the fastest that can run.

    Differentiable in hidden, weight, bias and token_weight; not in rates and elapsed. Second derivatives, forward mode and
    torch.func form the whole matrix of logits. A row of weight 0 gives exact zeros whatever its logits. The loss is NaN if a
    weight or row is NaN, or a logit exceeds the dtype's range.
    Raises ValueError when shapes disagree, label_smoothing is out of range or given with rates, hidden is fp16 (its logits
    overflow at 65,504), weight is a DTensor, or, on a CPU, a target is outside [0, V) or forbidden, or a row outside [0, N).
    These values are not checked on a GPU, because reading them would wait for it: a target out of range gives NaN, a forbidden
    one inf. With ATAT_FAST_DEBUG=1 a device assertion names the fault.
    """
    hidden = hidden.to(autocast_dtype(hidden))
    target, rows = as_ids("target", target), None if rows is None else as_ids("rows", rows)
    given = LossArguments(hidden, weight, target, bias, token_weight, rows, forbidden, rates, elapsed)
    _check_arguments(given, reduction, label_smoothing)
    token_weight = _counted(target, token_weight, ignore_index)
    given = given._replace(token_weight=token_weight)
    _check_values(given)
    without = _FP64_ONLY if hidden.dtype is torch.float64 else ()
    chosen = choose_backend("linear_cross_entropy", hidden.device, backend, without)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_LOW if low_memory else default_budget(hidden.device)
    if reduction == "none" or low_memory or transformed():
        if transformed():
            hidden, rows = counting(hidden, rows, token_weight), None
        losses, nll_apart, *known = _ROWS(
            hidden, weight, target, bias, rows, forbidden, rates, elapsed, chunk_bytes, return_statistics, chosen
        )
        nll = losses if rates is None else nll_apart  # without rates the loss is the nll
        if token_weight is not None:  # the loss is masked before the product: 0 * NaN would reach the weight's gradient
            empty = token_weight == 0
            losses, nll = losses.masked_fill(empty, 0.0), nll.masked_fill(empty, 0.0)
            known = [s.masked_fill(empty, 0.0) if return_statistics else s for s in known]
        result = losses if token_weight is None else token_weight * losses
        result = result if reduction == "none" else result.sum()
    else:
        track = torch.is_grad_enabled()
        result, nll, *known = _SUM(
            *given,
            chunk_bytes,
            track and hidden.requires_grad,
            track and weight.requires_grad,
            track and bias is not None and bias.requires_grad,
            return_statistics,
            chosen,
        )[:4]
    if label_smoothing:
        lift = label_smoothing * _lift(given)
        lift = lift if token_weight is None else token_weight * lift
        result = result + (lift if reduction == "none" else lift.sum())
    if reduction == "mean":
        result = result / (target.shape[0] if token_weight is None else token_weight.to(result.dtype).sum())
    extras = ([nll.detach()] if return_nll else []) + (
        [RowStatistics(nll.detach(), *(s.detach() for s in known))] if return_statistics else []
    )
    return (result, *extras) if extras else result


def _counted(target: Tensor, token_weight: Tensor | None, ignore_index: int) -> Tensor | None:
    """Token weights, with 0 for rows whose target is ignore_index."""
    ignored = target == ignore_index
    if readable(target) and not bool(ignored.any()):
        return token_weight
    if token_weight is None:
        return torch.where(ignored, 0.0, 1.0)
    return token_weight.masked_fill(ignored, 0)


def _lift(given: LossArguments) -> Tensor:
    """mean_v(-log p_v) - nll = z_target - mean_v z_v, [R]; means are over the ids that are not forbidden.

    The mean of a row's logits is its product with the head's mean row, so no logit is formed.
    """
    hidden, weight, target, bias, token_weight, rows, forbidden, *_ = given
    wide, vocabulary = accumulation_dtype(hidden), weight.shape[0]
    share = torch.full((vocabulary,), 1 / max(1, vocabulary - (forbidden is not None)), dtype=wide, device=hidden.device)
    if forbidden is not None:
        share[forbidden] = 0.0
    x = counting(hidden, rows, token_weight)
    if token_weight is not None:
        empty = token_weight == 0
        target = target.masked_fill(empty, 0)
    with without_autocast(hidden):
        head = weight.to(wide)
        lift = (x.to(wide) * (F.embedding(target, head) - share @ head)).sum(1)
        if bias is not None:
            lift = lift + bias.to(wide)[target] - share @ bias.to(wide)
    return lift if token_weight is None else lift.masked_fill(empty, 0.0)


def _check_arguments(given: LossArguments, reduction: str, label_smoothing: float) -> None:
    """Raise ValueError if shapes, dtypes, devices or options do not fit together."""
    hidden, weight, target, bias, token_weight, rows, forbidden, rates, elapsed = given
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown{nearest(reduction, REDUCTIONS)}; choose {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if label_smoothing and rates is not None:
        raise ValueError("label_smoothing is not defined with rates, whose loss is not a cross-entropy; leave one of them out")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, D] and weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        here = ", which autocast makes it" if autocast_is_on(hidden) else ""
        raise ValueError(f"hidden is {hidden.dtype}{here}; pass bfloat16 or float32 (float16 logits overflow at 65,504)")
    if type(weight).__name__ == "DTensor":
        raise ValueError("weight is a DTensor; pass weight.full_tensor(), gathered once for forward and backward")
    vocabulary, count = weight.shape[0], (hidden if rows is None else rows).shape[0]
    if elapsed is not None and rates is None:
        raise ValueError("elapsed is given without rates, which it multiplies; pass rates, or leave elapsed out")
    for name, tensor, length in (
        ("target", target, count),
        ("token_weight", token_weight, count),
        ("bias", bias, vocabulary),
        ("rates", rates, vocabulary),
        ("elapsed", elapsed, count),
    ):
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    for name, tensor in (
        ("weight", weight),
        ("target", target),
        ("bias", bias),
        ("token_weight", token_weight),
        ("rows", rows),
        ("rates", rates),
        ("elapsed", elapsed),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; move one of them")
    for name, tensor in (("rates", rates), ("elapsed", elapsed)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but gets none; pass {name}.detach()")
    if forbidden is not None and not 0 <= forbidden < vocabulary:
        raise ValueError(f"forbidden is {forbidden}, outside the vocabulary of {vocabulary}")


def _check_values(given: LossArguments) -> None:
    """Raise ValueError for ids out of range, if they are on a CPU. On a GPU with ATAT_FAST_DEBUG=1, leave a device assertion."""
    hidden, target, token_weight, rows, forbidden = given.hidden, given.target, given.token_weight, given.rows, given.forbidden
    vocabulary = given.weight.shape[0]
    if readable(hidden):
        if token_weight is not None:  # a row of weight 0 may have any target, such as -100
            target = target[token_weight != 0]
        _check_ids("target has id", target, vocabulary, "the vocabulary of")
        if rows is not None:
            _check_ids("rows has", rows, hidden.shape[0], "hidden, whose row count is")
        if forbidden is not None and bool((target == forbidden).any()):
            raise ValueError(f"target has the forbidden id {forbidden}: its loss would be infinite")
    elif os.environ.get("ATAT_FAST_DEBUG") == "1" and hidden.is_cuda and not (torch.compiler.is_compiling() or transformed()):
        valid = (target >= 0) & (target < vocabulary)
        valid = valid if forbidden is None else valid & (target != forbidden)
        valid = valid if token_weight is None else valid | (token_weight == 0)
        torch._assert_async(valid.all(), f"a target is outside the vocabulary of {vocabulary}, or the forbidden id {forbidden}")


def _check_ids(name: str, ids: Tensor, limit: int, of: str) -> None:
    if ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= limit:
            raise ValueError(f"{name} {low if low < 0 else high}, outside {of} {limit}")


_FP64_ONLY = tuple((name, "hidden is float64, which only PyTorch computes") for name in ("cuda", "triton", "cpp"))


# The schemas take the fields of LossArguments. An op cannot return None: outputs that were not asked for are empty tensors.


def _sum(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss, each row's nll and statistics, the gradients of the weighted sum that are needed; with rates, row losses."""
    given, (chunk_bytes, *wanted, backend) = LossArguments(*arguments[:9]), arguments[9:]
    out = run_slabs(given, chunk_bytes, Wanted(*wanted), backend)
    losses = _row_losses(out, given)
    weighted = losses if given.token_weight is None else losses * given.token_weight
    loss = weighted.sum(dtype=torch.float64).to(out.nll.dtype)
    not_nll = out.velocity if given.rates is None else losses
    return loss, out.nll, out.max_probability, out.entropy, out.hidden, out.weight, out.bias, not_nll


def _row_losses(out: Totals, given: LossArguments) -> Tensor:
    """nll, or with rates u_target nll + velocity. For a target out of range, which has no rate, both are NaN or 0 already."""
    if given.rates is None:
        return out.nll
    own = given.rates.to(out.nll.dtype)[given.target.clamp(0, len(given.rates) - 1)]
    return torch.addcmul(out.velocity, own, out.nll)


def _sum_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given, (_, *wanted, _) = LossArguments(*arguments[:9]), arguments[9:]
    out = _totals_fake(given, Wanted(*wanted))
    loss = given.hidden.new_empty((), dtype=out.nll.dtype)
    return loss, out.nll, out.max_probability, out.entropy, out.hidden, out.weight, out.bias, out.velocity


def _totals_fake(given: LossArguments, wanted: Wanted) -> Totals:
    hidden, count, (vocabulary, width) = given.hidden, given.target.shape[0], given.weight.shape
    wide = accumulation_dtype(hidden)
    statistics = count if wanted.statistics else 0
    return Totals(
        nll=hidden.new_empty(count, dtype=wide),
        max_probability=hidden.new_empty(statistics, dtype=wide),
        entropy=hidden.new_empty(statistics, dtype=wide),
        velocity=hidden.new_empty(0 if given.rates is None else count, dtype=wide),
        hidden=hidden.new_empty((count if wanted.hidden else 0, width), dtype=wide),
        weight=hidden.new_empty((vocabulary if wanted.weight else 0, width), dtype=wide),
        bias=hidden.new_empty(vocabulary if wanted.bias else 0, dtype=wide),
    )


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = LossArguments(*inputs[:9])
    _, nll, _, _, dhidden, dweight, dbias, losses = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # gradient outputs have no upstream: zeros for them would cost V * D a step
    ctx.forbidden, ctx.needed = given.forbidden, inputs[10:13]
    ctx.save_for_backward(nll if given.rates is None else losses, dhidden, dweight, dbias, *given._replace(forbidden=None))


def _sum_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none: tuple[Any, ...] = (None,) * 15
    if grad is None:
        return none
    losses, dhidden, dweight, dbias, *kept = ctx.saved_tensors
    given = LossArguments(*kept)._replace(forbidden=ctx.forbidden)
    if again():
        return *pull(lambda *values: plain_sum(LossArguments(*values)), tuple(given), grad), *none[9:]
    dh, dw, db, dloss = torch.ops.atat_fast.linear_cross_entropy_scale(
        grad, dhidden, dweight, dbias, losses, given.rows, given.hidden.shape[0], given.hidden.dtype
    )
    need_hidden, need_weight, need_bias = ctx.needed
    return (
        dh if need_hidden else None,
        dw.to(given.weight.dtype) if need_weight else None,
        None,
        db.to(given.bias.dtype) if need_bias and given.bias is not None else None,
        None if given.token_weight is None else dloss.to(given.token_weight.dtype),
        *none[5:],
    )


def _scale(
    grad: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    nll: Tensor,
    rows: Tensor | None,
    num_hidden: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _scatter((dhidden * grad).to(dtype), rows, num_hidden), dweight * grad, dbias * grad, nll * grad


def _scatter(dhidden: Tensor, rows: Tensor | None, num_hidden: int) -> Tensor:
    """Gradients of all rows from those of the rows that count: zeros elsewhere; a row listed twice gets the sum."""
    if rows is None:
        return dhidden
    total = dhidden.new_zeros((num_hidden, dhidden.shape[1]))
    return total.index_add_(0, rows, dhidden) if dhidden.shape[0] else total


def _scale_fake(
    grad: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    nll: Tensor,
    rows: Tensor | None,
    num_hidden: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = dhidden.shape[0] if rows is None else num_hidden
    dh = dhidden.new_empty((count, dhidden.shape[1]), dtype=dtype)
    return dh, torch.empty_like(dweight), torch.empty_like(dbias), torch.empty_like(nll)


def _of_rows(arguments: tuple[Any, ...]) -> tuple[LossArguments, tuple[Any, ...]]:
    """Arguments of the per-row form as (LossArguments, the rest); it has no token weights."""
    hidden, weight, target, bias, rows, forbidden, rates, elapsed, *rest = arguments
    return LossArguments(hidden, weight, target, bias, None, rows, forbidden, rates, elapsed), tuple(rest)


def _rows(*arguments: Any) -> tuple[Tensor, ...]:
    """Each row's loss, its nll if rates make that another number, and its statistics. One product, no buffer for gradients."""
    given, (chunk_bytes, statistics, backend) = _of_rows(arguments)
    out = run_slabs(given, chunk_bytes, Wanted(statistics=statistics), backend)
    nll = out.velocity if given.rates is None else out.nll
    return _row_losses(out, given), nll, out.max_probability, out.entropy


def _rows_plain(*arguments: Any) -> tuple[Tensor, ...]:
    given, (_, statistics, _) = _of_rows(arguments)
    return plain_rows(given, statistics)


def _rows_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given, (_, statistics, _) = _of_rows(arguments)
    out = _totals_fake(given, Wanted(statistics=statistics))
    return out.nll, out.velocity, out.max_probability, out.entropy


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, (ctx.chunk_bytes, _, ctx.backend) = _of_rows(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.forbidden = given.forbidden
    ctx.save_for_backward(*given._replace(forbidden=None))


def _rows_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none: tuple[Any, ...] = (None,) * 11
    if grad is None:
        return none
    hidden, weight, target, bias, _, rows, _, rates, elapsed = ctx.saved_tensors
    inputs = (hidden, weight, target, bias, rows, ctx.forbidden, rates, elapsed)
    if again():
        return *pull(lambda *values: plain_rows(_of_rows(values)[0])[0], inputs, grad), *none[8:]
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dh, dw, db = torch.ops.atat_fast.linear_cross_entropy_rows_backward(
        grad, *inputs, ctx.chunk_bytes, need_hidden, need_weight, need_bias, ctx.backend
    )
    return (
        dh if need_hidden else None,
        dw.to(weight.dtype) if need_weight else None,
        None,
        db.to(bias.dtype) if need_bias else None,
        *none[4:],
    )


def _rows_grad(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of the per-row form: the weighted sum's gradients, with the upstream vector as token weights."""
    given, (chunk_bytes, *needs, backend) = _of_rows(arguments)
    out = run_slabs(given._replace(token_weight=grad), chunk_bytes, Wanted(*needs), backend)
    dhidden = out.hidden.to(given.hidden.dtype)
    return _scatter(dhidden, given.rows, given.hidden.shape[0]) if needs[0] else dhidden, out.weight, out.bias


def _rows_grad_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, (_, *needs, _) = _of_rows(arguments)
    out, (count, width) = _totals_fake(given, Wanted(*needs)), given.hidden.shape
    return given.hidden.new_empty((count if needs[0] else 0, width)), out.weight, out.bias


backends("linear_cross_entropy", cuda=_sum, triton=_sum, cpp=_sum, torch=_sum)
_SUM = register(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? token_weight, Tensor? rows, "
    "int? forbidden, Tensor? rates, Tensor? elapsed, int chunk_bytes, bool need_hidden, bool need_weight, bool need_bias, "
    "bool statistics, str backend) -> (Tensor loss, Tensor nll, Tensor max_probability, Tensor entropy, Tensor dhidden, "
    "Tensor dweight, Tensor dbias, Tensor losses)",
    _sum,
    _sum_fake,
    backward=_sum_backward,
    setup=_sum_setup,
)
register(
    "linear_cross_entropy_scale(Tensor grad, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor nll, Tensor? rows, "
    "SymInt num_hidden, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _scale,
    _scale_fake,
)
_ROWS = register(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? rows, int? forbidden, "
    "Tensor? rates, Tensor? elapsed, int chunk_bytes, bool statistics, str backend) "
    "-> (Tensor losses, Tensor nll, Tensor max_probability, Tensor entropy)",
    _rows,
    _rows_fake,
    backward=_rows_backward,
    setup=_rows_setup,
    plain=_rows_plain,
)
register(
    "linear_cross_entropy_rows_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? rows, "
    "int? forbidden, Tensor? rates, Tensor? elapsed, int chunk_bytes, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _rows_grad,
    _rows_grad_fake,
)


def linear_cross_entropy_cost(
    rows: int, width: int, vocabulary: int, *, element_size: int = 2, backward: bool = True, recompute: bool = False
) -> Cost:
    """One product forward, two more for gradients, a fourth if logits are computed again. Bytes: the product writes the slab, the
    row pass reads and rewrites it, the two gradient products read it; the weight's fp32 gradient is written.
    """
    products = (1 + 2 * backward) + (backward and recompute)
    slab = rows * vocabulary * element_size
    passes = 2 + (3 if backward else 0) + (2 if backward and recompute else 0)
    edges = (rows * width + vocabulary * width) * element_size
    return Cost(
        flops=2 * products * rows * width * vocabulary,
        bytes=slab * passes + edges * products + (4 * vocabulary * width if backward else 0),
    )
