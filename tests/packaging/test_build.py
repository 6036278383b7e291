"""Real wheels of a copy of this tree: what is in them, how they are tagged, and that the library loads."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "csrc", "kernels", "atat_fast")
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the library is built on Linux only"),
    pytest.mark.skipif(not (ROOT / "atat_fast").is_dir(), reason="wheels are built from a checkout"),
]

# Prints the bits of the library that was loaded from the folder on PYTHONPATH, and where the kernels came from.
PROBE = """
import atat_fast, atat_fast.kernels
from atat_fast.ops import library
print(atat_fast.__file__, atat_fast.kernels.__file__, library.build_flags(), library.load(), library.problem(), sep="\\n")
"""


@dataclass
class Build:
    """One finished `pip wheel`."""

    status: int
    output: str
    wheels: list[Path]

    @property
    def wheel(self) -> Path:
        assert self.status == 0, self.output
        (wheel,) = self.wheels
        return wheel

    @property
    def names(self) -> set[str]:
        return set(zipfile.ZipFile(self.wheel).namelist())


def copy_tree(folder: Path) -> Path:
    tree = folder / "tree"
    tree.mkdir()
    for source in (ROOT / name for name in COPIED):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, tree / source.name, symlinks=True, ignore=ignored)
        elif source.is_file():
            shutil.copy2(source, tree)
    return tree


def build_wheel(tree: Path, **settings: str) -> Build:
    out = tree.parent / "wheels"
    env = {k: v for k, v in os.environ.items() if k not in ("ATAT_FAST_NO_CUDA", "ATAT_FAST_NO_EXT", "CUDA_HOME", "CXX")}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out), "."]
    pipe = subprocess.PIPE
    done = subprocess.run(command, cwd=tree, env=env | settings, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
    return Build(done.returncode, done.stdout, sorted(out.glob("*.whl")))


def run_probe(python: str, cwd: Path, environment: dict[str, str]) -> list[str]:
    """The lines of PROBE, run in a fresh interpreter."""
    done = subprocess.run([python, "-c", PROBE], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def unpack_and_probe(wheel: Path, folder: Path) -> list[str]:
    """The lines of PROBE from an interpreter that finds the unpacked wheel before any installed copy."""
    zipfile.ZipFile(wheel).extractall(folder)
    lines = run_probe(sys.executable, folder, os.environ | {"PYTHONPATH": str(folder)})
    assert lines[:2] == [str(folder / "atat_fast" / "__init__.py"), str(folder / "atat_fast" / "kernels" / "__init__.py")]
    return lines[2:]


def assert_complete(names: set[str], *, library: bool) -> None:
    """Every module, kernel and data file of the tree is there once, and nothing is installed beside atat_fast."""
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"atat_fast"}
    assert {name for name in names if name.endswith(".so")} == ({"atat_fast/libatat_fast.so"} if library else set())
    kernels = {f"atat_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    data = [path for pattern in ("presets/*.yaml", "*.html", "py.typed") for path in (ROOT / "atat_fast").rglob(pattern)]
    missing = (kernels | {str(path.relative_to(ROOT)) for path in data}) - names
    assert not missing


nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.mark.parametrize(
    ("settings", "said", "flags"),
    [  # `make install` compiles all of csrc/ with nvcc, for all capabilities; philox stands for it here
        pytest.param({"ATAT_FAST_CUDA_ARCHS": "8.9"}, "with CPU ops and CUDA kernels", "3", marks=nvcc),
        pytest.param({"ATAT_FAST_NO_CUDA": "1"}, "with CPU ops, by g++", "1", marks=gxx),
    ],
)
def test_a_wheel_with_a_library_loads_on_any_torch(settings, said, flags, tmp_path):
    tree = copy_tree(tmp_path)
    if flags == "3":
        for folder in (tree / "csrc").iterdir():
            if folder.is_dir() and folder.name not in ("common", "philox"):
                shutil.rmtree(folder)
    build = build_wheel(tree, **settings)
    assert f"atat_fast: compiled library {said}" in build.output
    assert build.wheel.name.endswith("-py3-none-linux_" + os.uname().machine + ".whl")
    if flags == "3":
        assert "arch=compute_89,code=sm_89" in build.output and "compute_90" not in build.output
    assert_complete(build.names, library=True)
    assert unpack_and_probe(build.wheel, tmp_path / "site") == [flags, "True", "None"]


def test_a_pure_wheel_has_no_library_and_one_that_does_not_load_is_told_in_one_sentence(tmp_path):
    tree = copy_tree(tmp_path)
    (tree / "atat_fast" / "libatat_fast.so").write_bytes(b"left by an editable install")
    build = build_wheel(tree, ATAT_FAST_NO_EXT="1")
    assert build.wheel.name.endswith("-py3-none-any.whl")
    assert_complete(build.names, library=False)
    *loaded, problem = unpack_and_probe(build.wheel, tmp_path / "site")
    assert loaded == ["0", "False"] and "was not built" in problem
    broken = tmp_path / "site" / "atat_fast" / "libatat_fast.so"
    broken.write_bytes(b"no library")
    *loaded, problem = unpack_and_probe(build.wheel, tmp_path / "site")
    assert loaded == ["0", "False"]
    assert problem.startswith(f"{broken} does not load with torch ") and "rebuild it with" in problem


def test_without_compilers_the_wheel_is_pure_and_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    build = build_wheel(copy_tree(tmp_path), PATH=str(tmp_path / "empty"))
    assert build.wheel.name.endswith("-py3-none-any.whl")
    said = [line.strip() for line in build.output.splitlines() if line.strip().startswith("atat_fast: ")]
    reason = "neither nvcc nor g++ is on PATH; install one of them and install this package again"
    assert said == [f"atat_fast: no compiled library, because {reason}"]
    assert_complete(build.names, library=False)


@gxx
def test_a_source_that_does_not_compile_fails_the_install(tmp_path):
    tree = copy_tree(tmp_path)
    for source in (tree / "csrc").rglob("*.cpp"):  # the others are sound, and take their time
        source.unlink()
    (tree / "csrc" / "broken.cpp").write_text("int broken( { return 0; }\n")
    build = build_wheel(tree, ATAT_FAST_NO_CUDA="1")
    assert build.status != 0 and not build.wheels
    assert "broken.cpp:1" in build.output and "g++ ended with status 1; its messages are above" in build.output


@nvcc
def test_a_capability_that_is_invalid_is_told_in_one_sentence(tmp_path):
    build = build_wheel(copy_tree(tmp_path), ATAT_FAST_CUDA_ARCHS="8.9 sm_90")
    assert build.status != 0 and not build.wheels
    assert "ATAT_FAST_CUDA_ARCHS names 'sm_90'; it lists capabilities from 8.0 on, such as '8.9 9.0'" in build.output
