"""What a run shows and writes, and where its rows go."""

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
from atat_fast.runs.trackers import require
from atat_fast.train import main

TRAIN = {"step": 5, "loss": 2.5, "tokens": 320, "tokens_per_second": 64.0, "throttled": []}
EVAL = {"step": 5, "nll": 2.0, "nll_se": 0.1}
SAMPLE = {"step": 5, "texts": ["a", "b"], "steps": 4}
CHECKPOINT = {"step": 3, "bytes": 100, "seconds": 0.5, "blocked": 0.1}


def everything(show, train=TRAIN):
    show.say("hello")
    show.train(train)
    show.evaluation(EVAL)
    show.line(EVAL["step"])
    show.samples(SAMPLE)
    show.advance(5)
    show.close()


def start(folder, run=None, **options):
    folder.mkdir(exist_ok=True)
    options = {"max_steps": 10, "first_step": 0, "resumed": False} | options
    return Telemetry(folder, run or RunConfig(tensorboard=False), **options)


def test_rows_are_lines_of_json_and_a_resumed_run_takes_back_what_is_past_it(tmp_path, capsys):
    folder = tmp_path / "run"
    everything(start(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"kind": "train", **TRAIN}, {"kind": "eval", **EVAL}, {"kind": "sample", **SAMPLE}]
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"], "no tracker that was not asked for"
    shown = capsys.readouterr().out
    assert "hello" in shown and "val/nll 2.000 ± 0.100" in shown and "step 5 of 10" in shown
    start(folder, resumed=True, first_step=4).close()
    assert (folder / "metrics.jsonl").read_text() == ""


def test_the_first_rank_alone_has_a_bar_and_the_others_show_and_write_nothing(tmp_path, monkeypatch, capfd):
    screen = io.StringIO()
    terminal = lambda **options: Console(file=screen, force_terminal=True, width=120, **options)  # noqa: E731
    monkeypatch.setattr(telemetry, "Console", terminal)
    everything(start(tmp_path / "first"))
    assert "5/10" in screen.getvalue()
    screen.seek(0)
    screen.truncate()
    for rank in (1, 3):
        everything(start(tmp_path / f"{rank}", RunConfig(tensorboard=True, wandb=True), rank=rank))
        assert capfd.readouterr() == ("", "") and screen.getvalue() == "" and list((tmp_path / f"{rank}").iterdir()) == []


def test_power_and_throttling_stand_beside_the_speed(tmp_path, capsys):
    everything(start(tmp_path / "run"), TRAIN | {"watts": 400.0, "watts_total": 2400.0, "throttled": ["rank 1: power cap"]})
    assert "64 tok/s  2400 W  throttled" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_gets_curves_and_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything(start(tmp_path / "run", RunConfig()))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("val/nll")] == [2.0] and events.Scalars("train/loss")[0].step == 5
    assert "samples/text_summary" in events.Tags()["tensors"]


def service(name):
    """A tracker's module that keeps what it is told."""
    module = types.ModuleType(name)
    module.__spec__, module.calls = types.SimpleNamespace(name=name), []
    module.init = lambda **options: module.calls.append(options)
    module.log = lambda row, step: module.calls.append((row, step))
    module.finish = lambda: module.calls.append("finish")
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_settings_and_curves(name, tmp_path, monkeypatch):
    run = RunConfig(tensorboard=False, **{name: True})
    inits = []
    for resumed in (False, True):
        monkeypatch.setitem(sys.modules, name, tracker := service(name))
        require(run)
        show = start(tmp_path / "mine", run, settings={"train": {"seed": 3}}, resumed=resumed)
        show.train(TRAIN)
        show.checkpoint(CHECKPOINT)
        everything(show)
        init, *logged, last = tracker.calls
        inits.append(init)
        assert (init["project"], init["name"], init["config"]) == ("atat_fast", "mine", {"train": {"seed": 3}})
        train = ({"train/loss": 2.5, "train/tokens_per_second": 64.0}, 5)
        saved = ({"checkpoint/bytes": 100, "checkpoint/seconds": 0.5, "checkpoint/blocked": 0.1}, 5)  # steps never go back
        assert logged == [train, saved, train, ({"val/nll": 2.0, "val/nll_se": 0.1}, 5), ({"sample/steps": 4}, 5)]
        assert last == "finish"
    assert inits[1]["resume"] == "allow" and inits[1].get("id") == inits[0].get("id")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_is_not_installed_says_how_to_get_it_before_anything_is_made(name, tmp_path, monkeypatch, small):
    monkeypatch.setitem(sys.modules, name, None)
    for more in ([], ["--dry_run"]):
        with pytest.raises(UsageError, match=f"--run.{name} needs the package {name}.*pip install {name}"):
            main([*small, f"--run.{name}=true", *more])
    assert not (tmp_path / "runs").exists()
