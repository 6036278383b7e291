"""Run the GPU's tests and benchmarks within time limits, the most important first.

    python bench/gpu_suite.py --tier 1            at most six minutes with a library built before (make install)
    python bench/gpu_suite.py --tier 2            at most five more
    python bench/gpu_suite.py --tier 3            the tests of single ops that need a GPU, and the slow ones: at most fifteen
    python bench/gpu_suite.py --tier 1 --dry_run  what would run, and each part's limit
    python bench/gpu_suite.py --unpack DIR/results.json        copy the results into this checkout's bench/results

Tier 1: versions and the backend every op chose; every kernel against fp64; the device's ceilings; the head by backend and size of
slab; training throughput; the other tests that need a GPU. Tier 2: peers of the head, norms, rotary, attention and sampling
beside compiled PyTorch, a training run, compute-sanitizer on small shapes, plain MDLM under torch.compile.

Each part is a process with its own limit. If one fails or runs out of time, that is recorded and the next begins; a part whose
package is missing is skipped with a note. After every part --out gets summary.txt (to read), summary.json (the same, with the end
of each part's output) and results.json (every JSON file written under bench/results). --wheels is a folder of pure-Python wheels
of missing packages (liger-kernel, cut-cross-entropy, jsonargparse): they are unpacked beside the run, not installed.
--small runs small shapes on a CPU: it shows that every command runs, and measures nothing.

Status 0: every part that could run did, and passed; without a GPU and without --small only the first can. 1: a part failed.
2: bad input.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
TAIL_CHARACTERS = 12_000
LARGEST_FILE = 9 << 20
STOP_SECONDS = 10.0
"""Seconds a step gets to write its results when its time is over."""
DEVICE_FOLDER = "bench/results/DEVICE"
"""Placeholder in a step's command: this device's results folder, as bench_*.py name it."""
PROCESSES, MICRO_BATCH = "PROCESSES", "MICRO_BATCH"
"""Placeholders in a step's command: processes that share the device in tests, and sequences a step; by the device's memory."""
SMALL = ("--preset", "small", "--vocabulary", "50258", "--micro_batch", MICRO_BATCH)
"""MDLM's own size, with GPT-2's vocabulary and the mask."""
SMALLEST = ("--length", "32", "--vocabulary", "4097", "--micro_batch", "2", "--rounds", "1", "--seconds", "1")
"""What takes seconds on a CPU; its memory is left out."""
LEAST_SECONDS = 5.0
"""A step is not begun with less time than this left."""

FACTS = """
import json, platform, torch, atat_fast.ops.__main__ as ops
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
         "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
for name in ("triton", "numpy", "liger_kernel", "cut_cross_entropy", "flash_attn", "quack", "pytest_benchmark", "jsonargparse"):
    try: facts[name] = getattr(__import__(name), "__version__", "installed")
    except Exception as error: facts[name] = None
print(json.dumps(facts))
ops.main()
"""
"""A script that prints the machine's versions, and which backend each op chose, with the reasons."""
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "pcie.link.gen.max,pcie.link.width.max,compute_cap"
)


@dataclass(frozen=True)
class Step:
    """One command, and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs_gpu: bool = True
    why: str = ""
    needs: tuple[str, ...] = ()
    """Modules it needs; without them it is skipped."""


@dataclass
class Outcome:
    """How a step ended: passed, failed, timed out or not run, with the reason."""

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


def pytest_step(name: str, seconds: float, *arguments: str, why: str, processes: bool = False) -> Step:
    """A pytest run without the project's options, because --strict-config fails on a machine without pytest-timeout.

    processes: run in several processes if pytest-xdist is installed.
    """
    options = ["-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "-ra", "-q"]
    if importlib.util.find_spec("pytest_benchmark") is None and "-m" not in arguments:
        options += ["-p", "plain_benchmark"]
    if processes and importlib.util.find_spec("xdist") is not None:
        options += ["-n", PROCESSES, "-p", "no:benchmark"]
    return Step(name, (sys.executable, "-m", "pytest", *options, *arguments), seconds, why=why)


def steps(tier: int, small: bool = False) -> list[Step]:
    """A tier's parts, the most important first; `small` for a CPU."""
    return (first_tier, second_tier, third_tier)[tier - 1](small)


def first_tier(small: bool) -> list[Step]:
    """Whether results are right, and how fast they are."""
    python, marker = sys.executable, "not gpu and not slow" if small else "gpu and not slow"
    ceilings, head = ("--rounds", "2") * small, ("--rows", "64", "--width", "32", "--vocabulary", "517", "--rounds", "2") * small
    ops, sizes = (
        ("tests/ops", "tests/gpu/test_ops.py", "-k", "tiny or large or test_ops"),
        (*SMALL, "--seconds", "110", "--profile"),
    )
    if small:
        sizes = SMALLEST
    out, processes = ("--out", DEVICE_FOLDER), not small
    only = ("--collect-only",) * small  # on a CPU the test suite that calls this runs them itself
    others = ("tests/gpu", "-m", marker, f"--ignore={ops[1]}", "--continue-on-collection-errors", *only)
    variants = ("--variants", "mdlm", "atat_fast", "atat_fast+atat")
    return [
        Step("environment", (python, "-c", FACTS), 25, needs_gpu=False, why="versions, and which backend every op chose"),
        pytest_step("ops", 65, *ops, "-m", marker, *only, why="every kernel against fp64", processes=processes),
        Step("ceilings", (python, "bench/ceilings.py", *out, *ceilings), 15, why="the device's best rates"),
        Step("head", (python, "bench/head.py", *out, *head), 20, why="the head by backend and size of slab, and a profile"),
        Step("throughput", (python, "bench/throughput.py", *sizes, *variants, *out), 120, why="the package's main figure"),
        pytest_step("tests", 115, *others, why="a step, sampling, evaluation and options on a GPU", processes=processes),
    ]  # fmt: skip


def second_tier(small: bool) -> list[Step]:
    """Peers, sampling, a training run, memory checks."""
    python, found = sys.executable, []
    out, tools = ("--out", DEVICE_FOLDER), ("compute-sanitizer",)
    benchmarks = (("linear_cross_entropy", 45), ("adaptive_norm", 20), ("rotary", 15), ("attention", 20))
    for name, seconds in benchmarks[:1] if small else benchmarks:
        only = ("--collect-only",) if small else ("-s",)
        found.append(pytest_step(f"op {name}", seconds, f"bench/bench_{name}.py", *only, why=f"{name} beside its peers"))
    sampling = ("--batch", "1", "16", "--steps", "128", "--seconds", "12")
    if small:
        sampling = ("--preset", "demo", "--vocabulary", "131", "--length", "32", "--batch", "1", "--steps", "4", "--seconds", "2")
    found.append(Step("sampling", (python, "bench/bench_sampling.py", *sampling, *out), 25, why="tokens a second of sampling"))
    run = ("--train.max_steps", "3", "--eval.sequences", "8", "--sample.num_samples", "0", "--model.layers", "1") * small
    trainer = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "atat_fast.train")
    found.append(
        Step("training", (*trainer, "--run.root", "out/runs", *run), 40, why="what make train does", needs=("jsonargparse",))
    )
    memcheck = ("tests/gpu/test_ops.py", "-m", "gpu and slow", "-k", "memcheck")
    found.append(replace(pytest_step("memcheck", 35, *memcheck, why="no kernel touches memory out of bounds"), needs=tools))
    sizes, variants = (*SMALL, "--rounds", "3", "--seconds", "85"), ("mdlm", "mdlm+compile", "atat_fast", "atat_fast+atat")
    if small:  # a CPU would compile it for most of a minute
        sizes, variants = SMALLEST, ("mdlm", "atat_fast")
    found.append(
        Step(
            "compiled mdlm",
            (python, "bench/throughput.py", *sizes, "--variants", *variants, *out),
            100,
            why="tier 1's throughput, beside plain MDLM under torch.compile too",
        )
    )
    return found


def third_tier(small: bool) -> list[Step]:
    """Every other test that needs a GPU: grids of shapes for each op, compute-sanitizer, slow tests."""
    marker = "not gpu and not slow" if small else "gpu"
    where = ("tests/ops/philox",) if small else ("tests", "--continue-on-collection-errors")
    return [
        pytest_step("all tests", 900, *where, "-m", marker, why="grids of shapes, sanitizers, slow tests", processes=not small)
    ]


def find_gpu() -> tuple[str | None, int, str | None]:
    """(the folder for its results, its GiB of memory, None), or without a GPU (None, 0, the reason)."""
    code = (
        "import sys, torch; torch.cuda.is_available() or sys.exit(3); "
        "print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory >> 30, sep='\\n')"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired):
        return None, 0, "torch does not answer"
    if done.returncode:
        return None, 0, "torch finds no CUDA device" if done.returncode == 3 else "torch cannot be imported"
    name, memory = done.stdout.split("\n")[:2]
    return name.strip().lower().replace(" ", "-"), int(memory), None


def settled(step: Step, folder: Path, memory: int) -> Step:
    """The step with its placeholders filled in, for a device of `memory` GiB whose results go to `folder`."""
    places = {PROCESSES: str(max(1, min(12, os.cpu_count() or 1, memory // 6))), MICRO_BATCH: "32" if memory >= 60 else "8"}
    return replace(step, command=tuple(places.get(word, word.replace(DEVICE_FOLDER, str(folder))) for word in step.command))


def clocks() -> str:
    """Clocks, power and temperature from nvidia-smi now, or ''."""
    if shutil.which("nvidia-smi") is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()
    return ""


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends within `seconds`. It is not reaped, so that its id stays valid until `stop` is done."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a step's session, and nothing else: first as Ctrl-C would, so that it writes what it has.

    Processes that a finished step left running are ended too. Returns the status of the step's own process.
    """
    if not ended(process, 0):
        os.killpg(process.pid, signal.SIGINT)
        ended(process, STOP_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_step(step: Step, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run it for at most `seconds`, then stop it and all it has started."""
    before, begin = clocks(), time.monotonic()
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # a background shell ignores it, and steps would inherit that and never stop
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
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


def missing(step: Step, no_gpu: str | None, path: str | None = None) -> str | None:
    """Why a step cannot run here, or None. path: one more folder in which to look for modules."""
    if step.needs_gpu and no_gpu:
        return f"it needs a GPU, and {no_gpu}"
    for name in step.needs:
        if shutil.which(name) is None and importlib.util.find_spec(name) is None and not (path and Path(path, name).is_dir()):
            return f"{name} is not here"
    return None


def run_all(
    todo: Sequence[Step],
    seconds: float,
    no_gpu: str | None,
    environment: dict[str, str],
    site: str | None = None,
    then: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run every step in order within `seconds`, plus the time that the last needs to stop; call `then` after each."""
    deadline, outcomes = time.monotonic() + seconds, []
    for step in todo:
        left = deadline - time.monotonic()
        if reason := missing(step, no_gpu, site):
            outcome = Outcome(step.name, "not run", reason=reason)
        elif left < LEAST_SECONDS:
            outcome = Outcome(step.name, "not run", reason="the time was over")
        else:
            outcome = run_step(step, min(step.seconds, left), environment)
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
        then(outcomes)
    return outcomes


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Unpack pure-Python wheels as packages under `target`. Returns their names. Raises ValueError for other wheels."""
    names = []
    for path in sorted(folder.glob("*.whl")):
        if not path.name.endswith("-none-any.whl"):
            raise ValueError(f"{path.name} is not a pure-Python wheel; install it with pip")
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target)  # zipfile keeps every member inside the target
        names.append(path.name)
    if not names:
        raise ValueError(f"--wheels {folder} holds no .whl file")
    return names


def written_since(moment: float) -> dict[str, Any]:
    """Every JSON file under bench/results written after `moment`, by its path there."""
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        if path.stat().st_mtime >= moment and path.stat().st_size < LARGEST_FILE:
            with contextlib.suppress(ValueError):
                found[path.relative_to(RESULTS).as_posix()] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summarise(out: Path, outcomes: list[Outcome], results: dict[str, Any], heading: list[str]) -> None:
    """Write the three files, none larger than LARGEST_FILE; if results are too large, the largest are left out and named."""
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
    """Copy the files of a results.json into bench/results. Raises ValueError for a name that leads out of it."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(files, dict)
    except (OSError, ValueError, AssertionError):
        raise ValueError(f"{path} is not a results.json of this script") from None
    targets = {name: (results / name).resolve() for name in files}
    for name, target in targets.items():
        if not target.is_relative_to(results.resolve()) or target.suffix != ".json":
            raise ValueError(f"{path} names {name!r}, which is not a JSON file under bench/results; nothing was written")
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(files[name], indent=1) + "\n", encoding="utf-8")
    return list(targets.values())


def choose(tier: int, only: Sequence[str], small: bool) -> list[Step]:
    """The tier's steps, or those named. Raises ValueError for an unknown name."""
    every = steps(tier, small)
    names = [step.name for step in every]
    for name in only:
        if name not in names:
            raise ValueError(f"tier {tier} has no part {name!r}; its parts are {', '.join(names)}")
    return [step for step in every if not only or step.name in only]


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", type=int, choices=(1, 2, 3), default=1, help="1: right and fast? 2: against peers; 3: the rest")
    parser.add_argument("--out", type=Path, default=Path("out", "suite"), help="folder for the summary and the results")
    parser.add_argument("--wheels", type=Path, default=None, help="folder of pure-Python wheels to make importable")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these parts alone")
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--dry_run", action="store_true", help="print the parts and their limits, and stop")
    parser.add_argument(
        "--unpack", type=Path, default=None, metavar="FILE", help="copy a results.json into bench/results and stop"
    )
    args = parser.parse_args(arguments)
    try:
        if args.unpack:
            for path in unpack(args.unpack):
                print(path)
            return 0
        todo = choose(args.tier, args.only, args.small)
        if args.dry_run:
            for step in todo:
                needs = ", ".join([*(["a GPU"] if step.needs_gpu else []), *step.needs])
                print(f"{step.name:<24} at most {step.seconds:>3.0f} s   {step.why}{f'; needs {needs}' if needs else ''}")
            print(f"{'all of tier ' + str(args.tier):<24} at most {sum(step.seconds for step in todo):>3.0f} s")
            return 0
        return suite(args.out, todo, args.wheels, args.small)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def suite(out: Path, todo: Sequence[Step], wheels: Path | None, small: bool = False) -> int:
    """Run the steps within the sum of their limits, and write their results."""
    begin = time.time()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        names = unpack_wheels(wheels, Path(site)) if wheels else []
        device, gib, no_gpu = (None, 0, None) if small else find_gpu()
        folder = (out / "small").resolve() if small else RESULTS / str(device)
        todo = [settled(step, folder, gib) for step in todo]
        paths = [str(ROOT), str(BENCH), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        if small:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        heading = [f"device: {'a CPU, with small shapes' if small else clocks() or no_gpu or 'nvidia-smi is not here'}"]
        heading += [f"wheels: {', '.join(names)}"] if names else []
        if no_gpu:
            waiting = ", ".join(step.name for step in todo if step.needs_gpu)
            heading.append(f"no GPU here ({no_gpu}); these parts need one: {waiting}")
        print("\n".join(heading), flush=True)

        def keep(outcomes: list[Outcome]) -> None:
            summarise(out, outcomes, written_since(begin), heading)

        outcomes = run_all(todo, sum(step.seconds for step in todo), no_gpu, environment, site, keep)
    print(f"written to {out}: summary.txt, summary.json, results.json")
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
