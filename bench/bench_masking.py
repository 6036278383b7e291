"""mask_tokens beside the usual code: random keys, a sort, a where, a nonzero, a gather of weights.

    pytest bench/bench_masking.py            a table, and bench/results/<device>/masking.json

Before timing, each backend's result is compared with the specification, and peers are checked for k hidden tokens a sequence.
Bytes are from the op's cost model, `mask_tokens_cost`: the least that any implementation moves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from op_table import OpTable, op_table

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import resolve
from atat_fast.ops import mask_tokens, mask_tokens_cost, registry

SHAPES = ((8, 1024), (32, 1024), (32, 4096))
MASK_ID = 50_257
ROUNDS = 200
COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
BACKENDS = [name for name, reason in registry.explain("mask_tokens", DEVICE).items() if reason is None]

Call = Callable[[], tuple[torch.Tensor, ...]]


def eager(tokens: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The usual exact-k masking: two sorts for ranks, and a nonzero, which waits for a GPU."""
    length = tokens.shape[1]
    ranks = torch.rand(tokens.shape, device=tokens.device).argsort(dim=1).argsort(dim=1)
    hidden = ranks < counts[:, None]
    noisy = torch.where(hidden, MASK_ID, tokens)
    rows = hidden.flatten().nonzero().squeeze(1)
    weights = ((length + 1) / counts.clamp(min=1))[rows // length]
    return noisy, rows, weights


class Case:
    """One batch, and every way to mask it."""

    def __init__(self, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.tokens = torch.randint(0, MASK_ID, (batch, length), device=DEVICE)
        half = torch.randint(0, length + 1, (batch // 2,))
        self.counts = torch.stack((half, length - half), dim=1).flatten()  # antithetic, as in training
        self.on_device = self.counts.to(DEVICE)
        self.rows = int(self.counts.sum())
        self.common: dict[str, Any] = {
            "mask_id": MASK_ID,
            "num_rows": self.rows,
            "seed": torch.tensor(1, device=DEVICE),
            "step": torch.tensor(7, device=DEVICE),
            "sample_ids": torch.arange(batch, device=DEVICE),
        }

    def call(self, way: str) -> Call:
        """The call of one way, its result checked."""
        if way.startswith("eager"):
            written = torch.compile(eager, dynamic=False) if way == "eager compiled" else eager
            hidden = written(self.tokens, self.on_device)[0] == MASK_ID
            assert torch.equal(hidden.sum(1).cpu(), self.counts)
            return lambda: written(self.tokens, self.on_device)

        def call() -> tuple[torch.Tensor, ...]:
            return mask_tokens(self.tokens, self.on_device, backend=way, **self.common)

        want = mask_tokens(self.tokens, self.on_device, backend="torch", **self.common)
        assert all(torch.equal(a, b) for a, b in zip(call(), want, strict=True))
        return call


table = op_table("masking", COMPUTE, ROUNDS, peers={"eager": "eager", "torch": "torch"})


@pytest.mark.parametrize("way", ["eager", "eager compiled", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_masking(benchmark: Any, table: OpTable, shape: tuple[int, int], way: str) -> None:
    case = Case(*shape)
    moved = mask_tokens_cost(*shape, case.rows).bytes
    table.time(benchmark, case.call(way), warmup=10, shape=shape, way=way, bytes=moved)
