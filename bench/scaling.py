"""How training scales over ranks: what the harness does on this machine, and what cards nobody has here are projected to do.

    python bench/scaling.py [--ranks 1 2] [--steps 20] [--modes ddp fsdp] [--out FOLDER]   writes FOLDER/scaling.json
    python bench/scaling.py --projections                    prints the projections alone; --renew renews those in the file

Two kinds of figures, never mixed. *Measured*: torchrun starts the trainer on 1, 2, ... ranks of this machine, gloo between them,
the same global batch each time. Ranks of one CPU share its cores, so nothing gets faster: what counts is that the losses are the
same, and what a rank more costs. *Projected*: `atat_fast.training.parallel_cost` over the table of devices, for six RTX 4090 and
for up to 64 cards: bytes on the wire a step, how much of it hides behind computing, and the share of a step spent computing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import Config, TrainConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import environment, resolve
from atat_fast.hardware.devices import TABLE, Device
from atat_fast.training.parallel_cost import GIB, Estimate, Sizes
from atat_fast.training.parallel_plan import choose_mode, name_of, options

LABEL = "PROJECTION, not a measurement"
VOCABULARY = 50_258
TOKENS = 50_000 * 24 * 1024
"""The seed's first run."""
MINUTES = 45
SIX = (
    ("the seed's 24 sequences a step, fp32 sums", 24, "fp32", False),
    ("24 sequences a step, bf16 sums", 24, "bf16", False),
    ("48 sequences a step, bf16 sums", 48, "bf16", False),
    ("96 sequences a step, fp32 sums", 96, "fp32", False),
    ("96 sequences a step, bf16 sums", 96, "bf16", False),
    ("192 sequences a step, bf16 sums", 192, "bf16", False),
    ("24 sequences a step, bf16 sums, were there peer-to-peer", 24, "bf16", True),
)
"""Ways to train on six cards: what is changed, sequences a step, dtype of gradient sums, peer-to-peer."""
MANY = (("rtx4090", "small", 8, 4), ("rtx4090", "large", 4, 8), ("h100", "small", 16, 2), ("h100", "large", 8, 4))
"""Device, preset, micro-batch and passes a step of each card: more cards see more sequences."""
CARDS = (1, 2, 4, 8, 16, 32, 64)


def planned(
    preset: str, device: Device, cards: int, *, global_batch: int, micro_batch: int, param_dtype: str = "fp32",
    reduce_dtype: str = "fp32", recompute: int = 0,
) -> Estimate:  # fmt: skip
    """The estimate of the mode that a run with these settings would choose."""
    config: Config = load_preset(preset)
    config.train.global_batch, config.train.micro_batch = global_batch, micro_batch
    config.parallel = replace(
        config.parallel, param_dtype=param_dtype, reduce_dtype=reduce_dtype, activation_checkpointing=recompute
    )
    return choose_mode(config, VOCABULARY, cards, device, sizes=_sizes(preset)).estimate


@functools.cache
def _sizes(preset: str) -> Sizes:
    return Sizes.of(load_preset(preset), VOCABULARY)


def row_of(e: Estimate) -> dict[str, Any]:
    """What a projection keeps of an estimate."""
    return {
        "device": e.device.key, "cards": e.layout.world, "hosts": e.layout.hosts, "mode": name_of(e.layout),
        "micro_batch": e.layout.micro_batch, "accumulation": e.layout.accumulation, "memory_bytes": e.bytes, "fits": e.fits,
        "wire_bytes": sum(e.wire.values()), "wire": e.wire, "seconds": e.seconds, "waiting_seconds": e.waiting,
        "hidden": e.hidden, "efficiency": e.efficiency, "tokens_per_second": e.tokens_per_second, "mfu": e.mfu,
    }  # fmt: skip


def six_cards() -> list[dict[str, Any]]:
    """The seed's first run on six RTX 4090: minutes for 1.23 billion tokens, and what of it is waiting for gradients."""
    rows = []
    for what, batch, reduce_dtype, p2p in SIX:
        device = replace(TABLE["rtx4090"], p2p=p2p)
        e = planned("small", device, 6, global_batch=batch, micro_batch=0, reduce_dtype=reduce_dtype)
        minutes = TOKENS / e.tokens_per_second / 60
        rows.append({"what": what, "global_batch": batch, "minutes": minutes, "within": minutes <= MINUTES} | row_of(e))
    return rows


def many_cards() -> list[dict[str, Any]]:
    """Weak scaling: every card has the same work, from one card to 64."""
    rows = []
    for key, preset, micro, passes in MANY:
        for cards in CARDS:
            small = {"param_dtype": "bf16", "reduce_dtype": "bf16"}
            e = planned(preset, TABLE[key], cards, global_batch=cards * micro * passes, micro_batch=micro, **small)
            rows.append({"preset": preset} | row_of(e))
    return rows


def memory_options() -> list[dict[str, Any]]:
    """Preset large on eight RTX 4090: what each memory option buys, as `--dry_run` says it."""
    config, device, sizes = load_preset("large"), TABLE["rtx4090"], _sizes("large")
    now = choose_mode(config, VOCABULARY, 8, device, sizes=sizes).estimate
    found = [("as the preset is", now), *options(config, sizes, 8, device, now)]
    return [{"what": name, "preset": "large"} | row_of(e) for name, e in found]


def projections() -> dict[str, Any]:
    """All of them, for the file."""
    six = six_cards()
    return {
        "label": LABEL, "vocabulary": VOCABULARY, "six": six, "verdict": verdict(six), "many": many_cards(),
        "options": memory_options(),
    }  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether six cards do the seed's run in 45 minutes, and if not what stands in the way."""
    first = rows[0]
    best = min(rows, key=lambda row: row["minutes"])
    plain = f"{first['what']}: {first['minutes']:.0f} minutes"
    if first["within"]:
        return f"{plain}, within {MINUTES}"
    share = first["waiting_seconds"] / first["seconds"]
    inside = [row["what"] for row in rows if row["within"]]
    way = f"{share:.0%} of a step waits for {first['wire_bytes'] / 1e9:.2f} GB of gradients"
    rest = (
        f"within {MINUTES}: {'; '.join(inside)}" if inside else f"nothing is; best {best['minutes']:.0f} minutes ({best['what']})"
    )
    return f"{plain}, because {way}; {rest}"


def measure(ranks: int, mode: str, steps: int, preset: str) -> dict[str, Any]:
    """Train `steps` steps on `ranks` processes of this machine; losses, and tokens a second without the first line's.

    Raises UsageError with the trainer's own words where it does not end well.
    """
    every = max(1, steps // 4)
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "atat_fast.train",
            "--preset", preset, "--run.root", root, "--run.name", "scaling", "--run.tensorboard", "false",
            "--train.max_steps", str(steps), "--train.log_every", str(every), "--train.device", "cpu", "--train.dtype", "fp32",
            "--train.micro_batch", "4", "--eval.every", str(steps), "--eval.sequences", "32", "--sample.num_samples", "0",
        ]  # fmt: skip
        if ranks > 1:
            command += ["--parallel.mode", mode]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.splitlines()[-1:]
            raise UsageError(f"{ranks} ranks under {mode} ended with status {done.returncode}: {' '.join(last)}")
        lines = (Path(root) / "scaling" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    train, final = [r for r in found if r["kind"] == "train"], [r for r in found if r["kind"] == "eval"][-1]
    rates = [r["tokens_per_second"] for r in train[1:] or train]
    return {
        "ranks": ranks, "mode": mode if ranks > 1 else "none", "losses": [r["loss"] for r in train], "nll": final["nll"],
        "tokens_per_second": statistics.median(rates), "low": min(rates), "high": max(rates),
    }  # fmt: skip


def measured(ranks: list[int], modes: list[str], steps: int, preset: str) -> list[dict[str, Any]]:
    """Every number of ranks under every mode, and how far its losses are from the first one's."""
    rows = [
        measure(n, mode, steps, preset) for n in ranks for mode in (modes if n > 1 else modes[:1])
    ]  # fmt: skip
    for row in rows:
        row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Projections as lines."""
    head = f"{'cards':>5} {'hosts':>5} {'device':<8} {'mode':<22} {'GiB':>5} {'GB sent':>8} {'s a step':>9} {'hidden':>7} "
    lines = [head + f"{'computing':>9} {'tokens/s':>11}  {'':<10}"]
    for r in rows:
        lines.append(
            f"{r['cards']:>5} {r['hosts']:>5} {r['device']:<8} {r['mode']:<22} {r['memory_bytes'] / GIB:>5.1f} "
            f"{r['wire_bytes'] / 1e9:>8.2f} {r['seconds']:>9.3f} {r['hidden']:>7.0%} {r['efficiency']:>9.0%} "
            f"{r['tokens_per_second']:>11,.0f}  {r.get('what') or r['preset']}"
            + (f": {r['minutes']:.0f} minutes" if "minutes" in r else "") + ("" if r["fits"] else " (does not fit)")
        )  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes to measure with, one after the other")
    parser.add_argument("--modes", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp", "hsdp"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each measurement")
    parser.add_argument("--preset", default="demo", help="what is trained while measuring")
    parser.add_argument("--projections", action="store_true", help="print the projections, measure and write nothing")
    parser.add_argument("--renew", action="store_true", help="renew the projections in scaling.json; what was measured stays")
    parser.add_argument("--out", type=Path, default=None, help="folder of scaling.json; bench/results/cpu by default")
    args = parser.parse_args(arguments)
    known = projections()
    lines = [
        LABEL,
        *table(known["six"]),
        f"six cards: {known['verdict']}",
        "",
        *table(known["many"]),
        "",
        *table(known["options"]),
    ]
    path = (args.out or results_folder(torch.device("cpu"))) / "scaling.json"
    try:
        if min(args.ranks) < 1 or args.steps < 1:
            raise UsageError(f"--ranks and --steps must be at least 1, got {min(args.ranks)} and {args.steps}")
        if args.renew and not path.is_file():
            raise UsageError(f"there is no {path} whose projections could be renewed; measure first, without --renew")
        rows = [] if args.projections or args.renew else measured(args.ranks, args.modes, args.steps, args.preset)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows:
        print(f"MEASURED on this machine, gloo, {os.cpu_count()} cores shared by all ranks; preset {args.preset}")
        for r in rows:
            print(
                f"{r['ranks']:>5} ranks {r['mode']:<5} {r['tokens_per_second']:>9,.0f} tokens/s ({r['ratio']:.2f}x), "
                f"losses within {r['loss_difference']:.1e} of the first"
            )
        print()
    print("\n".join(lines))
    if args.projections:
        return 0
    if args.renew:
        record = json.loads(path.read_text(encoding="utf-8")) | {"projections": known}
    else:
        facts = environment(resolve(TrainConfig(device="cpu", dtype="fp32")))
        record = {
            "benchmark": "scaling",
            "settings": {"preset": args.preset, "steps": args.steps, "backend": "gloo", "cores": os.cpu_count()},
            "environment": facts | {"load_average": os.getloadavg()[0], "cpu_threads": 1},
            "results": rows,
            "projections": known,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
