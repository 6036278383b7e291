"""The script that runs the tests on wheels sees what must not pass: a test that fails, and a file from another place."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "suite_on_wheels.py"
FAULTY = """
import subprocess
import sys

import atat_fast

def test_that_passes():
    assert atat_fast.__version__

def test_that_fails():
    assert not atat_fast.__version__

def test_whose_process_imports_a_file_of_another_place():
    code = "import atat_fast; atat_fast.__path__.append({elsewhere!r}); import atat_fast.left_behind"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def run(*arguments, env=None):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not (SCRIPT.parents[2] / "atat_fast").is_dir(), reason="wheels are built from a checkout")
@pytest.mark.parametrize(("chosen", "status"), [("test", 1), ("passes", 0)])
def test_faults_of_a_wheel_are_seen(chosen, status, tmp_path):
    (tmp_path / "left_behind.py").touch()
    (tmp_path / "test_faulty.py").write_text(FAULTY.format(elsewhere=str(tmp_path)))
    done = run("--wheels", "pure", "--", str(tmp_path / "test_faulty.py"), "-k", chosen)
    stray = f"files of atat_fast were imported from elsewhere: {tmp_path}/left_behind.py"
    said = f"pytest ended with status 1; 2 tests passed; {stray}" if status else "good"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, f"pure: {said}"), done.stdout + done.stderr


def test_without_nvcc_its_wheel_is_refused(tmp_path):
    done = run(env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == "" and "leave that out with --wheels host pure" in done.stderr
