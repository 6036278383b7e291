"""linear_categorical beside what people write for it: logits, fp64 noise and argmax; logits, softmax and multinomial.

    pytest bench/bench_linear_categorical.py     a table, and bench/results/<device>/linear_categorical.json

Rows are those one step of a sampler reveals. Every way draws from the same logits, and the op's draws are compared with its
specification before it is timed. `product` is the bare matrix product.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import environment, resolve, short
from atat_fast.ops import linear_categorical, linear_categorical_cost, linear_categorical_reference, registry

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
SHAPES = ((8, 768, 50_258), (256, 768, 50_258), (2048, 768, 50_258)) if GPU else ((8, 256, 30_522), (64, 256, 30_522))
ROUNDS = 100 if GPU else 15
BACKENDS = [name for name, reason in registry.explain("linear_categorical", DEVICE).items() if reason is None]
PEERS = ("product", "gumbel fp64", "multinomial")


def gumbel_argmax(logits: torch.Tensor) -> torch.Tensor:
    """As it is usually written since fp32 noise is known to be too coarse."""
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


def waiting(call: Callable[[], object]) -> Callable[[], None]:
    """The call, and on a GPU the wait for its end."""

    def timed() -> None:
        with torch.no_grad():
            call()
        if GPU:
            torch.cuda.synchronize(DEVICE)

    return timed


@pytest.fixture(scope="module")
def table() -> Iterator[list[dict[str, Any]]]:
    """Rows gathered by the tests; printed and written when the last is done."""
    rows: list[dict[str, Any]] = []
    yield rows
    if not rows:
        return
    for row in rows:
        base = [r["median_us"] for r in rows if (r["shape"], r["way"]) == (row["shape"], "gumbel fp64")]
        row["speedup_over_eager"] = round(base[0] / row["median_us"], 2) if base else None
    print(f"\n\nlinear_categorical, {short(COMPUTE.dtype)}, on {DEVICE}, {torch.get_num_threads()} threads")
    print(f"{'R x D x V':>20}  {'way':<13}{'median us':>11}{'25 %':>11}{'75 %':>11}{'GFLOP/s':>9}{'x gumbel':>9}")
    for row in rows:
        print(
            f"{' x '.join(map(str, row['shape'])):>20}  {row['way']:<13}{row['median_us']:>11,.1f}{row['low_us']:>11,.1f}"
            f"{row['high_us']:>11,.1f}{row['flops'] / row['median_us'] / 1e3:>9,.1f}{row['speedup_over_eager'] or 0:>9.2f}"
        )
    report = {"benchmark": "linear_categorical", "rounds": ROUNDS, "results": rows, "environment": environment(COMPUTE)}
    (results_folder(DEVICE) / "linear_categorical.json").write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.parametrize("way", [*PEERS, *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_linear_categorical(benchmark: Any, table: list[dict[str, Any]], shape: tuple[int, ...], way: str) -> None:
    call = Case(*shape).way(way)
    benchmark.pedantic(waiting(call), rounds=ROUNDS, warmup_rounds=2)
    stats = benchmark.stats.stats
    cost = linear_categorical_cost(*shape, element_size=COMPUTE.dtype.itemsize)
    table.append(
        {
            "shape": shape,
            "way": way,
            "median_us": round(stats.median * 1e6, 1),
            "low_us": round(stats.q1 * 1e6, 1),
            "high_us": round(stats.q3 * 1e6, 1),
            "bytes": cost.bytes,
            "flops": cost.flops,
        }
    )
