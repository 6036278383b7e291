"""Everything that needs a GPU, in one command and inside a given time: build, tests, benchmarks, a short training comparison.

    python bench/gpu_suite.py --out DIR --minutes 25 [--wheels FOLDER] [--only STEP ...] [--list]
    python bench/gpu_suite.py --unpack DIR/results.json        lay the benchmarks' files into this checkout's bench/results

It needs this checkout, torch 2.11 or newer, triton and pytest; what else is missing makes steps fail, and they say so. Steps
run in the order of what they are worth, each in a process of its own with a time limit; one that fails or runs out of time is
recorded, and the next begins. In DIR it leaves summary.txt (to read), summary.json (the same, with the end of each step's
output) and results.json (every JSON file the steps wrote under bench/results). --wheels holds pure-Python wheels of peers
(liger-kernel, cut-cross-entropy): they are unpacked beside the run, not installed.

Status 0: every step that could run did, and passed; without a GPU that is the first alone. 1: a step failed. 2: bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
TAIL_CHARACTERS = 12_000
LARGEST_FILE = 9 << 20
STOP_SECONDS = 10.0
"""What a step has for its last words when its time is over."""
DEVICE_FOLDER = "bench/results/DEVICE"
"""In a step's command: the folder of this device's results, as bench_*.py name it."""
LEAST_SECONDS = 5.0
"""A step is not begun with less time than this left."""

FACTS = """
import json, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
         "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
for name in ("triton", "numpy", "liger_kernel", "cut_cross_entropy", "flash_attn", "quack", "pytest_benchmark", "jsonargparse"):
    try: facts[name] = getattr(__import__(name), "__version__", "installed")
    except Exception as error: facts[name] = None
print(json.dumps(facts))
"""
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "pcie.link.gen.max,pcie.link.width.max,compute_cap"
)


@dataclass(frozen=True)
class Step:
    """One command, and the seconds it may take at most, whatever is left."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs_gpu: bool = True
    why: str = ""


@dataclass
class Outcome:
    """How a step ended: passed, failed, timed out, or not run (with the reason)."""

    name: str
    status: str
    seconds: float = 0.0
    code: int | None = None
    reason: str = ""
    clocks: list[str] = field(default_factory=list)
    tail: str = ""

    def line(self) -> str:
        """One line of the summary."""
        return f"{self.name:<28} {self.status:<10} {self.seconds:>7.1f} s  {self.reason}".rstrip()


def pytest_step(name: str, seconds: float, *arguments: str, why: str) -> Step:
    """A pytest run that takes nothing from the project's options: --strict-config refuses a machine without pytest-timeout."""
    options = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-ra", "-q"]
    if importlib.util.find_spec("pytest_benchmark") is None and "gpu" not in arguments:
        options += ["-p", "plain_benchmark"]
    return Step(name, (sys.executable, "-m", "pytest", *options, *arguments), seconds, why=why)


def steps() -> list[Step]:
    """All steps, what is worth most first. Benchmarks are those that are there."""
    python, found = sys.executable, []
    found.append(Step("environment", (python, "-c", FACTS), 120, needs_gpu=False, why="versions and devices beside every figure"))
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    found.append(Step("build", build, 420, why="csrc/ compiled for this machine's torch"))
    found.append(Step("ceilings", (python, "bench/ceilings.py"), 120, why="what the device reaches at best"))
    tests = ("tests", "-m", "gpu", "--continue-on-collection-errors")
    found.append(pytest_step("tests", 480, *tests, why="right numbers before fast ones"))
    sizes = ("--preset", "small", "--vocabulary", "50258", "--micro_batch", "8", "--profile", "--seconds", "400",
             "--out", DEVICE_FOLDER)  # fmt: skip
    found.append(Step("throughput", (python, "bench/throughput.py", *sizes), 480, why="the figure the package is for"))
    for path in sorted(set(BENCH.glob("bench_*.py")) - {BENCH / "bench_sampling.py"}):
        name = path.stem.removeprefix("bench_")
        found.append(pytest_step(f"op {name}", 240, f"bench/{path.name}", "-s", why=f"{name} beside its peers"))
    sampling = ("--batch", "1", "8", "32", "--steps", "128", "--seconds", "60")
    found.append(Step("sampling", (python, "bench/bench_sampling.py", *sampling), 240, why="tokens a second of sampling"))
    found.append(Step("training", (python, "bench/train_short.py", "--preset", "tiny", "--steps", "300", "--seconds", "240",
                                   "--out", DEVICE_FOLDER), 420, why="objectives side by side"))  # fmt: skip
    found.append(Step("projection", (python, "bench/project.py", "--gpus", "6", "--accumulation", "8"), 60,
                      why="how far the projections are from what was measured"))  # fmt: skip
    found.append(Step("peers", (python, "bench/peers.py"), 60, why="what was there to compare with"))
    return found


def find_gpu() -> tuple[str | None, str | None]:
    """(the folder its results go to, None) where there is a GPU, else (None, why there is none)."""
    code = "import sys, torch; torch.cuda.is_available() or sys.exit(3); print(torch.cuda.get_device_name())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired):
        return None, "torch does not answer"
    if done.returncode:
        return None, "torch finds no CUDA device" if done.returncode == 3 else "torch cannot be imported"
    return done.stdout.strip().lower().replace(" ", "-"), None


def clocks() -> str:
    """What nvidia-smi says of clocks, power and heat now, or nothing."""
    if shutil.which("nvidia-smi") is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()
    return ""


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends within `seconds`. It is not reaped, so that its number stays its own until `stop` is done."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def stop(process: subprocess.Popen[bytes]) -> int:
    """End the session that a step was started as, and nothing else: first as Ctrl-C would, so that it writes what it has.

    Returns the status of the step's own process. What a step that has ended left running is ended too.
    """
    if not ended(process, 0):
        os.killpg(process.pid, signal.SIGINT)
        ended(process, STOP_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run it for at most `seconds`, then stop it with all it has started."""
    before, begin = clocks(), time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, "failed", reason=f"it cannot be started: {error}")
        late = True
        try:
            late = not ended(process, seconds)
        finally:
            code = stop(process)
        took = time.monotonic() - begin
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - TAIL_CHARACTERS))
        tail = output.read().decode("utf-8", errors="replace")
    outcome = Outcome(step.name, "passed", took, code, clocks=[text for text in (before, clocks()) if text], tail=tail)
    if late:
        outcome.status, outcome.reason = "timed out", f"stopped after {seconds:.0f} s"
    elif code == 5 and "pytest" in step.command:
        outcome.status, outcome.reason = "failed", "no test was collected"
    elif code:
        last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
        outcome.status, outcome.reason = "failed", f"status {code}: {last.strip()[:160]}"
    return outcome


def run_all(todo: Sequence[Step], seconds: float, no_gpu: str | None, environment: dict[str, str]) -> list[Outcome]:
    """Every step, in order, inside `seconds` and the time the last of them needs to stop."""
    deadline, outcomes = time.monotonic() + seconds, []
    for step in todo:
        left = deadline - time.monotonic()
        if step.needs_gpu and no_gpu:
            outcome = Outcome(step.name, "not run", reason=f"it needs a GPU, and {no_gpu}")
        elif left < LEAST_SECONDS:
            outcome = Outcome(step.name, "not run", reason="the time was over")
        else:
            outcome = run_step(step, min(step.seconds, left), environment)
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
    return outcomes


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Lay pure-Python wheels out as importable packages under `target`; their names. Raises ValueError for others."""
    names = []
    for path in sorted(folder.glob("*.whl")):
        if not path.name.endswith("-none-any.whl"):
            raise ValueError(f"{path.name} is no pure-Python wheel; install it with pip")
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)  # zipfile keeps every member inside the target
        names.append(path.name)
    if not names:
        raise ValueError(f"--wheels {folder} holds no .whl file")
    return names


def written_since(moment: float) -> dict[str, Any]:
    """Every JSON file under bench/results that was written after `moment`, by its path in it."""
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        if path.stat().st_mtime >= moment and path.stat().st_size < LARGEST_FILE:
            with contextlib.suppress(ValueError):
                found[path.relative_to(RESULTS).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summarise(out: Path, outcomes: list[Outcome], results: dict[str, Any], heading: list[str]) -> None:
    """Write the three files, none larger than LARGEST_FILE; of results too many for one the largest are left out, and named."""
    kept, left_out = dict(results), []
    while len(json.dumps(kept)) > LARGEST_FILE:
        name = max(kept, key=lambda n: len(json.dumps(kept[n])))
        left_out.append(name)
        del kept[name]
    lines = [*heading, "", *(outcome.line() for outcome in outcomes), ""]
    lines += [f"results.json holds {len(kept)} files: {', '.join(kept)}" if kept else "no step wrote a result"]
    lines += [f"too large to keep: {name}" for name in left_out]
    ends = [f"\n=== {o.name}: {o.status}\n{o.tail.rstrip()}" for o in outcomes if o.tail.strip()]
    (out / "summary.txt").write_bytes(("\n".join([*lines, *ends]) + "\n").encode()[:LARGEST_FILE])
    facts = {"heading": heading, "steps": [vars(outcome) for outcome in outcomes], "results": list(kept), "left_out": left_out}
    (out / "summary.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(kept), encoding="utf-8")


def unpack(path: Path, results: Path = RESULTS) -> list[Path]:
    """Lay the files of a results.json into bench/results. Raises ValueError for a name that leads out of it."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(files, dict)
    except (OSError, ValueError, AssertionError):
        raise ValueError(f"{path} is no results.json of this script") from None
    targets = {name: (results / name).resolve() for name in files}
    for name, target in targets.items():
        if not target.is_relative_to(results.resolve()) or target.suffix != ".json":
            raise ValueError(f"{path} names {name!r}, which is no JSON file under bench/results; nothing was written")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(files[name], indent=1) + "\n", encoding="utf-8")
    return list(targets.values())


def choose(only: Sequence[str]) -> list[Step]:
    """The steps named, or all. Raises ValueError for a name that is none."""
    every = steps()
    names = [step.name for step in every]
    for name in only:
        if name not in names:
            raise ValueError(f"there is no step {name!r}; steps are {', '.join(names)}")
    return [step for step in every if not only or step.name in only]


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out", "suite"), help="folder for the summary and the results")
    parser.add_argument("--minutes", type=float, default=25.0, help="time for all steps together")
    parser.add_argument("--wheels", type=Path, default=None, help="folder of pure-Python wheels to make importable")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps alone")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument(
        "--unpack", type=Path, default=None, metavar="FILE", help="lay a results.json into bench/results and stop"
    )
    args = parser.parse_args(arguments)
    try:
        if args.unpack:
            for path in unpack(args.unpack):
                print(path)
            return 0
        todo = choose(args.only)
        if args.list:
            for step in todo:
                print(f"{step.name:<28} at most {step.seconds:>4.0f} s{'  GPU' if step.needs_gpu else '     '}  {step.why}")
            return 0
        if not 0 < args.minutes < 24 * 60:
            raise ValueError(f"--minutes must be above 0 and below a day, got {args.minutes}")
        return suite(args.out, args.minutes * 60, todo, args.wheels)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def suite(out: Path, seconds: float, todo: Sequence[Step], wheels: Path | None) -> int:
    """Run the steps and write what came of them."""
    begin, clock = time.time(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        names = unpack_wheels(wheels, Path(site)) if wheels else []
        device, no_gpu = find_gpu()
        todo = [replace(step, command=tuple(w.replace(DEVICE_FOLDER, f"bench/results/{device}") for w in step.command))
                for step in todo]  # fmt: skip
        paths = [str(ROOT), str(BENCH), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        heading = [f"device: {clocks() or no_gpu or 'nvidia-smi is not here'}"]
        heading += [f"wheels: {', '.join(names)}"] if names else []
        if no_gpu:
            waiting = ", ".join(step.name for step in todo if step.needs_gpu)
            heading.append(f"no GPU here ({no_gpu}); these steps need one: {waiting}")
        print("\n".join(heading), flush=True)
        outcomes = run_all(todo, seconds - (time.monotonic() - clock), no_gpu, environment)
    summarise(out, outcomes, written_since(begin), heading)
    print(f"written to {out}: summary.txt, summary.json, results.json")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
