"""A projection: what a training step should take, and hold, on a device nobody has measured yet.

    python bench/project.py --device rtx4090 --gpus 6 --preset small [--micro_batch 8] [--length 1024]
                            [--p2p | --no-p2p] [--vocabulary 50258] [--accumulation 1] [--out FILE.json]

Work comes from the ops' own cost models, peaks from bench/devices.py, and how much of a peak arrives is assumed, part by part,
and printed. Nothing that this prints was measured, except where it says so: for every device that has a throughput file in
bench/results it also gives the measured figure and its own error. `--device cpu` projects from what bench/ceilings.py measured.

    products      2 N (4 + 2 r) D^2 a block, times 3 with backward: rate
    attention     its own products: rate
    head          three products over hidden rows, and a pass over their logits: rate, and bytes
    norm chains   gate, residual, LayerNorm, modulate: bytes
    elementwise   rotary, the MLP's activation, embedding, casts of weights, gradient sums: bytes
    gaps          kernels times the time between two of them
    optimizer     clipping, AdamW, average, once a step: bytes
    all-reduce    fp32 gradients in a ring, less what overlaps the last backward pass: link
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

import devices
from devices import Device

from atat_fast.config import Config, ModelConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.models.dit import step_cost
from atat_fast.ops import (
    adaptive_layer_norm_cost,
    attention_cost,
    gated_residual_norm_cost,
    linear_cross_entropy_cost,
    rotary_cost,
)
from atat_fast.training.device import Compute
from atat_fast.training.plan import LARGEST_MICRO_BATCH, check, empty_model, estimate_memory

RESULTS = Path(__file__).resolve().parent / "results"
LABEL = "PROJECTION, not a measurement"
MOST_CARDS = 8
GIB = 1 << 30

# Kernels of one pass, counted from the model's own calls: a block's forward has four products, rotary, attention, activation and
# two norm chains; its backward two products for each, three for attention, two for each chain, bias sums; then casts of weights.
KERNELS_PER_BLOCK = 32
KERNELS_PER_SLAB = 6
KERNELS_PER_PASS = 20
KERNELS_PER_STEP = 30
SLAB_BYTES = 256 << 20

# Bytes a parameter: clipping reads the gradient twice and writes it (12), AdamW reads four and writes three (28), the average
# reads two and writes one (12).
OPTIMIZER_BYTES = 52
# Bytes a parameter and pass: a cast of the weight (read 4, write 2) and a sum into the gradient (read 2 + 4, write 4).
CAST_BYTES = 16
GRADIENT_BYTES = 4
RESERVED_BYTES = 3 * GIB // 2
"""Context, workspaces of libraries, and what the allocator cannot use."""


@dataclass(frozen=True)
class Part:
    """One part of a step: what it does, and how long that is projected to take."""

    name: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Projection:
    """A step on `gpus` cards, each with `accumulation` passes of `micro_batch` sequences."""

    device: Device
    gpus: int
    p2p: bool
    micro_batch: int
    accumulation: int
    length: int
    vocabulary: int
    parameters: int
    parts: tuple[Part, ...]
    memory: dict[str, int]
    largest_micro_batch: int
    flops_hidden: float
    flops_all: float

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """Of all cards."""
        return self.gpus * self.accumulation * self.micro_batch * self.length / self.seconds

    def mfu(self, flops: float) -> float:
        """Share of the data sheet's rate, counting `flops` for one card's step."""
        return flops / self.seconds / self.device.flops


def pass_parts(config: ModelConfig, vocabulary: int, batch: int, parameters: int, device: Device) -> list[Part]:
    """The parts of one forward and backward pass over `batch` sequences, half of whose tokens are hidden."""
    rows, width, layers, size = batch * config.length, config.dim, config.layers, device.element
    hidden, shares = rows // 2, device.shares
    head = linear_cross_entropy_cost(hidden, width, vocabulary, element_size=size)
    attend = [attention_cost(batch, config.length, width, element_size=size, backward=b) for b in (False, True)]
    # step_cost counts attention's backward as twice its forward; its own model counts what runs: scores again, five products.
    products = step_cost(config, vocabulary, batch, hidden).flops - head.flops - 3 * layers * attend[0].flops
    attention = layers * sum(cost.flops for cost in attend)

    chains = [gated_residual_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    first = [adaptive_layer_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    norm_bytes = 2 * layers * sum(chains) + sum(first)
    turns = 2 * layers * rotary_cost(rows, config.heads, width // config.heads, element_size=size).bytes
    activation = 5 * rows * config.mlp_ratio * width * size * layers
    embedding = 4 * rows * width * 4 + 4 * vocabulary * width
    casts = CAST_BYTES * parameters if size == 2 else 0
    plain = turns + activation + embedding + casts

    over_logits = 2 * hidden * vocabulary * size  # the row pass: it follows the product and cannot overlap it
    rate, moved = device.flops * shares.gemm, device.bandwidth * shares.bandwidth
    head_seconds = max(head.flops / rate, (head.bytes - over_logits) / moved) + over_logits / moved
    slabs = math.ceil(hidden * vocabulary * size / SLAB_BYTES)
    kernels = KERNELS_PER_BLOCK * layers + KERNELS_PER_SLAB * slabs + KERNELS_PER_PASS
    return [
        Part("products", products, 0, products / rate),
        Part("attention", attention, 0, attention / (device.flops * shares.attention)),
        Part("head", head.flops, head.bytes, head_seconds),
        Part("norm chains", 0, norm_bytes, norm_bytes / moved),
        Part("elementwise", 0, plain, plain / moved),
        Part("gaps", 0, 0, kernels * shares.gap),
    ]


def step_parts(
    config: ModelConfig, vocabulary: int, batch: int, accumulation: int, parameters: int, device: Device, gpus: int, p2p: bool
) -> tuple[Part, ...]:
    """The parts of a whole step of one card among `gpus`."""
    once = pass_parts(config, vocabulary, batch, parameters, device)
    parts = [Part(p.name, p.flops * accumulation, p.bytes * accumulation, p.seconds * accumulation) for p in once]
    moved = OPTIMIZER_BYTES * parameters
    gaps = KERNELS_PER_STEP * device.shares.gap
    parts.append(Part("optimizer", 0, moved, moved / (device.bandwidth * device.shares.bandwidth) + gaps))
    if gpus > 1:
        sent = 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters
        backward = 2 / 3 * sum(p.seconds for p in once)
        seconds = max(0.0, sent / (device.link if p2p else device.link_host) - device.shares.overlap * backward)
        parts.append(Part("all-reduce", 0, sent, seconds))
    return tuple(parts)


def memory_parts(config: Config, vocabulary: int, batch: int, parameters: int, device: Device, gpus: int) -> dict[str, int]:
    """Bytes one card holds, by what holds them: the trainer's own estimate, and what it does not count."""
    dtype = torch.bfloat16 if device.element == 2 else torch.float32
    kind = torch.device("cpu" if device.key == "cpu" else "cuda")
    parts = dict(vars(estimate_memory(config, parameters, vocabulary, batch, Compute(kind, dtype, compile=True))))
    parts["weights in bf16"] = 2 * parameters if device.element == 2 else 0
    parts["buckets"] = GRADIENT_BYTES * parameters if gpus > 1 else 0
    parts["reserved"] = RESERVED_BYTES
    return parts


def largest_micro_batch(config: Config, vocabulary: int, parameters: int, device: Device, gpus: int) -> int:
    """Most sequences a pass can have before memory is full; 0 where not even one fits."""

    def fits(batch: int) -> bool:
        return sum(memory_parts(config, vocabulary, batch, parameters, device, gpus).values()) <= device.memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def project(
    device: Device, config: Config, *, vocabulary: int, gpus: int = 1, p2p: bool | None = None, micro_batch: int = 0,
    accumulation: int = 1,
) -> Projection:  # fmt: skip
    """The projection. micro_batch 0 is the largest that fits, up to 32; p2p None is what the device offers.

    Raises UsageError for numbers that make no sense, more than eight cards, and a model that does not fit.
    """
    if not 1 <= gpus <= MOST_CARDS:
        raise UsageError(f"--gpus must be 1 to {MOST_CARDS}, the cards of one machine; got {gpus}")
    if device.key == "cpu" and gpus > 1:
        raise UsageError(f"--device cpu is one process; leave --gpus {gpus} out")
    if micro_batch < 0 or accumulation < 1 or vocabulary < 2 or config.model.length < 1:
        raise UsageError("--micro_batch must be at least 0, --accumulation and --length at least 1, --vocabulary at least 2")
    check(config)
    p2p = device.p2p if p2p is None else p2p
    parameters = empty_model(config, vocabulary, vocabulary - 1).parameter_counts()["total"]
    largest = largest_micro_batch(config, vocabulary, parameters, device, gpus)
    if max(micro_batch, 1) > largest:
        raise UsageError(
            f"a micro-batch of {max(micro_batch, 1)} x {config.model.length} tokens does not fit into {device.name}'s "
            f"{device.memory / GIB:.1f} GiB; "
            + (f"the largest that does is {largest}" if largest else "not even one sequence does, so the model has to be sharded")
        )
    batch = micro_batch or min(largest, LARGEST_MICRO_BATCH)
    rows = batch * config.model.length
    cost = [accumulation * step_cost(config.model, vocabulary, batch, n).flops for n in (rows // 2, rows)]
    return Projection(
        device, gpus, p2p, batch, accumulation, config.model.length, vocabulary, parameters,
        step_parts(config.model, vocabulary, batch, accumulation, parameters, device, gpus, p2p),
        memory_parts(config, vocabulary, batch, parameters, device, gpus), largest, cost[0], cost[1],
    )  # fmt: skip


def checked(results: Path) -> list[dict[str, Any]]:
    """For every throughput file of a known device: tokens a second as measured and as projected, and the error, per cent."""
    found = []
    for path in sorted(results.glob("*/throughput*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            s, measured = record["settings"], record["results"]["atat_fast"]["tokens_per_second"]
            device = devices.find(record["environment"], results)
            config = load_preset(s["preset"])
            config.model.length = s["length"]
            if device is None:
                continue
            p = project(device, config, vocabulary=s["vocabulary"], micro_batch=s["micro_batch"])
        except (KeyError, TypeError, ValueError):
            continue  # another tool's file, or one of an older shape: nothing to check against
        row = {"file": path.relative_to(results).as_posix(), "device": record["environment"]["device"]}
        error = (p.tokens_per_second / measured - 1) * 100
        row |= {"measured": measured, "projected": p.tokens_per_second, "error_percent": error}
        found.append(row)
    return found


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the projection is worth, in sentences."""
    lines = [
        f"error    {r['file']} ({r['device']}): measured {r['measured']:,.0f} tokens/s, projected {r['projected']:,.0f}, "
        f"{r['error_percent']:+.0f} %"
        for r in rows
    ]
    if not any(r["device"].startswith("CPU") for r in rows):
        lines.append("error    on CPUs unknown: no throughput file has ceilings of the same CPU beside it (bench/ceilings.py)")
    if all(r["device"].startswith("CPU") for r in rows):
        lines.append("error    on GPUs unknown: bench/results has no throughput measured on one")
    return lines


def table(p: Projection) -> str:
    """The projection as text."""
    d, s = p.device, p.device.shares
    link = "one card" if p.gpus == 1 else ("peer-to-peer" if p.p2p else "no peer-to-peer, through host memory")
    rate = (d.link if p.p2p else d.link_host) / 1e9
    lines = [
        f"{LABEL}: {p.gpus} x {d.name}, {link}",
        f"step     {p.gpus} x {p.accumulation} x {p.micro_batch} sequences of {p.length}, V={p.vocabulary:,}, "
        f"{p.parameters:,} parameters",
        f"device   {d.flops / 1e12:,.4g} TFLOP/s, {d.bandwidth / 1e9:,.4g} GB/s, {d.memory / GIB:.1f} GiB: {d.source}",
        f"assumed  products {s.gemm:.0%} of the rate, attention {s.attention:.0%}, memory {s.bandwidth:.0%}, "
        f"{s.gap * 1e6:g} us a kernel: {s.source}",
    ]
    if p.gpus > 1:
        lines.append(f"link     {rate:,.4g} GB/s of all-reduce, {s.overlap:.0%} of a backward pass overlaps it: {d.link_source}")
    lines += ["", f"{'part':<14}{'TFLOP':>10}{'GB':>10}{'ms':>10}{'share':>8}"]
    lines += [
        f"{part.name:<14}{part.flops / 1e12:>10.3f}{part.bytes / 1e9:>10.2f}{part.seconds * 1e3:>10.2f}"
        f"{part.seconds / p.seconds:>8.1%}"
        for part in p.parts
    ]
    held = "  ".join(f"{name} {size / GIB:.2f}" for name, size in p.memory.items() if size)
    return "\n".join(
        [
            *lines,
            f"{'step':<14}{'':>20}{p.seconds * 1e3:>10.2f}",
            "",
            f"tokens/s {p.tokens_per_second:,.0f} projected, {p.tokens_per_second / p.gpus:,.0f} a card",
            f"MFU      {p.mfu(p.flops_hidden):.1%} counting hidden rows through the head, "
            f"{p.mfu(p.flops_all):.1%} counting all rows",
            f"memory   {sum(p.memory.values()) / GIB:.2f} of {d.memory / GIB:.1f} GiB: {held}",
            f"largest  {p.largest_micro_batch} sequences of {p.length} in a pass",
        ]
    )


def as_record(p: Projection, errors: list[dict[str, Any]]) -> dict[str, Any]:
    """The projection as JSON, labelled."""
    rows = [{"part": part.name, "flops": part.flops, "bytes": part.bytes, "seconds": part.seconds} for part in p.parts]
    return {
        "benchmark": "projection", "projection": True, "label": LABEL,
        "settings": {
            "device": p.device.key, "gpus": p.gpus, "p2p": p.p2p, "micro_batch": p.micro_batch, "accumulation": p.accumulation,
            "length": p.length, "vocabulary": p.vocabulary, "parameters": p.parameters,
        },
        "device": dataclasses.asdict(p.device),
        "results": {
            "step": {"seconds": p.seconds, "tokens_per_second": p.tokens_per_second, "mfu_hidden_rows": p.mfu(p.flops_hidden),
                     "mfu_all_rows": p.mfu(p.flops_all), "memory_bytes": sum(p.memory.values()),
                     "largest_micro_batch": p.largest_micro_batch},
            "parts": rows, "memory": p.memory,
        },
        "checked": errors,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="rtx4090", help=f"one of {', '.join(devices.TABLE)}, cpu")
    parser.add_argument("--gpus", type=int, default=1, help="cards of one machine, 1 to 8")
    parser.add_argument("--preset", default="small", help="model sizes")
    parser.add_argument("--micro_batch", type=int, default=0, help="sequences of a pass; 0 is the largest that fits, up to 32")
    parser.add_argument("--accumulation", type=int, default=1, help="passes a step")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--vocabulary", type=int, default=50_258, help="ids, the mask included; GPT-2's by default")
    parser.add_argument("--p2p", action=argparse.BooleanOptionalAction, default=None, help="cards reach each other's memory")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file to write too")
    args = parser.parse_args(arguments)
    try:
        device, config = devices.named(args.device, RESULTS), load_preset(args.preset)
        config.model.length = args.length or config.model.length
        p = project(
            device, config, vocabulary=args.vocabulary, gpus=args.gpus, p2p=args.p2p, micro_batch=args.micro_batch,
            accumulation=args.accumulation,
        )  # fmt: skip
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    errors = checked(RESULTS)
    print(table(p))
    print("\n".join(verdict(errors)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(as_record(p, errors), indent=1) + "\n", encoding="utf-8")
        print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
