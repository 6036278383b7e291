"""Triton kernels without a GPU: the tests of ops, run again in a process where Triton interprets its kernels on CPU tensors.

TRITON_INTERPRET has to be set before triton is imported, hence the process. It is serial: it shows wrong numbers, never a race.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
PLACES = (("masking", "linear_cross_entropy"), ("adaptive_norm", "rotary", "linear_categorical", "philox", "test_interpreter.py"))
"""In two processes, which take about as long."""


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES, ids=" ".join)
def test_in_the_interpreter(places):
    files = [str(HERE / place) for place in places]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files]
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
