"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982) for many matrices at once.

    m <- lerp(m, g, 1 - momentum),   u = lerp(g, m, momentum),   w <- (1 - lr decay) w - 0.2 lr sqrt(max(rows, columns)) O(u)

O is five steps of a Newton-Schulz iteration towards the nearest orthogonal matrix. Matrices of one shape, and of its transpose,
are stacked and made orthogonal together: about twenty launches for a shape instead of for each matrix. The products are bf16 if
the device multiplies it fast, else fp32; either will do, for the iteration's limit is not exact.

Under FSDP a matrix is in pieces, and only a whole one can be made orthogonal. Each rank assembles some of the matrices, makes
them orthogonal, and sends the pieces back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from atat_fast.distributed.tensors import local
from atat_fast.ops.processor import multiplies_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
LEAST_NORM = 1e-7
MOST = 1 << 25
"""Most elements of a stack, so that temporary memory stays below 0.4 GB."""


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", up to rounding; its state has the same names.

    params: matrices, plain or DTensors sharded by rows. dtype: of the products; by default bf16 if it is fast, else fp32.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"muon moves matrices, and one of its parameters has shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for some in stacks(moving):
                self._move(some, group)

    def _move(self, some: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape or its transpose."""
        sharded = isinstance(some[0], DTensor)
        mine = [local(p) for p in some]
        grads = [local(p.grad) for p in some if p.grad is not None]
        momenta = [local(self.state[p]["momentum_buffer"]) for p in some]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        moved = self._across_ranks(some, updates) if sharded else self._orthogonal(updates)
        scale = 0.2 * group["lr"] * math.sqrt(max(some[0].shape))
        torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(mine, moved, alpha=-scale)

    def _orthogonal(self, updates: Sequence[Tensor]) -> list[Tensor]:
        """The orthogonalised updates, each in its own shape: those of one shape, then those of its transpose."""
        dtype = self.dtype or products_dtype(updates[0].device)
        wide = [u for u in updates if u.shape[0] <= u.shape[1]]
        tall = [u for u in updates if u.shape[0] > u.shape[1]]
        stacked = [torch.stack(wide).to(dtype)] if wide else []
        stacked += [torch.stack(tall).to(dtype).mT] if tall else []
        x = orthogonal(torch.cat(stacked) if len(stacked) > 1 else stacked[0]).to(updates[0].dtype)
        of_wide, of_tall = iter(x[: len(wide)].unbind()), iter(x[len(wide) :].mT.contiguous().unbind())
        return [next(of_wide if u.shape[0] <= u.shape[1] else of_tall) for u in updates]

    def _across_ranks(self, some: Sequence[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """This rank's pieces of the orthogonalised updates, from its pieces of updates. Rank i % ranks assembles matrix i.

        Pieces travel in the dtype of the products, which they are rounded to in any case.
        """
        group, ranks, rank = _group_of(some[0])
        dtype = self.dtype or products_dtype(updates[0].device)
        moved: list[Tensor] = []
        for first in range(0, len(some), ranks):
            turn = range(first, min(first + ranks, len(some)))
            rows = [_rows_of(some[i].shape[0], ranks) for i in turn]
            widths = [some[i].shape[1] for i in turn]
            out = [rows[j][rank] * widths[j] for j in range(len(turn))] + [0] * (ranks - len(turn))
            owner = rank if rank < len(turn) else None
            back = [n * widths[owner] for n in rows[owner]] if owner is not None else [0] * ranks
            whole = updates[first].new_empty(sum(back), dtype=dtype)
            sent = torch.cat([updates[i].flatten() for i in turn]).to(dtype)
            dist.all_to_all_single(whole, sent, back, out, group=group)
            if owner is not None:
                (made,) = self._orthogonal([whole.view(some[first + owner].shape)])
                whole = made.contiguous().flatten()
            pieces = torch.empty_like(sent)
            dist.all_to_all_single(pieces, whole, out, back, group=group)
            split = pieces.to(updates[first].dtype).split(out[: len(turn)])
            moved += [piece.view(updates[i].shape) for piece, i in zip(split, turn, strict=True)]
        return moved


def orthogonal(x: Tensor) -> Tensor:
    """A new tensor: matrices [N, R, C], R <= C, with singular values pushed towards one (into 0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide).clamp(min=LEAST_NORM).to(x.dtype)
    exact = x.dtype is wide and x.device.type == "cpu"  # a GPU may take fp32 products in TF32
    if exact and 2 * x.shape[2] >= 3 * x.shape[1]:
        return _factor(x @ x.mT) @ x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _factor(gram: Tensor) -> Tensor:
    """The [N, R, R] matrix by which the iteration multiplies x, from x x^T.

    A step multiplies x by a polynomial P of its gram matrix, and so turns that into P gram P. Only R x R matrices are multiplied:
    0.55 of the operations at C = 4 R. In bf16 it would diverge, for rounding makes the gram's small eigenvalues negative.
    """
    a, b, c = COEFFICIENTS
    product = gram
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product if step else factor
        gram = factor @ gram @ factor if step + 1 < STEPS else gram
    return product


def stacks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters grouped by shape, with its transpose; a group has at most MOST elements, or one matrix."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
    for found in by_shape.values():
        count = max(1, MOST // max(1, found[0].numel()))
        for first in range(0, len(found), count):
            yield found[first : first + count]


def products_dtype(device: torch.device) -> torch.dtype:
    """bf16 if the device multiplies it fast, else fp32."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def _group_of(parameter: Tensor) -> tuple[dist.ProcessGroup, int, int]:
    """The group of ranks that hold a DTensor's pieces, its size, and this rank's number in it."""
    assert isinstance(parameter, DTensor)
    (dimension,) = (i for i, placement in enumerate(parameter.placements) if placement == Shard(0))
    mesh = parameter.device_mesh
    return mesh.get_group(dimension), mesh.size(dimension), mesh.get_local_rank(dimension)


def _rows_of(rows: int, ranks: int) -> list[int]:
    """Rows of a matrix that each rank holds, as torch.chunk cuts it."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]
