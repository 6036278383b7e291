"""bench/scaling.py measures what the trainer does over ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_no_ranks_are_refused_in_a_sentence(load, capsys):
    assert load("scaling").main(["--ranks", "0"]) == 2
    assert "--ranks and --steps must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_are_measured_and_learn_the_same(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "bench" / "scaling.py"),
        "--steps",
        "4",
        "--modes",
        "ddp",
        "--out",
        str(tmp_path / "out"),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    one, two = record["results"]
    assert (one["ranks"], one["mode"], two["ranks"], two["mode"]) == (1, "none", 2, "ddp")
    assert len(one["losses"]) == 4 and one["tokens_per_second"] > 0 and two["loss_difference"] < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
