"""Builds csrc/ into one shared library, atat_fast/libatat_fast.so; everything else is in pyproject.toml.

The library speaks torch's stable ABI and knows nothing of Python, so nvcc or g++ is called here directly and one wheel serves
every supported Python and torch. nvcc needs no GPU and no CUDA build of torch.

    nvcc on PATH or in CUDA_HOME      CPU ops and CUDA kernels: sm_89, sm_90, and PTX for newer devices
    g++ (or $CXX) alone               CPU ops
    neither, or torch not importable  no library: the package runs on Triton and PyTorch

ATAT_FAST_NO_CUDA=1 leaves nvcc aside, ATAT_FAST_NO_EXT=1 builds no library, ATAT_FAST_CUDA_ARCHS="8.9" compiles for that alone.
A compile that fails fails the install.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("atat_fast", "libatat_fast.so")

# The oldest torch whose stable ABI is used: 2.11. A library built against a newer torch still loads there.
TORCH_TARGET_VERSION = "0x020b000000000000ULL"
CUDA_TARGETS = ("arch=compute_89,code=sm_89", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90")


@dataclass
class Toolchain:
    """How to turn one source into an object, and the objects into the library."""

    compile: list[str]
    link: list[str]
    libraries: list[str]
    suffixes: tuple[str, ...]
    makes: str


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def find_nvcc() -> str | None:
    if is_set("ATAT_FAST_NO_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def cuda_targets() -> tuple[str, ...]:
    """What nvcc compiles for: both Ada and Hopper, and PTX for what comes after, unless ATAT_FAST_CUDA_ARCHS names less."""
    chosen = os.environ.get("ATAT_FAST_CUDA_ARCHS", "").split()
    wrong = next((name for name in chosen if not re.fullmatch(r"[89]\.\d|1\d\.\d", name)), None)
    if wrong is not None:
        sys.exit(f"atat_fast: ATAT_FAST_CUDA_ARCHS names {wrong!r}; it lists capabilities from 8.0 on, such as '8.9 9.0'")
    numbers = [name.replace(".", "") for name in chosen]
    return tuple(f"arch=compute_{number},code=sm_{number}" for number in numbers) or CUDA_TARGETS


def find_host_compiler() -> list[str] | None:
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and not shutil.which(chosen[0]):
        sys.exit(f"atat_fast: CXX is {chosen[0]!r}, which is no program on PATH; correct it, or unset it to use g++")
    return chosen or next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def find_toolchain() -> Toolchain | str:
    """The commands to build with, or the reason why no library is built."""
    if is_set("ATAT_FAST_NO_EXT"):
        return "ATAT_FAST_NO_EXT is set"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, and this is {sys.platform}"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch cannot be imported in this build; install torch first, then pass --no-build-isolation to pip"
    nvcc, host = find_nvcc(), find_host_compiler()
    if nvcc is None and host is None:
        return "neither nvcc nor g++ is on PATH; install one of them and install this package again"

    torch = Path(spec.origin).parent
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        sys.exit(f"atat_fast: {torch} has no stable ABI headers; install torch>=2.11, or set ATAT_FAST_NO_EXT=1")
    common = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include")]
    # libtorch.so brings the CUDA half of torch with it. Beside a CPU torch nothing of it is used, and the linker would drop it.
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    if nvcc is None:
        assert host is not None
        return Toolchain(
            compile=[*host, *common, "-Wall", "-fPIC", "-fopenmp-simd", "-c"],
            link=[*host, "-shared", "-Wl,--no-as-needed"],
            libraries=libraries,
            suffixes=(".cpp",),
            makes=f"CPU ops, by {host[0]}",
        )
    targets = [word for target in cuda_targets() for word in ("-gencode", target)]
    if host and os.environ.get("CXX"):
        targets += ["-ccbin", host[0]]
    numbers = [re.sub(r".*code=(sm_|(compute_))", lambda m: "-" if m[2] else "", target) for target in cuda_targets()]
    said = "-DATAT_FAST_CUDA_TARGETS=" + "".join(f"TARGET({number})" for number in numbers)  # nvcc takes no comma here
    return Toolchain(
        compile=[nvcc, *common, *targets, "-DUSE_CUDA", said, "-Xcompiler", "-Wall,-fPIC,-fopenmp-simd", "-c"],
        link=[nvcc, *targets, "-shared", "--cudart", "static", "-Xlinker", "--no-as-needed"],
        libraries=libraries,
        suffixes=(".cpp", ".cu"),
        makes=f"CPU ops and CUDA kernels, by {nvcc}",
    )


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{shlex.join(command)}\n{done.stdout}", end="", flush=True)
    if done.returncode:
        raise CompileError(f"{Path(command[0]).name} ended with status {done.returncode}; its messages are above")


class BuildLibrary(build_ext):
    """Compiles the sources side by side, then links them into LIBRARY."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        assert isinstance(toolchain, Toolchain)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp, "csrc").resolve()
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(objects / f"{source.replace(os.sep, '.')}.o")  # folders share names such as cpu.cpp
            run([*toolchain.compile, source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        run([*toolchain.link, *compiled, "-o", str(library), *toolchain.libraries])


class PlatformWheel(bdist_wheel):
    """py3-none-PLATFORM where there is a library: it is bound to the platform, and to no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


toolchain = find_toolchain()
if isinstance(toolchain, str):
    extensions = []
    outcome = f"no compiled library, because {toolchain}"
else:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in toolchain.suffixes)
    extensions = [Extension("atat_fast.libatat_fast", sources)]
    outcome = f"compiled library with {toolchain.makes}"

if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    print(f"atat_fast: {outcome}", flush=True)
if not extensions and "editable_wheel" in sys.argv:
    (ROOT / LIBRARY).unlink(missing_ok=True)  # an earlier build's, which this install would otherwise load

# The folder kernels/ is the package atat_fast.kernels. In a checkout atat_fast/kernels is a link to it, for tools that read
# files and follow no mapping; sources packed for release hold the files once.
packages = find_packages(include=["atat_fast", "atat_fast.*"], exclude=["atat_fast.kernels", "atat_fast.kernels.*"])
packages += ["atat_fast.kernels", *(f"atat_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=packages,
    package_dir={"atat_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
