"""rotary beside what people write for it: rotate-half with a concatenation, the same compiled, and flash-attn's kernel.

    pytest bench/bench_rotary.py             a table, and bench/results/<device>/rotary.json

Queries and keys of a packed projection, in place and into a new tensor; `train` is the new tensor and its backward. A result is
compared with the specification before it is timed. Bytes are the op's own model, `rotary_cost`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import TrainConfig
from atat_fast.ops import registry, rotary, rotary_cost, rotary_reference, rotary_table
from atat_fast.training.device import environment, resolve, short

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
SHAPES = ((8, 1024, 12, 64), (32, 1024, 12, 64)) if GPU else ((8, 256, 4, 64),)
ROUNDS = 200 if GPU else 30
KINDS = ("inplace", "new", "train")
BACKENDS = [name for name, reason in registry.explain("rotary", DEVICE).items() if reason is None]
PEERS = ["eager", "compiled"] + (["flash-attn"] if GPU and importlib.util.find_spec("flash_attn") else [])


def eager(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As it is usually written, tables in the data's dtype: x cos + rotate_half(x) sin, then a concatenation with the values."""
    turned, values = qkv.split((2, 1), dim=2)
    a, b = turned.chunk(2, dim=-1)
    c, s = (torch.cat((t, t), dim=-1).to(qkv.dtype)[:, None, None] for t in (cos, sin))
    return torch.cat((turned * c + torch.cat((-b, a), dim=-1) * s, values), dim=2)


COMPILED = torch.compile(eager, dynamic=False)


class Case:
    """One packed projection, and every way to turn it."""

    def __init__(self, batch: int, length: int, heads: int, size: int) -> None:
        torch.manual_seed(0)
        self.qkv = torch.randn(batch, length, 3, heads, size, device=DEVICE).to(COMPUTE.dtype)
        self.cos, self.sin = rotary_table(length, size, device=DEVICE)
        self.upstream = torch.randn_like(self.qkv)

    def way(self, name: str, inplace: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function of one way."""
        if name in ("eager", "compiled"):
            written = COMPILED if name == "compiled" else eager
            return lambda qkv: written(qkv, self.cos, self.sin)
        if name == "flash-attn":
            from flash_attn.layers.rotary import apply_rotary_emb_qkv_

            cos, sin = self.cos.to(COMPUTE.dtype), self.sin.to(COMPUTE.dtype)
            return lambda qkv: apply_rotary_emb_qkv_(qkv, cos, sin)
        return lambda qkv: rotary(qkv, self.cos, self.sin, inplace=inplace, backend=name)

    def call(self, name: str, kind: str) -> Callable[[], object]:
        """What is timed, its result checked."""
        run = self.way(name, kind == "inplace")
        want = rotary_reference(self.qkv.double(), self.cos.double(), self.sin.double())
        with torch.no_grad():
            got = run(self.qkv.clone())
        allowed = 2 * float((eager(self.qkv, self.cos, self.sin).double() - want).abs().max()) + 1e-6
        assert float((got.double() - want).abs().max()) <= allowed
        if kind != "train":
            work = self.qkv.clone()

            def call() -> torch.Tensor:
                with torch.no_grad():
                    return run(work)

            return call
        leaf = self.qkv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(leaf * 1), leaf, self.upstream)
        back = rotary_reference(self.upstream.double(), self.cos.double(), -self.sin.double())
        assert float((grad.double() - back).abs().max()) <= 2 * allowed

        def train() -> object:
            return torch.autograd.grad(run(leaf), leaf, self.upstream)

        return train


def waiting(call: Callable[[], object]) -> Callable[[], None]:
    """The call, and on a GPU the wait for its end."""

    def timed() -> None:
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
        base = [r["median_us"] for r in rows if (r["shape"], r["kind"], r["way"]) == (row["shape"], row["kind"], "eager")]
        row["speedup_over_eager"] = round(base[0] / row["median_us"], 2) if base else None
    print(f"\n\nrotary, {short(COMPUTE.dtype)}, on {DEVICE}, {torch.get_num_threads()} threads")
    print(
        f"{'B x L x H x E':>18}  {'kind':<8}{'way':<11}{'median us':>10}{'25 %':>9}{'75 %':>9}{'MB':>8}{'GB/s':>8}{'x eager':>9}"
    )
    for row in rows:
        print(
            f"{' x '.join(map(str, row['shape'])):>18}  {row['kind']:<8}{row['way']:<11}{row['median_us']:>10.1f}"
            f"{row['low_us']:>9.1f}{row['high_us']:>9.1f}{row['bytes'] / 1e6:>8.2f}{row['bytes'] / row['median_us'] / 1e3:>8.2f}"
            f"{row['speedup_over_eager'] or 0:>9.2f}"
        )
    report = {"benchmark": "rotary", "rounds": ROUNDS, "results": rows, "environment": environment(COMPUTE)}
    (results_folder(DEVICE) / "rotary.json").write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.parametrize("way", [*PEERS, *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rotary(benchmark: Any, table: list[dict[str, Any]], shape: tuple[int, ...], kind: str, way: str) -> None:
    call = Case(*shape).call(way, kind)
    benchmark.pedantic(waiting(call), rounds=ROUNDS, warmup_rounds=5)
    stats = benchmark.stats.stats
    batch, length, heads, size = shape
    cost = rotary_cost(batch * length, heads, size, element_size=COMPUTE.dtype.itemsize, inplace=kind == "inplace")
    table.append(
        {
            "shape": shape, "kind": kind, "way": way, "median_us": round(stats.median * 1e6, 1),
            "low_us": round(stats.q1 * 1e6, 1), "high_us": round(stats.q3 * 1e6, 1),
            "bytes": cost.bytes * (2 if kind == "train" else 1),
        }
    )  # fmt: skip
