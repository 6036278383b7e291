"""mask_tokens beside what people write for it: random keys, a sort, a where, a nonzero, a gather of weights.

    pytest bench/bench_masking.py            a table, and bench/results/<device>/masking.json

Each backend's result is compared with the specification before it is timed; peers are held to their own promise, k hidden
tokens a sequence. Bytes are the op's own model, `mask_tokens_cost`: what any implementation has to move.
"""

from __future__ import annotations

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
from atat_fast.hardware.compute import environment, resolve
from atat_fast.ops import mask_tokens, mask_tokens_cost, registry

SHAPES = ((8, 1024), (32, 1024), (32, 4096))
MASK_ID = 50_257
ROUNDS = 200
COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
BACKENDS = [name for name, reason in registry.explain("mask_tokens", DEVICE).items() if reason is None]

Call = Callable[[], tuple[torch.Tensor, ...]]


def eager(tokens: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact-k masking as it is usually written: two sorts for ranks, and a nonzero that on a GPU waits for the device."""
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


def waiting(call: Call) -> Callable[[], None]:
    """The call, and on a GPU the wait for its end."""

    def timed() -> None:
        call()
        if DEVICE.type == "cuda":
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
        peers = {r["way"]: r["median_us"] for r in rows if r["shape"] == row["shape"]}
        row["speedup_over_eager"] = round(peers["eager"] / row["median_us"], 2) if "eager" in peers else None
        row["speedup_over_torch"] = round(peers["torch"] / row["median_us"], 2) if "torch" in peers else None
    print(f"\n\nmask_tokens, int64 ids, uniform weights, on {COMPUTE.device}, {torch.get_num_threads()} threads")
    print(f"{'B x L':>10}  {'way':<15}{'median us':>10}{'25 %':>9}{'75 %':>9}{'MB':>8}{'GB/s':>8}{'x eager':>9}{'x torch':>9}")
    for row in rows:
        print(
            f"{row['shape'][0]:>4} x {row['shape'][1]:<5} {row['way']:<15}{row['median_us']:>10.1f}{row['low_us']:>9.1f}"
            f"{row['high_us']:>9.1f}{row['bytes'] / 1e6:>8.2f}{row['bytes'] / row['median_us'] / 1e3:>8.2f}"
            f"{row['speedup_over_eager'] or 0:>9.2f}{row['speedup_over_torch'] or 0:>9.2f}"
        )
    report = {"benchmark": "masking", "rounds": ROUNDS, "results": rows, "environment": environment(COMPUTE)}
    (results_folder(DEVICE) / "masking.json").write_text(json.dumps(report, indent=1) + "\n")


@pytest.mark.parametrize("way", ["eager", "eager compiled", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_masking(benchmark: Any, table: list[dict[str, Any]], shape: tuple[int, int], way: str) -> None:
    case = Case(*shape)
    benchmark.pedantic(waiting(case.call(way)), rounds=ROUNDS, warmup_rounds=10)
    stats = benchmark.stats.stats
    table.append(
        {
            "shape": shape,
            "way": way,
            "median_us": round(stats.median * 1e6, 1),
            "low_us": round(stats.q1 * 1e6, 1),
            "high_us": round(stats.q3 * 1e6, 1),
            "bytes": mask_tokens_cost(*shape, case.rows).bytes,
        }
    )
