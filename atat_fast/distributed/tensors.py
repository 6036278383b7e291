"""Tensors that may be spread over ranks: the part that lies here, the whole, and a part cut from a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, sharing its memory."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: a collective call where it is sharded."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, as it lies here of `like`: the shard where that is sharded."""
    if not isinstance(like, DTensor):
        return full
    # Nothing is sent: every rank cuts its own part.
    placed = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


@torch.no_grad()
def load_parts(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors on the CPU into tensors of any spread, by name."""
    for name, target in targets.items():
        mine = local(target)
        mine.copy_(part_like(values[name].to(mine.device), target))
