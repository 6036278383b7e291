"""What the driver (NVML) reports of a run's cards: utilisation, memory, temperature, power, clocks, and why they are throttled.

`nvidia-ml-py` and a driver are optional: without them only these figures are missing. Reading a card takes tens of milliseconds
(PCIe rates are sampled over 20 ms), so a thread does it and the training loop does not wait.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

SECONDS_BETWEEN = 2.0
"""Seconds between two readings of a card."""
GIB = 1 << 30

THROTTLING = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""NVML's reasons for lowered clocks, in words; without idling and clocks set by hand, which users need not know."""

Reading = dict[str, float | list[str]]


class Card:
    """One card, read through NVML. Raises NVML's error if there is no driver or no such card."""

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> Reading:
        """The driver's figures now, without those that this card does not give.

        gpu_utilisation, memory_utilisation: share of the last sampling period in which a kernel ran, and in which memory was
        read or written. memory_used_gib of the whole card, watts, watts_limit, celsius, clock_mhz, throttled (reasons in words),
        pcie_sent_mb_s and pcie_received_mb_s (seen from the card).
        """
        nvml, handle, found = self._nvml, self._handle, {}
        # Cards and drivers lack different figures, so each is read by itself.
        with contextlib.suppress(nvml.NVMLError):
            rates = nvml.nvmlDeviceGetUtilizationRates(handle)
            found["gpu_utilisation"], found["memory_utilisation"] = rates.gpu / 100, rates.memory / 100
        with contextlib.suppress(nvml.NVMLError):
            found["memory_used_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB
        with contextlib.suppress(nvml.NVMLError):
            found["watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            found["watts_limit"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            found["celsius"] = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        with contextlib.suppress(nvml.NVMLError):
            found["clock_mhz"] = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        with contextlib.suppress(nvml.NVMLError):
            found["throttled"] = self._throttled()
        for name, counter in (("pcie_sent_mb_s", "NVML_PCIE_UTIL_TX_BYTES"), ("pcie_received_mb_s", "NVML_PCIE_UTIL_RX_BYTES")):
            with contextlib.suppress(nvml.NVMLError):
                found[name] = nvml.nvmlDeviceGetPcieThroughput(handle, getattr(nvml, counter)) / 1e3  # NVML says KB/s
        return found

    def _throttled(self) -> list[str]:
        """Reasons for lowered clocks, in words. Older bindings have an older name for the call."""
        nvml = self._nvml
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        bits = ask(self._handle)
        older = {name: name.replace("ClocksEvent", "ClocksThrottle") for name in THROTTLING}
        masks = {words: getattr(nvml, name, getattr(nvml, older[name], 0)) for name, words in THROTTLING.items()}
        return [words for words, mask in masks.items() if bits & mask]


def card_of(device: torch.device) -> Card | None:
    """The card of a torch device, or None without a card, a driver or nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        return Card(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # a machine can lack these figures in many ways
        return None


def summarise(readings: Sequence[Reading]) -> Reading:
    """Means of a card's readings. `throttled` is every reason seen, and `throttled_share` the share of readings with one."""
    if not readings:
        return {}
    row: Reading = {}
    for name in dict.fromkeys(name for reading in readings for name in reading if name != "throttled"):
        row[name] = statistics.fmean(float(r[name]) for r in readings if name in r)  # type: ignore[arg-type]
    reasons = [r["throttled"] for r in readings if isinstance(r.get("throttled"), list)]
    if reasons:
        row["throttled"] = sorted({word for found in reasons for word in found})  # type: ignore[union-attr]
        row["throttled_share"] = sum(bool(found) for found in reasons) / len(reasons)
    return row


class Monitor:
    """Reads a card at intervals in a thread. `row` returns a summary of the readings since the last call."""

    def __init__(self, card: Card | None, seconds: float = SECONDS_BETWEEN) -> None:
        self._card, self._seconds = card, seconds
        self._readings: list[Reading] = []
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        if card is not None:
            self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        assert self._card is not None
        while not self._done.is_set():
            try:
                reading = self._card.read()
            except Exception:  # a driver that fails must not end the run
                return
            with self._lock:
                self._readings.append(reading)
            self._done.wait(self._seconds)

    def row(self) -> Reading:
        """The summary since the last call; empty without a card."""
        with self._lock:
            readings, self._readings = self._readings, []
        return summarise(readings)

    def close(self) -> None:
        """Stop reading."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * self._seconds)


class Stopwatch:
    """This rank's own time: reading and forward passes, which under ddp involve no other rank.

    Under fsdp forward passes gather weights, so every rank waits in them for a slow one, and only a slow host shows.
    On a GPU it records events. `seconds` reads them, after the caller has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._pairs: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Count the time of the block."""
        begin = self._now()
        yield
        self._pairs.append((begin, self._now()))

    def seconds(self) -> float:
        """Mean seconds of an `own` block since the last call; 0 without one."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return 0.0
        if self._gpu:
            return statistics.fmean(begin.elapsed_time(end) / 1e3 for begin, end in pairs)
        return statistics.fmean(end - begin for begin, end in pairs)


def stragglers(seconds: float, gather: Callable[[float], Sequence[float]]) -> dict[str, float]:
    """Which rank is slowest. seconds: this rank's own time (`Stopwatch`); gather(seconds): every rank's, in rank order.

    slowest_rank, slowest_seconds, median_seconds, and spread = slowest / median - 1: the share of a step that the others wait.
    """
    everyone = [float(s) for s in gather(seconds)]
    slowest = max(range(len(everyone)), key=everyone.__getitem__)
    middle = statistics.median(everyone)
    spread = everyone[slowest] / middle - 1 if middle > 0 else 0.0
    return {"slowest_rank": slowest, "slowest_seconds": everyone[slowest], "median_seconds": middle, "spread": spread}


def by_card(rows: Sequence[Reading]) -> Reading:
    """One row for all ranks' cards: means, the highest temperature and share of throttling, and which ranks are throttled.

    rows: every rank's `Monitor.row`, in rank order. Empty if no rank has a card.
    """
    if not any(rows):
        return {}
    together: Reading = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "throttled"):
        values = [float(row[name]) for row in rows if name in row]  # type: ignore[arg-type]
        together[name] = max(values) if name in ("celsius", "throttled_share") else statistics.fmean(values)
    together["throttled"] = list(_held_back(rows))
    watts = [float(row["watts"]) for row in rows if "watts" in row]  # type: ignore[arg-type]
    if watts:
        together["watts_total"] = sum(watts)
    return together


def _held_back(rows: Sequence[Reading]) -> Iterator[str]:
    for rank, row in enumerate(rows):
        reasons = row.get("throttled")
        if isinstance(reasons, list) and reasons:
            yield f"rank {rank}: {', '.join(reasons)}"
