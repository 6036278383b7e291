"""Every kernel and configuration that is compiled for a GPU without one. A new kernel adds its entries to TRITON or CUDA."""

from __future__ import annotations

import itertools
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
    """Each weighting once, with and without tilt and masks; some of them for the shortest and the longest sequences too."""
    from atat_fast.kernels.masking import configuration
    from atat_fast.ops.masking import LONGEST_SPREAD

    types = {
        "Noisy": "*i64", "Rows": "*i64", "Weights": "*fp32", "Tokens": "*i64", "NumMasked": "*i64", "SampleIds": "*i64",
        "Seed": "*i64", "Step": "*i64", "Scores": "*fp32", "Eligible": "*i1", "Frozen": "*i1", "num_rows": "i32",
        "mask_id": "i32", "tilt": "fp32", "focus": "fp32", "spread": "i64", "stream": "i32", "B": "i32", "L": "i32",
    }  # fmt: skip
    variants = {
        "uniform": {"weighting": 0},
        "uniform-masks": {"weighting": 0, "masks": True},
        "order-tilt": {"weighting": 1, "tilt": True},
        "importance-tilt-masks-int32-odd": {"weighting": 2, "tilt": True, "masks": True, "ids": "*i32", "divisible": False},
        "ce-masks": {"weighting": 3, "masks": True},
        "ce-spread": {"weighting": 3, "spread": 1},
        "ce-span-masks": {"weighting": 3, "spread": -1, "masks": True},
    }
    ends = ("uniform-masks", "importance-tilt-masks-int32-odd", "ce-span-masks")
    for longest, names in ((512, ends), (4096, variants), (16384, ends)):
        for name in names:
            v = variants[name]
            length = min(longest, LONGEST_SPREAD) if "spread" in v else longest
            sizes = configuration(length)
            options = {name: sizes.pop(name) for name in ("num_warps", "maxnreg")}
            tilt, masks = v.get("tilt", False), v.get("masks", False)
            flags = {"TILTED": tilt, "SPREAD": v.get("spread", 0), "ELIGIBLE": masks, "FROZEN": masks}
            constants = sizes | flags | {"WEIGHTING": v["weighting"], "BLOCK_B": 32}
            absent = {n: None for n, given in (("Scores", tilt), ("Eligible", masks), ("Frozen", masks)) if not given}
            here = {n: t for n, t in types.items() if n not in absent}
            here["Noisy"] = here["Tokens"] = v.get("ids", "*i64")
            yield Triton(
                f"mask_tokens/{name}/{length}",
                "masking",
                "_mask_tokens_kernel",
                here,
                constants | absent,
                options,
                divisible=("L",) if v.get("divisible", True) else (),
            )


def cross_entropy() -> Iterator[Triton]:
    """Rows of fp32 and bf16, with and without what is optional, aligned and odd; and the column sums."""
    from atat_fast.kernels.cross_entropy import configuration

    def types(dtype: str) -> dict[str, str]:
        return {
            "Logits": dtype, "Target": "*i64", "TokenWeight": "*fp32", "Hidden": dtype, "Weight": dtype, "Bias": dtype,
            "Nll": "*fp32", "MaxProbability": "*fp32", "Entropy": "*fp32", "Rates": "*fp32", "Elapsed": "*fp32",
            "Velocity": "*fp32", "columns": "i32", "stride": "i32", "width": "i32",
            "vocabulary": "i32",
        }  # fmt: skip

    recomputed, reported, rated = ("Hidden", "Weight", "Bias"), ("MaxProbability", "Entropy"), ("Rates", "Elapsed", "Velocity")
    for name, dtype, columns, gradient, absent, divisible in (
        ("bf16/gradient", "*bf16", 50_304, True, ("TokenWeight", *rated), True),
        ("bf16/gradient-weighted", "*bf16", 50_304, True, rated, True),
        ("bf16/gradient-weighted-stored-odd", "*bf16", 50_257, True, (*recomputed, *reported, *rated), False),
        ("bf16/gradient-weighted-short", "*bf16", 384, True, rated, True),
        ("bf16/gradient-rated", "*bf16", 50_304, True, (), True),
        ("bf16/gradient-rated-odd", "*bf16", 50_257, True, ("TokenWeight", *recomputed), False),
        ("bf16/loss-rated", "*bf16", 50_304, False, ("TokenWeight", *reported), True),
        ("fp32/gradient-rated", "*fp32", 50_304, True, reported, True),
        ("bf16/loss", "*bf16", 50_304, False, ("TokenWeight", *reported, *rated), True),
        ("bf16/loss-weighted", "*bf16", 50_304, False, rated, True),
        ("fp32/gradient", "*fp32", 50_304, True, ("TokenWeight", *recomputed, *rated), True),
        ("fp32/gradient-weighted", "*fp32", 50_304, True, rated, True),
        ("fp32/gradient-weighted-stored-odd", "*fp32", 50_257, True, (*recomputed, *reported, *rated), False),
        ("fp32/loss", "*fp32", 50_304, False, ("TokenWeight", *reported, *rated), True),
        ("fp32/loss-weighted", "*fp32", 50_304, False, (*recomputed, *rated), True),
    ):
        sizes = configuration(columns, 768)
        options = {"num_warps": sizes.pop("num_warps")}
        here = {n: t for n, t in types(dtype).items() if n not in absent}
        constants = sizes | {"GRADIENT": gradient} | dict.fromkeys(absent)
        yield Triton(
            f"cross_entropy/{name}",
            "cross_entropy",
            "_cross_entropy_kernel",
            here,
            constants,
            options,
            divisible=("columns", "stride", "width") if divisible else (),
        )

    sums = {"Sums": "*fp32", "rows": "i32", "columns": "i32", "stride": "i32", "rows_of_split": "i32"}
    for dtype in ("bf16", "fp32"):
        for add, divisible in ((False, ("columns", "stride")), (True, ())):
            yield Triton(
                f"cross_entropy/columns/{dtype}{'-add-odd' if add else ''}",
                "cross_entropy",
                "_column_sum_kernel",
                {"Gradient": f"*{dtype}"} | sums,
                {"ADD": add, "BLOCK_M": 16, "BLOCK_N": 256},
                {"num_warps": 4},
                divisible,
            )
    types_of_last = {"BiasGradient": "*fp32", "Sums": "*fp32", "columns": "i32", "splits": "i32"}
    yield Triton(
        "cross_entropy/columns/last",
        "cross_entropy",
        "_add_column_sums_kernel",
        types_of_last,
        {"BLOCK": 1024},
        {"num_warps": 4},
        ("columns",),
    )


def linear_categorical() -> Iterator[Triton]:
    """16, 32 and 64 rows a program, bf16 and fp32, with and without a bias, aligned and odd; and the best of the splits."""
    from atat_fast.kernels.linear_categorical import configuration

    for rows, width, dtype, bias in (
        (8, 768, "bf16", True),
        (32, 768, "bf16", True),
        (256, 768, "bf16", True),
        (256, 768, "bf16", False),
        (256, 50, "bf16", True),
        (256, 768, "fp32", True),
        (16, 768, "fp32", False),
    ):
        types = {
            "Scores": "*fp32", "Ids": "*i32", "Hidden": f"*{dtype}", "Weight": f"*{dtype}", "Bias": "*fp32", "Index": "*i64",
            "Seed": "*i64", "Step": "*i64", "rows": "i32", "width": "i32", "vocabulary": "i32", "forbidden": "i32",
            "parts_of_split": "i32", "inverse_temperature": "fp32",
        }  # fmt: skip
        sizes = configuration(rows, width)
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        absent = {} if bias else {"Bias": None}
        yield Triton(
            f"linear_categorical/{dtype}{'' if bias else '-no-bias'}/{rows}x{width}",
            "linear_categorical",
            "_linear_categorical_kernel",
            {n: t for n, t in types.items() if n not in absent},
            sizes | absent,
            options,
            ("width",) if width % 16 == 0 else (),
        )
    types = {"Out": "*i64", "Scores": "*fp32", "Ids": "*i32", "rows": "i32", "splits": "i32"}
    yield Triton(
        "linear_categorical/splits", "linear_categorical", "_best_of_splits_kernel", types, {"BLOCK": 128}, {"num_warps": 4}
    )


def philox() -> Iterator[Triton]:
    """The words alone."""
    types = {"Out": "*i64", "Index": "*i64", "Seed": "*i64", "Step": "*i64", "stream": "i32", "N": "i32"}
    yield Triton("philox/1024", "philox", "_words_kernel", types, {"BLOCK": 1024}, {"num_warps": 4}, ("N",))


def adaptive_norm() -> Iterator[Triton]:
    """Every kernel over the widths at which the configuration changes; dtypes, dropout and absent tensors at one of them.

    How many rows conditioning has is a stride, 0 for one row: divisible by 16 like every other, so the kernel is the same.
    """
    from atat_fast.kernels.adaptive_norm import REGISTERS, SUM_COLUMNS, SUM_ROWS, configuration

    kinds = {
        "stream": "X Dx Residual Total Dtotal Dresidual", "branch": "Y Dy Branch Dbranch",
        "conditioning": "Shift Scale Gate Dshift Dscale Dgate", "*fp32": "Mean Rstd Weight Dweight Partials",
        "*i64": "Seed Step SampleIds", "fp32": "inverse eps",
        "i32": "gate_stride shift_stride scale_stride L rows stream limit groups group_rows splits",
    }  # fmt: skip
    strides = tuple(name for name in kinds["i32"].split() if name.endswith("_stride"))
    no_dropout = "Seed Step SampleIds"

    def case(kernel, width, without="", stream="*fp32", branch="*bf16", conditioning="*fp32", row_ids=False):
        given = {"stream": stream, "branch": branch, "conditioning": conditioning}
        absent = dict.fromkeys(without.split())
        types = {name: given.get(kind, kind) for kind, names in kinds.items() for name in names.split() if name not in absent}
        if kernel == "sums":
            sizes, options = {"K": 2 if "Dgate" in absent else 3, "CHUNK": SUM_COLUMNS, "TILE_ROWS": SUM_ROWS}, {"num_warps": 4}
        else:
            chunk, chunks, tile_rows, warps = configuration(width)
            sizes, options = {"CHUNK": chunk, "CHUNKS": chunks, "TILE_ROWS": tile_rows}, {"num_warps": warps}
            if kernel.startswith("gated"):
                sizes["ROW_IDS"] = row_ids
        if kernel.endswith("backward"):
            options["maxnreg"] = REGISTERS
        marks = [f"{name}={kind[1:]}" for name, kind in given.items()] + [f"without={'+'.join(absent)}"] * bool(absent)
        name = f"{kernel}/{width}/{','.join(marks)}" + ",row_ids" * row_ids
        return Triton(name, "adaptive_norm", f"_{kernel}_kernel", types, {"D": width} | sizes | absent, options, strides)

    for width in (256, 768, 2048, 4096):
        yield case("norm_forward", width)
        yield case("norm_backward", width)
        yield case("gated_forward", width, no_dropout)
        yield case("gated_backward", width, no_dropout)
    yield case("gated_forward", 768)
    yield case("gated_backward", 768)
    for dtypes in ({"stream": "*bf16", "conditioning": "*bf16"}, {"branch": "*fp32"}):
        yield case("gated_backward", 768, **dtypes)
        yield case("norm_backward", 768, "Weight", **dtypes)
        yield case("sums", 768, "Dgate", **dtypes)
    yield case("gated_forward", 768, branch="*fp32")
    yield case("norm_forward", 768, "Weight", branch="*fp32")
    yield case("sums", 768)
    yield case("gated_backward", 768, f"Dtotal {no_dropout}")
    yield case("gated_backward", 768, f"Dy {no_dropout}")
    yield case("gated_backward", 4096)
    yield case("gated_backward", 1000, conditioning="*bf16")
    yield case("gated_backward", 1003)
    yield case("gated_forward", 768, row_ids=True)
    yield case("gated_backward", 768, row_ids=True)


def rotary() -> Iterator[Triton]:
    """Half a head of 16, 32 and 64 elements, in place and out of place, and a length that nothing divides; with a norm, whose
    scales are kept out of place, also a head that is no power of two; and the gradient of that. fp32 at two of the sizes.
    """
    from atat_fast.kernels.rotary import IN_PLACE, configuration

    integers = ("rows", "L", "H", "in_batch", "in_row", "out_batch", "out_row")
    backward_integers = ("rows", "L", "H", "grad_batch", "grad_row", "out_row")
    three = ("Q", "K", "V")
    for size, name in ((32, "bf16"), (64, "bf16"), (64, "fp32"), (96, "bf16"), (128, "bf16"), (256, "bf16"), (256, "fp32")):
        pointer = f"*{name}"
        sizes = configuration(12, size)
        options = {"num_warps": sizes.pop("num_warps")}
        types = {f"{side}{part}": pointer for side in ("Out", "In") for part in three}
        types |= {"Cos": "*fp32", "Sin": "*fp32"} | dict.fromkeys(integers, "i32")
        for norm, copy in itertools.product((False, True), repeat=2):
            if size in (96, 256) and not norm:
                continue
            constants = sizes | {"INVERSE": copy and not norm, "NORM": norm, "COPY": copy, "HALF": size // 2}
            given = types | ({"eps": "fp32"} if norm else {}) | ({"Rstd": "*fp32"} if norm and copy else {})
            absent = {optional: None for optional in ("eps", "Rstd") if optional not in given}
            yield Triton(
                f"rotary/{name}-{'norm-' * norm}{'copy' if copy else 'inplace'}/{size}",
                "rotary",
                "_rotary_kernel",
                given,
                constants | absent,
                options | ({} if copy else IN_PLACE),
                divisible=("in_batch", "in_row", "out_batch", "out_row") if copy else integers[:2] + integers[3:],
            )
        types = {f"{side}{part}": pointer for side in ("Dx", "Grad") for part in three} | {"OutQ": pointer, "OutK": pointer}
        types |= {"Rstd": "*fp32", "Cos": "*fp32", "Sin": "*fp32"}
        yield Triton(
            f"rotary/{name}-norm-backward/{size}",
            "rotary",
            "_rotary_backward_kernel",
            types | dict.fromkeys(backward_integers, "i32"),
            sizes | {"HALF": size // 2},
            options,
            divisible=backward_integers[3:],
        )


TRITON = (adaptive_norm, cross_entropy, linear_categorical, masking, philox, rotary)

CUDA = (
    # row_bytes of 50,304 bf16 columns with rates, in csrc/cross_entropy/kernel.cuh. A longer row is kept only if a device has
    # more shared memory.
    Cuda("cross_entropy/launch.cu", {"cross_entropy_kernel": 101_248, "column_sum_kernel": 8_192}),
    Cuda("masking/launch.cu", {"mask_tokens_kernel": 70_924}),  # shared_bytes(16384) in csrc/masking/kernel.cuh
    Cuda("philox/launch.cu"),
)
