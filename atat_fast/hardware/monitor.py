"""What the cards of a run are doing, from the driver (NVML): how busy, full and hot, on how much power, and what holds them back.

`nvidia-ml-py` and a driver are optional: without them there are no such figures, and nothing else changes. Reading a card takes
tens of milliseconds (PCIe rates are sampled over 20 ms), so a thread of its own does it; the training loop waits for nothing.
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
"""Between two readings of a card."""
GIB = 1 << 30

THROTTLING = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""NVML's reasons to lower clocks that a user should know of; being idle and clocks set by hand are none."""

Reading = dict[str, float | list[str]]


class Card:
    """One card as NVML knows it. Raises whatever NVML raises where there is no driver or no such card."""

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> Reading:
        """What the driver says now; a figure that this card does not give is left out.

        gpu_utilisation, memory_utilisation: share of the last sampling period in which a kernel ran, and in which memory was
        read or written. memory_used_gib of the whole card, watts, watts_limit, celsius, clock_mhz, throttled (reasons in words),
        pcie_sent_mb_s and pcie_received_mb_s (seen from the card).
        """
        nvml, handle, found = self._nvml, self._handle, {}
        # Cards and drivers lack one figure or another: each is asked for by itself.
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
        """Reasons for lowered clocks, in words. Older bindings know the call under its older name."""
        nvml = self._nvml
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        bits = ask(self._handle)
        older = {name: name.replace("ClocksEvent", "ClocksThrottle") for name in THROTTLING}
        masks = {words: getattr(nvml, name, getattr(nvml, older[name], 0)) for name, words in THROTTLING.items()}
        return [words for words, mask in masks.items() if bits & mask]


def card_of(device: torch.device) -> Card | None:
    """The card under a torch device, or None where there is none, no driver, or no nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        return Card(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # each of the many ways in which a machine has no such figures
        return None


def summarise(readings: Sequence[Reading]) -> Reading:
    """Means of a card's readings; of `throttled`, every reason that came up, and `throttled_share` of the readings with any."""
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
    """Reads a card again and again in a thread of its own. `row` gives what it saw since the last time, and forgets it."""

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
            except Exception:  # a driver that goes away must not take the run with it
                return
            with self._lock:
                self._readings.append(reading)
            self._done.wait(self._seconds)

    def row(self) -> Reading:
        """The summary since the last call; nothing where nobody reads."""
        with self._lock:
            readings, self._readings = self._readings, []
        return summarise(readings)

    def close(self) -> None:
        """Stop reading."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * self._seconds)


class Stopwatch:
    """Time that this rank spends on its own: reading and forward passes, in which under ddp no other rank takes part.

    Under fsdp forward passes gather weights, so that every rank waits in them for a slow one; then only a slow host shows.
    On a GPU events are recorded, and nothing waits for them before `seconds` is asked, after the device was waited for anyway.
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
        """What happens within is this rank's own."""
        begin = self._now()
        yield
        self._pairs.append((begin, self._now()))

    def seconds(self) -> float:
        """Mean time within `own` since the last call, 0 where there was none."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return 0.0
        if self._gpu:
            return statistics.fmean(begin.elapsed_time(end) / 1e3 for begin, end in pairs)
        return statistics.fmean(end - begin for begin, end in pairs)


def stragglers(seconds: float, gather: Callable[[float], Sequence[float]]) -> dict[str, float]:
    """Which rank is slowest: `seconds` is this rank's own time (`Stopwatch`), and `gather` gives every rank's, in their order.

    slowest_rank, slowest_seconds, median_seconds, and spread = slowest / median - 1: the share of a step that the others wait.
    """
    everyone = [float(s) for s in gather(seconds)]
    slowest = max(range(len(everyone)), key=everyone.__getitem__)
    middle = statistics.median(everyone)
    spread = everyone[slowest] / middle - 1 if middle > 0 else 0.0
    return {"slowest_rank": slowest, "slowest_seconds": everyone[slowest], "median_seconds": middle, "spread": spread}


def by_card(rows: Sequence[Reading]) -> Reading:
    """One row of all ranks' cards: means, of temperature and throttling the worst, and which card that is.

    rows: every rank's `Monitor.row`, in the order of ranks. Nothing where no rank has a card to read.
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
