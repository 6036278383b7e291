"""Count the instructions that the C++ ops execute: a measure of their cost that a busy machine does not change.

    python bench/instructions.py [--out FOLDER]       writes bench/results/cpu/instructions.json; needs valgrind
    python bench/compare.py OLD.json NEW.json         says whether an op executes more than before

Each op is called as torch calls it, in a process under valgrind's callgrind with one thread. Only instructions in the compiled
library and libm count, by function; Python and torch do not. The count is the same in every run of one library on one kind of
processor, so each case is counted twice and the two must agree. Caches and waiting do not count: bench/bench_*.py measure time.

Without valgrind (`apt-get install valgrind`) it writes nothing and says why. perf counts instructions too, if a processor's
counters can be read; virtual machines seldom allow it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from atat_fast.errors import UsageError

RESULTS = Path(__file__).resolve().parent / "results"
MASK_ID = 50_257
CALLS = 2
LIMIT_SECONDS = 1_800


def mask_tokens(batch: int, length: int, scored: bool) -> tuple[str, tuple[Any, ...]]:
    """Antithetic counts, as in training; with scores, tilted Gumbel keys and the weights of `importance`."""
    torch.manual_seed(0)
    tokens = torch.randint(0, MASK_ID, (batch, length))
    half = torch.randint(0, length + 1, (batch // 2,))
    counts = torch.stack((half, length - half), dim=1).flatten()
    scores = torch.rand(batch, length) if scored else None
    tilt, focus, weighting = (1.5, 1.0, 2) if scored else (0.0, 0.0, 0)
    rest = (torch.tensor(1), torch.tensor(7), torch.arange(batch), 0)
    rows = batch * length // 2
    return "mask_tokens", (tokens, counts, rows, MASK_ID, scores, tilt, focus, 0, None, None, weighting, *rest)


def philox(count: int) -> tuple[str, tuple[Any, ...]]:
    """Four words for each of `count` consecutive counters."""
    return "philox", (torch.arange(count), torch.tensor(1), torch.tensor(7), 0)


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    f"mask_tokens {batch}x{length} {'scored' if scored else 'uniform'}": (
        {"op": "mask_tokens", "shape": [batch, length], "scored": scored},
        functools.partial(mask_tokens, batch, length, scored),
    )
    for batch, length, scored in ((8, 1024, False), (8, 1024, True), (32, 4096, False))
} | {"philox 8192": ({"op": "philox", "shape": [8192]}, functools.partial(philox, 8192))}
"""Fields of each case's row, and a function that makes the op's name and arguments."""


def child(library: Path) -> None:
    """Runs under callgrind: call each case once to warm up, then CALLS times with counting on, and dump after each.

    It imports only torch, which takes a minute under valgrind.
    """
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    for _, make in CASES.values():
        name, arguments = make()
        op = getattr(torch.ops.atat_fast_c, name).default
        op(*arguments)
        for _ in range(CALLS):
            torch._C._valgrind_toggle()
            op(*arguments)
            torch._C._valgrind_toggle_and_dump_stats()


def count_in(profile: str, library: str) -> Counter[str]:
    """Instructions by function in a callgrind profile, of one library and of the C library's mathematics (libm).

    In a profile, `ob=` and `fn=` name the object and function of the next lines; `calls=` says that the next line is a callee's
    cost, which is not counted here; a line that begins with a place in the source is a cost.
    """
    found: Counter[str] = Counter()
    inside, function, skip = False, "", False
    for line in profile.splitlines():
        if line.startswith("ob="):
            name = Path(line[3:]).name
            inside = name == library or name.startswith(("libm.", "libm-", "libmvec"))
        elif line.startswith("fn="):
            function = line[3:]
        elif line.startswith("calls="):
            skip = True
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            if inside and not skip:
                found[function] += int(line.split()[-1])
            skip = False
    return found


def short(function: str) -> str:
    """A C++ function's name without its arguments and template arguments, short enough for a table."""
    depth, kept = 0, []
    for character in function.replace("(anonymous namespace)::", ""):
        depth += character in "<(" and 1
        if not depth:
            kept.append(character)
        depth -= character in ">)" and 1
    words = "".join(kept).replace(" [clone .avx2]", "").split()
    return (words[-1] if words else function).removeprefix("atat_fast::")


def profiles(folder: Path, library: Path) -> list[str]:
    """Run the cases under callgrind. Returns a profile for each counted call, in order. Raises UsageError if that fails."""
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--compress-strings=no", "--compress-pos=no"]
    command += [
        f"--callgrind-out-file={folder / 'profile'}",
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        str(library),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UsageError(f"the ops did not end within {LIMIT_SECONDS // 60} minutes under valgrind") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UsageError(f"the process under valgrind ended with status {done.returncode}: {' '.join(last)}")
    paths = [folder / f"profile.{i + 1}" for i in range(len(CASES) * CALLS)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(f"valgrind wrote no {missing[0]}; this torch may lack its callgrind bindings")
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def measure() -> list[dict[str, Any]]:
    """One row a case."""
    from atat_fast.ops import library

    if shutil.which("valgrind") is None:
        raise UsageError("valgrind is not installed; `apt-get install valgrind`, or your system's package of that name, has it")
    if not library.load():
        raise UsageError(library.problem() or "the compiled library was not built")
    if not (hasattr(torch._C, "_valgrind_toggle") and torch._C._valgrind_supported_platform()):
        raise UsageError(f"torch {torch.__version__} has no callgrind bindings on this platform")
    with tempfile.TemporaryDirectory() as folder:
        parts = profiles(Path(folder), library.LIBRARY_PATH)
    rows = []
    for i, (name, (what, _)) in enumerate(CASES.items()):
        counts = [count_in(text, library.LIBRARY_PATH.name) for text in parts[i * CALLS : (i + 1) * CALLS]]
        totals = [sum(count.values()) for count in counts]
        if len(set(totals)) > 1 or not totals[0]:
            raise UsageError(f"{name} executed {totals} instructions in {CALLS} equal calls; counts are useful only if equal")
        largest = {short(function): count for function, count in counts[0].most_common(4)}
        rows.append(what | {"instructions": totals[0], "functions": largest})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 if nothing can be counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder of instructions.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child)
        return 0
    from atat_fast.config import TrainConfig
    from atat_fast.hardware.compute import environment, resolve

    try:
        rows = measure()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True).stdout.strip()
    facts = environment(resolve(TrainConfig(device="cpu"))) | {"cpu_threads": 1, "valgrind": version}
    print("instructions of one call inside the compiled library, one thread")
    for row in rows:
        label = f"{row['op']} {' x '.join(map(str, row['shape']))}" + (", scored" if row.get("scored") else "")
        size = torch.Size(row["shape"]).numel()
        largest = ", ".join(f"{name} {count:,}" for name, count in row["functions"].items())
        print(f"{label:<32}{row['instructions']:>14,}{row['instructions'] / size:>10.1f} an element   {largest}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "instructions.json"
    path.write_text(json.dumps({"benchmark": "instructions", "results": rows, "environment": facts}, indent=1) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
