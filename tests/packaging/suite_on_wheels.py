"""The quick tests against wheels instead of the checkout, once for each kind of wheel.

    python tests/packaging/suite_on_wheels.py                          the nvcc, host and pure wheels, as `make wheels` does
    python tests/packaging/suite_on_wheels.py --wheels pure -- -k mask     one wheel; pytest takes what follows --

Each wheel is built from a copy of the tree and installed into an empty virtual environment, which borrows every other package
from the one that runs this script. The tests run in a folder that holds all they read and neither atat_fast/ nor kernels/. Each
process that imports atat_fast there writes down which files it got: one file from elsewhere is a failure.

The last lines say what is wrong with each wheel. The exit status is 1 if something is, 2 for bad arguments.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_build import NVCC, ROOT, build_wheel, copy_tree, run_probe

# What the tests read, the package itself excepted.
READ_BY_TESTS = (
    ".ci",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "bench",
    "constraints.txt",
    "csrc",
    "docs",
    "pyproject.toml",
    "setup.py",
    "tests",
)
# A way to build the wheel, and the bits of library.build_flags() it should show.
KINDS = {"nvcc": ({}, "3"), "host": ({"ATAT_FAST_NO_CUDA": "1"}, "1"), "pure": ({"ATAT_FAST_NO_EXT": "1"}, "0")}

# Runs at the start of every Python of the environment. At its end the files of atat_fast it imported become a line of JSON.
RECORDER = """
import atexit, json, sys

def record():
    files = [m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "atat_fast" and getattr(m, "__file__", None)]
    if files:
        with open({log!r}, "a", encoding="utf-8") as log:
            log.write(json.dumps(files) + "\\n")

atexit.register(record)
"""


def install(wheel: Path, folder: Path, log: Path) -> Path:
    """The folder of packages of a new environment with this wheel, whose processes write to `log`.

    Folders named in a .pth file come after the wheel, and the .pth files in them, an editable install's, are not read.
    """
    venv.EnvBuilder(with_pip=False).create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    (packages / "record_imports.py").write_text(RECORDER.format(log=str(log)))
    (packages / "record_imports.pth").write_text("import record_imports\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    return packages


def copy_tests(folder: Path) -> Path:
    folder.mkdir()
    for source in (ROOT / name for name in READ_BY_TESTS):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.is_file():
            shutil.copy2(source, folder)
    return folder


def faults(name: str, folder: Path, extra: list[str]) -> Iterator[str]:
    """Build one wheel in `folder`, install it, run the tests on it, and say in sentences what is wrong."""
    settings, expected = KINDS[name]
    folder.mkdir()
    build = build_wheel(copy_tree(folder), **settings)
    if build.status:
        yield f"it does not build: {build.output[-6000:]}"
        return
    tests, place, log = copy_tests(folder / "tests"), folder / "environment", folder / "imported.jsonl"
    home = os.path.realpath(install(build.wheel, place, log) / "atat_fast") + os.sep
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    env |= {"PATH": os.pathsep.join([str(place / "bin"), os.environ.get("PATH", os.defpath)])}
    env.setdefault("ATAT_FAST_SHARED", str(ROOT.parent / "shared"))
    try:
        *_, flags, _, problem = run_probe(str(place / "bin" / "python"), tests, env)
    except AssertionError as error:
        yield f"it cannot be imported: {error}"
        return
    if flags != expected:
        yield f"its library's flags are {flags} and should be {expected}: {problem}"
    print(f"== {name}: the quick tests on {build.wheel.name}, library flags {flags}", flush=True)
    pytest = [str(place / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    status = subprocess.run([*pytest, f"--junitxml={folder}/report.xml", *extra], cwd=tests, env=env, check=False).returncode
    suite = next(ElementTree.parse(folder / "report.xml").iter("testsuite"), None) if (folder / "report.xml").is_file() else {}
    total, *others = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    if status or total == sum(others):
        yield f"pytest ended with status {status}; {total - sum(others)} tests passed"
    processes = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if len(processes) < 2:
        yield "imports are not recorded: there are the probe and pytest at least"
    if strays := sorted({path for files in processes for path in files if not os.path.realpath(path).startswith(home)}):
        yield f"files of atat_fast were imported from elsewhere: {', '.join(strays)}"


def main() -> int:
    """The script."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", nargs="+", choices=KINDS, default=list(KINDS), help="which to build; all by default")
    wheels = list(dict.fromkeys(parser.parse_args(words[:end]).wheels))
    if "nvcc" in wheels and NVCC is None:
        print("error: nvcc is not on PATH, and the nvcc wheel needs it; leave that out with --wheels host pure", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        wrong = {name: list(faults(name, Path(folder).resolve() / name, words[end + 1 :])) for name in wheels}
    for name, sentences in wrong.items():
        print(f"{name}: {'; '.join(sentences) or 'good'}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
