"""bench/compare.py: what it compares, what it calls worse, and what it refuses."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
CPP = {"shape": [8, 1024], "way": "cpp", "median_us": 200, "low_us": 1, "high_us": 9e2, "bytes": 7, "speedup_over_eager": 4}
OPS = {
    "benchmark": "masking", "rounds": 200, "results": [CPP, CPP | {"way": "torch", "median_us": 800, "speedup_over_eager": 1}],
    "environment": {"device": "CPU (X)", "dtype": "fp32", "cpu_threads": 2, "torch": "2.13.0"},
}  # fmt: skip
COUNTS = OPS | {"results": [{"shape": [8, 1024], "instructions": 100}]}
RATES = {
    "benchmark": "throughput", "settings": {"preset": "tiny", "micro_batch": 8, "rounds": 5}, "results": {
        "mdlm": {"tokens_per_second": 400.0, "low": 1.0, "high": 9e2, "step_memory_bytes": 1000, "ratio": 1.0, "mean_loss": 9.0},
        "atat_fast": {"tokens_per_second": 1200.0, "low": 1.0, "high": 2e3, "step_memory_bytes": None, "ratio": 3.0},
    },
    "environment": {"device": "NVIDIA H100", "dtype": "bf16", "cpu_threads": 16},
}  # fmt: skip


@pytest.fixture
def run(load, tmp_path, capsys):
    """run(old, new, *options) is (status, standard output, standard error)."""

    def run(old, new, *options):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, record in zip(paths, (old, new), strict=True):
            path.write_text(record if isinstance(record, str) else json.dumps(record))
        return load("compare").main([*map(str, paths), *options]), *capsys.readouterr()

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
        (COUNTS, ("results", 0, "instructions"), 107, 1),
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
def test_times_rates_and_memory_beyond_the_limit_are_worse_and_nothing_else_is(run, old, path, value, status):
    new = changed(old, *path, value)
    got, out, _ = run(old, new)
    assert got == status and ("WORSE" in out) == bool(status)
    if status:
        assert "WORSE" in out.splitlines()[1]  # the worst comes first
        assert run(new, old)[0] == 0  # what got worse one way got better the other


@pytest.mark.parametrize(("limit", "status"), [("6", 0), ("0", 1), ("-1", 2)])
def test_the_limit_is_the_users(run, limit, status):
    assert run(OPS, changed(OPS, "results", 0, "median_us", 211.0), "--limit", limit)[0] == status


def test_rows_meet_by_what_they_are_in_any_order(run):
    status, out, _ = run(OPS, OPS | {"results": OPS["results"][::-1]}, "--limit", "0")
    assert status == 0 and "only in" not in out
    more = {"shape": [32, 1024], "way": "cpp", "median_us": 1.0}
    status, out, _ = run(OPS, OPS | {"results": [*OPS["results"], more]})
    assert status == 0 and "only in" in out and "shape 32 x 1024, way cpp" in out
    twice = json.loads(json.dumps(OPS | {"results": OPS["results"] * 2}))  # rows that look alike are told apart by their order
    assert run(twice, twice)[1].count("#2") == 2
    status, out, _ = run(twice, changed(twice, "results", 2, "median_us", 999.0))
    assert status == 1 and "way cpp #2" in out.splitlines()[1]
    nested = {"benchmark": "x", "results": {"a": [{"width": 8, "forward": {"median": 1.0}, "backward": {"median": 2.0}}]}}
    status, out, _ = run(nested, changed(nested, "results", "a", 0, "backward", "median", 3.0))
    assert status == 1 and out.splitlines()[1].startswith("a, width 8, backward")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (OPS, RATES, "of different benchmarks: masking and throughput"),
        (OPS, changed(OPS, "environment", "device", "CPU (Y)"), "differ in device: CPU (X) and CPU (Y)"),
        (OPS, changed(OPS, "environment", "cpu_threads", 1), "differ in cpu_threads"),
        (OPS, changed(OPS, "environment", "dtype", "bf16"), "differ in dtype"),
        (OPS, changed(OPS, "results", []), "no figure is in both files"),
        (OPS, changed(OPS, "results", 0, "median_us", float("nan")), "no figure to compare"),
        (OPS, changed(OPS, "results", 0, "median_us", -1.0), "no figure to compare"),
        (OPS, "{", "is not JSON"),
        (OPS, "[]", "is not a result file"),
        (OPS, '{"benchmark": "masking"}', "is not a result file"),
        (RATES, changed(RATES, "settings", "micro_batch", 16), "setting micro_batch: 8 and 16"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(run, old, new, message):
    status, out, err = run(old, new)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""


def test_every_recorded_result_file_can_be_compared_with_itself(load, capsys):
    records = {path: json.loads(path.read_text()) for path in RESULTS.glob("*/*.json")}
    recorded = [path for path, record in records.items() if "results" in record]
    for path in recorded:
        assert load("compare").main([str(path), str(path), "--limit", "0"]) == 0, path
        out = capsys.readouterr().out
        assert "only in" not in out and "none of" in out, path
        assert load("compare").entries(records[path]["results"], path), path
    assert len(recorded) > 10


@given(old=st.floats(1, 1e4), new=st.floats(1, 1e4), more=st.booleans())
def test_worse_one_way_is_better_the_other(load, old, new, more):
    change = load("compare").Change
    there, back = change("", "", old, new, more), change("", "", new, old, more)
    assert (there.worse > 0) == (back.worse < 0) or there.worse == back.worse == 0
    assert (1 + there.worse / 100) * (1 + back.worse / 100) == pytest.approx(1)
    assert (there.percent > 0) == (new > old)
