"""Compare two result files of one benchmark, entry by entry: did anything get slower?

    python bench/compare.py OLD.json NEW.json [--limit 5]

Prints a table. Status 1: an entry got slower, or its memory larger, by more than `--limit` per cent. Status 2: the files cannot
be compared (not results, or of different benchmarks, settings or devices).

A result file is a JSON object with `benchmark` (its name), `results`, `environment` (with `device`), and optionally `settings`.
`results` is a list of rows, or an object of them by name, to any depth. In a row,

    tokens_per_second, *_per_second        a rate: more is better
    median, seconds, instructions, *_us    a time or a count (also *_ns, *_ms, *_s, *_seconds, *_instructions): less is better
    *memory*, *workspace*, *peak_bytes     memory (also *peak_mib, ...): less is better
    low*, high*, *_q1, *_min, mean*, ...   the spread of a figure: not compared
    text, booleans, integers, lists        the row's identity: rows of the two files are compared if all of these agree
    other numbers                          ratios, speedups, a cost model's bytes: not compared
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atat_fast.errors import UsageError

SPREAD = re.compile(r"(^|_)(low|high|q1|q3|q25|q75|min|max|mean|std|stddev|iqr|first|p\d+)(_|$)")
RATIO = re.compile(r"(^|_)(ratio|speedup|share|percent|mfu|of)(_|$)|_over_")
DERIVED = re.compile(r"(^|_)(flops|tflops|bytes|error|loss|agreement|gb_?s|gb_per_s)(_|$)")
MEMORY = re.compile(r"memory|workspace|(^|_)peak_(bytes|mb|mib|gb|gib)$")
LESS = re.compile(r"(^|_)(ns|us|ms|s|seconds|median|instructions)$")
MORE = re.compile(r"_per_second$")

EFFORT = ("rounds", "steps", "warmup", "warmup_rounds", "repeats", "iterations", "calls", "seed", "seeds")
"""Settings of how long was measured, not of what."""
SAME = ("device", "dtype", "compile", "cpu_threads")
"""Facts of the environment that must agree; threads on a CPU only."""


@dataclass(frozen=True)
class Entry:
    """One figure: its row's identity, its name and value, and whether more is better."""

    what: str
    metric: str
    value: float
    more: bool


@dataclass(frozen=True)
class Change:
    """A figure in both files."""

    what: str
    metric: str
    old: float
    new: float
    more: bool

    @property
    def percent(self) -> float:
        """Change of the value, in per cent of the old."""
        return (self.new / self.old - 1) * 100 if self.old else math.inf * (self.new > 0) if self.new else 0.0

    @property
    def worse(self) -> float:
        """Per cent slower or larger than before; below 0 if it got better. Half the rate is 100 per cent slower."""
        if not self.more:
            return self.percent
        return (self.old / self.new - 1) * 100 if self.new else math.inf


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises UsageError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("results"), (list, dict)) or "benchmark" not in record:
        raise UsageError(f"{path} is not a result file: it needs `benchmark` and `results`, as the files in bench/results have")
    return record


def direction(name: str) -> bool | None:
    """Whether more of this is better, or None if it is not compared."""
    if SPREAD.search(name) or RATIO.search(name):
        return None
    if MORE.search(name):
        return True
    if MEMORY.search(name):
        return False
    if DERIVED.search(name):
        return None
    return False if LESS.search(name) else None


def entries(results: Any, path: Path) -> dict[tuple[str, str], Entry]:
    """Every figure of a file's `results`, by its row's identity. Rows of equal identity are numbered in order."""
    found: dict[tuple[str, str], Entry] = {}

    def walk(node: Any, what: tuple[str, ...]) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item, what)
        if not isinstance(node, dict):
            return
        figures = {k: v for k, v in node.items() if is_number(v) and direction(k) is not None}
        inside = {k: v for k, v in node.items() if holds_rows(v)}
        for name, value in node.items():
            plain = name not in figures and name not in inside and identifies(name, value)
            what += (f"{name} {text(value)}",) if plain else ()
        for name, value in figures.items():
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{path} has {name} {value} at {', '.join(what) or 'its only row'}: no figure to compare")
            label, count = ", ".join(what), 1
            while (label, name) in found:
                count += 1
                label = f"{', '.join(what)} #{count}"
            found[label, name] = Entry(label, name, float(value), bool(direction(name)))
        for name, value in inside.items():
            walk(value, (*what, name))

    walk(results, ())
    return found


def is_number(value: Any) -> bool:
    """Whether it is an int or float, not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def holds_rows(value: Any) -> bool:
    """Whether it may hold rows: an object, or a list with one in it."""
    return isinstance(value, dict) or (isinstance(value, list) and any(holds_rows(item) for item in value))


def identifies(name: str, value: Any) -> bool:
    """Whether a field is part of its row's identity."""
    if value is None or isinstance(value, float) or name in EFFORT or direction(name) is not None:
        return False
    return not any(pattern.search(name) for pattern in (SPREAD, RATIO, DERIVED))


def text(value: Any) -> str:
    """A shape as 8 x 1024, anything else as str gives it."""
    if isinstance(value, list):
        return " x ".join(str(item) for item in value)
    return str(value)


def check_comparable(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Raise UsageError if the two measure different things. Returns other differences, as sentences."""
    if old["benchmark"] != new["benchmark"]:
        raise UsageError(f"the files are of different benchmarks: {old['benchmark']} and {new['benchmark']}")
    a, b = (record.get("environment") or {} for record in (old, new))
    for name in SAME:
        if name == "cpu_threads" and not str(a.get("device", "")).startswith("CPU"):
            continue
        if a.get(name) != b.get(name):
            raise UsageError(
                f"the files differ in {name}: {a.get(name)} and {b.get(name)}; compare figures that were taken alike"
            )
    a, b = (record.get("settings") or {} for record in (old, new))
    for name in sorted({*a, *b} - {*EFFORT}):
        if a.get(name) != b.get(name):
            raise UsageError(f"the files differ in setting {name}: {a.get(name)} and {b.get(name)}")
    a, b = (record.get("environment") or {} for record in (old, new))
    names = [n for n in ("torch", "triton", "python", "driver") if a.get(n) != b.get(n)]
    return [f"{name} was {a.get(name)} and is {b.get(name)}" for name in names]


def compare(old: dict[str, Any], new: dict[str, Any], paths: tuple[Path, Path]) -> tuple[list[Change], list[str]]:
    """Changes, worst first, and the figures that only one file has. Raises UsageError if no figure is in both."""
    before, after = entries(old["results"], paths[0]), entries(new["results"], paths[1])
    both = [(before[key], after[key]) for key in before if key in after]
    if not both:
        raise UsageError(f"no figure is in both files: {paths[0]} has {len(before)} and {paths[1]} has {len(after)}")
    changes = [Change(a.what, a.metric, a.value, b.value, a.more) for a, b in both]
    sides = ((paths[0], before, after), (paths[1], after, before))
    alone = [f"only in {path}: {key[0]} {key[1]}" for path, own, other in sides for key in own if key not in other]
    return sorted(changes, key=lambda change: -change.worse), alone


def amount(value: float) -> str:
    """As text: whole numbers, and those from 1,000 on, without decimals; others with four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.4g}"


def table(changes: list[Change], limit: float) -> str:
    """The changes as text, worst first."""
    rows = [("what", "figure", "old", "new", "change")]
    for c in changes:
        verdict = f"{c.percent:+.1f} %" + (" WORSE" if c.worse > limit else "")
        rows.append((c.what or "the only row", c.metric, amount(c.old), amount(c.new), verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}" for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, 1 if something got worse, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the result file to compare with")
    parser.add_argument("new", type=Path, help="the result file to judge")
    parser.add_argument("--limit", type=float, default=5.0, help="per cent slower, or more memory, that is still accepted")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.limit < math.inf:
            raise UsageError(f"--limit must be a percentage of 0 or more, got {args.limit}")
        old, new = read(args.old), read(args.new)
        notes = check_comparable(old, new)
        changes, alone = compare(old, new, (args.old, args.new))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(changes, args.limit))
    for sentence in [*alone, *notes]:
        print(sentence)
    worse = [change for change in changes if change.worse > args.limit]
    count = f"{len(worse)} of {len(changes)} figures" if worse else f"none of {len(changes)} figures"
    print(f"{count} got worse by more than {args.limit:g} %")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
