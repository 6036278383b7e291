"""Compare training over several ranks of this machine with one process: losses, time, and the bytes that ranks send.

    python bench/scaling.py [--ranks 1 2 4] [--steps 20] [--modes ddp fsdp] [--out FOLDER]   writes FOLDER/scaling.json

torchrun starts the trainer on 1, 2, ... ranks over gloo, with the same global batch each time. Ranks of one CPU share its cores,
so nothing gets faster. The bytes of one step are counted and compared with `distributed.fit.bytes_sent`. Last, a step's gradient
is summed over eight ranks in bf16, in fp32 and in fp64. bench/project.py projects times on cards that were not measured.
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
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder
from wire import Wire

from atat_fast import cli
from atat_fast.config import TrainConfig
from atat_fast.distributed.fit import bytes_sent
from atat_fast.distributed.ranks import Ranks
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import environment, resolve
from atat_fast.training.plan import card_of, sizes_of
from atat_fast.training.step import read_batch
from atat_fast.training.trainer import Trainer


def started(ranks: int, worker: str, *settings: object) -> dict[str, Any]:
    """What a worker below leaves as JSON, on so many ranks. Raises UsageError with the trainer's own error if it fails."""
    with tempfile.TemporaryDirectory() as root:
        own = ["--run.root", root, "--run.name", "scaling", "--run.tensorboard", "false", "--sample.num_samples", "0"]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
            "--worker", worker, f"{root}/found.json", *own, "--train.device", "cpu", "--train.dtype", "fp32", *map(str, settings),
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if "Error: " in line] or done.stderr.splitlines()[-1:]
            raise UsageError(f"{ranks} ranks ended with status {done.returncode}: {last[0]}")
        found: dict[str, Any] = json.loads((Path(root) / "found.json").read_text(encoding="utf-8"))
        return found


def worker(name: str, path: Path, settings: list[str]) -> int:
    """One rank's part of `train` or `summed`; rank 0 writes what it found."""
    config, _ = cli.parse_config(cli.make_parser(), settings)
    ranks = Ranks.start("cpu", config.parallel.timeout)
    found = {"train": train, "summed": summed}[name](Trainer(config, show_progress=False, ranks=ranks))
    if ranks.first:
        path.write_text(json.dumps(found), encoding="utf-8")
    ranks.leave()
    return 0


def train(run: Trainer) -> dict[str, Any]:
    """Train, counting the bytes of the second step. Losses, the bound, tokens a second after the first log line, and bytes."""
    step, wire = run._train_step, Wire()

    def counted() -> None:
        if run.state.step == 1:
            with wire:
                step()
        else:
            step()

    run._train_step = counted  # type: ignore[method-assign]
    final = run.train()
    parts = run.parts
    sizes = sizes_of(parts.config, parts.model.vocab_size)
    formula = bytes_sent(parts.config, sizes, parts.layout, card_of(parts.compute), parts.plan.accumulation)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    rates = [line["tokens_per_second"] for line in logged[1:] or logged]
    return {
        "ranks": parts.ranks.size, "mode": parts.layout.mode, "losses": [line["loss"] for line in logged], "nll": final["nll"],
        "tokens_per_second": statistics.median(rates), "low": min(rates), "high": max(rates),
        "step_ms": 1e3 * parts.tokens_per_step / statistics.median(rates), "sent": wire.sent, "formula": formula,
    }  # fmt: skip


def summed(run: Trainer) -> dict[str, Any]:
    """Errors of a gradient's sum over ranks, in bf16 and in fp32, relative to its size; and how far halves of a batch are apart.

    The gradient is that of the step after the run's last, so no part of the network is still zero.
    """
    run.train()
    parts, state = run.parts, run.state
    objective, slot = parts.objective, parts.plan.slots(parts.ranks.rank)[0]
    tokens, ids, documents = read_batch(parts, state.step, slot)
    loss, _ = objective.loss(tokens, ids, first=slot, step=state.step, progress=1.0, documents=documents)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(objective.parameters()), allow_unused=True) if g is not None]
    )

    def total(dtype: torch.dtype, part: torch.Tensor = gradient) -> torch.Tensor:
        out = part.to(dtype)
        dist.all_reduce(out)
        return out.double()

    exact = total(torch.float64)
    first = total(torch.float64, gradient if parts.ranks.rank < parts.ranks.size // 2 else torch.zeros_like(gradient))
    size = exact.norm()
    errors = {
        name: ((total(dtype) - exact).norm() / size).item() for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return {"ranks": parts.ranks.size, "error": errors, "halves_apart": ((2 * first - exact).norm() / size).item()}


def measured(ranks: list[int], modes: list[str], steps: int, preset: str) -> list[dict[str, Any]]:
    """`train` for every number of ranks and mode, with the largest difference of losses from the first one's."""
    every = max(1, steps // 4)
    settings = (
        "--preset", preset, "--train.max_steps", steps, "--train.log_every", every, "--eval.every", steps, "--eval.sequences", 32,
        "--train.micro_batch", 4,
    )  # fmt: skip
    rows = [
        started(n, "train", *settings, *(("--parallel.mode", mode) if n > 1 else ()))
        for n in ranks
        for mode in (modes if n > 1 else modes[:1])
    ]
    for row in rows:
        row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The script: 0, or 2 on bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        return worker(arguments[1], Path(arguments[2]), arguments[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes to measure with, one after the other")
    parser.add_argument("--modes", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp", "hsdp"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each measurement")
    parser.add_argument("--sums", type=int, default=8, help="ranks over which a gradient is summed in bf16")
    parser.add_argument("--preset", default="demo", help="what is trained while measuring")
    parser.add_argument("--out", type=Path, default=None, help="folder of scaling.json; bench/results/cpu by default")
    args = parser.parse_args(arguments)
    path = (args.out or results_folder(torch.device("cpu"))) / "scaling.json"
    try:
        if min(*args.ranks, args.steps) < 1 or args.sums < 2:
            raise UsageError(f"--ranks and --steps must be at least 1, and --sums 2; got {args.ranks}, {args.steps}, {args.sums}")
        rows = measured(args.ranks, args.modes, args.steps, args.preset)
        settings = ("--preset", args.preset, "--train.max_steps", args.steps, "--eval.every", args.steps, "--eval.sequences", 32)
        sums = started(args.sums, "summed", *settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"gloo, {os.cpu_count()} cores shared by all ranks; preset {args.preset}")
    for r in rows:
        print(
            f"{r['ranks']:>5} ranks {r['mode']:<5} {r['tokens_per_second']:>9,.0f} tokens/s ({r['ratio']:.2f}x), "
            f"{r['step_ms']:,.0f} ms a step, losses within {r['loss_difference']:.1e} of the first"
        )
        for kind, count in r["sent"].items():
            share = count / r["formula"][kind]
            print(f"{'':>12}{kind:<15}{count / 1e6:>9,.2f} MB sent by a rank in a step, {share:.3f} of the formula")
    print(
        f"a gradient's sum over {sums['ranks']} ranks is wrong by {sums['error']['bf16']:.1e} of its size in bf16, "
        f"{sums['error']['fp32']:.1e} in fp32; halves of the batch are {sums['halves_apart']:.2f} apart"
    )
    facts = environment(resolve(TrainConfig(device="cpu", dtype="fp32")))
    record = {
        "benchmark": "scaling",
        "settings": {"preset": args.preset, "steps": args.steps, "backend": "gloo", "cores": os.cpu_count()},
        "environment": facts | {"load_average": os.getloadavg()[0], "cpu_threads": 1},
        "results": rows,
        "sums": sums,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
