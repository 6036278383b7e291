"""csrc/ compiles against the headers of other releases of torch, which `make headers` fetches."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build_on_headers


@pytest.mark.slow
@pytest.mark.parametrize("compiler", build_on_headers.COMPILERS)
@pytest.mark.parametrize("version", ["2.11.0", "2.14.1"])
def test_it_compiles(version, compiler, monkeypatch):
    site = build_on_headers.KEPT / version
    if not (site / "torch" / "include").is_dir():
        pytest.skip(f"`make headers` fetches those of torch {version}")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on PATH")
    if compiler == "nvcc":
        monkeypatch.setenv("ATAT_FAST_CUDA_ARCHS", "9.0")  # `make headers` compiles for all of them
    status, output = build_on_headers.build(site, compiler)
    assert status == 0, output[-4000:]


def test_a_version_that_is_not_a_release_is_refused():
    done = subprocess.run([sys.executable, build_on_headers.__file__, "2.11"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'2.11' is not a release of torch, such as 2.11.0" in done.stderr
