"""What devices are sold as, and what is assumed of how much of it a training step gets: the one table that the plan of a run
(`training/parallel_plan.py`) and bench/project.py compute from.

Peaks are those of `atat_fast.hardware.compute.PEAK_BF16_FLOPS`. Memory is what nvidia-smi reports for such a card. All other
numbers carry their source in words; a share is an assumption until a file in bench/results says otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.compute import PEAK_BF16_FLOPS, Compute, device_name

MIB = 1 << 20
GB = 10**9


@dataclass(frozen=True)
class Shares:
    """How much of a device's peaks is assumed to arrive, and what starting a kernel is assumed to cost.

    gemm, attention: of the peak rate, in matrix products of these widths and in attention with heads of 64.
    bandwidth: of the memory's rate, in kernels that only move data.   gap: seconds between two kernels of a stream.
    overlap: of the last backward pass, during which gradients are already being summed over cards.
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

    `link` is with peer-to-peer and `link_host` through host memory, both as nccl-tests count it (bus bandwidth). A host holds
    up to `cards` of them and sends and receives `network` bytes a second. `element` is the size of a number in products.
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
    cards: int = 8
    network: float = 3.125e9
    network_source: str = "an assumption: one 25 Gb/s port a host, all of it"

    @property
    def between(self) -> float:
        """Bytes a second between the cards of a host, by the way that they have."""
        return self.link if self.p2p else self.link_host


PCIE4 = "an assumption: PCIe 4 x16 carries 32 GB/s each way in name; through host memory every byte crosses it twice"
PCIE5 = (
    "an assumption: PCIe 5 x16 carries 63 GB/s each way in name; a public NCCL issue (number 1639) has 28 GB/s for eight cards "
    "of a two-socket server and 35 for four"
)
GEFORCE = "; GeForce drivers offer no peer-to-peer"
NVLINK = "an assumption: NVLink 4 carries 450 GB/s each way in name, and rings of eight reach about 80 % of it"
ADA = Shares(
    gemm=0.70, attention=0.55, bandwidth=0.85, gap=2e-6, overlap=0.7,
    source="assumed; a public GPT-2 run at 55 % of this card's peak over a whole step (nanoGPT issue 182) bounds them from below",
)  # fmt: skip
HOPPER = Shares(
    gemm=0.65, attention=0.40, bandwidth=0.85, gap=2e-6, overlap=0.7,
    source="assumed; an H100 has given 798 TFLOP/s (81 %) for 8192-wide products and 3.0 TB/s (90 %) for copies, and products "
    "of width 768 give less",
)  # fmt: skip
FABRIC = "an assumption: eight 400 Gb/s ports a host, 80 % of them"
CPU = Shares(
    gemm=0.85, attention=0.40, bandwidth=0.5, gap=1e-5, overlap=0.0,
    source="assumed, of the measured ceilings: eager ops pass over their tensors more often than the cost models count",
)  # fmt: skip
SHEET = "vendor's data sheet: dense bf16 products with fp32 sums, and memory bandwidth"

TABLE = {
    device.key: device
    for device in (
        Device("rtx4090", "RTX 4090", PEAK_BF16_FLOPS["RTX 4090"], 1008 * GB, 24_564 * MIB, 20 * GB, 10 * GB, False, 2, ADA,
               SHEET + " of GDDR6X at 21 Gb/s on 384 bits", PCIE4 + GEFORCE),
        Device("rtx5090", "RTX 5090", PEAK_BF16_FLOPS["RTX 5090"], 1792 * GB, 32_607 * MIB, 45 * GB, 25 * GB, False, 2, ADA,
               SHEET + " of GDDR7 at 28 Gb/s on 512 bits", PCIE5 + GEFORCE),
        Device("l40s", "L40S", PEAK_BF16_FLOPS["L40S"], 864 * GB, 46_068 * MIB, 20 * GB, 10 * GB, True, 2, ADA, SHEET, PCIE4),
        Device("h100", "H100", PEAK_BF16_FLOPS["H100"], 3350 * GB, 81_559 * MIB, 360 * GB, 20 * GB, True, 2, HOPPER,
               SHEET + " of the SXM card", NVLINK, network=320 * GB, network_source=FABRIC),
        Device("h200", "H200", PEAK_BF16_FLOPS["H200"], 4800 * GB, 143_771 * MIB, 360 * GB, 20 * GB, True, 2, HOPPER,
               SHEET + " of the SXM card", NVLINK, network=320 * GB, network_source=FABRIC),
    )
}  # fmt: skip


def named(key: str) -> Device:
    """A device of the table. Raises UsageError for a name that is none."""
    if key not in TABLE:
        raise UsageError(f"the device {key!r} is unknown{nearest(key, TABLE)}; known are {', '.join(TABLE)}")
    return TABLE[key]


def of_name(name: str) -> Device | None:
    """The device whose name is part of what a driver calls it, or None. The table's H100 is the SXM card alone."""
    return next((device for device in TABLE.values() if device.name in name and "PCIe" not in name), None)


def facts_of(compute: Compute, ranks_on_host: int = 1) -> Device:
    """What is known of the device a run has: the table's row with the memory and peer-to-peer access that this one really has.

    A GPU the table lacks gets an A100's rates, and a CPU round figures and an equal part of the host's memory: such estimates
    are good for what fits, not for how long it takes, and their sources say so.
    """
    if compute.device.type != "cuda":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, ranks_on_host)
        unknown = "round figures; a CPU's rates are not known here"
        return Device(
            "cpu", device_name(compute.device), 0.5e12, 20 * GB, memory, GB, GB, False, compute.dtype.itemsize, CPU, unknown,
            "an assumption: gloo through loopback", cards=max(1, ranks_on_host),
        )  # fmt: skip
    index = compute.device.index or 0
    name, memory = device_name(compute.device), torch.cuda.get_device_properties(index).total_memory
    found = of_name(name) or replace(
        TABLE["l40s"], key="gpu", name=name, flops=PEAK_BF16_FLOPS["A100"], bandwidth=1555 * GB,
        source="an A100's rates: this device is not in the table",
    )  # fmt: skip
    others = [i for i in range(torch.cuda.device_count()) if i != index]
    p2p = torch.cuda.can_device_access_peer(index, others[0]) if others else found.p2p
    return replace(found, memory=memory, p2p=p2p, element=compute.dtype.itemsize)
