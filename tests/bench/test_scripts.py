"""The scripts in bench/: they run, they check before they time, and the README says what their files say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def script(name, *arguments, root=ROOT, cwd=None):
    command = [sys.executable, str(root / "bench" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True)


@pytest.mark.slow
def test_throughput_checks_then_times_and_writes(tmp_path):
    small = ["--vocabulary", 30522, "--length", 128, "--micro_batch", 2, "--rounds", 2, "--dtype", "fp32", "--seconds", 0,
             "--variants", "mdlm", "atat_fast", "--out", tmp_path / "out"]  # fmt: skip
    done = script("throughput.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "losses and gradients agree to" in done.stdout
    record = json.loads((tmp_path / "out" / "throughput-tiny-30522-2.json").read_text())
    assert record["agreement"] < 1e-3 and record["environment"]["torch"]
    for name in ("mdlm", "atat_fast"):
        r = record["results"][name]
        assert r["tokens_per_second"] > 0 and r["low"] <= r["tokens_per_second"] <= r["high"] and r["step_memory_bytes"] > 0
    memory = [record["results"][name]["step_memory_bytes"] for name in ("mdlm", "atat_fast")]
    assert memory[0] > memory[1] > 1 << 20  # the logits of every token, and some of those of a slab
    assert record["results"]["mdlm"]["ratio"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "ways"),
    [("bench_block.py", ["--length", 16], ("mdlm", "atat_fast")), ("last_block.py", ["--vocabulary", 50], ())],
)
def test_block_scripts_check_then_time_and_write(tmp_path, name, arguments, ways):
    done = script(name, *arguments, "--batch", 2, "--rounds", 2, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "agree to" in done.stdout
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["agreement"] < (5e-2 if record["environment"]["dtype"] == "bf16" else 1e-3) and record["environment"]["torch"]
    assert all(0 < record["results"][way]["low"] <= record["results"][way]["ms"] for way in ways)
    assert ways or 0.8 < record["predicted_ratio"] < 1
    refused = script(name, "--preset", "tny", cwd=tmp_path)
    assert refused.returncode == 2 and "did you mean tiny" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds", 0], "must be at least 1"), (["--preset", "tny"], "did you mean tiny"), (["--vocabulary", 100], "is below")],
)
def test_throughput_refuses_in_a_sentence(arguments, message, tmp_path):
    done = script("throughput.py", *arguments, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cpu_without_bf16_is_played_checked_and_timed(tmp_path):
    done = script("without_bf16.py", "--rounds", 1, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "without_bf16.json").read_text())
    assert len(record["results"]) == 6 and record["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    for before, after in zip(record["results"][::2], record["results"][1::2], strict=True):
        assert (before["what"], before["way"], after["way"]) == (after["what"], "before", "after")
        assert after["speedup"] == pytest.approx(before["median_ms"] / after["median_ms"])
    done = script("without_bf16.py", "--rounds", 0, cwd=tmp_path)
    assert done.returncode == 2 and "--rounds must be at least 1, got 0" in done.stderr


@pytest.mark.slow
def test_the_readme_says_what_the_files_say():
    done = script("report.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_report_notices_a_figure_that_no_file_gives(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("README.md", "bench", "docs"):
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copyfile(source, copy / name)
    readme = copy / "README.md"
    honest = readme.read_text()
    start = honest.index("<!-- throughput -->")
    readme.write_text(honest[:start] + honest[start:].replace("x |", "9x |", 1))
    assert script("report.py", "--check", root=copy).returncode == 1
    assert script("report.py", root=copy).returncode == 0
    assert readme.read_text() == honest and (copy / "docs" / "images" / "demo.png").stat().st_size > 10_000
