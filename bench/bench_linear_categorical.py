"""linear_categorical beside the usual code: logits, fp64 noise and argmax; logits, softmax and multinomial.

    pytest bench/bench_linear_categorical.py     a table, and bench/results/<device>/linear_categorical.json

Rows are as many as one step of a sampler reveals. Every way draws from the same logits; the op's draws are compared with its
specification before it is timed. `product` is the bare matrix product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from op_table import OpTable, op_table

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import resolve
from atat_fast.ops import linear_categorical, linear_categorical_cost, linear_categorical_reference, registry

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
SHAPES = ((8, 768, 50_258), (256, 768, 50_258), (2048, 768, 50_258)) if GPU else ((8, 256, 30_522), (64, 256, 30_522))
ROUNDS = 100 if GPU else 15
BACKENDS = [name for name, reason in registry.explain("linear_categorical", DEVICE).items() if reason is None]
PEERS = ("product", "gumbel fp64", "multinomial")


def gumbel_argmax(logits: torch.Tensor) -> torch.Tensor:
    """The usual draw, with fp64 noise, since fp32's is known to be too coarse."""
    noise = 1e-10 - (torch.rand_like(logits, dtype=torch.float64) + 1e-10).log()
    return (logits.double().exp() / noise).argmax(1)


class Case:
    """One head and its rows, and every way to draw."""

    def __init__(self, rows: int, width: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, width, device=DEVICE).to(COMPUTE.dtype)
        self.weight = (0.1 * torch.randn(vocabulary, width, device=DEVICE)).to(COMPUTE.dtype)
        self.bias = torch.zeros(vocabulary, device=DEVICE, dtype=COMPUTE.dtype)
        self.index = torch.arange(rows, device=DEVICE)
        self.seed, self.step = (torch.tensor(n, device=DEVICE) for n in (1, 2))

    def logits(self) -> torch.Tensor:
        """[R, V] in the compute dtype."""
        return F.linear(self.hidden, self.weight, self.bias)

    def way(self, name: str) -> Callable[[], torch.Tensor]:
        """A function that draws, its result checked."""
        if name == "product":
            return self.logits
        if name == "gumbel fp64":
            return lambda: gumbel_argmax(self.logits())
        if name == "multinomial":
            return lambda: torch.multinomial(torch.softmax(self.logits().float(), dim=1), 1)[:, 0]

        def run() -> torch.Tensor:
            return linear_categorical(
                self.hidden, self.weight, self.index, bias=self.bias, forbidden=3, seed=self.seed, step=self.step, backend=name
            )

        some = slice(0, 8)
        want = linear_categorical_reference(
            self.hidden[some], self.weight, self.index[some], self.bias, 3, seed=self.seed, step=self.step
        )
        agree = int((run()[some] == want).sum())
        assert agree >= 6, f"{name} draws {8 - agree} of 8 rows otherwise than the specification"  # bf16 logits are rounded
        return run


table = op_table("linear_categorical", COMPUTE, ROUNDS, peers={"eager": "gumbel fp64"})


@pytest.mark.parametrize("way", [*PEERS, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear_categorical(benchmark: Any, table: OpTable, shape: tuple[int, ...], way: str) -> None:
    call = Case(*shape).way(way)
    cost = linear_categorical_cost(*shape, element_size=COMPUTE.dtype.itemsize)
    table.time(benchmark, torch.no_grad()(call), warmup=2, shape=shape, way=way, bytes=cost.bytes, flops=cost.flops)
