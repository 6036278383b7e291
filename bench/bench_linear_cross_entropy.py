"""The vocabulary head and its weighted loss, forward and backward, beside its peers and its three bare matrix products.

    pytest bench/bench_linear_cross_entropy.py        tables, and bench/results/<device>/linear_cross_entropy.json

`mdlm` is the head of plain MDLM: fp32 log-probabilities of every token, visible or not, the mask's logit lowered by a million.
The other peers (bench/peers.py) get only the rows that count, already gathered, which helps them. `three products` is the floor:
the matrix products of the same rows, and nothing else. Every way's loss and gradients are compared before it is timed. Memory is
the most that a call adds to what is held before it, its gradients included: on a CPU that of a fresh process
(python bench/bench_linear_cross_entropy.py --memory_of WAY ... prints it), on a GPU the allocator's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from peers import linear_cross_entropy_missing, linear_cross_entropy_peers, versions
from timing import interleaved, peak_resident_bytes, results_folder, seconds, spread, synchronize

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import environment, peak_flops, resolve
from atat_fast.ops import linear_cross_entropy, linear_cross_entropy_cost, registry

COMPUTE = resolve(TrainConfig())
DEVICE, DTYPE = COMPUTE.device, COMPUTE.dtype
ON_GPU = DEVICE.type == "cuda"
ROUNDS = 20 if ON_GPU else 3
BACKENDS = [
    name for name, reason in registry.explain("linear_cross_entropy", DEVICE).items() if reason is None and name != "torch"
]


@dataclass(frozen=True)
class Shape:
    """N tokens of width D, V ids, the last of them the mask, and the share of tokens that is hidden."""

    n: int
    d: int
    v: int
    hidden: float

    @property
    def rows(self) -> int:
        """Tokens that count."""
        return round(self.n * self.hidden)

    def __str__(self) -> str:
        return f"N={self.n} D={self.d} V={self.v} {'all' if self.hidden == 1 else f'{self.hidden:.0%}'} hidden"


if ON_GPU:
    SHAPES = [Shape(n, 768, v, share) for n in (8192, 32_768) for v in (50_258, 30_522) for share in (0.5, 1.0)]
else:
    SHAPES = [Shape(4096, 256, 30_522, share) for share in (1.0, 0.5)]
MEMORY_SHAPES = [Shape(8192 if ON_GPU else 1024, 768 if ON_GPU else 256, v, 0.5) for v in (4096, 30_522, 131_072)]


def plain_head(
    h: torch.Tensor, w: torch.Tensor, noisy_hidden: torch.Tensor, target: torch.Tensor, b: torch.Tensor, weight: torch.Tensor
):
    """MDLM's: h [N, D], noisy_hidden [N] bool, target [N], weight [N] fp32. Sum over hidden tokens of weight * nll."""
    logits = F.linear(h, w.to(h.dtype), b.to(h.dtype)).float()
    logits[:, -1] += -1_000_000.0
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    visible = ~noisy_hidden
    logits[visible] = -1_000_000.0
    logits[visible, target[visible]] = 0
    return (-logits.gather(-1, target[:, None])[:, 0] * weight).sum()


class Case:
    """One shape's tensors, and every way to the loss. On a GPU two copies take turns, so that no call finds its own cached."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        n, d, v = shape.n, shape.d, shape.v
        self.hidden = [torch.randn(n, d, generator=generator).to(DEVICE, DTYPE).requires_grad_() for _ in range(1 + ON_GPU)]
        self.weight = [(torch.randn(v, d, generator=generator) / d**0.5).to(DEVICE).requires_grad_() for _ in self.hidden]
        self.bias = (0.1 * torch.randn(v, generator=generator)).to(DEVICE).requires_grad_()
        rows = torch.randperm(n, generator=generator)[: shape.rows].sort().values
        dense_target = torch.randint(0, v - 1, (n,), generator=generator)
        dense_weight = torch.zeros(n)
        dense_weight[rows] = torch.rand(shape.rows, generator=generator) * 2
        self.is_hidden = torch.zeros(n, dtype=torch.bool).index_fill_(0, rows, True).to(DEVICE)
        self.rows = None if shape.hidden == 1 else rows.to(DEVICE)
        self.dense_target, self.dense_weight = dense_target.to(DEVICE), dense_weight.to(DEVICE)
        self.target, self.token_weight = dense_target[rows].to(DEVICE), dense_weight[rows].to(DEVICE)
        self.turn = 0

    def loss(self, way: str) -> torch.Tensor:
        """The loss by `way`, on the next copy of the tensors."""
        h, w = self.hidden[self.turn], self.weight[self.turn]
        if way == "mdlm":
            return plain_head(h, w, self.is_hidden, self.dense_target, self.bias, self.dense_weight)
        if way.startswith("atat_fast"):
            backend = way.removeprefix("atat_fast ").removesuffix(" low_memory")
            return linear_cross_entropy(
                h,
                w,
                self.target,
                bias=self.bias,
                token_weight=self.token_weight,
                rows=self.rows,
                forbidden=self.shape.v - 1,
                backend=backend,
                low_memory=way.endswith("low_memory"),
            )
        bias = self.bias.index_fill(0, torch.tensor([self.shape.v - 1], device=DEVICE), -torch.inf)  # the fair way to forbid
        return linear_cross_entropy_peers(DEVICE)[way](h, w, self.target, bias, self.token_weight, self.rows)

    def gradients(self, way: str) -> tuple[torch.Tensor, ...]:
        """The loss and its gradients in hidden, weight and bias."""
        loss = self.loss(way)
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden[self.turn], self.weight[self.turn], self.bias))

    def call(self, way: str) -> Callable[[], object]:
        """The function to time."""
        if way == "three products":
            return self.products()

        def timed() -> None:
            self.turn = (self.turn + 1) % len(self.hidden)
            self.gradients(way)

        return timed

    def products(self) -> Callable[[], object]:
        """The three products on the rows that count, in slabs of the same size; results are overwritten."""
        from atat_fast.ops.linear_cross_entropy.slabs import PADDED, default_budget, rows_per_slab

        columns = -(-self.shape.v // PADDED) * PADDED if ON_GPU else self.shape.v
        budget, multiple = default_budget(DEVICE), PADDED if ON_GPU else 16
        step = rows_per_slab(budget, columns, DTYPE.itemsize, self.shape.rows, multiple=multiple)
        w = torch.randn(columns, self.shape.d, device=DEVICE, dtype=DTYPE)
        x = torch.randn(self.shape.rows, self.shape.d, device=DEVICE, dtype=DTYPE)
        slab, dx = torch.zeros(step, columns, device=DEVICE, dtype=DTYPE), torch.empty_like(x)
        wide = torch.float32 if ON_GPU else DTYPE
        dw = torch.zeros(columns, self.shape.d, device=DEVICE, dtype=wide)

        def run() -> None:
            for start in range(0, self.shape.rows, step):
                part = x[start : start + step]
                z = slab[: len(part)]
                torch.mm(part, w.t(), out=z)
                torch.mm(z, w, out=dx[start : start + step])
                if wide is DTYPE:
                    torch.addmm(dw, z.t(), part, out=dw)
                else:
                    torch.addmm(dw, z.t(), part, out_dtype=wide, out=dw)

        return run


def without_bias() -> dict[str, str]:
    """Installed peers that do not take a bias, which all heads here have, with the reason."""
    return {name: peer.cannot for name, peer in linear_cross_entropy_peers(DEVICE).items() if not peer.takes_bias}


def ways() -> list[str]:
    """Names of all ways, the baseline first."""
    ours = [f"atat_fast {name}" for name in BACKENDS if name != "triton" or ON_GPU]
    peers = [name for name, peer in linear_cross_entropy_peers(DEVICE).items() if peer.takes_bias]
    return ["mdlm", *peers, *ours, f"{ours[0]} low_memory", "three products"]


def check(case: Case, names: list[str]) -> dict[str, float]:
    """Every way's loss, without those that run out of memory; raises if a loss or a gradient differs from the first way's."""
    losses: dict[str, float] = {}
    want = None
    for name in names:
        try:
            got = case.gradients(name)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        want = want or got
        losses[name] = float(got[0])
        for a, b, what in zip(got, want, ("loss", "dhidden", "dweight", "dbias"), strict=True):
            tolerance = 0.06 if DTYPE is torch.bfloat16 else 1e-4  # of the largest; some peers sum the bias's gradient in bf16
            difference = float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9))
            assert difference < tolerance, f"{name}: {what} differs from {names[0]}'s by {difference:.1e} of its largest"
    return losses


def memory(shape: Shape, way: str) -> int | None:
    """Bytes that one call adds at its peak to the tensors it is given."""
    if way == "three products":
        return None
    if ON_GPU:
        case = Case(shape)
        synchronize(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        try:
            kept = case.gradients(way)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        del kept
        return torch.cuda.max_memory_allocated(DEVICE) - before
    sizes = []
    for calls in ("0", "1"):
        command = [sys.executable, __file__, "--memory_of", way, "--shape", json.dumps(asdict(shape)), "--calls", calls]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return None
        sizes.append(int(done.stdout.split()[-1]))
    return sizes[1] - sizes[0]


def memory_by_vocabulary() -> dict[str, Any]:
    """Bytes of a call by way and vocabulary, for the picture in docs/ops/linear_cross_entropy.md."""
    names = ["mdlm", "eager", f"atat_fast {BACKENDS[0]}", f"atat_fast {BACKENDS[0]} low_memory"]
    sizes = {name: [memory(shape, name) for shape in MEMORY_SHAPES] for name in names}
    return {"n": MEMORY_SHAPES[0].n, "d": MEMORY_SHAPES[0].d, "v": [shape.v for shape in MEMORY_SHAPES], "bytes": sizes}


class Report:
    """Rows of the tests, written as they come, so that running out of time or memory loses none."""

    def __init__(self) -> None:
        self.path = results_folder(DEVICE) / "linear_cross_entropy.json"
        self.record: dict[str, Any] = {
            "benchmark": "linear_cross_entropy", "rounds": ROUNDS, "results": [], "peers": versions(),
            "missing": linear_cross_entropy_missing(DEVICE) | without_bias(), "environment": environment(COMPUTE),
        }  # fmt: skip

    def write(self, rows: list[dict[str, Any]], **more: Any) -> None:
        """Add rows and other fields to the file."""
        self.record["results"] += rows
        self.record |= more
        self.path.write_text(json.dumps(self.record, indent=1) + "\n")


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """The fixture of all tests; at the end it measures memory by vocabulary."""
    found = Report()
    yield found
    if found.record["results"]:
        found.write([], memory_by_vocabulary=memory_by_vocabulary())
        print("left out:", "; ".join(f"{name}: {why}" for name, why in found.record["missing"].items()))
        print(f"written to {found.path}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy(report: Report, shape: Shape, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(shape)
    losses = check(case, [name for name in ways() if name != "three products"])
    names = [name for name in ways() if name in losses or name == "three products"]
    taken = interleaved({name: case.call(name) for name in names}, DEVICE, ROUNDS)
    del case
    floor, plain = spread(taken["three products"])[1], spread(taken["mdlm"])[1] if "mdlm" in taken else None
    cost, peak = linear_cross_entropy_cost(shape.rows, shape.d, shape.v), peak_flops(DEVICE)
    rows = []
    for name in names:
        low, median, high = spread(taken[name])
        row = {
            "shape": asdict(shape), "way": name, "median_ms": median * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3,
            "speedup_over_mdlm": plain and plain / median, "over_three_products": median / floor,
            "tflops": cost.flops / median / 1e12, "share_of_peak": cost.flops / median / peak if peak else None,
            "memory_bytes": memory(shape, name), "loss": losses.get(name),
        }  # fmt: skip
        rows.append(row)
    base = next((row["memory_bytes"] for row in rows if row["way"] == "mdlm"), None)
    with capsys.disabled():
        print(f"\n\n{shape}, {COMPUTE.describe()}, {torch.get_num_threads()} threads, forward and backward")
        heads = f"{'x mdlm':>8}{'/ floor':>8}{'TFLOP/s':>9}{'MiB':>8}{'/ mdlm':>8}{'loss':>12}"
        print(f"{'way':<28}{'ms':>10}{'25 %':>10}{'75 %':>10}{heads}")
        for row in rows:
            size = row["memory_bytes"]
            row["memory_over_mdlm"] = size / base if size is not None and base else None
            mib = "" if size is None else f"{size / (1 << 20):,.0f}"
            share = "" if row["memory_over_mdlm"] is None else f"{row['memory_over_mdlm']:.2f}"
            loss = "" if row["loss"] is None else f"{row['loss']:.2f}"
            faster = "" if plain is None else f"{row['speedup_over_mdlm']:.2f}"
            print(
                f"{row['way']:<28}{row['median_ms']:>10.2f}{row['low_ms']:>10.2f}{row['high_ms']:>10.2f}"
                f"{faster:>8}{row['over_three_products']:>8.2f}{row['tflops']:>9.3f}{mib:>8}{share:>8}{loss:>12}"
            )
        for name in set(ways()) - set(names):
            print(f"{name}: not enough memory")
    report.write(rows)


def main() -> int:
    """Print this process's peak memory after some calls of one way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory_of", required=True, help="a way")
    parser.add_argument("--shape", required=True, help="as JSON: n, d, v, hidden")
    parser.add_argument("--calls", type=int, default=1)
    args = parser.parse_args()
    case = Case(Shape(**json.loads(args.shape)))
    for _ in range(args.calls):
        seconds(case.call(args.memory_of), DEVICE)
    print(peak_resident_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
