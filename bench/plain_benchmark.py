"""The `benchmark` fixture of pytest-benchmark for machines without it: `python -m pytest -p plain_benchmark bench/bench_*.py`.

It has what bench/bench_*.py use: `benchmark.pedantic` and the statistics they read. It draws no tables and compares nothing.
bench/gpu_suite.py loads it if pytest-benchmark cannot be imported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


class Statistics:
    """Seconds of the rounds, and the figures that pytest-benchmark derives from them."""

    def __init__(self, data: list[float]) -> None:
        self.data, self.rounds = data, len(data)
        self.min, self.max, self.mean, self.median = min(data), max(data), statistics.fmean(data), statistics.median(data)
        self.stddev = statistics.stdev(data) if len(data) > 1 else 0.0
        self.q1, _, self.q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else (data[0],) * 3
        self.iqr = self.q3 - self.q1


class Metadata:
    """Holds the statistics where pytest-benchmark does: `benchmark.stats.stats`."""

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
        """Call `target` in `rounds` rounds of `iterations` calls, after `warmup_rounds` untimed. Returns the last value."""
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
    """pytest-benchmark's fixture of this name."""
    return Benchmark()
