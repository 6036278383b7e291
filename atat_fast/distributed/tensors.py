"""Tensors that may be sharded over ranks: this rank's part, the whole, and a part cut from a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective call if it is sharded."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, which every rank has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return full
    # src_data_rank None sends nothing: every rank cuts its own part.
    placed = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


@torch.no_grad()
def load_parts(targets: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into tensors of the same names, sharded or not, one at a time."""
    for name, value in values:
        mine = local(targets[name])
        mine.copy_(part_like(value.detach().to(mine.device), targets[name]))
