"""Shared by benchmarks: interleaved timings with quartiles, peak memory, and the results folder."""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def results_folder(device: torch.device, results: Path = RESULTS) -> Path:
    """bench/results/cpu, or a folder named after the GPU; created if it is missing."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-")
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_record(record: dict[str, object], device: torch.device, out: Path | None = None) -> Path:
    """Write a record as BENCHMARK.json into `out`, or the results folder of the device, and say where."""
    folder = out or results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['benchmark']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, *, in_a_loop: bool = False
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one warm-up each. A round makes all calls, so drift affects all alike.

    in_a_loop: a warm-up before every call, for what runs over and over. After a long call of another kind that leaves threads
    idle, a short one would wait for them and for its own data.
    """
    for call in calls.values() if not in_a_loop else ():
        seconds(call, device)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if in_a_loop:
                seconds(call, device)
            taken[name].append(seconds(call, device))
    return taken


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


def peak_resident_bytes() -> int:
    """This process's peak memory, from Linux's own count: getrusage starts a child with its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def added_at_peak(call: Callable[[], object]) -> int:
    """Bytes by which one call raises this process's resident memory at its peak. Linux; the process should be fresh."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before, such as initial weights, goes back first
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_resident_bytes()
    call()
    return peak_resident_bytes() - before
