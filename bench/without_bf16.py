"""The gain of a CPU without bf16 instructions from multiplying in fp32: Muon's step, the head in bf16, a step of the demo.

    python bench/without_bf16.py [--rounds 5] [--out FOLDER]     a minute; writes bench/results/cpu/without_bf16.json

On a CPU that has such instructions, oneDNN is turned off and torch limited to AVX2 to imitate one without. That shows the
direction of the gain, not its size, because torch's own bf16 loops are better there. `before` is torch's way: torch.optim.Muon,
and products of bf16 tensors. Both ways are checked against fp64 before they are timed, and rounds are interleaved; each timed
call follows one of its own kind, as a step follows a step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":  # read when torch is loaded
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import interleaved, results_folder, spread

from atat_fast.config import TrainConfig, load_preset
from atat_fast.hardware.compute import environment, resolve
from atat_fast.models import DiT
from atat_fast.ops import linear_cross_entropy, linear_cross_entropy_reference, processor
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Optimizers
from atat_fast.training.optimizers.muon import Muon

CPU = torch.device("cpu")
Calls = dict[str, Callable[[], Any]]


@contextmanager
def as_torch_does() -> Iterator[None]:
    """Let ops leave bf16 products to torch."""
    before = processor.bf16_products
    processor.bf16_products = lambda: "native"
    try:
        yield
    finally:
        processor.bf16_products = before


def muon() -> Calls:
    """A step of the demo's 16 matrices."""
    model, found = load_preset("demo").model, {}
    shapes = [(3 * model.dim, model.dim), (model.dim, model.dim), (4 * model.dim, model.dim), (model.dim, 4 * model.dim)]
    start = [torch.randn(shape) for shape in shapes * model.layers]
    moved = []
    for name in ("before", "after", "exact"):
        some = [torch.nn.Parameter(p.clone()) for p in start]
        options = {"lr": 0.1, "weight_decay": 0.0}
        made = torch.optim.Muon(some, adjust_lr_fn="match_rms_adamw", **options) if name == "before" else None
        made = made or Muon(some, dtype=torch.float64 if name == "exact" else None, **options)
        torch.manual_seed(1)
        for p in some:
            p.grad = torch.randn_like(p)
        made.step()
        moved.append([float(0)] + [p.detach() for p in some])
        found[name] = made.step
    exact = found.pop("exact") and moved[2]
    for updates in moved[:2]:
        for a, b, p in zip(updates[1:], exact[1:], start, strict=True):
            assert float((a - b).norm() / (b - p).norm()) < 0.1
    return found


def head() -> Calls:
    """linear_cross_entropy of 512 rows, V = 8,192, D = 256, forward and backward, hidden in bf16."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 256).bfloat16().requires_grad_()
    weight, target = (torch.randn(8192, 256) / 16).requires_grad_(), torch.randint(0, 8192, (512,))

    def call() -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, target)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    def before() -> tuple[torch.Tensor, ...]:
        with as_torch_does():
            return call()

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy_reference(*wide, target).sum()
    want = (loss.detach(), *torch.autograd.grad(loss, wide))
    for way in (before, call):
        for a, b in zip(way(), want, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < 2e-2
    return {"before": before, "after": call}


def demo() -> Calls:
    """A step of the demo: masks, forward, backward, clip, optimizer."""
    config, compute = load_preset("demo"), resolve(TrainConfig())
    assert compute.dtype is torch.float32
    found: Calls = {}
    tokens = torch.randint(0, 260, (config.train.global_batch, config.model.length))
    ids = torch.arange(len(tokens))
    for name in ("before", "after"):
        torch.manual_seed(0)
        model = DiT(261, 260, **vars(config.model))
        objective = Objective(model, config, compute, seed=1, total=config.train.global_batch)
        optimizers = Optimizers(objective.named_parameters(), config.optim)
        if name == "before":
            inner = [p for group in optimizers.parts[1].param_groups for p in group["params"]]
            optimizers.parts[1] = torch.optim.Muon(inner, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

        def step(objective: Objective = objective, optimizers: Optimizers = optimizers) -> None:
            loss, _ = objective.loss(tokens, ids, first=0, step=0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
            optimizers.step(1e-4)

        found[name] = step
    return found


def main() -> int:
    """Time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON; bench/results/cpu by default")
    args = parser.parse_args()
    if args.rounds < 1:
        print(f"error: --rounds must be at least 1, got {args.rounds}", file=sys.stderr)
        return 2
    torch.backends.mkldnn.enabled = False
    rows = []
    for name, calls in (("Muon, the demo's matrices", muon()), ("the head in bf16", head()), ("a step of the demo", demo())):
        taken = interleaved(calls, CPU, args.rounds, in_a_loop=True)
        ms = {way: [1e3 * s for s in spread(sorted(values))] for way, values in taken.items()}
        ratio = ms["before"][1] / ms["after"][1]
        for way, (low, median, high) in ms.items():
            figures = {"low_ms": low, "median_ms": median, "high_ms": high, "speedup": ms["before"][1] / median}
            rows.append({"what": name, "way": way} | figures)
        print(f"{name:<28}{ms['before'][1]:>9.1f} ms before{ms['after'][1]:>9.1f} ms after{ratio:>8.2f}x", flush=True)
    folder = args.out or results_folder(CPU)
    facts = environment(resolve(TrainConfig(device="cpu"))) | {"mkldnn": False, "ATEN_CPU_CAPABILITY": "avx2"}
    record = {"benchmark": "without_bf16", "rounds": args.rounds, "results": rows, "environment": facts}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "without_bf16.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
