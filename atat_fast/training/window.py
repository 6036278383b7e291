"""Sums between two log lines: kept on the device, by each rank for its own slots, until read."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from atat_fast.distributed.ranks import Ranks

LOCAL = ("bad", "odd")
"""Steps, not sums: the first step with a gradient, and with a loss on this rank, that was not finite; -1 for none."""


class Window:
    """Sums since the last log line. `norm` is the global batch's on every rank; other sums are this rank's share."""

    def __init__(self, ranks: Ranks, device: torch.device, step: int) -> None:
        self.ranks, self.device = ranks, device
        zero = torch.zeros((), device=device)
        none = torch.full_like(zero, -1, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {"loss": zero.clone(), "norm": zero.clone(), "bad": none, "odd": none.clone()}
        self.first = self.timed_from = step
        self.begin = time.perf_counter()

    def add(self, name: str, part: Tensor) -> None:
        """Add to a sum; the first part starts it."""
        self.sums[name] = self.sums[name] + part if name in self.sums else part

    def step(self, number: int, norm: Tensor) -> None:
        """Note the gradient's norm in step `number`, and anything not finite, without waiting for the device."""
        self.add("norm", norm)
        for name, fine in (("odd", torch.isfinite(self.sums["loss"])), ("bad", torch.isfinite(norm))):
            known = self.sums[name]
            self.sums[name] = torch.where(~fine & (known < 0), number, known)

    def totals(self) -> dict[str, Any]:
        """Each sum over all ranks, as a number or a list."""
        names = sorted(self.sums.keys() - set(LOCAL))
        flat = [self.sums[name].detach().flatten() for name in names]
        values = torch.cat([part.double() for part in flat]).cpu()
        total = self.ranks.total(values)
        parts = dict(zip(names, total.split([len(part) for part in flat]), strict=True))
        parts["norm"] = parts["norm"] / self.ranks.size
        return {name: part.view(self.sums[name].shape).tolist() for name, part in parts.items()}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: the first step, and every rank's sums."""
        mine = {name: value.tolist() for name, value in self.sums.items() if name not in LOCAL}
        return {"step": self.first, "ranks": self.ranks.gather(mine)}

    def load(self, state: dict[str, Any]) -> None:
        """Load a state: this rank's own part if there are as many ranks as then, else the sum of all on rank 0."""
        self.first = state["step"]
        parts = state.get("ranks") or [{name: value for name, value in state.items() if name != "step"}]
        tensors = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]
        if len(tensors) == self.ranks.size:
            mine = tensors[self.ranks.rank]
        else:
            scale = 1.0 if self.ranks.first else 0.0
            mine = {name: scale * torch.stack([part[name] for part in tensors]).sum(0) for name in tensors[0]}
            mine["norm"] = tensors[0]["norm"]  # the same on every rank
        self.sums |= {name: value.to(self.device) for name, value in mine.items()}
