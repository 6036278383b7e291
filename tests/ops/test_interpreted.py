"""Triton kernels without a GPU: the tests of ops, run again in a process where Triton interprets its kernels on CPU tensors.

TRITON_INTERPRET has to be set before triton is imported, hence the process. It is serial: it shows wrong numbers, never a race.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("triton")


MODULES = (
    "test_interpreter.py",
    "test_philox.py",
    "test_masking.py",
    "test_cross_entropy.py",
    "test_linear_cross_entropy.py",
    "test_linear_categorical.py",
    "test_adaptive_norm_kernel.py",
    "test_rotary.py",
    "test_rotary_kernel.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_in_the_interpreter(module):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(ROOT / "tests/ops" / module)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
