"""Watts and joules of a GPU, from the driver's energy counter (NVML); needs nvidia-ml-py."""

from __future__ import annotations

from typing import Any

import torch


class EnergyMeter:
    """Joules a GPU has used since its driver was loaded, updated about every 0.1 s; None if the machine has no counter."""

    def __init__(self, device: torch.device) -> None:
        self._read: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # cards before Volta refuse here
        except Exception:  # no package, no driver or no such counter: no figure
            return
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

    def joules(self) -> float | None:
        """The counter now."""
        return None if self._read is None else float(self._read())


def figures(joules: float | None, seconds: float, tokens: float) -> dict[str, float]:
    """Mean watts and joules per million tokens of work that took `joules`; empty if they were not counted."""
    if joules is None or seconds <= 0 or tokens <= 0:
        return {}
    return {"watts": joules / seconds, "joules_per_million_tokens": joules / tokens * 1e6}
