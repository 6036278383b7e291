"""Every kernel and configuration that is compiled for a GPU without one. A new kernel adds its entries to TRITON or CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TARGETS = {89: 101_376, 90: 232_448}
"""Compute capability, and the bytes of shared memory one CTA may have there."""


@dataclass(frozen=True)
class Triton:
    """One compilation of a `@triton.jit` function of atat_fast.kernels.

    types:      Triton's type of every run-time argument ("*fp32", "i32"); pointers are 16-byte aligned, as torch's are.
    constants:  value of every `tl.constexpr`, and None for a tensor that is not given.
    divisible:  names of integers that 16 divides.
    """

    name: str
    module: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cuda:
    """One source of csrc/. dynamic_shared: the most bytes a launch asks for beyond static shared memory, by kernel."""

    source: str
    dynamic_shared: dict[str, int] = field(default_factory=dict)


def masking() -> Iterator[Triton]:
    """Each weighting once, with and without tilt and masks, over the lengths at which the configuration changes."""
    from atat_fast.kernels.masking import configuration

    types = {
        "Noisy": "*i64", "Rows": "*i64", "Weights": "*fp32", "Tokens": "*i64", "NumMasked": "*i64", "SampleIds": "*i64",
        "Seed": "*i64", "Step": "*i64", "Scores": "*fp32", "Eligible": "*i1", "Frozen": "*i1", "num_rows": "i32",
        "mask_id": "i32", "tilt": "fp32", "focus": "fp32", "stream": "i32", "B": "i32", "L": "i32",
    }  # fmt: skip
    variants = {
        "uniform": {"weighting": 0},
        "uniform-masks": {"weighting": 0, "masks": True},
        "order-tilt": {"weighting": 1, "tilt": True},
        "importance-tilt-masks-int32-odd": {"weighting": 2, "tilt": True, "masks": True, "ids": "*i32", "divisible": False},
        "ce-masks": {"weighting": 3, "masks": True},
    }
    for length in (512, 4096, 16384):
        sizes = configuration(length)
        options = {name: sizes.pop(name) for name in ("num_warps", "maxnreg")}
        for name, v in variants.items():
            tilt, masks = v.get("tilt", False), v.get("masks", False)
            constants = sizes | {"WEIGHTING": v["weighting"], "TILTED": tilt, "ELIGIBLE": masks, "FROZEN": masks, "BLOCK_B": 32}
            absent = {n: None for n, given in (("Scores", tilt), ("Eligible", masks), ("Frozen", masks)) if not given}
            here = {n: t for n, t in types.items() if n not in absent}
            here["Noisy"] = here["Tokens"] = v.get("ids", "*i64")
            yield Triton(
                f"mask_tokens/{name}/{length}", "masking", "_mask_tokens_kernel", here, constants | absent, options,
                divisible=("L",) if v.get("divisible", True) else (),
            )  # fmt: skip


def philox() -> Iterator[Triton]:
    """The words alone."""
    types = {"Out": "*i64", "Index": "*i64", "Seed": "*i64", "Step": "*i64", "stream": "i32", "N": "i32"}
    yield Triton("philox/1024", "philox", "_words_kernel", types, {"BLOCK": 1024}, {"num_warps": 4}, ("N",))


TRITON = (masking, philox)

CUDA = (
    Cuda("masking.cu", {"mask_tokens_kernel": 70_924}),  # shared_bytes(16384) in csrc/masking.cuh
    Cuda("philox.cu"),
)
