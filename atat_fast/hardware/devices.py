"""Cards a run can be planned for, and the memory of the device that it runs on.

Memory is as nvidia-smi reports it; peaks are from `compute.PEAK_BF16_FLOPS`. bench/project.py projects the time of a step on a
card that was not measured.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.compute import PEAK_BF16_FLOPS

MIB = 1 << 20
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that configure torch's allocator, the newer name first."""


@dataclass(frozen=True)
class Device:
    """One card: its key for --parallel.device, its name, bytes of memory, and whether cards read each other's memory."""

    key: str
    name: str
    memory: int
    p2p: bool
    cards: int = 8
    """The most in one host."""

    @property
    def flops(self) -> float:
        """Dense bf16 operations a second, by the vendor's data sheet."""
        return PEAK_BF16_FLOPS[self.name]


TABLE = {
    device.key: device
    for device in (
        Device("rtx4090", "RTX 4090", 24_564 * MIB, p2p=False),  # GeForce drivers offer no peer-to-peer
        Device("rtx5090", "RTX 5090", 32_607 * MIB, p2p=False),
        Device("l40s", "L40S", 46_068 * MIB, p2p=True),
        Device("h100", "H100", 81_559 * MIB, p2p=True),
        Device("h200", "H200", 143_771 * MIB, p2p=True),
    )
}


def named(key: str) -> Device:
    """A device of the table. Raises UsageError for an unknown name."""
    if key not in TABLE:
        raise UsageError(f"the device {key!r} is unknown{nearest(key, TABLE)}; known are {', '.join(TABLE)}")
    return TABLE[key]


def of_name(name: str) -> Device | None:
    """The device whose name is part of a driver's name for it, or None. The table's H100 is the SXM card only."""
    return next((device for device in TABLE.values() if device.name in name and "PCIe" not in name), None)


def lacks_peer_access(name: str) -> bool:
    """Whether cards that a driver calls so cannot read each other's memory: GeForce drivers of these generations forbid it."""
    return re.search(r"GeForce RTX [45]0\d\d", name) is not None


def grow_segments(device: torch.device) -> None:
    """Let torch's allocator grow a card's segments of memory, unless the user configured it.

    Call it before the first tensor is on the card. Numbers of hidden rows vary from step to step, and pieces of fixed segments
    that fit no later tensor would add up.
    """
    if device.type != "cuda" or any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        return
    newer: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (newer or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def memory_of(device: torch.device, ranks_on_host: int = 1) -> int:
    """Bytes of a GPU's memory; of a CPU's, an equal part for each rank on this host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device.index or 0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, ranks_on_host)
