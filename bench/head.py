"""The head by itself: the best backend, the best size of slab, and where its time goes.

    python bench/head.py                        R = 4,096 and 8,192 hidden rows of width 768, V = 50,258 on a GPU; half a minute
    python bench/head.py --rows 512 --width 64 --vocabulary 1003 --budgets 1 2 --rounds 2         small, anywhere

For each number of rows it times the three bare products (bench_linear_cross_entropy.py's floor) and linear_cross_entropy's
forward and backward on every backend that runs here, each at every budget of a slab, in interleaved rounds, after a check that
backends agree. Then it profiles the fastest backend's kernels at the default budget. Writes bench/results/<device>/head.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from ceilings import timed
from timing import results_folder, spread, synchronize
from torch.profiler import ProfilerActivity

from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.ops import linear_cross_entropy, linear_cross_entropy_cost, registry
from atat_fast.ops.linear_cross_entropy.slabs import PADDED, default_budget, rows_per_slab

DEFAULTS = {"cuda": ((4096, 8192), 768, 50_258, (128, 256, 512, 1024)), "cpu": ((512,), 256, 8003, (16, 64))}
FLOOR = "three products"
LIMIT = 0.06
"""Largest allowed difference of two backends' gradients, relative to the largest entry; in bf16 one of them rounds a slab."""


class Head:
    """The tensors for one number of rows, the same for every way."""

    def __init__(self, rows: int, width: int, vocabulary: int, compute: Compute) -> None:
        self.rows, self.width, self.vocabulary, self.compute = rows, width, vocabulary, compute
        torch.manual_seed(0)
        device, dtype = compute.device, compute.dtype
        self.hidden = torch.randn(2 * rows, width).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, width) / width**0.5).to(device).requires_grad_()
        self.bias = (0.1 * torch.randn(vocabulary)).to(device).requires_grad_()
        self.target = torch.randint(0, vocabulary - 1, (rows,)).to(device)
        self.token_weight = torch.rand(rows).to(device) * 2
        self.which = torch.randperm(2 * rows)[:rows].sort().values.to(device)

    def gradients(self, backend: str, budget: int) -> tuple[torch.Tensor, ...]:
        """Loss and gradients, with slabs of `budget` MB."""
        loss = linear_cross_entropy(
            self.hidden,
            self.weight,
            self.target,
            bias=self.bias,
            token_weight=self.token_weight,
            rows=self.which,
            forbidden=self.vocabulary - 1,
            backend=backend,
            chunk_bytes=budget << 20,
        )
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))

    def products(self, budget: int) -> Any:
        """The three products alone, in the same slabs, into tensors made before."""
        device, dtype = self.compute.device, self.compute.dtype
        on_gpu = device.type == "cuda"
        columns = -(-self.vocabulary // PADDED) * PADDED if on_gpu else self.vocabulary
        step = rows_per_slab(budget << 20, columns, dtype.itemsize, self.rows, multiple=PADDED if on_gpu else 16)
        w = torch.randn(columns, self.width, device=device, dtype=dtype)
        x = torch.randn(self.rows, self.width, device=device, dtype=dtype)
        slab, dx = torch.randn(step, columns, device=device, dtype=dtype), torch.empty_like(x)
        wide = torch.float32 if on_gpu else dtype
        dw = torch.zeros(columns, self.width, device=device, dtype=wide)
        told = {} if wide is dtype else {"out_dtype": wide}

        def run() -> None:
            for start in range(0, self.rows, step):
                part = x[start : start + step]
                z = slab[: len(part)]
                torch.mm(part, w.t(), out=z)
                torch.mm(z, w, out=dx[start : start + step])
                torch.addmm(dw, z.t(), part, out=dw, **told)

        return run


def check(head: Head, backends: list[str], budget: int) -> None:
    """Raise RuntimeError if the backends' losses or gradients disagree."""
    want = head.gradients(backends[0], budget)
    for name in backends[1:]:
        for a, b, what in zip(head.gradients(name, budget), want, ("loss", "dhidden", "dweight", "dbias"), strict=True):
            apart = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9))
            if not apart < LIMIT:
                raise RuntimeError(f"{name}'s {what} differs from {backends[0]}'s by {apart:.1e} of its largest")


def measure(head: Head, backends: list[str], budgets: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row a way and budget: median and quartiles of the rounds, in milliseconds."""
    calls: dict[tuple[str, int], Any] = {}
    for budget in budgets:
        calls[FLOOR, budget] = head.products(budget)
        for name in backends:
            calls[name, budget] = lambda n=name, b=budget: head.gradients(n, b)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for i in range(rounds + 1):
        for key, call in calls.items():
            took = timed(call, head.compute.device)
            if i:  # the first warms up
                taken[key].append(took)
    flops = linear_cross_entropy_cost(head.rows, head.width, head.vocabulary).flops
    best = min(spread(values)[1] for (name, _), values in taken.items() if name == FLOOR)
    rows = []
    for (name, budget), values in taken.items():
        low, middle, high = spread(sorted(values))
        rows.append(
            {
                "rows": head.rows,
                "way": name,
                "budget_mb": budget,
                "median_ms": middle * 1e3,
                "low_ms": low * 1e3,
                "high_ms": high * 1e3,
                "tflops": flops / middle / 1e12,
                "over_best_products": middle / best,
            }
        )
    return rows


def profile(head: Head, backend: str, budget: int) -> list[dict[str, Any]]:
    """Kernels (on a CPU, operators) of one call by time, the longest first: name, how often, milliseconds in all."""
    on_gpu = head.compute.device.type == "cuda"
    head.gradients(backend, budget)
    synchronize(head.compute.device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as watched:
        head.gradients(backend, budget)
        synchronize(head.compute.device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found: dict[str, list[float]] = {}
    for event in watched.events():
        if event.device_type == kind:
            took = event.device_time_total if on_gpu else event.self_cpu_time_total
            found.setdefault(event.name, []).append(took / 1e3)
    rows = [{"kernel": name, "calls": len(values), "ms": sum(values)} for name, values in found.items()]
    return sorted(rows, key=lambda row: -row["ms"])[:30]


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="hidden rows, each a table of its own")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[], metavar="MB", help="sizes of a slab")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="folder of head.json; bench/results/<device> by default")
    args = parser.parse_args(arguments)
    try:
        if min([args.rounds, *args.rows, *args.budgets], default=1) < 1 or min(args.width, args.vocabulary) < 0:
            raise UsageError("--rows, --budgets and --rounds must be at least 1; --width and --vocabulary at least 1 if given")
        compute = resolve(TrainConfig(device=args.device))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, width, vocabulary, budgets = DEFAULTS[compute.device.type]
    args.rows, args.width, args.vocabulary = args.rows or rows, args.width or width, args.vocabulary or vocabulary
    args.budgets = args.budgets or budgets
    reasons = registry.explain("linear_cross_entropy", compute.device)
    backends = [name for name, reason in reasons.items() if reason is None and name != "torch"] or ["torch"]
    record: dict[str, Any] = {
        "benchmark": "head", "settings": {name: getattr(args, name) for name in ("width", "vocabulary", "rounds")},
        "backends": reasons, "results": [], "profile": {}, "environment": environment(compute),
    }  # fmt: skip
    folder = args.out or results_folder(compute.device)
    folder.mkdir(parents=True, exist_ok=True)
    for count in args.rows:
        head = Head(count, args.width, args.vocabulary, compute)
        check(head, backends, args.budgets[0])
        found = measure(head, backends, list(args.budgets), args.rounds)
        print(f"\nR={count:,} D={args.width} V={args.vocabulary:,}, {compute.describe()}, forward and backward")
        print(f"{'way':<16}{'slab MB':>8}{'ms':>9}{'25 %':>9}{'75 %':>9}{'TFLOP/s':>9}{'/ best products':>17}")
        for row in found:
            print(
                f"{row['way']:<16}{row['budget_mb']:>8}{row['median_ms']:>9.3f}{row['low_ms']:>9.3f}{row['high_ms']:>9.3f}"
                f"{row['tflops']:>9.1f}{row['over_best_products']:>17.2f}"
            )
        record["results"] += found
        if count == max(args.rows):
            usual = default_budget(compute.device) >> 20
            kernels = profile(head, backends[0], usual)
            record["profile"] = {"rows": count, "backend": backends[0], "budget_mb": usual, "kernels": kernels}
            for row in record["profile"]["kernels"][:14]:
                print(f"{row['ms']:>9.3f} ms {row['calls']:>4} x {row['kernel'][:110]}")
        (folder / "head.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")  # as it comes: time may run out
    print(f"written to {folder / 'head.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
