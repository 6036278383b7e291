"""Assumptions about devices, from which a step is projected, and processors that were measured.

Peaks and memory are from `atat_fast.hardware.devices`. Every other number has its source in words beside it: a share is assumed
until a file in bench/results measures it, and a CPU's peaks are bench/ceilings.py's measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atat_fast.errors import UsageError, nearest
from atat_fast.hardware import devices

GB = 10**9


@dataclass(frozen=True)
class Shares:
    """Assumed shares of a device's peaks, and the assumed cost of starting a kernel.

    gemm, attention: share of the peak rate in matrix products of these widths, and in attention with heads of 64.
    bandwidth: share of the memory's rate in kernels that only move data.   gap: seconds between two kernels of a stream.
    overlap: share of the last backward pass that overlaps sums of gradients over cards.
    """

    gemm: float
    attention: float
    bandwidth: float
    gap: float
    overlap: float
    source: str


@dataclass(frozen=True)
class Device:
    """One card: floating-point operations and bytes a second, bytes of memory, and all-reduce bytes a second between cards.

    `link` is with peer-to-peer and `link_host` through host memory, both as nccl-tests count it (bus bandwidth). `element` is the
    size of a number in products.
    """

    key: str
    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float
    link_host: float
    p2p: bool
    element: int
    shares: Shares
    source: str
    link_source: str


PCIE4 = "an assumption: PCIe 4 x16 carries 32 GB/s each way in name; through host memory every byte crosses it twice"
PCIE5 = (
    "an assumption: PCIe 5 x16 carries 63 GB/s each way in name; a public NCCL issue (number 1639) has 28 GB/s for eight cards "
    "of a two-socket server and 35 for four"
)
GEFORCE = "; GeForce drivers offer no peer-to-peer"
NVLINK = "an assumption: NVLink 4 carries 450 GB/s each way in name, and rings of eight reach about 80 % of it"
ADA = Shares(
    gemm=0.70,
    attention=0.55,
    bandwidth=0.85,
    gap=2e-6,
    overlap=0.7,
    source="assumed; a public GPT-2 run at 55 % of this card's peak over a whole step (nanoGPT issue 182) bounds them from below",
)
HOPPER = Shares(
    gemm=0.65,
    attention=0.40,
    bandwidth=0.85,
    gap=2e-6,
    overlap=0.7,
    source="assumed; an H100 has given 798 TFLOP/s (81 %) for 8192-wide products and 3.0 TB/s (90 %) for copies, and products "
    "of width 768 give less",
)
CPU = Shares(
    gemm=0.85,
    attention=0.40,
    bandwidth=0.5,
    gap=1e-5,
    overlap=0.0,
    source="assumed, of the measured ceilings: eager ops pass over their tensors more often than the cost models count",
)
SHEET = "vendor's data sheet: dense bf16 products with fp32 sums, and memory bandwidth"


def _card(key: str, bandwidth: float, link: float, link_host: float, shares: Shares, memory: str, link_source: str) -> Device:
    """A row: the card's facts in atat_fast.hardware.devices, and what is assumed here."""
    known = devices.TABLE[key]
    return Device(
        key, known.name, known.flops, bandwidth, known.memory, link, link_host, known.p2p, 2, shares, SHEET + memory, link_source
    )


TABLE = {
    row.key: row
    for row in (
        _card("rtx4090", 1008 * GB, 20 * GB, 10 * GB, ADA, " of GDDR6X at 21 Gb/s on 384 bits", PCIE4 + GEFORCE),
        _card("rtx5090", 1792 * GB, 45 * GB, 25 * GB, ADA, " of GDDR7 at 28 Gb/s on 512 bits", PCIE5 + GEFORCE),
        _card("l40s", 864 * GB, 20 * GB, 10 * GB, ADA, "", PCIE4),
        _card("h100", 3350 * GB, 360 * GB, 20 * GB, HOPPER, " of the SXM card", NVLINK),
        _card("h200", 4800 * GB, 360 * GB, 20 * GB, HOPPER, " of the SXM card", NVLINK),
    )
}


def of_name(name: str) -> Device | None:
    """The row of a card by the driver's name for it, or None."""
    found = devices.of_name(name)
    return None if found is None else TABLE[found.key]


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
    """A processor from a result file of bench/ceilings.py."""
    best = {kind: max(row["rate"] for row in record["results"] if row["kind"] == kind) for kind in ("product", "copy")}
    facts = record["environment"]
    measured = f"bench/ceilings.py on this {facts['device']}, {facts['cpu_threads']} threads, {facts['dtype']}"
    size = 2 if facts["dtype"] == "bf16" else 4
    return Device(
        "cpu",
        facts["device"],
        best["product"],
        best["copy"],
        record["memory_bytes"],
        0.0,
        0.0,
        False,
        size,
        CPU,
        measured,
        "one process",
    )


def find(facts: dict[str, Any], results: Path) -> Device | None:
    """The device of a result file's `environment`, or None if it is unknown.

    A CPU is known if `results` has ceilings of the same CPU with as many threads and the same dtype.
    """
    name, path = facts["device"], results / "cpu" / "ceilings.json"
    if name.startswith("CPU"):
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"environment": {}}
        alike = all(record["environment"].get(key) == facts.get(key) for key in ("device", "cpu_threads", "dtype"))
        return from_ceilings(record) if alike else None
    return of_name(name)
