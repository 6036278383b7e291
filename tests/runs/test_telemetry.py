"""What a run shows and writes, and where its rows go."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest
from rich.console import Console

from atat_fast.config import RunConfig
from atat_fast.errors import UsageError
from atat_fast.runs import telemetry
from atat_fast.runs.telemetry import Telemetry
from atat_fast.runs.trackers import open_trackers, require, scalars
from atat_fast.train import main

TRAIN = {"step": 5, "loss": 2.5, "tokens": 320, "tokens_per_second": 64.0, "throttled": []}
EVAL = {"step": 5, "nll": 2.0, "nll_se": 0.1}
SAMPLE = {"step": 5, "texts": ["a", "b"], "steps": 4}


CHECKPOINT = {"step": 3, "bytes": 100, "seconds": 0.5, "blocked": 0.1}


def everything(show):
    show.say("hello")
    show.train(TRAIN)
    show.evaluation(EVAL)
    show.line(EVAL["step"])
    show.samples(SAMPLE)
    show.advance(5)
    show.close()


def start(folder, run=None, **options):
    folder.mkdir(exist_ok=True)
    run = run or RunConfig(tensorboard=False)
    return Telemetry(folder, run, **({"max_steps": 10, "first_step": 0, "resumed": False} | options))


def test_rows_are_lines_of_json_and_a_resumed_run_takes_back_what_is_past_it(tmp_path, capsys):
    folder = tmp_path / "run"
    everything(start(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"kind": "train", **TRAIN}, {"kind": "eval", **EVAL}, {"kind": "sample", **SAMPLE}]
    shown = capsys.readouterr().out
    assert "hello" in shown and "val/nll 2.000 ± 0.100" in shown and "step 5 of 10" in shown
    start(folder, resumed=True, first_step=4).close()
    assert (folder / "metrics.jsonl").read_text() == ""


def test_ranks_other_than_the_first_show_and_write_nothing(tmp_path, capfd):
    everything(start(tmp_path / "run", RunConfig(tensorboard=True, wandb=True), rank=3))
    assert capfd.readouterr() == ("", "") and list((tmp_path / "run").iterdir()) == []


def test_the_first_rank_alone_has_a_bar(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = lambda **options: Console(file=screen, force_terminal=True, width=120, **options)  # noqa: E731
    monkeypatch.setattr(telemetry, "Console", terminal)
    everything(start(tmp_path / "first"))
    assert "5/10" in screen.getvalue()
    screen.truncate(0)
    everything(start(tmp_path / "second", rank=1))
    assert screen.getvalue().strip("\x00") == ""


def test_power_and_throttling_stand_beside_the_speed(tmp_path, capsys):
    show = start(tmp_path / "run")
    show.train(TRAIN | {"watts": 400.0, "watts_total": 2400.0, "throttled": ["rank 1: power cap"]})
    show.evaluation(EVAL)
    show.line(EVAL["step"])
    show.close()
    assert "64 tok/s  2400 W  throttled" in capsys.readouterr().out


def test_curves_are_the_numbers_of_a_row():
    assert dict(scalars("eval", EVAL)) == {"val/nll": 2.0, "val/nll_se": 0.1}
    assert dict(scalars("train", TRAIN)) == {"train/loss": 2.5, "train/tokens_per_second": 64.0}


@pytest.mark.slow
def test_tensorboard_gets_curves_and_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything(start(tmp_path / "run", RunConfig()))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("val/nll")] == [2.0] and events.Scalars("train/loss")[0].step == 5
    assert "samples/text_summary" in events.Tags()["tensors"]


class Service(types.ModuleType):
    """A tracker's module that keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))

    def log(self, row, step):
        self.calls.append(("log", row, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_settings_and_curves(name, tmp_path, monkeypatch):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    run = RunConfig(tensorboard=False, **{name: True})
    require(run)
    for resumed in (False, True):
        everything(start(tmp_path / "mine", run, settings={"train": {"seed": 3}}, resumed=resumed))
    late = Service(name)
    monkeypatch.setitem(sys.modules, name, late)
    show = start(tmp_path / "late", run)
    show.train(TRAIN)
    show.checkpoint(CHECKPOINT)
    show.close()
    assert late.calls[2] == ("log", {"checkpoint/bytes": 100, "checkpoint/seconds": 0.5, "checkpoint/blocked": 0.1}, 5)
    (_, first), *logged, last = service.calls[: len(service.calls) // 2]
    assert (first["project"], first["name"], first["config"]) == ("atat_fast", "mine", {"train": {"seed": 3}})
    assert [(set(row), step) for _, row, step in logged] == [
        ({"train/loss", "train/tokens_per_second"}, 5), ({"val/nll", "val/nll_se"}, 5), ({"sample/steps"}, 5)
    ]  # fmt: skip
    assert last == ("finish",)
    again = service.calls[len(service.calls) // 2][1]
    assert again["name"] == "mine" and again["resume"] == "allow" and again.get("id") == first.get("id")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_is_not_installed_says_how_to_get_it_before_anything_is_made(name, tmp_path, monkeypatch, small):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"pip install {name}"):
        main([*small, f"--run.{name}", "true"])
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UsageError, match=f"--run.{name} needs the package {name}"):
        main([*small, f"--run.{name}", "true", "--dry_run"])


def test_trackers_are_those_that_were_asked_for(tmp_path):
    (only,) = open_trackers(RunConfig(tensorboard=False), tmp_path, first_step=0, resumed=False)
    only.write("train", TRAIN)
    only.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.5
