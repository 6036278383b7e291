"""The table of one op's benchmark: rows that its tests add, printed and written to bench/results when the last is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from timing import results_folder, synchronize

from atat_fast.hardware.compute import Compute, environment, short


class OpTable:
    """Rows of times. `time` adds one.

    same: fields that are equal in rows to compare.   peers: by NAME of a speedup_over_NAME, the way that it is relative to.
    settings: more facts for the file.
    """

    def __init__(
        self,
        op: str,
        compute: Compute,
        rounds: int,
        same: tuple[str, ...],
        peers: Mapping[str, str],
        settings: dict[str, Any] | None,
    ) -> None:
        self.op, self.compute, self.rounds = op, compute, rounds
        self.same, self.peers, self.settings = same, peers, settings
        self.rows: list[dict[str, Any]] = []

    def time(
        self, benchmark: Any, call: Callable[[], object], *, warmup: int = 5, setup: Any = None, **row: Any
    ) -> dict[str, Any]:
        """Time a call, including the wait for the device. row: what was called, and its bytes or flops. Returns the row."""

        def timed() -> None:
            call()
            synchronize(self.compute.device)

        benchmark.pedantic(timed, setup=setup, rounds=self.rounds, warmup_rounds=warmup)
        stats = benchmark.stats.stats
        named = (("median_us", stats.median), ("low_us", stats.q1), ("high_us", stats.q3))
        work = {name: row.pop(name) for name in ("bytes", "flops") if name in row}
        self.rows.append(row | {name: round(value * 1e6, 1) for name, value in named} | work)
        return self.rows[-1]

    def finish(self) -> None:
        """Compare, print and write."""
        if not self.rows:
            return
        for row in self.rows:
            alike = {r.get("way"): r["median_us"] for r in self.rows if all(r[name] == row[name] for name in self.same)}
            for name, way in self.peers.items():
                row[f"speedup_over_{name}"] = round(alike[way] / row["median_us"], 2) if way in alike else None
        device = self.compute.device
        what = f"{self.op}, {short(self.compute.dtype)}, on {device}, {torch.get_num_threads()} threads"
        shown = Table(*self.rows[0], "GB/s", "GFLOP/s", title=what, box=None)
        for row in self.rows:
            rates = [row[name] / row["median_us"] / 1e3 if name in row else None for name in ("bytes", "flops")]
            shown.add_row(*map(_cell, [*row.values(), *rates]))
        Console(width=200).print("\n", shown)
        settings = {} if self.settings is None else {"settings": self.settings}
        report = {"benchmark": self.op, "rounds": self.rounds, **settings, "results": self.rows}
        path = results_folder(device) / f"{self.op}.json"
        path.write_text(json.dumps(report | {"environment": environment(self.compute)}, indent=1) + "\n", encoding="utf-8")


def op_table(
    op: str,
    compute: Compute,
    rounds: int,
    *,
    same: tuple[str, ...] = ("shape",),
    peers: Mapping[str, str] = {"eager": "eager"},
    settings: dict[str, Any] | None = None,
) -> Any:
    """The fixture `table` of a benchmark's file."""

    @pytest.fixture(scope="module")
    def table() -> Iterator[OpTable]:
        made = OpTable(op, compute, rounds, same, peers, settings)
        yield made
        made.finish()

    return table


def _cell(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " x ".join(map(str, value))
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
