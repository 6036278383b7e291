"""bench/compare.py: what it compares, what it calls worse, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
OPS = {
    "benchmark": "masking",
    "rounds": 200,
    "results": [
        {
            "shape": [8, 1024],
            "way": "cpp",
            "median_us": 200.0,
            "low_us": 1.0,
            "high_us": 9e2,
            "bytes": 7,
            "speedup_over_eager": 4.0,
        },
        {"shape": [8, 1024], "way": "torch", "median_us": 800.0, "low_us": 700.0, "high_us": 900.0, "bytes": 7},
    ],
    "environment": {"device": "CPU (X)", "dtype": "fp32", "cpu_threads": 2, "torch": "2.13.0"},
}
RATES = {
    "benchmark": "throughput",
    "settings": {"preset": "tiny", "micro_batch": 8, "rounds": 5},
    "results": {
        "mdlm": {"tokens_per_second": 400.0, "low": 1.0, "high": 9e2, "step_memory_bytes": 1000, "ratio": 1.0, "mean_loss": 9.0},
        "atat_fast": {"tokens_per_second": 1200.0, "low": 1.0, "high": 2e3, "step_memory_bytes": None, "ratio": 3.0},
    },
    "environment": {"device": "NVIDIA H100", "dtype": "bf16", "cpu_threads": 16},
}


@pytest.fixture
def run(load, tmp_path, capsys):
    """run(old, new, *options) is (status, standard output, standard error)."""

    def run(old, new, *options):
        paths = []
        for name, record in (("old", old), ("new", new)):
            path = tmp_path / f"{name}.json"
            path.write_text(record if isinstance(record, str) else json.dumps(record))
            paths.append(str(path))
        status = load("compare").main([*paths, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def changed(record, *path_and_value):
    """A copy with one place set to another value."""
    *path, last, value = path_and_value
    record = place = copy.deepcopy(record)
    for name in path:
        place = place[name]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("old", "path", "value", "status"),
    [
        (OPS, ("results", 0, "median_us"), 209.0, 0),
        (OPS, ("results", 0, "median_us"), 211.0, 1),
        (OPS, ("results", 0, "median_us"), 20.0, 0),
        (OPS, ("results", 0, "high_us"), 9e9, 0),  # the spread
        (OPS, ("results", 0, "speedup_over_eager"), 0.1, 0),  # what follows from the medians
        (OPS, ("results", 0, "bytes"), 8, 0),  # the cost model
        (RATES, ("results", "mdlm", "tokens_per_second"), 385.0, 0),
        (RATES, ("results", "mdlm", "tokens_per_second"), 380.0, 1),
        (RATES, ("results", "mdlm", "tokens_per_second"), 4000.0, 0),
        (RATES, ("results", "mdlm", "step_memory_bytes"), 1049, 0),
        (RATES, ("results", "mdlm", "step_memory_bytes"), 1051, 1),
        (RATES, ("results", "mdlm", "mean_loss"), 99.0, 0),
        (RATES, ("settings", "rounds"), 50, 0),
        (RATES, ("environment", "cpu_threads"), 4, 0),  # of a GPU's host
    ],
)
def test_what_is_worse(run, old, path, value, status):
    new = changed(old, *path, value)
    got, out, _ = run(old, new)
    assert got == status
    assert ("WORSE" in out) == bool(status)
    if status:
        assert "WORSE" in out.splitlines()[1]  # the worst comes first
        assert run(new, old)[0] == 0  # what got worse one way got better the other


def test_the_limit_is_the_users(run):
    slower = changed(OPS, "results", 0, "median_us", 211.0)
    assert run(OPS, slower, "--limit", "6")[0] == 0
    assert run(OPS, slower, "--limit", "0")[0] == 1
    assert run(OPS, OPS, "--limit", "-1")[0] == 2


def test_rows_meet_by_what_they_are_in_any_order(run):
    turned = changed(OPS, "results", list(reversed(copy.deepcopy(OPS["results"]))))
    status, out, _ = run(OPS, turned, "--limit", "0")
    assert status == 0 and "only in" not in out
    grown = copy.deepcopy(OPS)
    grown["results"].append({"shape": [32, 1024], "way": "cpp", "median_us": 1.0})
    status, out, _ = run(OPS, grown)
    assert status == 0 and "only in" in out and "shape 32 x 1024, way cpp" in out


def test_rows_that_look_alike_are_told_apart_by_their_order(run):
    twice = copy.deepcopy(OPS)
    twice["results"] += copy.deepcopy(OPS["results"])
    assert run(twice, twice)[1].count("#2") == 2
    status, out, _ = run(twice, changed(twice, "results", 2, "median_us", 999.0))
    assert status == 1 and "way cpp #2" in out.splitlines()[1]


def test_rows_inside_rows(run):
    nested = {"benchmark": "x", "results": {"a": [{"width": 8, "forward": {"median": 1.0}, "backward": {"median": 2.0}}]}}
    status, out, _ = run(nested, changed(nested, "results", "a", 0, "backward", "median", 3.0))
    assert status == 1 and out.splitlines()[1].startswith("a, width 8, backward")


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (RATES, "of different benchmarks: masking and throughput"),
        (changed(OPS, "environment", "device", "CPU (Y)"), "differ in device: CPU (X) and CPU (Y)"),
        (changed(OPS, "environment", "cpu_threads", 1), "differ in cpu_threads"),
        (changed(OPS, "environment", "dtype", "bf16"), "differ in dtype"),
        (changed(OPS, "results", []), "no figure is in both files"),
        (changed(OPS, "results", 0, "median_us", float("nan")), "no figure to compare"),
        (changed(OPS, "results", 0, "median_us", -1.0), "no figure to compare"),
        ("{", "is not JSON"),
        ("[]", "is no result file"),
        ('{"benchmark": "masking"}', "is no result file"),
    ],
)
def test_refuses_in_a_sentence(run, new, message):
    status, out, err = run(OPS, new)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""


def test_other_settings_are_another_benchmark(run):
    status, _, err = run(RATES, changed(RATES, "settings", "micro_batch", 16))
    assert status == 2 and "setting micro_batch: 8 and 16" in err


def test_a_missing_file_is_a_sentence(load, capsys, tmp_path):
    assert load("compare").main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


RECORDED = [p for p in sorted(RESULTS.glob("*/*.json")) if "results" in json.loads(p.read_text())]


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recorded_result_file_can_be_compared_with_itself(load, capsys, path):
    assert load("compare").main([str(path), str(path), "--limit", "0"]) == 0
    out = capsys.readouterr().out
    assert "only in" not in out and "none of" in out
    assert len(load("compare").entries(json.loads(path.read_text())["results"], path)) >= 1


@given(old=st.floats(1, 1e4), new=st.floats(1, 1e4), more=st.booleans())
def test_worse_one_way_is_better_the_other(load, old, new, more):
    Change = load("compare").Change

    there, back = Change("", "", old, new, more), Change("", "", new, old, more)
    assert (there.worse > 0) == (back.worse < 0) or there.worse == back.worse == 0
    assert (1 + there.worse / 100) * (1 + back.worse / 100) == pytest.approx(1)
    assert (there.percent > 0) == (new > old)
