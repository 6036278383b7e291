"""How fast this machine's processor multiplies bf16. Ops, Muon, `train.dtype auto`, benchmarks and tests ask.

    native     AMX or AVX512-BF16: bf16 products beat fp32's, two to eight times
    emulated   AVX-512 alone: oneDNN widens bf16 as it goes; about as fast as fp32
    none       others, most laptops: torch multiplies bf16 on one thread without vector instructions, some forty times slower

bf16 is the better choice on the first only. On the last it is a bad one, so the ops there multiply in fp32. Instructions that
oneDNN is told to leave aside (ONEDNN_MAX_CPU_ISA, or by its old name DNNL_MAX_CPU_ISA) count as missing, and so do those that
torch is told to (ATEN_CPU_CAPABILITY): with AVX2 in one of them, any machine multiplies as a laptop does.
"""

from __future__ import annotations

import functools
import os
import time

import torch


@functools.cache
def _bf16_instructions() -> str:
    def has(*names: str) -> bool:
        probes = (getattr(torch.cpu, name, None) for name in names)
        return any(probe is not None and probe() for probe in probes)

    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    if limit.startswith(("SSE", "AVX")) and not limit.startswith(("AVX512", "AVX10")):
        return "none"
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # its attention in bf16 then raises beside AMX
        return "none"
    if has("_is_amx_tile_supported", "_is_avx512_bf16_supported") and limit not in ("AVX512_CORE", "AVX512_CORE_VNNI"):
        return "native"
    return "emulated" if has("_is_avx512_supported") else "none"


def bf16_products() -> str:
    """How the CPU multiplies bf16: native, emulated or none; none without oneDNN, which alone uses these instructions."""
    return _bf16_instructions() if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "none"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32's on the device."""
    return device.type != "cpu" or bf16_products() == "native"


def widens_bf16(tensor: torch.Tensor) -> bool:
    """Whether to multiply this tensor in fp32: it is bf16 on a CPU that multiplies bf16 one number at a time."""
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" and bf16_products() == "none"


def times_slower(size: int = 256) -> float:
    """Measure how many times longer a bf16 product takes than one in fp32 on this CPU; takes a few hundredths of a second."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(size, size).to(dtype)
        a @ a
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - begin)
        return min(taken)

    return seconds(torch.bfloat16) / max(1e-9, seconds(torch.float32))
