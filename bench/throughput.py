"""Tokens a second of whole training steps: plain MDLM and atat_fast, in turn, in one run.

    python bench/throughput.py [--preset tiny] [--vocabulary 30522] [--length 256] [--micro_batch 8] [--rounds 5] [--out FOLDER]

A step is everything a trainer does: read tokens, hide some, forward, backward, clip, optimizer, average. The two hold the same
weights at the start, and before anything is timed their losses on the same masked batch must agree. Rounds are interleaved;
the figures are medians with quartiles. Without arguments it takes two to three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from mdlm import PlainMDLM, block_by_block

from atat_fast.config import DataConfig, DiffusionConfig, ModelConfig, OptimConfig, TrainConfig, load_preset
from atat_fast.data import SequenceLoader, prepare
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.training.device import Compute, environment, resolve
from atat_fast.training.optimizers import Average, Optimizers

VARIANTS = ("mdlm", "atat_fast")
LR = 1e-4


class Bench:
    """One variant: a model, its optimizer and average, and a step."""

    def __init__(
        self, name: str, config: ModelConfig, vocabulary: int, batch: int, compute: Compute, loader: SequenceLoader
    ) -> None:
        self.name, self.batch, self.compute, self.loader = name, batch, compute, loader
        torch.manual_seed(0)
        ours = DiT(vocabulary, vocabulary - 1, **vars(config))
        with torch.no_grad():  # away from the all-zero start, so that every gradient is real
            for p in ours.parameters():
                p.add_(0.02 * torch.randn_like(p))
        self.model: Any = ours
        if name == "mdlm":
            self.model = PlainMDLM(vocabulary, vocabulary - 1, config)
            self.model.load_state_dict(block_by_block(ours.state_dict(), config.layers))
        self.model.to(compute.device)
        self.call = torch.compile(self.model) if compute.compile and name != "mdlm" else self.model
        self.optimizers = Optimizers(self.model, OptimConfig())
        self.average = Average(self.model, 0.9999)
        self.losses: list[float] = []
        self.count = 0

    def loss(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mask and forward; nats a token."""
        if self.name == "mdlm":
            noisy, weight = self.model.masks(tokens)
            with self.compute.autocast():
                return self.model.loss(tokens, noisy, weight)
        masked = hide_for_training(
            tokens,
            DiffusionConfig(),
            first=0,
            total=self.batch,
            mask_id=self.model.mask_id,
            sample_ids=ids,
            seed=1,
            step=self.count,
        )
        randomness = Randomness(1, torch.full((), self.count, device=tokens.device), ids)
        with self.compute.autocast():
            loss, _ = self.call(masked.noisy, masked.rows, masked.target, masked.weights, None, randomness)
        return loss / masked.tokens

    def step(self) -> None:
        """One whole training step."""
        tokens, ids = self.loader.batch(self.count * self.batch, self.batch)
        loss = self.loss(tokens.to(self.compute.device), ids.to(self.compute.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(LR)
        self.average.update(self.count)
        self.count += 1
        self.losses.append(loss.detach())

    def timed(self, steps: int) -> float:
        """Seconds a step."""
        synchronize(self.compute.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.compute.device)
        return (time.perf_counter() - begin) / steps


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_agreement(plain: Bench, ours: Bench, tokens: torch.Tensor) -> float:
    """The largest relative difference of loss and gradients on one masked batch without dropout; raises where they disagree."""
    noisy, weight = plain.model.masks(tokens)
    rows = (noisy == plain.model.mask_id).flatten().nonzero().flatten()
    weights = weight.repeat_interleave((noisy == plain.model.mask_id).sum(1))
    plain.model.eval()
    with plain.compute.autocast():
        want = plain.model.loss(tokens, noisy, weight)
        got = ours.model(noisy, rows, tokens.flatten()[rows], weights)[0] / tokens.numel()
    want.backward()
    got.backward()
    plain.model.train()
    worst = abs(float(got.detach() - want.detach())) / abs(float(want.detach()))
    theirs = {name: p.grad for name, p in plain.model.named_parameters()}
    mine = block_by_block({name: p.grad for name, p in ours.model.named_parameters()}, len(ours.model.blocks))
    for name, grad in mine.items():
        scale = float(theirs[name].norm())
        worst = max(worst, float((grad - theirs[name]).norm()) / scale if scale else 0.0)
    limit = 5e-2 if plain.compute.dtype is torch.bfloat16 else 1e-3
    if not worst < limit:
        raise RuntimeError(f"the variants disagree: loss and gradients differ by up to {worst:.2e} of their size")
    plain.model.zero_grad()
    ours.model.zero_grad()
    return worst


def summary(seconds: list[float], tokens: int) -> dict[str, float]:
    """Median and quartiles of tokens a second."""
    rates = sorted(tokens / s for s in seconds)
    low, middle, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
    return {"tokens_per_second": middle, "low": low, "high": high}


def peak_resident_bytes() -> int:
    """Most memory this process has held. Read from Linux's own count: getrusage starts a child with its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def peak_memory(name: str, arguments: list[str]) -> int | None:
    """Largest memory of a process that runs three steps of one variant, above one that only builds it, in bytes."""
    sizes = []
    for steps in ("0", "3"):
        command = [sys.executable, __file__, *arguments, "--memory_of", name, "--memory_steps", steps]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None
        sizes.append(int(done.stdout.split()[-1]))
    return sizes[1] - sizes[0]


def main() -> int:
    """Time the variants, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model sizes")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="ids of the model, the mask included")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of each variant in a round")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    parser.add_argument("--memory_of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory_steps", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        return measure(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(args: argparse.Namespace) -> int:
    """What `main` does with parsed arguments."""
    if min(args.rounds, args.steps, args.micro_batch) < 1 or args.length < 0:
        raise UsageError("--rounds, --steps and --micro_batch must be at least 1, and --length at least 0")
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype))
    config = load_preset(args.preset).model
    config.length = args.length or config.length
    dataset = prepare(DataConfig(corpus="python-docs", tokenizer="bpe-4096"), progress=False)
    if args.vocabulary < dataset.tokenizer.model_vocab_size:
        raise UsageError(f"--vocabulary {args.vocabulary} is below the corpus's own {dataset.tokenizer.model_vocab_size}")
    loader = SequenceLoader(dataset.train, config.length, 1)

    def build(name: str) -> Bench:
        return Bench(name, config, args.vocabulary, args.micro_batch, compute, loader)

    if args.memory_of:
        one = build(args.memory_of)
        one.timed(args.memory_steps) if args.memory_steps else None
        peak = torch.cuda.max_memory_allocated() if compute.device.type == "cuda" else peak_resident_bytes()
        print(peak)
        return 0

    variants = {name: build(name) for name in VARIANTS}
    tokens = args.micro_batch * config.length
    worst = check_agreement(variants["mdlm"], variants["atat_fast"], loader.batch(0, args.micro_batch)[0].to(compute.device))
    print(f"{compute.describe()}; preset {args.preset}, V={args.vocabulary}, {args.micro_batch} x {config.length} tokens a step")
    print(f"checked: on one batch, losses and gradients agree to {worst:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for name in VARIANTS:
        variants[name].timed(1)
    for _ in range(args.rounds):
        for name in VARIANTS:
            seconds[name].append(variants[name].timed(args.steps))
    passed = [f"--{k}={getattr(args, k)}" for k in ("preset", "vocabulary", "length", "micro_batch", "device", "dtype")]
    results = {}
    for name in VARIANTS:
        loss = torch.stack([torch.as_tensor(x) for x in variants[name].losses]).mean()
        results[name] = summary(seconds[name], tokens) | {
            "step_memory_bytes": peak_memory(name, passed),
            "mean_loss": float(loss),
        }
    base = results["mdlm"]["tokens_per_second"]
    print(f"{'variant':12} {'tokens/s':>10} {'quartiles':>17} {'ratio':>7} {'memory of a step':>17} {'mean loss':>10}")
    for name, r in results.items():
        r["ratio"] = r["tokens_per_second"] / base
        memory = "unknown" if r["step_memory_bytes"] is None else f"{r['step_memory_bytes'] / (1 << 20):,.0f} MiB"
        spread = f"{r['low']:,.0f} to {r['high']:,.0f}"
        print(f"{name:12} {r['tokens_per_second']:10,.0f} {spread:>17} {r['ratio']:6.2f}x {memory:>17} {r['mean_loss']:10.3f}")
    settings = {k: getattr(args, k) for k in ("preset", "vocabulary", "micro_batch", "rounds", "steps")} | {
        "length": config.length
    }
    record = {
        "benchmark": "throughput",
        "settings": settings,
        "agreement": worst,
        "results": results,
        "environment": environment(compute),
    }
    assert all(math.isfinite(r["tokens_per_second"]) for r in results.values())
    folder = args.out or Path(__file__).parent / "results" / compute.device.type
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"throughput-{args.preset}-{args.vocabulary}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
