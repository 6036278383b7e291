"""The last block on the head's rows only: forward and backward with those, and with all rows, in turn.

    python bench/last_block.py [--preset tiny] [--vocabulary 4097] [--batch 8] [--rounds 31] [--out FOLDER]

Half of the tokens are hidden. Losses and gradients of the two must agree first. The predicted ratio comes from the floating-point
operations that are left out; see docs/notes/last_block.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from atat_fast.config import TrainConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import environment, resolve
from atat_fast.models import DiT
from atat_fast.models.dit import step_cost
from atat_fast.ops import linear_cross_entropy


def measure(args: argparse.Namespace) -> int:
    """Check, time, print, write."""
    if min(args.rounds, args.batch) < 1 or args.vocabulary < 2:
        raise UsageError("--rounds and --batch must be at least 1, and --vocabulary at least 2")
    compute = resolve(TrainConfig())
    config = load_preset(args.preset).model
    config.dropout = 0.0
    torch.manual_seed(0)
    model = DiT(args.vocabulary, args.vocabulary - 1, **vars(config)).to(compute.device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    total = args.batch * config.length
    noisy = torch.randint(0, args.vocabulary, (args.batch, config.length), device=compute.device)
    rows = torch.randperm(total, device=compute.device)[: total // 2].sort().values
    target = torch.randint(0, args.vocabulary - 1, (len(rows),), device=compute.device)
    weights = torch.rand(len(rows), device=compute.device)

    def picked() -> torch.Tensor:
        return model(noisy, rows, target, weights)[0]

    def dense() -> torch.Tensor:
        return linear_cross_entropy(
            model.features(noisy),
            model.head.weight,
            target,
            bias=model.head.bias,
            token_weight=weights,
            rows=rows,
            forbidden=model.mask_id,
        )

    def step(way) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        with compute.autocast():
            loss = way()
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(step(picked), step(dense), strict=True))
    if not worst < (5e-2 if compute.dtype is torch.bfloat16 else 1e-3):
        raise RuntimeError(f"the two disagree: loss or a gradient differs by {worst:.2e} of its size")

    def seconds(way) -> float:  # type: ignore[no-untyped-def]
        begin = time.perf_counter()
        step(way)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(picked), seconds(dense)
    spent = [(seconds(picked), seconds(dense)) for _ in range(args.rounds)]
    left_out = 3 * 2 * (1 + 2 * config.mlp_ratio) * config.dim**2 * (total - len(rows))
    whole = step_cost(config, args.vocabulary, args.batch, len(rows)).flops + left_out
    low, middle, high = statistics.quantiles([a / b for a, b in spent], n=4)
    record = {
        "benchmark": "last_block",
        "settings": {"preset": args.preset, "vocabulary": args.vocabulary, "batch": args.batch, "rounds": args.rounds},
        "agreement": worst,
        "picked_ms": statistics.median(a for a, _ in spent) * 1e3,
        "dense_ms": statistics.median(b for _, b in spent) * 1e3,
        "ratio": {"median": middle, "low": low, "high": high},
        "predicted_ratio": 1 - left_out / whole,
        "environment": environment(compute),
    }
    print(f"{compute.describe()}; preset {args.preset}, V={args.vocabulary:,}, {args.batch} x {config.length}, half hidden")
    print(f"checked: loss and gradients agree to {worst:.1e}")
    print(f"all rows {record['dense_ms']:.1f} ms, hidden rows {record['picked_ms']:.1f} ms a step")
    print(f"ratio {middle:.3f} ({low:.3f} to {high:.3f}); {record['predicted_ratio']:.3f} from floating-point operations")
    name = "cpu" if compute.device.type == "cpu" else torch.cuda.get_device_name(compute.device).lower().replace(" ", "-")
    folder = args.out or Path(__file__).parent / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"last_block-{args.preset}-{args.vocabulary}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


def main() -> int:
    """Parse, measure; status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model sizes")
    parser.add_argument("--vocabulary", type=int, default=4097, help="ids of the model, the mask included")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    try:
        return measure(parser.parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
