"""Compiles a C++ or CUDA source of the tests into a library that ctypes loads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compile_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    def compile_(source: str, compiler: str, *flags: str) -> ctypes.CDLL:
        program = shutil.which(compiler)
        if program is None:
            pytest.skip(f"{compiler} is not on PATH")
        library = tmp_path_factory.mktemp("native") / f"{Path(source).stem}.so"
        command = [program, "-O1", "-std=c++17", "-shared", *flags, str(HERE / source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))

    return compile_
