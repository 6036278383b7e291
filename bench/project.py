"""Project the time and memory of a training step on a device that was not measured.

    python bench/project.py --device rtx4090 --gpus 6 --preset small [--micro_batch 8] [--length 1024]
                            [--p2p | --no-p2p] [--vocabulary 50258] [--accumulation 1] [--out FILE.json]

Work comes from the ops' cost models, and peaks from atat_fast/hardware/devices.py. The share of a peak that each part reaches is
assumed, and printed. Figures are projections unless they are called measured: for every device with a throughput file in
bench/results the measured figure and the projection's error are printed too. `--device cpu` uses bench/ceilings.py's peaks.

The parts of a step, each from the ops' cost models:

    products      2 N (4 + 2 r) D^2 a block, times 3 with backward: rate
    attention     its own products: rate
    head          three products over hidden rows, and a pass over their logits: rate, and bytes
    norm chains   gate, residual, LayerNorm, modulate: bytes
    elementwise   rotary, the MLP's activation, embedding, casts of weights, gradient sums: bytes
    gaps          kernels times the time between two of them
    optimizer     clipping, AdamW, the average, once a step: bytes
    all-reduce    gradients in a ring between cards, less what overlaps the last backward pass: link

    python bench/project.py --six         six RTX 4090 and the tokens of 50,000 steps of 24 x 1,024, written to bench/results
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

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

import devices
from devices import TABLE, Device

from atat_fast.config import Config, ImportanceConfig, ModelConfig, load_preset
from atat_fast.distributed.fit import BYTES, Card, Layout, card_memory, largest_micro_batch
from atat_fast.errors import UsageError
from atat_fast.models.dit import step_cost
from atat_fast.ops import (
    adaptive_layer_norm_cost,
    attention_cost,
    gated_residual_norm_cost,
    linear_cross_entropy_cost,
    rotary_cost,
)
from atat_fast.ops.linear_cross_entropy.slabs import CHUNK_BYTES_GPU
from atat_fast.training.plan import LARGEST_MICRO_BATCH, check, sizes_of

RESULTS = Path(__file__).resolve().parent / "results"
SIX_FILE = RESULTS / "projected-six-rtx4090.json"
LABEL = "PROJECTION, not a measurement"
MOST_CARDS = 8
GIB = 1 << 30

# Kernels of one pass, counted from the model's calls. A block's forward has four products, rotary, attention, activation and two
# norm chains; its backward has two for each product, three for attention, two for each chain, bias sums; then casts of weights.
KERNELS_PER_BLOCK = 32
KERNELS_PER_SLAB = 6
KERNELS_PER_PASS = 20
KERNELS_PER_STEP = 30

# Bytes a parameter: clipping reads the gradient twice and writes it (12), the optimizer reads gradient and weight and writes the
# weight (12) and reads and writes its moments, the average reads two and writes one (12).
CLIP_BYTES, WEIGHT_BYTES, MOMENT_BYTES, AVERAGE_BYTES = 12, 12, 16, 12
# Bytes a parameter and pass: a cast of the weight (read 4, write 2) and a sum into the gradient (read 2 + 4, write 4).
CAST_BYTES = 16


@dataclass(frozen=True)
class Part:
    """One part of a step: its work, and the projected seconds."""

    name: str
    flops: float
    bytes: float
    seconds: float

    def times(self, n: float) -> Part:
        """This part, n times."""
        return Part(self.name, self.flops * n, self.bytes * n, self.seconds * n)


def pass_parts(config: ModelConfig, vocabulary: int, batch: int, parameters: int, device: Device) -> list[Part]:
    """The parts of one forward and backward pass over `batch` sequences, half of whose tokens are hidden."""
    rows, width, layers, size = batch * config.length, config.dim, config.layers, device.element
    hidden, shares = rows // 2, device.shares
    head = linear_cross_entropy_cost(hidden, width, vocabulary, element_size=size)
    attend = [attention_cost(batch, config.length, width, element_size=size, backward=b) for b in (False, True)]
    # step_cost counts attention's backward as twice its forward; attention_cost counts the five products that run.
    products = step_cost(config, vocabulary, batch, hidden).flops - head.flops - 3 * layers * attend[0].flops
    attention = layers * sum(cost.flops for cost in attend)

    chains = [gated_residual_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    first = [adaptive_layer_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    norm_bytes = 2 * layers * sum(chains) + sum(first)
    turns = [
        layers * rotary_cost(rows, config.heads, width // config.heads, element_size=size, norm=config.qk_norm, backward=b).bytes
        for b in (False, True)
    ]
    activation = 5 * rows * config.mlp_ratio * width * size * layers
    embedding = 4 * rows * width * 4 + 4 * vocabulary * width
    casts = CAST_BYTES * parameters if size == 2 else 0
    plain = sum(turns) + activation + embedding + casts

    over_logits = 2 * hidden * vocabulary * size  # the row pass: it follows the product and cannot overlap it
    rate, moved = device.flops * shares.gemm, device.bandwidth * shares.bandwidth
    head_seconds = max(head.flops / rate, (head.bytes - over_logits) / moved) + over_logits / moved
    slabs = math.ceil(hidden * vocabulary * size / CHUNK_BYTES_GPU)
    kernels = KERNELS_PER_BLOCK * layers + KERNELS_PER_SLAB * slabs + KERNELS_PER_PASS
    return [
        Part("products", products, 0, products / rate),
        Part("attention", attention, 0, attention / (device.flops * shares.attention)),
        Part("head", head.flops, head.bytes, head_seconds),
        Part("norm chains", 0, norm_bytes, norm_bytes / moved),
        Part("elementwise", 0, plain, plain / moved),
        Part("gaps", 0, 0, kernels * shares.gap),
    ]


def optimizer_part(parameters: int, device: Device) -> Part:
    """Clipping, AdamW and the average over `parameters` numbers."""
    moved = (CLIP_BYTES + WEIGHT_BYTES + MOMENT_BYTES + AVERAGE_BYTES) * parameters
    seconds = moved / (device.bandwidth * device.shares.bandwidth) + KERNELS_PER_STEP * device.shares.gap
    return Part("optimizer", 0, moved, seconds)


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
        """Seconds of a whole step."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all cards."""
        return self.gpus * self.accumulation * self.micro_batch * self.length / self.seconds

    def mfu(self, flops: float) -> float:
        """Share of the data sheet's rate, counting `flops` for one card's step."""
        return flops / self.seconds / self.device.flops


def step_parts(
    config: ModelConfig,
    vocabulary: int,
    batch: int,
    accumulation: int,
    parameters: int,
    device: Device,
    gpus: int,
    p2p: bool,
    reduce_dtype: str = "fp32",
) -> tuple[Part, ...]:
    """The parts of a whole step of one card among `gpus`."""
    once = pass_parts(config, vocabulary, batch, parameters, device)
    parts = [*(p.times(accumulation) for p in once), optimizer_part(parameters, device)]
    if gpus > 1:
        sent = 2 * (gpus - 1) / gpus * BYTES[reduce_dtype] * parameters
        backward = 2 / 3 * sum(p.seconds for p in once)
        seconds = max(0.0, sent / (device.link if p2p else device.link_host) - device.shares.overlap * backward)
        parts.append(Part("all-reduce", 0, sent, seconds))
    return tuple(parts)


def project(
    device: Device,
    config: Config,
    *,
    vocabulary: int,
    gpus: int = 1,
    p2p: bool | None = None,
    micro_batch: int = 0,
    accumulation: int = 1,
    reduce_dtype: str = "fp32",
) -> Projection:
    """The projection; every card holds the whole model. micro_batch: 0 for the largest that fits, up to 32. p2p: None for the
    device's own. reduce_dtype: the dtype of gradient sums.

    Raises UsageError for invalid numbers, more than eight cards, or a model that does not fit.
    """
    if not 1 <= gpus <= MOST_CARDS:
        raise UsageError(f"--gpus must be 1 to {MOST_CARDS}, the cards of one machine; got {gpus}")
    if device.key == "cpu" and gpus > 1:
        raise UsageError(f"--device cpu is one process; leave out --gpus {gpus}")
    if micro_batch < 0 or accumulation < 1 or vocabulary < 2 or config.model.length < 1:
        raise UsageError("--micro_batch must be at least 0, --accumulation and --length at least 1, --vocabulary at least 2")
    check(config)
    p2p = device.p2p if p2p is None else p2p
    sizes = sizes_of(dataclasses.replace(config, importance=ImportanceConfig()), vocabulary)
    parameters, layout = sizes.total, Layout("ddp" if gpus > 1 else "none", gpus, 1)
    card = Card(device.memory, "cpu" if device.key == "cpu" else "cuda", device.element)
    largest = largest_micro_batch(config, sizes, layout, card)
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
        device,
        gpus,
        p2p,
        batch,
        accumulation,
        config.model.length,
        vocabulary,
        parameters,
        step_parts(config.model, vocabulary, batch, accumulation, parameters, device, gpus, p2p, reduce_dtype),
        card_memory(config, sizes, layout, card, batch),
        largest,
        cost[0],
        cost[1],
    )


def checked(results: Path) -> list[dict[str, Any]]:
    """For every throughput file of a known device: measured and projected tokens a second, and the error in per cent."""
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
            continue  # another tool's file, or one of an older shape
        row = {"file": path.relative_to(results).as_posix(), "device": record["environment"]["device"]}
        error = (p.tokens_per_second / measured - 1) * 100
        row |= {"measured": measured, "projected": p.tokens_per_second, "error_percent": error}
        found.append(row)
    return found


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """The projection's error on measured devices, in sentences."""
    lines = [
        f"error    {r['file']} ({r['device']}): measured {r['measured']:,.0f} tokens/s, projected {r['projected']:,.0f}, "
        f"{r['error_percent']:+.0f} %"
        for r in rows
    ]
    if not any(r["device"].startswith("CPU") for r in rows):
        lines.append("error    on CPUs unknown: no throughput file has ceilings of the same CPU (bench/ceilings.py)")
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


TOKENS, MINUTES = 50_000 * 24 * 1024, 45
SIX = (
    ("24 sequences a step, fp32 sums", 24, "fp32", False),
    ("24 sequences a step, bf16 sums", 24, "bf16", False),
    ("48 sequences a step, bf16 sums", 48, "bf16", False),
    ("96 sequences a step, fp32 sums", 96, "fp32", False),
    ("96 sequences a step, bf16 sums", 96, "bf16", False),
    ("192 sequences a step, bf16 sums", 192, "bf16", False),
    ("24 sequences a step, bf16 sums, were there peer-to-peer", 24, "bf16", True),
)
"""Ways to train on six cards: (description, sequences a step, dtype of gradient sums, peer-to-peer)."""


def six_cards() -> list[dict[str, Any]]:
    """Preset small on six RTX 4090: minutes for 1.23 billion tokens, and the share of a step that waits for gradients."""
    rows = []
    for what, batch, reduce_dtype, p2p in SIX:
        config = load_preset("small")
        plan = project(
            TABLE["rtx4090"], config, vocabulary=50_258, gpus=6, p2p=p2p, micro_batch=batch // 6, reduce_dtype=reduce_dtype
        )
        (link,) = (part for part in plan.parts if part.name == "all-reduce")
        rows.append({
            "what": what, "global_batch": batch, "memory_bytes": sum(plan.memory.values()), "wire_bytes": link.bytes,
            "seconds": plan.seconds, "waiting_seconds": link.seconds, "tokens_per_second": plan.tokens_per_second,
            "minutes": TOKENS / plan.tokens_per_second / 60,
        })  # fmt: skip
    return rows


def six_verdict(rows: list[dict[str, Any]]) -> str:
    """Whether six cards do it in 45 minutes, and if not, why."""
    first, inside = rows[0], [row["what"] for row in rows if row["minutes"] <= MINUTES]
    plain = f"{first['what']}: {first['minutes']:.0f} minutes"
    if first["minutes"] <= MINUTES:
        return f"{plain}, within {MINUTES}"
    share = first["waiting_seconds"] / first["seconds"]
    best = min(rows, key=lambda row: row["minutes"])
    rest = (
        f"within {MINUTES}: {'; '.join(inside)}" if inside else f"none is; the best takes {best['minutes']:.0f} ({best['what']})"
    )
    return f"{plain}, because {share:.0%} of a step waits for {first['wire_bytes'] / 1e9:.2f} GB of gradients; {rest}"


def write_six(path: Path) -> None:
    """Write the projections of six cards as a file for bench/report.py."""
    rows = six_cards()
    record = {"benchmark": "projection", "projection": True, "label": LABEL, "six": rows, "verdict": six_verdict(rows)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{LABEL}: six RTX 4090, preset small")
    for row in rows:
        print(f"{row['minutes']:>6.0f} minutes  {row['tokens_per_second']:>9,.0f} tokens/s  {row['what']}")
    print(f"{six_verdict(rows)}\nwritten to {path}")


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="rtx4090", help=f"one of {', '.join(TABLE)}, cpu")
    parser.add_argument("--gpus", type=int, default=1, help="cards of one machine, 1 to 8")
    parser.add_argument("--preset", default="small", help="model sizes")
    parser.add_argument("--micro_batch", type=int, default=0, help="sequences of a pass; 0 is the largest that fits, up to 32")
    parser.add_argument("--accumulation", type=int, default=1, help="passes a step")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--vocabulary", type=int, default=50_258, help="ids, the mask included; GPT-2's by default")
    parser.add_argument("--p2p", action=argparse.BooleanOptionalAction, default=None, help="cards reach each other's memory")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file to write too")
    parser.add_argument("--six", action="store_true", help="the projections of docs/distributed.md, written to bench/results")
    args = parser.parse_args(arguments)
    if args.six:
        write_six(args.out or SIX_FILE)
        return 0
    try:
        device, config = devices.named(args.device, RESULTS), load_preset(args.preset)
        config.model.length = args.length or config.model.length
        p = project(
            device,
            config,
            vocabulary=args.vocabulary,
            gpus=args.gpus,
            p2p=args.p2p,
            micro_batch=args.micro_batch,
            accumulation=args.accumulation,
        )
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
