"""The best rates of this device, of a large matrix product and of a copy: they bound every benchmark.

    python bench/ceilings.py [--device auto] [--out FOLDER]     writes bench/results/<device>/ceilings.json in a few seconds

Random data, interleaved rounds; median and quartiles of each shape. The rate of the fastest round is the ceiling. Measure on an
idle machine: if a CPU is busy, the output and the file say so. bench/project.py takes a CPU's peaks from here; a GPU's are its
data sheet's, and this shows how much of them was reached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, environment, resolve, short

PRODUCTS = {"cpu": ((512, 512, 512), (2048, 256, 1024)), "cuda": ((8192, 8192, 8192), (32_768, 768, 3072), (8192, 768, 50_304))}
"""(rows, inner, columns) of the products: a square one, and the shapes of an MLP and of a head."""
BUSY = 0.5
"""Load for each core from which a CPU counts as busy."""
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def calls(compute: Compute) -> dict[tuple[str, tuple[int, ...]], tuple[Callable[[], Any], float]]:
    """Every call with its work: floating-point operations of a product, bytes read and written of a copy."""
    kind, found = compute.device.type, {}
    for n, k, m in PRODUCTS[kind]:
        a = torch.randn(n, k, device=compute.device, dtype=compute.dtype)
        b = torch.randn(k, m, device=compute.device, dtype=compute.dtype)
        out = torch.empty(n, m, device=compute.device, dtype=compute.dtype)
        found["product", (n, k, m)] = (lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * n * k * m)
    source = torch.randn(COPY_BYTES[kind] // 4, device=compute.device)
    target = torch.empty_like(source)
    found["copy", (source.numel(),)] = (lambda: target.copy_(source), 2.0 * COPY_BYTES[kind])
    return found


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(compute: Compute, rounds: int) -> list[dict[str, Any]]:
    """One row a call: median and quartiles in microseconds, and the fastest round's rate a second."""
    todo = calls(compute)
    seconds: dict[tuple[str, tuple[int, ...]], list[float]] = {name: [] for name in todo}
    for i in range(rounds + 1):
        for name, (call, _) in todo.items():
            took = timed(call, compute.device)
            if i:  # the first round warms up
                seconds[name].append(took)
    rows = []
    for (kind, shape), (_, amount) in todo.items():
        low, middle, high = (s * 1e6 for s in statistics.quantiles(seconds[kind, shape], n=4))
        rows.append(
            {
                "kind": kind,
                "shape": list(shape),
                "dtype": short(compute.dtype) if kind == "product" else "fp32",
                "median_us": round(middle, 1),
                "low_us": round(low, 1),
                "high_us": round(high, 1),
                "rate": amount / min(seconds[kind, shape]),
            }
        )
    return rows


def memory_bytes(device: torch.device) -> int:
    """The device's whole memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, two or more")
    parser.add_argument("--out", type=Path, default=None, help="folder of ceilings.json; bench/results/<device> by default")
    args = parser.parse_args(arguments)
    try:
        if args.rounds < 2:
            raise UsageError(f"--rounds must be at least 2, because quartiles need them; got {args.rounds}")
        compute = resolve(TrainConfig(device=args.device))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    rows = measure(compute, args.rounds)
    print(f"{compute.describe()}, {torch.get_num_threads()} threads")
    for row in rows:
        unit = "TFLOP/s" if row["kind"] == "product" else "GB/s read and written"
        scale = 1e12 if row["kind"] == "product" else 1e9
        shape = " x ".join(f"{n:,}" for n in row["shape"])
        print(f"{row['kind']:<8} {shape:<24} {row['dtype']:<5} {row['rate'] / scale:>9.3f} {unit}")
    folder = args.out or results_folder(compute.device)
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment(compute) | {"load_average": load}
    record = {"benchmark": "ceilings", "results": rows, "memory_bytes": memory_bytes(compute.device), "environment": facts}
    path = folder / "ceilings.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    if compute.device.type == "cpu" and load > BUSY * (os.cpu_count() or 1):
        print(f"this machine was busy (load {load:.1f}): these are not ceilings; measure again when it is idle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
