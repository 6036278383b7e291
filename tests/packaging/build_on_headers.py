"""Does csrc/ compile against other releases of torch?

    python tests/packaging/build_on_headers.py 2.11.0 2.14.1       as `make headers` does
    python tests/packaging/build_on_headers.py --with nvcc 2.11.0  by one compiler

A release's wheel (0.2 to 0.9 GB) is fetched once, and its headers unpacked to .torch-headers/VERSION; nothing is installed. Then
setup.py builds as it does for a user, by nvcc and by g++, with those headers in the place of the installed torch. Libraries of
that torch are not needed: empty ones of their names are linked against. The exit status is 1 if a build failed, 2 for bad
arguments.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".torch-headers"
COMPILERS = {"nvcc": {}, "g++": {"ATAT_FAST_NO_CUDA": "1"}}


def fetch(version: str) -> Path:
    """The folder that stands for site-packages with this torch: its headers, once they are here."""
    place = KEPT / version
    if (place / "torch" / "include").is_dir():
        return place
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching torch {version}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*command, f"torch=={version}"], check=True)
        (wheel,) = Path(folder).glob("torch-*.whl")
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheel) as names:
            names.extractall(unpacked, [name for name in names.namelist() if name.startswith("torch/include/")])
        (unpacked / "torch" / "__init__.py").touch()
        KEPT.mkdir(exist_ok=True)
        shutil.move(unpacked, place)
    return place


def build(site: Path, compiler: str) -> tuple[int, str]:
    """(status, output) of setup.py's build_ext where torch is what lies in `site`."""
    libraries = site / "torch" / "lib"
    libraries.mkdir(exist_ok=True)
    for empty in (libraries / f"lib{name}.so" for name in ("torch_cpu", "torch", "c10")):
        if not empty.is_file():
            subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", str(empty)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/objects"]
        env, pipe = os.environ | COMPILERS[compiler] | {"PYTHONPATH": str(site)}, subprocess.PIPE
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="releases of torch")
    parser.add_argument("--with", dest="compilers", nargs="+", choices=COMPILERS, default=list(COMPILERS))
    args = parser.parse_args()
    for version in args.versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            parser.error(f"{version!r} is not a release of torch, such as 2.11.0")
    failed = False
    for version, compiler in ((version, compiler) for version in args.versions for compiler in args.compilers):
        status, output = build(fetch(version), compiler) if shutil.which(compiler) else (1, "it is not on PATH")
        print(f"torch {version}, {compiler}: {'FAILS' if status else 'compiles'}", flush=True)
        if status:
            print(output[-6000:])
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
