"""The `benchmark` fixture of pytest-benchmark for machines without it: `python -m pytest -p plain_benchmark bench/bench_*.py`.

It times what bench/bench_*.py ask for, `benchmark.pedantic`, and gives the statistics they read. It draws no tables and compares
nothing. bench/gpu_suite.py loads it where pytest-benchmark cannot be imported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


class Statistics:
    """Seconds of the rounds and what pytest-benchmark derives from them."""

    def __init__(self, data: list[float]) -> None:
        self.data, self.rounds = data, len(data)
        self.min, self.max, self.mean, self.median = min(data), max(data), statistics.fmean(data), statistics.median(data)
        self.stddev = statistics.stdev(data) if len(data) > 1 else 0.0
        self.q1, _, self.q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else (data[0],) * 3
        self.iqr = self.q3 - self.q1


class Metadata:
    """Where pytest-benchmark keeps the statistics: `benchmark.stats.stats`."""

    def __init__(self, data: list[float]) -> None:
        self.stats = Statistics(data)


class Benchmark:
    """The fixture's value."""

    def __init__(self) -> None:
        self.stats: Metadata | None = None
        self.extra_info: dict[str, Any] = {}
        self.group: str | None = None

    def pedantic(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        setup: Callable[[], Any] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 0,
        iterations: int = 1,
    ) -> Any:
        """Call `target` `rounds` times, each time `iterations` in a row, after `warmup_rounds` untimed; give its last result."""
        assert rounds > 0 and iterations > 0 and not (setup and iterations > 1)
        seconds, result = [], None
        for i in range(warmup_rounds + rounds):
            given = setup() if setup else None
            a, k = given if given is not None else (args, kwargs or {})
            begin = time.perf_counter()
            for _ in range(iterations):
                result = target(*a, **k)
            took = (time.perf_counter() - begin) / iterations
            if i >= warmup_rounds:
                seconds.append(took)
        self.stats = Metadata(seconds)
        return result

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`pedantic` with 20 rounds after 2."""
        return self.pedantic(target, args, kwargs, rounds=20, warmup_rounds=2)


@pytest.fixture
def benchmark() -> Benchmark:
    """What pytest-benchmark calls the same."""
    return Benchmark()
