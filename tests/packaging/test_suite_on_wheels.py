"""The tool that runs the tests on wheels: a short run of it on the pure wheel, and what it must not let pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOL = HERE / "suite_on_wheels.py"

pytestmark = pytest.mark.slow
in_a_checkout = pytest.mark.skipif(
    not (HERE.parents[1] / "atat_fast").is_dir(), reason="wheels are built from a checkout, and here are its tests alone"
)

FAULTY = """
import importlib

import atat_fast

def test_that_fails():
    assert atat_fast.__version__ == "none"

def test_that_imports_a_file_of_another_place():
    atat_fast.__path__.append({elsewhere!r})
    importlib.import_module("atat_fast.left_behind")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False)


def row(output: str, wheel: str) -> list[int]:
    """Flags, passed, skipped, failed and seconds of a wheel, from the table."""
    (found,) = re.findall(rf"^{wheel} +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", output, re.MULTILINE)
    return list(map(int, found))


@in_a_checkout
def test_the_pure_wheel_passes_a_selection_and_a_door():
    chosen = ("tests/ops/test_registry.py", "tests/ops/test_masking.py", "tests/test_doors.py")
    done = run("--wheels", "pure", "--", *chosen, "-k", "registry or all_and_none or help_names_every_setting")
    assert done.returncode == 0, done.stdout + done.stderr
    flags, passed, skipped, failed, _ = row(done.stdout, "pure")
    assert flags == 0 and passed >= 6 and skipped == 2 and failed == 0  # two that need the library
    assert "3 processes imported atat_fast" in done.stdout  # the tool's probe, pytest, and a door that pytest opened
    assert "the compiled library was not built" in done.stdout


@in_a_checkout
def test_faults_of_a_wheel_are_seen(tmp_path):
    left_behind = tmp_path / "left_behind.py"
    left_behind.touch()
    (tmp_path / "test_faulty.py").write_text(FAULTY.format(elsewhere=str(tmp_path)))
    done = run("--wheels", "pure", "--", tmp_path / "test_faulty.py")
    assert done.returncode == 1, done.stdout + done.stderr
    assert row(done.stdout, "pure")[:4] == [0, 1, 0, 1]
    assert done.stdout.endswith(f"pure: files of atat_fast were imported from elsewhere: {left_behind}\n")


def test_bad_arguments_are_refused_before_anything_is_built(tmp_path):
    done = run("--wheels", "cuda")
    assert done.returncode == 2 and "invalid choice: 'cuda'" in done.stderr
    command = [sys.executable, str(TOOL)]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nvcc is not on PATH, and the nvcc wheel needs it; leave that out with --wheels host pure\n"
