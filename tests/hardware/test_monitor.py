"""What the driver says of cards, with a driver that is made up; and who is slow."""

import statistics
import sys
import threading
import types

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from atat_fast.hardware.monitor import Card, Monitor, Stopwatch, by_card, card_of, stragglers, summarise


class NVMLError(Exception):
    """As pynvml's."""


def refuse(*arguments):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """nvml(**changes) installs a pynvml whose card is busy, hot and short of power, with calls replaced or, by None, removed."""

    def install(**changes):
        given = {
            "Init": lambda: None,
            "DeviceGetHandleByUUID": {"GPU-1": "handle"}.__getitem__,
            "DeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=97, memory=41),
            "DeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=20 << 30, total=24 << 30),
            "DeviceGetPowerUsage": lambda handle: 448_500,
            "DeviceGetEnforcedPowerLimit": lambda handle: 450_000,
            "DeviceGetTemperature": lambda handle, sensor: 83,
            "DeviceGetClockInfo": lambda handle, clock: 2520,
            "DeviceGetCurrentClocksEventReasons": lambda handle: 0x44 | 0x1,
            "DeviceGetPcieThroughput": lambda handle, counter: [1_500_000, 9_000_000][counter],
            "ClocksEventReasonSwPowerCap": 0x4, "ClocksEventReasonHwThermalSlowdown": 0x40,
        }  # fmt: skip
        facts = {f"nvml{name}": what for name, what in (given | changes).items() if what is not None}
        facts |= {"NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVML_PCIE_UTIL_TX_BYTES": 0, "NVML_PCIE_UTIL_RX_BYTES": 1}
        monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=NVMLError, **facts))

    return install


def test_a_reading_is_in_the_units_people_use_and_without_the_figures_a_card_lacks(nvml):
    nvml()
    whole = {
        "gpu_utilisation": 0.97, "memory_utilisation": 0.41, "memory_used_gib": 20.0, "watts": 448.5, "watts_limit": 450.0,
        "celsius": 83.0, "clock_mhz": 2520.0, "throttled": ["power cap", "heat (hardware)"],
        "pcie_sent_mb_s": 1500.0, "pcie_received_mb_s": 9000.0,
    }  # fmt: skip
    assert Card("GPU-1").read() == whole
    nvml(DeviceGetPcieThroughput=refuse, DeviceGetPowerUsage=refuse)
    lacking = ("watts", "pcie_sent_mb_s", "pcie_received_mb_s")
    assert Card("GPU-1").read() == {name: value for name, value in whole.items() if name not in lacking}
    older = {"DeviceGetCurrentClocksEventReasons": None, "DeviceGetCurrentClocksThrottleReasons": lambda handle: 0x20}
    nvml(**older, ClocksThrottleReasonSwThermalSlowdown=0x20)  # older bindings say throttle
    assert Card("GPU-1").read()["throttled"] == ["heat (driver)"]


def test_a_machine_without_a_driver_or_a_card_has_no_figures(nvml, monkeypatch):
    assert card_of(torch.device("cpu")) is None and Monitor(None).row() == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1"))
    nvml()
    assert card_of(torch.device("cuda", 0)) is not None
    nvml(Init=refuse)
    assert card_of(torch.device("cuda", 0)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert card_of(torch.device("cuda", 0)) is None


class Script:
    """A card that gives what it is told to, then says so and goes on with the last."""

    def __init__(self, *readings):
        self.readings, self.done = list(readings), threading.Event()

    def read(self):
        if len(self.readings) == 1:
            self.done.set()
        reading = self.readings[0] if len(self.readings) == 1 else self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading


def test_a_monitor_sums_up_since_it_was_last_asked_and_ends_with_its_driver():
    card = Script({"watts": 100.0, "throttled": []}, {"watts": 300.0, "throttled": ["power cap"]}, {})
    monitor = Monitor(card, seconds=0.001)
    assert card.done.wait(10)
    row = monitor.row()
    assert row["watts"] == 200.0 and row["throttled"] == ["power cap"] and row["throttled_share"] == 0.5
    monitor.close()
    monitor.row()
    assert monitor.row() == {}
    monitor = Monitor(Script({"watts": 100.0}, RuntimeError("GPU is lost")), seconds=0.001)
    monitor._thread.join(10)
    assert not monitor._thread.is_alive() and monitor.row() == {"watts": 100.0}
    monitor.close()


@given(st.lists(st.floats(1, 500), min_size=1, max_size=9))
def test_means_lie_between_what_was_read(watts):
    row = summarise([{"watts": w} for w in watts])
    assert min(watts) * (1 - 1e-9) <= row["watts"] <= max(watts) * (1 + 1e-9)


def test_one_row_of_all_cards_names_the_one_that_is_held_back():
    rows = [{"watts": 400.0, "celsius": 70.0, "throttled": []}, {"watts": 300.0, "celsius": 90.0, "throttled": ["heat (driver)"]}]
    assert by_card(rows) == {"watts": 350.0, "watts_total": 700.0, "celsius": 90.0, "throttled": ["rank 1: heat (driver)"]}
    assert by_card([{}, {}]) == {}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=64))
@example([1.0, 1.0, 1.5, 1.1])
@example([2.0])
def test_the_slowest_rank_is_named(seconds):
    found = stragglers(seconds[-1], lambda own: seconds if own == seconds[-1] else [])
    assert found["slowest_seconds"] == max(seconds) == seconds[int(found["slowest_rank"])]
    assert found["median_seconds"] == pytest.approx(statistics.median(seconds))
    assert found["spread"] == pytest.approx(max(seconds) / statistics.median(seconds) - 1) and found["spread"] >= 0


def test_a_stopwatch_counts_what_is_the_rank_s_own(monkeypatch):
    ticks = iter([1.0, 1.5, 7.0, 8.0])
    monkeypatch.setattr("atat_fast.hardware.monitor.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.own():
            pass
    assert watch.seconds() == 0.75 and watch.seconds() == 0.0
