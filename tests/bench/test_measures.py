"""bench/instructions.py, ceilings.py, train_short.py and the stand-in for pytest-benchmark's fixture."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from atat_fast.ops import library

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"

PROFILE = """# callgrind format
events: Ir
summary: 999

ob=/usr/lib/libpython3.so
fn=call
12 500
cob=/somewhere/libatat_fast.so
cfn=atat_fast::(anonymous namespace)::fill_words(unsigned int*, long) [clone .avx2]
calls=3 40
12 77000

ob=/somewhere/libatat_fast.so
fn=atat_fast::(anonymous namespace)::fill_words(unsigned int*, long) [clone .avx2]
40 5
+2 6
-1 7
* 8
cfn=void atat_fast::fill_noisy<long>(long*, long const*)
calls=1 9
42 90000
fn=void atat_fast::fill_noisy<long>(long*, long const*)
9 100
ob=/usr/lib/libm.so.6
fn=__logf_fma
0 1000
"""


def test_a_profile_gives_each_function_its_own_instructions_under_a_short_name(load):
    found = load("instructions").count_in(PROFILE + "ob=/usr/lib/libmore.so\nfn=other\n0 3\n", "libatat_fast.so")
    short = {load("instructions").short(name): count for name, count in found.items()}
    assert short == {"fill_words": 26, "fill_noisy": 100, "__logf_fma": 1000}


def test_every_case_is_one_the_library_takes(load):
    """And its number of rows is what the counts add up to."""
    if not library.load():
        pytest.skip("the compiled library is not built")
    for what, make in load("instructions").CASES.values():
        name, arguments = make()
        out = getattr(torch.ops.atat_fast_c, name).default(*arguments)
        assert what["op"] == name
        if name == "mask_tokens":
            assert len(out[1]) == int(arguments[1].sum()) == arguments[2] and bool((out[2] > 0).all())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_counts_are_those_recorded_or_the_cause_is_in_the_code(load, tmp_path):
    """A whole run under valgrind: the counts repeat, and bench/compare.py reads them."""
    if os.environ.get("ATAT_FAST_VALGRIND") != "1" or shutil.which("valgrind") is None or not library.load():
        pytest.skip("importing torch under valgrind takes minutes: ATAT_FAST_VALGRIND=1 asks for it, and it needs the library")
    assert load("instructions").main(["--out", str(tmp_path)]) == 0
    path = tmp_path / "instructions.json"
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == len(load("instructions").CASES)
    for row in rows:
        assert row["instructions"] > 10 * torch.Size(row["shape"]).numel()
        assert sum(row["functions"].values()) <= row["instructions"]
    assert load("compare").main([str(path), str(path), "--limit", "0"]) == 0


def test_ceilings_are_rates_of_products_and_copies(load, tmp_path, monkeypatch, capsys):
    ceilings = load("ceilings")
    monkeypatch.setattr(ceilings, "PRODUCTS", {"cpu": ((64, 32, 48),)})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 16})
    assert ceilings.main(["--device", "cpu", "--rounds", "3", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "ceilings.json").read_text())
    product, copy = record["results"]
    assert product["low_us"] <= product["median_us"] <= product["high_us"]
    assert 2 * 64 * 32 * 48 / product["rate"] <= product["high_us"] / 1e6 and copy["rate"] > 0
    devices = load("devices")
    assert devices.from_ceilings(record).flops == product["rate"] and record["environment"]["load_average"] >= 0
    assert ("not ceilings" in capsys.readouterr().out) == (record["environment"]["load_average"] > 0.5 * os.cpu_count())


BENCHMARK = """
def test_it(benchmark):
    calls = []
    benchmark.pedantic(calls.append, args=(1,), rounds=4, warmup_rounds=3)
    stats = benchmark.stats.stats
    assert len(calls) == 7 and stats.rounds == 4
    assert 0 < stats.min <= stats.q1 <= stats.median <= stats.q3 <= stats.max
    assert benchmark(max, 2, 3) == 3
"""


@pytest.mark.parametrize("plugin", ["plain_benchmark", None])
def test_the_stand_in_does_what_pytest_benchmark_does(plugin, tmp_path, python, monkeypatch):
    for name in os.environ:
        if name.startswith("PYTEST_"):  # xdist turns timing off
            monkeypatch.delenv(name)
    (tmp_path / "test_it.py").write_text(BENCHMARK if plugin else BENCHMARK.replace("    assert benchmark(max, 2, 3) == 3\n", ""))
    options = ["-p", plugin, "-p", "no:benchmark"] if plugin else []
    path = str(ROOT / "bench")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_it.py", cwd=tmp_path, PYTHONPATH=path)
    if plugin is None and "fixture 'benchmark' not found" in done.stdout:
        pytest.skip("pytest-benchmark is not installed")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_rounds_are_interleaved_after_one_warm_up_each_or_one_a_call(load):
    timing, made = load("timing"), []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    for in_a_loop, order in ((False, "abababab"), (True, "aabbaabbaabb")):
        made.clear()
        taken = timing.interleaved(calls, torch.device("cpu"), 3, in_a_loop=in_a_loop)
        assert "".join(made) == order and [len(times) for times in taken.values()] == [3, 3]


def test_short_runs_are_what_they_say(load):
    short = load("train_short")
    configs = {name: short.settings("tiny", name, 30, 2, "root") for name in short.VARIANTS}
    assert [c.diffusion.masking for c in configs.values()] == ["bernoulli", "exact", "exact"]
    assert configs["ce"].diffusion.weighting == "ce"
    for config in configs.values():
        assert (config.train.max_steps, config.eval.every, config.train.seed, config.sample.num_samples) == (30, 30, 2, 0)
    assert len({c.run.name for c in configs.values()}) == 3


@pytest.mark.slow
def test_a_short_comparison_imports_neither_jsonargparse_nor_datasets(tmp_path, python):
    for name in ("jsonargparse", "datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    out, path = tmp_path / "out", os.pathsep.join((str(tmp_path), str(ROOT)))
    script = ROOT / "bench" / "train_short.py"
    done = python(script, "--preset", "demo", "--steps", "2", "--out", out, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "training.json").read_text())["results"]
    assert [row["variant"] for row in results] == ["mdlm", "exact", "ce"]
    for row in results:
        assert row["nll"] > 0 and row["nll_se"] > 0 and row["tokens_per_second"] > 0
        assert re.search(rf"{row['variant']} +seed 1  val/nll {row['nll']:.4f}", done.stdout)
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"jsonargparse.py", "datasets.py", "out"}
