"""The loop of linear_cross_entropy over slabs of logits.

A slab is some of the rows that count by the whole vocabulary, within a byte budget. One product makes its logits, the row pass
(row_pass.py) turns them in place into the gradient of the weighted sum, and two products add that to dX and dW. Logits, their
gradient and the gathered rows share buffers made once. dW is fp32; the first slab writes it, so nothing is filled with zeros.
No step waits for the device.

On a GPU the vocabulary is padded to a multiple of 128, so rows are aligned for any V. Padding columns and the forbidden column
have a bias of -inf: their probability, gradient, rows of dW and entries of dbias are exactly 0, and no kernel branches for them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atat_fast.ops.linear_cross_entropy.row_pass import cross_entropy_
from atat_fast.ops.processor import widens_bf16
from atat_fast.ops.registry import constant_in_graphs

CHUNK_BYTES_GPU = 256 << 20
CHUNK_BYTES_CPU = 64 << 20
CHUNK_BYTES_LOW = 32 << 20
"""Bytes of a slab: the least on a GPU (see `default_budget`), on a CPU, and in low_memory mode."""

PADDED = 128


@constant_in_graphs
def default_budget(device: torch.device) -> int:
    """Bytes of a slab if the caller gives none: 64 MB on a CPU; on a GPU the largest power of two within a 64th of its memory,
    from 256 MB (24 GB) to 1 GB (80 GB). Fewer and larger products are faster: docs/notes/gpu.md has the sweep.
    """
    return _budget(device)


@functools.cache
def _budget(device: torch.device) -> int:
    if device.type == "cpu":
        return CHUNK_BYTES_CPU
    if device.type != "cuda" or not torch.cuda.is_available():
        return CHUNK_BYTES_GPU
    share = torch.cuda.get_device_properties(device).total_memory // 64
    return min(1 << 30, max(CHUNK_BYTES_GPU, 1 << (share.bit_length() - 1)))


class LossArguments(NamedTuple):
    """The arguments of linear_cross_entropy that define the loss, in the order of its schemas."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    token_weight: Tensor | None = None
    rows: Tensor | None = None
    forbidden: int | None = None
    rates: Tensor | None = None
    elapsed: Tensor | None = None


@dataclass
class Totals:
    """Sums over slabs. An op cannot return None, so an output that was not asked for is an empty tensor."""

    nll: Tensor  # [R]
    max_probability: Tensor  # [R] or [0]
    entropy: Tensor  # [R] or [0]
    velocity: Tensor  # [R], or [0] without rates
    hidden: Tensor  # [R, D] fp32, gradient of the rows that count
    weight: Tensor  # [V, D] fp32
    bias: Tensor  # [V] fp32


@dataclass(frozen=True)
class Wanted:
    """The outputs of a call besides nll."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    statistics: bool = False

    @property
    def gradient(self) -> bool:
        """Whether slabs become gradients; if not, there is one product and no buffer for gradients."""
        return self.hidden or self.weight or self.bias


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def most_rows(chunk_bytes: int, vocabulary: int, element_size: int, *, multiple: int) -> int:
    """Rows within a budget, rounded down to a multiple of `multiple`, but at least that many. Does not depend on D."""
    return max(multiple, chunk_bytes // max(1, vocabulary * element_size) // multiple * multiple)


def rows_per_slab(chunk_bytes: int, vocabulary: int, element_size: int, count: int, *, multiple: int) -> int:
    """Rows of a slab, a multiple of `multiple`: equal over as few slabs as the budget allows, so that none is tiny."""
    most = most_rows(chunk_bytes, vocabulary, element_size, multiple=multiple)
    slabs = max(1, -(-count // most))
    equal = -(-count // slabs)
    return max(1, -(-equal // multiple) * multiple)


def new_slab(hidden: Tensor, columns: int, count: int, chunk_bytes: int, *, multiple: int) -> Tensor:
    """The buffer for slabs of `count` rows. Counts change every step, and buffers of many sizes would fragment a GPU's memory:
    all counts that need several slabs share one size, and smaller ones are rounded up to a power of two.
    """
    most = most_rows(chunk_bytes, columns, hidden.element_size(), multiple=multiple)
    rounded = 1 << max(0, count - 1).bit_length()
    return hidden.new_empty((min(most, rounded) if count else 0, columns))


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, forbidden: int | None) -> tuple[Tensor, Tensor | None]:
    """The head in hidden's dtype: weight [V', D] and bias [V'] or None; V' is V, on a GPU padded."""
    vocabulary, width = weight.shape
    on_gpu = hidden.device.type == "cuda"
    columns = -(-vocabulary // PADDED) * PADDED if on_gpu else vocabulary
    if columns == vocabulary or (weight.dtype is hidden.dtype and vocabulary % 8 == 0):
        columns = vocabulary
        w = weight.to(hidden.dtype).contiguous()
    else:
        w = hidden.new_empty((columns, width))
        w[:vocabulary].copy_(weight)
        w[vocabulary:].zero_()
    if bias is None and forbidden is None and columns == vocabulary:
        return w, None
    b = hidden.new_zeros(columns)
    if bias is not None:
        b[:vocabulary].copy_(bias)
    b[vocabulary:].fill_(-torch.inf)
    if forbidden is not None:
        b[forbidden : forbidden + 1].fill_(-torch.inf)
    return w, b


def run_slabs(given: LossArguments, chunk_bytes: int, wanted: Wanted, backend: str) -> Totals:
    """Run every slab. Gradients are of sum(token_weight * nll), or with rates of
    sum(token_weight * (rates[target] * nll + velocity)).
    """
    hidden, weight, target, bias, token_weight, rows, forbidden, rates, elapsed = given
    if widens_bf16(hidden):  # products are fp32, and the head is not rounded to bf16
        with torch.autocast("cpu", enabled=False):
            return run_slabs(given._replace(hidden=hidden.float()), chunk_bytes, wanted, backend)
    wide = accumulation_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    w, b = head_of(hidden, weight, bias, forbidden)
    columns = w.shape[0]
    multiple = PADDED if hidden.device.type == "cuda" else 16
    step = rows_per_slab(chunk_bytes, columns, hidden.element_size(), count, multiple=multiple)
    exact = None if wide is hidden.dtype else w[:vocabulary]
    if columns != vocabulary:  # a target in the padding is out of range too
        target = torch.where(target < vocabulary, target, -1)

    statistics = count if wanted.statistics else 0
    out = Totals(
        nll=hidden.new_empty(count, dtype=wide),
        max_probability=hidden.new_empty(statistics, dtype=wide),
        entropy=hidden.new_empty(statistics, dtype=wide),
        velocity=hidden.new_empty(0 if rates is None else count, dtype=wide),
        hidden=hidden.new_empty((count if wanted.hidden else 0, width), dtype=wide),
        weight=hidden.new_empty((columns if wanted.weight else 0, width), dtype=wide),
        bias=hidden.new_zeros(columns if wanted.bias else 0, dtype=wide),
    )
    if count == 0:
        out.weight.zero_()
    if token_weight is not None:
        token_weight = token_weight.to(wide).contiguous()
    if rates is not None:
        rates, unpadded = hidden.new_zeros(columns, dtype=wide), rates
        rates[:vocabulary].copy_(unpadded)
        elapsed = None if elapsed is None else elapsed.to(wide).contiguous()
    slab = new_slab(hidden, columns, count, chunk_bytes, multiple=multiple)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        x = hidden[part] if rows is None else hidden.index_select(0, rows[part])
        scale = None if token_weight is None else token_weight[part]
        if scale is not None:  # a row of weight 0 may be inf or NaN, and 0 * inf would reach dW
            x = torch.where(scale[:, None] == 0, 0.0, x)
        x = x.contiguous()
        z = slab[: x.shape[0]]
        if b is None:
            torch.mm(x, w.t(), out=z)
        else:
            torch.addmm(b, x, w.t(), out=z)
        cross_entropy_(
            z,
            target[part].contiguous(),
            scale,
            None if exact is None else x,
            exact,
            b,
            wanted.gradient,
            out.nll[part],
            out.max_probability[part] if wanted.statistics else None,
            out.entropy[part] if wanted.statistics else None,
            out.bias if wanted.bias else None,
            rates,
            None if rates is None or elapsed is None else elapsed[part],
            None if rates is None else out.velocity[part],
            backend,
        )
        if wanted.hidden:
            _gradient_of_rows(out.hidden[part], z, w)
        if wanted.weight:
            _add_product(out.weight, z.t(), x, first=start == 0)
    out.weight, out.bias = out.weight[:vocabulary], out.bias[:vocabulary]
    return out


def _gradient_of_rows(total: Tensor, z: Tensor, w: Tensor) -> None:
    """total = z w in total's dtype.

    Rounded to bf16 here and again after the upstream is applied, a gradient is wrong in one direction: by 6e-4 of its size for
    an upstream of 1 / 769. A CPU's bf16 product is rounded, so the vocabulary's halves are added in fp32: their sums do not lie
    on bf16's grid, and the second rounding is as even as one alone.
    """
    if total.dtype is z.dtype or z.device.type == "cuda":
        _add_product(total, z, w, first=True)
    else:
        half = z.shape[1] // 2
        for columns in (slice(half), slice(half, None)):
            _add_product(total, z[:, columns], w[columns], first=columns.start is None)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a b in total's dtype; the first product writes total instead."""
    if a.dtype is total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.device.type == "cuda":  # bf16 products with fp32 sums and output: no temporary, no cast
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
