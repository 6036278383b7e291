"""Argument checks of linear_cross_entropy."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from atat_fast.errors import nearest
from atat_fast.ops.linear_cross_entropy.slabs import LossArguments
from atat_fast.ops.registry import autocast_is_on, readable, transformed

REDUCTIONS = ("sum", "mean", "none")


def check_arguments(given: LossArguments, reduction: str, label_smoothing: float) -> None:
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
            raise ValueError(f"{name} requires a gradient, and there is none for it; pass {name}.detach()")
    if forbidden is not None and not 0 <= forbidden < vocabulary:
        raise ValueError(f"forbidden is {forbidden}, outside the vocabulary of {vocabulary}")


def check_values(given: LossArguments) -> None:
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
