"""The package's table of devices (`atat_fast.hardware.devices`), and the processors that were measured beside it.

A share is an assumption until a file in bench/results says otherwise; a CPU is known by what bench/ceilings.py found on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.devices import CPU, TABLE, Device, of_name


def named(key: str, results: Path) -> Device:
    """A device of the table, or `cpu`: the processor whose ceilings are in `results`/cpu. Raises UsageError for others."""
    if key in TABLE:
        return TABLE[key]
    path = results / "cpu" / "ceilings.json"
    if key != "cpu":
        known = [*TABLE, "cpu"]
        raise UsageError(f"--device {key!r} is unknown{nearest(key, known)}; known are {', '.join(known)}")
    if not path.is_file():
        raise UsageError(f"--device cpu needs {path}, which `python bench/ceilings.py` measures")
    return from_ceilings(json.loads(path.read_text(encoding="utf-8")))


def from_ceilings(record: dict[str, Any]) -> Device:
    """A processor by what bench/ceilings.py measured on it."""
    best = {kind: max(row["rate"] for row in record["results"] if row["kind"] == kind) for kind in ("product", "copy")}
    facts = record["environment"]
    measured = f"bench/ceilings.py on this {facts['device']}, {facts['cpu_threads']} threads, {facts['dtype']}"
    size = 2 if facts["dtype"] == "bf16" else 4
    return Device(
        "cpu", facts["device"], best["product"], best["copy"], record["memory_bytes"], 0.0, 0.0, False, size, CPU, measured,
        "one process",
    )  # fmt: skip


def find(facts: dict[str, Any], results: Path) -> Device | None:
    """The device of a result file's `environment`, or None where nothing is known of it.

    A CPU is known by ceilings measured on the same one with as many threads and the same dtype.
    """
    name, path = facts["device"], results / "cpu" / "ceilings.json"
    if name.startswith("CPU"):
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"environment": {}}
        alike = all(record["environment"].get(key) == facts.get(key) for key in ("device", "cpu_threads", "dtype"))
        return from_ceilings(record) if alike else None
    return of_name(name)
