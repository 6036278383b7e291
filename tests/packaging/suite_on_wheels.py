"""The quick tests against wheels instead of the checkout, once for each kind of wheel.

    python tests/packaging/suite_on_wheels.py                          the nvcc, host and pure wheels, as `make wheels` does
    python tests/packaging/suite_on_wheels.py --wheels pure -- -k mask     one wheel; pytest takes what follows --

Each wheel is built from a copy of the tree and installed into an empty virtual environment, which borrows every other package
from the one that runs this script. The tests run in a folder that holds all they read and neither atat_fast/ nor kernels/. Each
process that imports atat_fast there writes down which files it got, doors and scripts too: one file from elsewhere is a failure.

A table ends it. The exit status is 1 where a test failed, none passed, or a wheel is not what it should be; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_build import NVCC, ROOT, build_wheel, copy_tree, run_probe

# What the tests read, the package itself excepted.
READ_BY_TESTS = (
    ".ci", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "bench", "constraints.txt",
    "csrc", "docs", "pyproject.toml", "setup.py", "tests",
)  # fmt: skip

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


@dataclass(frozen=True)
class Kind:
    """A way to build the wheel, and the bits of library.build_flags() it should show."""

    flags: int
    settings: dict[str, str]


KINDS = {
    "nvcc": Kind(3, {}),
    "host": Kind(1, {"ATAT_FAST_NO_CUDA": "1"}),
    "pure": Kind(0, {"ATAT_FAST_NO_EXT": "1"}),
}


@dataclass
class Outcome:
    """A row of the table, and what else is wrong with a wheel, in sentences."""

    wheel: str
    flags: str = "-"
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed and not self.wrong


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds one wheel and looks elsewhere for all other packages."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(self.folder)}))

    @property
    def log(self) -> Path:
        return self.folder / "imported.jsonl"

    @property
    def variables(self) -> dict[str, str]:
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        shared = {"ATAT_FAST_SHARED": str(ROOT.parent / "shared")} if (ROOT.parent / "shared").is_dir() else {}
        return shared | kept | {"PATH": os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])}

    def install(self, wheel: Path) -> None:
        """Folders named in a .pth file come after the wheel, and the .pth files in them, an editable install's, are not read."""
        venv.EnvBuilder(with_pip=False).create(self.folder)
        others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.packages / "others.pth").write_text("\n".join(others) + "\n")
        (self.packages / "record_imports.py").write_text(RECORDER.format(log=str(self.log)))
        (self.packages / "record_imports.pth").write_text("import record_imports\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)

    def imports(self) -> list[list[str]]:
        """For each process that imported atat_fast and has ended: the files it got."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()] if self.log.exists() else []

    def strays(self) -> list[str]:
        """Files of atat_fast that some process imported from another place than the wheel."""
        home = os.path.realpath(self.packages / "atat_fast") + os.sep
        return sorted({path for files in self.imports() for path in files if not os.path.realpath(path).startswith(home)})


def copy_tests(folder: Path) -> Path:
    for name in READ_BY_TESTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copy2(source, folder / name)
    assert not (folder / "atat_fast").exists() and not (folder / "kernels").exists()
    return folder


def run_tests(environment: Environment, tests: Path, extra: list[str], outcome: Outcome) -> None:
    """Fills in the counts. pytest's own words appear as they come."""
    report = environment.folder / "report.xml"
    command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *extra]
    started = time.monotonic()
    status = subprocess.run(command, cwd=tests, env=environment.variables, check=False).returncode
    outcome.seconds = time.monotonic() - started
    if report.is_file():
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        total, failures, errors, outcome.skipped = (
            sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
        )
        outcome.failed = failures + errors
        outcome.passed = total - outcome.failed - outcome.skipped
    if status and not outcome.failed:
        outcome.wrong.append(f"pytest ended with status {status}")
    elif not outcome.passed:
        outcome.wrong.append("no test passed")


def check(name: str, folder: Path, extra: list[str]) -> Outcome:
    """Build one wheel in `folder`, install it, run the tests on it."""
    kind, outcome = KINDS[name], Outcome(name)
    print(f"\n== {name}: building", flush=True)
    folder.mkdir()
    build = build_wheel(copy_tree(folder), **kind.settings)
    if build.status:
        print(build.output)
        outcome.wrong.append(f"it does not build: pip ended with status {build.status}")
        return outcome
    environment = Environment(folder / "environment")
    environment.install(build.wheel)
    tests = copy_tests(folder / "tests")
    try:
        *places, outcome.flags, _, problem = run_probe(environment.python, tests, environment.variables)
    except AssertionError as error:
        outcome.wrong.append(f"it cannot be imported: {error}")
        return outcome
    if len(environment.imports()) != 1:
        outcome.wrong.append(f"imports are not recorded: {environment.imports()} are those of the process that got {places}")
    if outcome.flags != str(kind.flags):
        outcome.wrong.append(f"its library's flags are {outcome.flags} and should be {kind.flags}: {problem}")
    print(f"== {name}: the quick tests on {build.wheel.name}, library flags {outcome.flags}", flush=True)
    run_tests(environment, tests, extra, outcome)
    if strays := environment.strays():
        outcome.wrong.append(f"files of atat_fast were imported from elsewhere: {', '.join(strays)}")
    print(f"== {name}: {len(environment.imports())} processes imported atat_fast", flush=True)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    rows = [("wheel", "flags", "passed", "skipped", "failed", "seconds")]
    rows += [(o.wheel, o.flags, *map(str, (o.passed, o.skipped, o.failed)), f"{o.seconds:.0f}") for o in outcomes]
    lines = [f"{first:<6}" + "".join(f"{word:>9}" for word in rest) for first, *rest in rows]
    return "\n".join([*lines, *(f"{o.wheel}: {sentence}" for o in outcomes for sentence in o.wrong)])


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    words = sys.argv[1:] if arguments is None else arguments
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--wheels {nvcc,host,pure} ...] [-- PYTEST_ARGUMENT ...]",
    )
    parser.add_argument("--wheels", nargs="+", choices=KINDS, default=list(KINDS), help="which to build; all by default")
    wheels = list(dict.fromkeys(parser.parse_args(words[:end]).wheels))
    if "nvcc" in wheels and NVCC is None:
        print("error: nvcc is not on PATH, and the nvcc wheel needs it; leave that out with --wheels host pure", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        outcomes = [check(name, Path(folder).resolve() / name, words[end + 1 :]) for name in wheels]
    print(f"\n{table(outcomes)}")
    return int(not all(outcome.good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
