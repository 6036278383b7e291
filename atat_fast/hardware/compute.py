"""What a run computes on: device, precision, compilation, and the facts about them that it records."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError
from atat_fast.ops import processor
from atat_fast.version import __version__

PEAK_BF16_FLOPS = {
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
    "L40S": 362e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""FLOP/s of dense bf16 products with fp32 sums, from data sheets; the first key that is part of a device's name counts."""


@dataclass(frozen=True)
class Compute:
    """Where and how tensors are computed."""

    device: torch.device
    dtype: torch.dtype
    compile: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast over fp32 master weights; nothing if the dtype is fp32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def describe(self) -> str:
        """'NVIDIA H100, bf16, compiled'."""
        return f"{device_name(self.device)}, {short(self.dtype)}, {'compiled' if self.compile else 'eager'}"


def resolve(config: TrainConfig, prefix: str = "--train.") -> Compute:
    """Turn the `auto`s of a TrainConfig into choices; print a note if the dtype asked for is slow here. prefix: the start of
    option names in messages. Raises UsageError if device is cuda and torch sees none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{prefix}device is cuda, but torch sees no CUDA device here; use {prefix}device cpu")
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(config.dtype)
    if dtype is None:
        dtype = torch.bfloat16 if processor.multiplies_bf16(device) else torch.float32
    elif dtype is torch.bfloat16 and device.type == "cpu" and processor.bf16_products() == "none":
        _say_slow(prefix)
    compiled = device.type == "cuda" if config.compile == "auto" else config.compile == "on"
    return Compute(device, dtype, compiled)


@functools.cache
def _say_slow(prefix: str) -> None:
    """Print the note once a process, on one rank of a host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"note: this CPU has no instructions for bf16 and multiplies it {processor.times_slower():.0f} times slower than "
            f"fp32; {prefix}dtype auto takes fp32",
            file=sys.stderr,
        )


def device_name(device: torch.device) -> str:
    """The product name: a GPU's, or 'CPU (model)'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU ({model or platform.machine()})"


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's FLOP/s in bf16, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def short(dtype: torch.dtype) -> str:
    """bf16 for torch.bfloat16."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def environment(compute: Compute) -> dict[str, Any]:
    """Facts about software and hardware for run.json."""
    return {
        "version": __version__,
        "commit": _commit(),
        "device": device_name(compute.device),
        "dtype": short(compute.dtype),
        "compile": compute.compile,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, or None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", os.fspath(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
