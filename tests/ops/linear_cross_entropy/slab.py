"""The row pass of linear_cross_entropy on a slab of logits, its definition in fp64, and the comparison of both."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from op_checks import BF16, F64, Guards
from torch import Tensor

from atat_fast.ops.linear_cross_entropy.row_pass import cross_entropy_

INF, NAN = math.inf, math.nan


@dataclass
class Slab:
    """The pass's inputs."""

    logits: Tensor
    target: Tensor
    token_weight: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    rates: Tensor | None = None
    elapsed: Tensor | None = None

    def to(self, device):
        return Slab(**{name: None if t is None else t.to(device) for name, t in vars(self).items()})


@dataclass
class Result:
    """The pass's outputs."""

    logits: Tensor
    nll: Tensor
    max_probability: Tensor | None
    entropy: Tensor | None
    bias_gradient: Tensor | None
    velocity: Tensor | None = None

    def __iter__(self):
        return iter(tensor for tensor in vars(self).values() if tensor is not None)


class OnHost:
    """The CUDA kernels, compiled for the CPU, on cross_entropy_'s arguments; guards lie around all they write.

    Rows are kept in shared memory where `kept`, and read twice where not. Column sums are those of the gradients as stored.
    """

    class Arguments(ctypes.Structure):
        """RowArguments of csrc/cross_entropy/rule.h."""

        _fields_ = [
            *((n, ctypes.c_void_p) for n in ("logits", "target", "token_weight", "hidden", "weight", "bias", "nll")),
            *((n, ctypes.c_void_p) for n in ("max_probability", "entropy", "bias_gradient", "rates", "elapsed", "velocity")),
            *((n, ctypes.c_int64) for n in ("rows", "columns", "stride", "width", "vocabulary")),
            ("gradient", ctypes.c_bool),
            ("half", ctypes.c_bool),
        ]

    def __init__(self, library):
        self.library = library
        for name in ("bytes_of_row", "threads_of_kept_row", "splits_of", "argument_bytes"):
            getattr(library, name).restype = ctypes.c_int64
        library.bytes_of_row.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        library.threads_of_kept_row.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
        library.splits_of.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        library.run_cross_entropy.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p, ctypes.c_uint]
        assert library.argument_bytes() == ctypes.sizeof(self.Arguments)

    def __call__(self, logits, gradient, *, kept=True, threads=64, seed=0, **given):
        (rows, columns), stride, guards = logits.shape, logits.stride(0), Guards()
        half, weight, sums = logits.dtype is BF16, given["weight"], given["bias_gradient"]
        here = guards.strided((rows, columns), (stride, 1), logits.dtype, logits.data_ptr() % 16 // logits.element_size())
        aligned = here.data_ptr() % 16 == 0 and stride * logits.element_size() % 16 == 0
        written = {
            n: given[n] for n in ("nll", "max_probability", "entropy", "velocity", "bias_gradient") if given[n] is not None
        }
        inside = {"logits": here, **{n: guards.empty(t.shape, t.dtype) for n, t in written.items()}}
        written["logits"] = logits
        for name, tensor in written.items():
            inside[name].copy_(tensor)
        partial = guards.empty((self.library.splits_of(rows, columns, half) * columns,), torch.float32)
        pointers = {n: None if t is None else t.data_ptr() for n, t in (given | inside).items()}
        call = self.Arguments(
            **pointers,
            rows=rows,
            columns=columns,
            stride=stride,
            width=0 if weight is None else weight.shape[1],
            vocabulary=columns if weight is None else min(columns, len(weight)),
            gradient=gradient,
            half=half,
        )
        assert self.library.run_cross_entropy(ctypes.byref(call), aligned, kept, threads, partial.data_ptr(), seed) == 0
        guards.check()
        if gradient and sums is not None:
            want = sums.double() + here.double().sum(0)
            torch.testing.assert_close(inside["bias_gradient"].double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)
        for name, tensor in written.items():
            tensor.copy_(inside[name])


def run(backend, slab, *, gradient=True, reports=True, sums=True, in_place=False, start=None):
    """The pass on a copy of the slab; outputs hold NaN before, and `start` the column sums. backend: a name, or an OnHost."""
    logits = slab.logits if in_place else slab.logits.clone()
    wide = F64 if logits.dtype is F64 else torch.float32
    fresh = functools.partial(logits.new_full, (len(logits),), NAN, dtype=wide)
    bias_gradient = (logits.new_zeros(logits.shape[1], dtype=wide) if start is None else start.clone()) if sums else None
    made = Result(
        logits,
        fresh(),
        fresh() if reports else None,
        fresh() if reports else None,
        bias_gradient,
        None if slab.rates is None else fresh(),
    )
    call = functools.partial(cross_entropy_, backend=backend) if isinstance(backend, str) else backend
    call(**(vars(slab) | vars(made)), gradient=gradient)
    return made


def make(rows, columns, dtype, *, weighted=True, recomputed=True, forbidden=True, spread=3.0, width=24, rated=False, aged=True):
    """A slab as linear_cross_entropy makes it: logits are a product rounded to dtype, and one column may not be chosen.

    With `rated` it has rates from 0.2 to 3, and NaN behind them, and with `aged` times up to 4: they move logits by up to ten.
    """
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(columns, width) * spread / width**0.5).to(dtype)
    bias = torch.randn(columns).to(dtype)
    target = torch.randint(0, columns, (rows,))
    if forbidden and columns > 1:
        bias[columns // 2] = -INF
        target[target == columns // 2] = columns - 1 if columns > 2 else 0
    logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
    token_weight = torch.randn(rows) if weighted else None
    if token_weight is not None and rows > 1:
        token_weight[rows // 2] = 0
    slab = Slab(logits, target, token_weight, *((hidden, weight, bias) if recomputed else (None, None, None)))
    if rated:
        slab.rates = torch.full((columns + 16,), NAN)[:columns].copy_(0.2 + 2.8 * torch.rand(columns))
        slab.elapsed = 4 * torch.rand(rows) if aged else None
    return slab


def truth(slab):
    """The definitions in fp64, relative to the target: p_j = e^(z_j - z_t) / (1 + S), S = sum of e^(z_j - z_t), j != t.

    Also the sum of the magnitudes that each gradient is a difference of, and those of each velocity. Without rates all are 1.
    """
    z, column = slab.logits.double(), slab.target[:, None]
    w = torch.ones_like(z[:, 0]) if slab.token_weight is None else slab.token_weight.double()
    rates = torch.ones_like(z[0]) if slab.rates is None else slab.rates.double()
    age = torch.zeros_like(w) if slab.elapsed is None else slab.elapsed.double()
    own = rates[slab.target]
    at_target = z.gather(1, column)[:, 0]
    if slab.hidden is not None:
        at_target = (slab.hidden.double() * slab.weight.double()[slab.target]).sum(1) + slab.bias.double()[slab.target]
    x = z - age[:, None] * rates - (at_target - age * own)[:, None]
    odds = x.exp().scatter(1, column, 0.0)
    others = odds.sum(1)
    p, q, live = odds / (1 + others)[:, None], others / (1 + others), w != 0
    entropy = others.log1p() - (odds * x.clamp(min=-1e4)).sum(1) / (1 + others)
    mean = (p * rates).sum(1)
    velocity = mean - own * q if slab.rates is not None else torch.zeros_like(w)
    of_target = -w * (own * q**2 + mean / (1 + others)) if slab.rates is not None else -w * q
    gradient = (w[:, None] * p * (rates - velocity[:, None])).scatter(1, column, of_target[:, None])
    size = (w[:, None] * p * (rates + mean[:, None] + (own * q)[:, None])).abs().scatter(1, column, 0.0) + gradient.abs()
    largest = torch.maximum(p.amax(1), 1 / (1 + others))
    gradient, size, nll, largest, entropy, velocity, speeds = (
        torch.where(live[:, None] if t.dim() == 2 else live, t, 0.0)
        for t in (gradient, size, others.log1p(), largest, entropy, velocity, mean + own * q)
    )
    rated = None if slab.rates is None else velocity
    return Result(gradient, nll, largest, entropy, gradient.sum(0), rated), size, speeds


def compare(got, slab, strict=False):
    """Losses to fp32's rounding, of logits too, and gradients to one rounding to their dtype more. `strict` is for losses."""
    want, size, speeds = truth(slab)
    rounding, columns = 2**-8 * 1.001 if got.logits.dtype is BF16 else 0, slab.logits.shape[1]
    if slab.rates is None:
        close = functools.partial(torch.testing.assert_close, rtol=5e-6 if strict else 4e-6)
        close(got.nll.double(), want.nll, atol=0 if strict else 2e-6)
        close(got.max_probability.double(), want.max_probability, atol=0)
        close(got.entropy.double(), want.entropy, atol=2e-6 * max(1.0, math.log(columns)))
        allowed = (rounding + 6e-6) * want.logits.abs() + 1e-37
    else:
        torch.testing.assert_close(got.nll.double(), want.nll, atol=4e-6, rtol=8e-6)
        for ours, exact in ((got.max_probability, want.max_probability), (got.entropy, want.entropy)):
            torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
        assert ((got.velocity.double() - want.velocity).abs() <= 2e-5 * speeds).all()
        allowed = (rounding * 1.01 + 2e-5) * size + 1e-37
    assert ((got.logits.double() - want.logits).abs() <= allowed).all()
    assert ((got.bias_gradient.double() - want.bias_gradient).abs() <= allowed.sum(0) + 1e-37).all()
