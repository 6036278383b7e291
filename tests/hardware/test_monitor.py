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
        module = types.ModuleType("pynvml")
        module.NVMLError, module.asked = NVMLError, []
        module.NVML_TEMPERATURE_GPU, module.NVML_CLOCK_SM = 0, 1
        module.NVML_PCIE_UTIL_TX_BYTES, module.NVML_PCIE_UTIL_RX_BYTES = 0, 1
        module.nvmlClocksEventReasonSwPowerCap, module.nvmlClocksEventReasonHwThermalSlowdown = 0x4, 0x40
        calls = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: module.asked.append(uuid) or "handle",
            "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=97, memory=41),
            "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=20 << 30, total=24 << 30),
            "nvmlDeviceGetPowerUsage": lambda handle: 448_500,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 450_000,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 83,
            "nvmlDeviceGetClockInfo": lambda handle, clock: 2520,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x44 | 0x1,
            "nvmlDeviceGetPcieThroughput": lambda handle, counter: [1_500_000, 9_000_000][counter],
        }
        vars(module).update({name: call for name, call in (calls | changes).items() if call is not None})
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_a_reading_in_the_units_people_use(nvml):
    module = nvml()
    assert Card("GPU-1").read() == {
        "gpu_utilisation": 0.97, "memory_utilisation": 0.41, "memory_used_gib": 20.0, "watts": 448.5, "watts_limit": 450.0,
        "celsius": 83.0, "clock_mhz": 2520.0, "throttled": ["power cap", "heat (hardware)"],
        "pcie_sent_mb_s": 1500.0, "pcie_received_mb_s": 9000.0,
    }  # fmt: skip
    assert module.asked == ["GPU-1"]


def test_a_card_without_a_figure_gives_the_others(nvml):
    nvml(nvmlDeviceGetPcieThroughput=refuse, nvmlDeviceGetPowerUsage=refuse)
    reading = Card("GPU-1").read()
    assert "watts" not in reading and "pcie_sent_mb_s" not in reading and reading["celsius"] == 83.0


def test_older_bindings_say_throttle(nvml):
    module = nvml(nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x20)
    module.nvmlClocksThrottleReasonSwThermalSlowdown = 0x20
    assert Card("GPU-1").read()["throttled"] == ["heat (driver)"]


def test_a_machine_without_a_driver_or_a_card_has_no_figures(nvml, monkeypatch):
    assert card_of(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1"))
    nvml()
    assert card_of(torch.device("cuda", 0)) is not None
    nvml(nvmlInit=refuse)
    assert card_of(torch.device("cuda", 0)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert card_of(torch.device("cuda", 0)) is None
    assert Monitor(None).row() == {}


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


def test_a_monitor_sums_up_since_it_was_last_asked():
    card = Script({"watts": 100.0, "throttled": []}, {"watts": 300.0, "throttled": ["power cap"]}, {})
    monitor = Monitor(card, seconds=0.001)
    assert card.done.wait(10)
    row = monitor.row()
    assert row["watts"] == 200.0 and row["throttled"] == ["power cap"] and row["throttled_share"] == 0.5
    monitor.close()
    monitor.row()
    assert monitor.row() == {}


def test_a_driver_that_goes_away_ends_the_figures_and_nothing_else():
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
    row = by_card(rows)
    assert row == {"watts": 350.0, "watts_total": 700.0, "celsius": 90.0, "throttled": ["rank 1: heat (driver)"]}
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
