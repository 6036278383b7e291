"""Counts the bytes that this rank sends in collectives, as rings send them: (n - 1) / n of the data, and twice that for a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": ("all-reduce", 2, 0),
    "_allgather_base_": ("all-gather", 1, 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "alltoall_base_": ("all-to-all", 1, 1),
}
"""torch's collectives: a name, how often the data goes round, and which argument holds all of it."""


class Wire(TorchDispatchMode):
    """Inside, `sent` has the bytes of each kind of collective; `least`: smaller ones, such as a norm's sum, are left out."""

    def __init__(self, least: int = 256) -> None:
        super().__init__()
        self.least = least
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func.name().removeprefix("c10d::").split(".")[0]) in KINDS:
            kind, rounds, place = KINDS[name]
            data = args[place] if isinstance(args[place], list) else [args[place]]
            ranks = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject))
            size = sum(t.nbytes for t in data)
            if size >= self.least:
                self.sent[kind] = self.sent.get(kind, 0.0) + rounds * size * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))
