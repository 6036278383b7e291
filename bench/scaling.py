"""Compare training over several ranks of this machine with one process: losses, and tokens a second.

    python bench/scaling.py [--ranks 1 2] [--steps 20] [--modes ddp fsdp] [--out FOLDER]   writes FOLDER/scaling.json

torchrun starts the trainer on 1, 2, ... ranks over gloo, with the same global batch each time. Ranks of one CPU share its cores,
so nothing gets faster. bench/project.py projects times on cards that were not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import environment, resolve


def measure(ranks: int, mode: str, steps: int, preset: str) -> dict[str, Any]:
    """Train `steps` steps on `ranks` processes of this machine. Returns losses, and tokens a second after the first log line.

    Raises UsageError with the trainer's own error if it fails.
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
    """`measure` for every number of ranks and mode, with the largest difference of losses from the first one's."""
    rows = [
        measure(n, mode, steps, preset) for n in ranks for mode in (modes if n > 1 else modes[:1])
    ]  # fmt: skip
    for row in rows:
        row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes to measure with, one after the other")
    parser.add_argument("--modes", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp", "hsdp"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each measurement")
    parser.add_argument("--preset", default="demo", help="what is trained while measuring")
    parser.add_argument("--out", type=Path, default=None, help="folder of scaling.json; bench/results/cpu by default")
    args = parser.parse_args(arguments)
    path = (args.out or results_folder(torch.device("cpu"))) / "scaling.json"
    try:
        if min(args.ranks) < 1 or args.steps < 1:
            raise UsageError(f"--ranks and --steps must be at least 1, got {min(args.ranks)} and {args.steps}")
        rows = measured(args.ranks, args.modes, args.steps, args.preset)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"gloo, {os.cpu_count()} cores shared by all ranks; preset {args.preset}")
    for r in rows:
        print(
            f"{r['ranks']:>5} ranks {r['mode']:<5} {r['tokens_per_second']:>9,.0f} tokens/s ({r['ratio']:.2f}x), "
            f"losses within {r['loss_difference']:.1e} of the first"
        )
    facts = environment(resolve(TrainConfig(device="cpu", dtype="fp32")))
    record = {
        "benchmark": "scaling",
        "settings": {"preset": args.preset, "steps": args.steps, "backend": "gloo", "cores": os.cpu_count()},
        "environment": facts | {"load_average": os.getloadavg()[0], "cpu_threads": 1},
        "results": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
