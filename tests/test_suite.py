"""How the tests themselves are run: on several processes, of which one may die."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os

import pytest

@pytest.fixture(scope="module")
def together():
    "Keeps this file's tests in one process."

@pytest.mark.parametrize("number", range(40))
def test_it(number, together):
    if number in (20, 39):
        os._exit(3)
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core gets one process")
def test_a_test_that_ends_its_process_fails_and_the_others_are_run(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_dies.py").write_text(TESTS)
    (tmp_path / "tests" / "test_lives.py").write_text(TESTS.replace("(20, 39)", "()").replace('(scope="module")', ""))
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['slow', 'gpu']\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    failed = sorted(line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    said = "FAILED tests/test_dies.py::test_it[{}] - its process ended with status 3"
    assert failed == [said.format(number) for number in (20, 39)], done.stdout + done.stderr
    assert done.returncode == 1 and "2 failed, 78 passed" in done.stdout
