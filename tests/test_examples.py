"""The scripts of examples/, from an empty folder, as a reader runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are part of a checkout, and here are its tests alone"),
]


@pytest.mark.parametrize(
    ("script", "arguments", "left"),
    [
        ("train_modernbert.py", "--steps 30 --batch 8 --length 64 --width 64", {"modernbert"}),
        ("finetune_llada.py", "--steps 40", set()),
        ("finetune_llada.py", "--steps 40 --rows rows.jsonl --batch 4", set()),
    ],
)
def test_an_example_learns(script, arguments, left, tmp_path):
    pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    (folder := tmp_path / "empty").mkdir()
    if "rows.jsonl" in arguments:
        line = '{"prompt": "the %s of ", "response": "things is %s"}\n'
        (tmp_path / "rows.jsonl").write_text("".join(line % (i, i + 1) for i in range(20)))
        arguments = arguments.replace("rows.jsonl", str(tmp_path / "rows.jsonl"))
    command = [sys.executable, EXAMPLES / script, *arguments.split()]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = map(float, re.search(r"loss (\S+) at first, ([\d.]+) at last", done.stdout).groups())
    assert last < 0.95 * first
    assert {path.name for path in folder.iterdir()} == left


def test_an_example_is_read_in_one_sitting():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path.name
