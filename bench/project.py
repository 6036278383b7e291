"""A projection: what a training step should take, and hold, on a device nobody has measured yet.

    python bench/project.py --device rtx4090 --gpus 6 --preset small [--micro_batch 8] [--length 1024]
                            [--p2p | --no-p2p] [--vocabulary 50258] [--accumulation 1] [--out FILE.json]

Work comes from the ops' own cost models, peaks from atat_fast/hardware/devices.py, and how much of a peak arrives is assumed,
part by part, and printed. Nothing that this prints was measured, except where it says so: for every device that has a throughput
file in bench/results it also gives the measured figure and its own error. `--device cpu` projects from what bench/ceilings.py
measured.

The parts of a step are those of atat_fast/training/step_time.py; between cards there is one more:

    all-reduce    fp32 gradients in a ring, less what overlaps the last backward pass: link
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

import devices

from atat_fast.config import Config, ImportanceConfig, ModelConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.devices import TABLE, Device
from atat_fast.models.dit import step_cost
from atat_fast.training.parallel_cost import Layout, Sizes, card_memory, largest_micro_batch
from atat_fast.training.plan import LARGEST_MICRO_BATCH, check
from atat_fast.training.step_time import Part, optimizer_part, pass_parts

RESULTS = Path(__file__).resolve().parent / "results"
LABEL = "PROJECTION, not a measurement"
MOST_CARDS = 8
GIB = 1 << 30

# Bytes a parameter: gradients are summed over cards in fp32.
GRADIENT_BYTES = 4


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


def step_parts(
    config: ModelConfig, vocabulary: int, batch: int, accumulation: int, parameters: int, device: Device, gpus: int, p2p: bool
) -> tuple[Part, ...]:
    """The parts of a whole step of one card among `gpus`."""
    once = pass_parts(config, vocabulary, batch, parameters, device)
    parts = [*(p.times(accumulation) for p in once), optimizer_part(parameters, device)]
    if gpus > 1:
        sent = 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters
        backward = 2 / 3 * sum(p.seconds for p in once)
        seconds = max(0.0, sent / (device.link if p2p else device.link_host) - device.shares.overlap * backward)
        parts.append(Part("all-reduce", 0, sent, seconds))
    return tuple(parts)


def layout_of(batch: int, accumulation: int, gpus: int) -> Layout:
    """Every card holds the whole model."""
    return Layout("ddp" if gpus > 1 else "none", gpus, 1, 1, True, 4, GRADIENT_BYTES, batch, accumulation)


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
    sizes = Sizes.of(dataclasses.replace(config, importance=ImportanceConfig()), vocabulary)
    parameters, layout = sizes.total, layout_of(1, accumulation, gpus)
    largest = largest_micro_batch(config, sizes, layout, device)
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
        card_memory(config, sizes, dataclasses.replace(layout, micro_batch=batch), device), largest, cost[0], cost[1],
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
    parser.add_argument("--device", default="rtx4090", help=f"one of {', '.join(TABLE)}, cpu")
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
