"""A few minutes of training: the same model, data and steps under different objectives, each with its held-out bound.

    python bench/train_short.py [--preset tiny] [--steps 300] [--seeds 1] [--out FOLDER] [--seconds 600]

mdlm hides each token by chance at stratified times, as MDLM does; exact hides exactly k, antithetic pairs; ce is exact with the
plain mean of the hidden tokens' losses. `val/nll` is the same unweighted bound for all three, with its standard error. Trainers
are made from settings, not by the train command, so jsonargparse is not needed; python-docs is in every Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder

from atat_fast.config import Config, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import environment, resolve
from atat_fast.training.trainer import Diverged, Trainer

VARIANTS = {
    "mdlm": {"counts": "uniform", "masking": "bernoulli", "pairing": "independent", "weighting": "uniform"},
    "exact": {"counts": "uniform", "masking": "exact", "pairing": "antithetic", "weighting": "uniform"},
    "ce": {"counts": "uniform", "masking": "exact", "pairing": "antithetic", "weighting": "ce"},
}


def settings(preset: str, variant: str, steps: int, seed: int, root: str) -> Config:
    """A preset as a short run: one evaluation at the end, and no samples."""
    config = load_preset(preset)
    for name, value in VARIANTS[variant].items():
        setattr(config.diffusion, name, value)
    config.data.corpus = "python-docs"
    config.data.tokenizer = config.data.tokenizer if config.data.tokenizer.startswith("bpe-") else "bytes"
    config.train.max_steps, config.train.seed, config.train.log_every = steps, seed, max(1, steps // 10)
    config.eval.every, config.sample.num_samples = steps, 0
    config.run.root, config.run.name, config.run.tensorboard = root, f"{variant}-{seed}", False
    return config


def run(config: Config) -> dict[str, Any]:
    """Train. Returns the last evaluation, and the speed without the first tenth, in which things compile."""
    trainer = Trainer(config, show_progress=False)
    last = trainer.train()
    lines = (trainer.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    rates = sorted(row["tokens_per_second"] for row in rows[1:] or rows)
    memory = {"memory_gib": rows[-1]["memory_gib"]} if "memory_gib" in rows[-1] else {}
    kept = {name: last[name] for name in ("nll", "nll_se", "bits_per_byte", "unigram_entropy")}
    return kept | {"train_loss": rows[-1]["loss"], "tokens_per_second": rates[len(rates) // 2]} | memory


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, 1 if a run diverged, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--seconds", type=float, default=600, help="begin no run after this")
    parser.add_argument("--out", type=Path, default=None, help="folder of training.json; bench/results/<device> by default")
    args = parser.parse_args(arguments)
    begin, rows, status = time.monotonic(), [], 0
    try:
        if min(args.steps, args.seeds) < 1 or not args.seconds > 0:
            raise UsageError("--steps and --seeds must be at least 1, and --seconds above 0")
        base = load_preset(args.preset)
        compute = resolve(base.train)
        with tempfile.TemporaryDirectory() as root:
            for seed in range(1, args.seeds + 1):
                for variant in VARIANTS:
                    if rows and time.monotonic() - begin > args.seconds:
                        print(f"{variant} with seed {seed} is left out: {args.seconds:g} seconds are over")
                        continue
                    try:
                        result = run(settings(args.preset, variant, args.steps, seed, root))
                    except Diverged as error:
                        print(f"{variant} with seed {seed} diverged: {error}", file=sys.stderr)
                        status = 1
                        continue
                    rows.append({"variant": variant, "run": seed} | result)
                    print(
                        f"{variant:<6} seed {seed}  val/nll {result['nll']:.4f} ± {result['nll_se']:.4f} nats a token  "
                        f"{result['tokens_per_second']:,.0f} tokens/s",
                        flush=True,
                    )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = args.out or results_folder(compute.device)
    folder.mkdir(parents=True, exist_ok=True)
    model = {"preset": args.preset, "length": base.model.length, "global_batch": base.train.global_batch}
    model["train_steps"] = args.steps
    record = {"benchmark": "training", "settings": model, "results": rows, "environment": environment(compute)}
    path = folder / "training.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
