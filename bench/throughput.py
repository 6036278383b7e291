"""Tokens a second of whole training steps: plain MDLM, the same compiled, atat_fast, and it with parts of ATAT, in one run.

    python bench/throughput.py                                at most three minutes anywhere, two CPU cores included
    python bench/throughput.py --preset small --vocabulary 50258 --micro_batch 16 --largest --profile --sampling
    torchrun --standalone --nproc-per-node 2 bench/throughput.py

A step is everything a trainer does: read tokens, hide some, forward, backward, clip, optimizer, average. The variants begin with
the same weights, and before anything is timed plain MDLM's and atat_fast's losses and gradients on one masked batch must agree.
Rounds are interleaved, figures are medians with quartiles. The parts of a step are timed in separate steps (without CUDA graphs,
which show no parts), a CPU's memory in separate processes, and power, if a GPU's driver counts it, in the rounds. Writes
throughput-PRESET-VOCABULARY-MICRO_BATCH.json and .png in bench/results/<device>; with --profile also a Chrome trace and a table
by op.

If time is short, the slowest things are left out, and the output says so: first the compiled plain variant on a CPU, which
compiles for most of a minute, then rounds, then memory. --seconds 0 sets no limit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

import devices
from mdlm import mdlm_network
from power import EnergyMeter, figures
from timing import RESULTS, peak_resident_bytes, results_folder, spread, synchronize
from variants import COMPILED, MDLM, OURS, PARTS, PLAIN, VARIANTS, Setting, Variant, check_agreement

from atat_fast.config import DataConfig, TrainConfig, load_preset
from atat_fast.data import SequenceLoader, prepare
from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.models.dit import step_cost

DEFAULTS = {"cpu": ("tiny", 30_522), "cuda": ("small", 50_258)}
"""Default preset and vocabulary: a step takes seconds on two CPU cores; on a GPU it is MDLM's own size."""
TURN_SECONDS = 1.0
"""About the length of a variant's turn in a round on a GPU, so that its energy counter moves."""
COMPILE_SECONDS = 60.0
CHILD_SECONDS = 12.0
"""Assumed for a CPU: seconds to compile the plain step, and to start a process and build a model."""
NO_TIME = "no time left: on a CPU it compiles for most of a minute (--variants and --seconds decide)"
LARGEST_SECONDS = 120.0


def arguments() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="", help="model sizes; tiny on a CPU and small on a GPU by default")
    parser.add_argument("--vocabulary", type=int, default=0, help="ids of the model, the mask included; 30522 or 50258")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--micro_batch", type=int, default=8, help="sequences a step and rank")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=0, help="steps of a round; 0 is one on a CPU, a second of them on a GPU")
    parser.add_argument("--variants", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(VARIANTS)}; all by default")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--seconds", type=float, default=130.0, help="time for all of it, about; 0 is no limit")
    parser.add_argument("--largest", action="store_true", help="find the largest micro-batch that fits (GPU), by doubling")
    parser.add_argument("--sampling", action="store_true", help="time the samplers too (bench/bench_sampling.py)")
    parser.add_argument("--profile", action="store_true", help="write a trace and a table by op too")
    parser.add_argument("--out", type=Path, default=None, help="folder for what is written; bench/results/<device> by default")
    parser.add_argument("--child", choices=("memory", "largest"), help=argparse.SUPPRESS)
    return parser


class Budget:
    """Seconds left of `seconds`; 0 for no limit."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds if seconds else float("inf")

    def allows(self, seconds: float) -> bool:
        """Whether this much is left."""
        return time.monotonic() + seconds <= self.end

    @property
    def left(self) -> float:
        """Seconds left, below 0 if it is overdrawn."""
        return self.end - time.monotonic()


class Ranks:
    """The processes that torchrun started, or this one."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = device
        if self.count > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def agree(self, value: float) -> float:
        """Rank 0's value, on every rank, so that all ranks decide alike by time."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def say(self, text: str) -> None:
        """Print, on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()


def chosen(names: list[str]) -> list[str]:
    """The variants named, or all, in their order. Raises UsageError for an unknown name."""
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"there is no variant {name!r}{nearest(name, VARIANTS)}; variants are {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if not names or name in names]


def setting_of(args: argparse.Namespace, compute: Compute, ranks: Ranks) -> Setting:
    """Sizes and data of a run; fills in args.preset and args.vocabulary. Raises UsageError if they are invalid."""
    if args.rounds < 1 or args.micro_batch < 1 or min(args.steps, args.length, args.vocabulary, args.seconds) < 0:
        raise UsageError(
            "--rounds and --micro_batch must be at least 1; --steps, --length, --vocabulary and --seconds at least 0"
        )
    preset, vocabulary = DEFAULTS[compute.device.type]
    args.preset, args.vocabulary = args.preset or preset, args.vocabulary or vocabulary
    config = load_preset(args.preset)
    config.model = mdlm_network(config.model)
    args.length = config.model.length = args.length or config.model.length
    dataset = prepare(DataConfig(corpus="python-docs", tokenizer="bpe-4096"), progress=False)
    if args.vocabulary < dataset.tokenizer.model_vocab_size:
        raise UsageError(f"--vocabulary {args.vocabulary} is below the corpus's own {dataset.tokenizer.model_vocab_size}")
    loader = SequenceLoader(dataset.train, config.model.length, 1)
    return Setting(config, args.vocabulary, args.micro_batch, compute, loader, ranks.rank, ranks.count)


def build(name: str, setting: Setting) -> tuple[Variant | None, str]:
    """(the variant after a first step, ''), or (None, the reason)."""
    on_gpu = setting.compute.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        variant = Variant(name, setting)
        graphs, variant.graphs = variant.graphs, None
        variant.timed(2 if name == COMPILED or setting.compute.compile else 1)
        if on_gpu:  # the allocator counts exactly, but without graphs; a CPU's memory takes a process of its own
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            variant.timed(1)
            step = torch.cuda.max_memory_allocated() - held
            variant.memory = {"step": step, "peak": held - before + step}
        variant.graphs = graphs
        if graphs is not None:
            variant.timed(3)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, f"out of memory with {setting.batch} sequences"
    return variant, ""


def build_all(
    names: list[str], args: argparse.Namespace, setting: Setting, ranks: Ranks, budget: Budget
) -> tuple[Any, Any, float]:
    """(variants, reasons of the missing ones, agreement). Plain and atat_fast first, compared before they are warmed up."""
    found: dict[str, Variant] = {}
    reasons: dict[str, str] = {}
    checked = {name: Variant(name, setting) for name in (PLAIN, OURS)}
    tokens = setting.loader.batch(0, min(setting.batch, 8))[0].to(setting.compute.device)
    worst = check_agreement(checked[PLAIN], checked[OURS], tokens)
    del checked
    step = 0.0
    for name in sorted(names, key=lambda n: n == COMPILED):  # the one that may take too long comes last
        if name == COMPILED and setting.compute.device.type == "cpu" and not args.variants:
            rest = COMPILE_SECONDS + 4 * step + sum(CHILD_SECONDS for _ in found)
            if not ranks.agree(float(budget.allows(rest))):
                reasons[name] = NO_TIME
                continue
        variant, reason = build(name, setting)
        if variant is None:
            reasons[name] = reason
            continue
        found[name] = variant
        step += variant.timed(1)
    return {name: found[name] for name in names if name in found}, reasons, worst


def rounds(
    variants: dict[str, Variant], args: argparse.Namespace, ranks: Ranks, meter: EnergyMeter, budget: Budget
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds a step of every round, and joules of all of a variant's steps. At least two rounds, even without time."""
    steps = {}
    for name, variant in variants.items():
        one = variant.timed(1)
        turn = args.steps or (1 if variant.device.type == "cpu" else max(1, round(TURN_SECONDS / one)))
        steps[name] = int(ranks.agree(turn))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    joules: dict[str, float | None] = dict.fromkeys(variants)
    for i in range(args.rounds):
        begin = time.monotonic()
        for name, variant in variants.items():
            synchronize(variant.device)
            before = meter.joules()
            seconds[name].append(variant.timed(steps[name]))
            after = meter.joules()
            if before is not None and after is not None:
                joules[name] = (joules[name] or 0.0) + (after - before) / steps[name]
        took = time.monotonic() - begin
        rest = took * 2 + (CHILD_SECONDS + took) * len(variants) / 2
        if i >= 1 and ranks.agree(float(not budget.allows(rest))):
            break
    return seconds, joules


def child(kind: str, name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any] | None:
    """One variant's memory, measured in a separate process; None if that failed or took too long."""
    passed = [f"--{k}={getattr(args, k)}" for k in ("preset", "vocabulary", "length", "micro_batch", "device", "dtype")]
    command = [
        sys.executable,
        __file__,
        *passed,
        "--variants",
        name,
        "--child",
        kind,
        "--seconds",
        str(min(seconds, LARGEST_SECONDS)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds if seconds < 1e6 else None)
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode() if kind == "largest" else ""
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def be_child(args: argparse.Namespace, setting: Setting) -> int:
    """In that process: print as JSON the memory of two steps, or after each micro-batch that fits the largest so far."""
    (name,) = args.variants
    on_gpu = setting.compute.device.type == "cuda"
    if args.child == "memory":
        variant = Variant(name, setting)
        held = torch.cuda.memory_allocated() if on_gpu else reset_peak_resident_bytes()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        variant.timed(2)
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
        print(json.dumps({"step": peak - held, "peak": peak}))
        return 0
    budget, fits = Budget(args.seconds), 0
    try:
        while budget.allows(0):
            batch = max(1, 2 * fits)
            Variant(name, dataclasses.replace(setting, batch=batch)).timed(2)
            fits = batch
            print(json.dumps({"micro_batch": fits, "full": False}), flush=True)
            torch.cuda.empty_cache()
    except torch.OutOfMemoryError:
        print(json.dumps({"micro_batch": fits, "full": True}))
    return 0


def reset_peak_resident_bytes() -> int:
    """Reset this process's peak memory to what it holds now. If Linux refuses, the old peak stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_resident_bytes()


def summary(
    variant: Variant, seconds: list[float], joules: float | None, parts: tuple[dict[str, float], float], peak: float | None
) -> dict[str, Any]:
    """One variant's figures."""
    s, tokens = variant.setting, variant.setting.tokens
    low, middle, high = spread(sorted(tokens / x for x in seconds))
    by_part, step = parts
    rows = s.batch * s.config.model.length
    result: dict[str, Any] = {
        "tokens_per_second": middle, "low": low, "high": high, "step_seconds": tokens / middle,
        "parts": by_part, "parts_step_seconds": step, "mean_loss": variant.mean_loss(),
    }  # fmt: skip
    for key, head in (("mfu_all_rows", rows), ("mfu_hidden_rows", rows // 2)):
        work = step_cost(s.config.model, s.vocabulary, s.batch, head).flops
        result[key] = None if peak is None else work / (tokens / middle) / peak
    result |= {"watts": None, "joules_per_million_tokens": None}
    return result | figures(joules, sum(seconds), tokens / s.ranks * len(seconds))


def measure(args: argparse.Namespace) -> int:
    """`main` with parsed arguments."""
    budget, names = Budget(args.seconds), chosen(args.variants)
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype))
    ranks = Ranks(compute.device)
    try:
        compute = dataclasses.replace(compute, device=ranks.device)
        setting = setting_of(args, compute, ranks)
        return be_child(args, setting) if args.child else compare(names, args, setting, ranks, budget)
    finally:
        ranks.close()


def compare(names: list[str], args: argparse.Namespace, setting: Setting, ranks: Ranks, budget: Budget) -> int:
    """Check, time, print, write. On a GPU the compiled plain variant may take minutes to compile, so the others are written
    first; then everything is timed again, with it.
    """
    compute = setting.compute
    each = f"{args.micro_batch} x {args.length} tokens a step" + (f" and rank, {ranks.count} ranks" if ranks.count > 1 else "")
    ranks.say(f"{compute.describe()}; preset {args.preset}, V={args.vocabulary:,}, {each}")
    late = compute.device.type == "cuda" and COMPILED in names and names != [COMPILED]
    variants, reasons, worst = build_all([n for n in names if n != COMPILED or not late], args, setting, ranks, budget)
    ranks.say(f"checked: on one batch, losses and gradients agree to {worst:.1e}")
    if not variants:
        raise UsageError("none of these variants can run: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    folder = args.out or results_folder(compute.device)
    stem = f"throughput-{args.preset}-{args.vocabulary}-{args.micro_batch}" + (f"-{ranks.count}-ranks" if ranks.count > 1 else "")
    record = timed(variants, reasons, worst, args, setting, ranks, budget)
    if late:
        finish(record, args, ranks, budget, folder, stem)
        compiled, reason = build(COMPILED, setting)
        if compiled is None:
            reasons[COMPILED] = reason
        else:
            variants = {name: compiled if name == COMPILED else variants[name] for name in names if name not in reasons}
        record = timed(variants, reasons, worst, args, setting, ranks, budget)
    if args.profile and ranks.rank == 0:
        from profiling import profile

        known = devices.find(record["environment"], RESULTS)
        record["profile"] = {name: profile(v, folder / f"{stem}-{name}.trace.json.gz", known) for name, v in variants.items()}
    if args.sampling and ranks.rank == 0:
        from bench_sampling import time_samplers

        ours = next((v for name, v in variants.items() if name not in MDLM), None) or Variant(OURS, setting)
        record["sampling"] = time_samplers(
            ours.model, compute, batch=2 if compute.device.type == "cpu" else 16, budget=budget.left
        )
    del variants
    finish(record, args, ranks, budget, folder, stem)
    return 0


def timed(
    variants: dict[str, Variant],
    reasons: dict[str, str],
    worst: float,
    args: argparse.Namespace,
    setting: Setting,
    ranks: Ranks,
    budget: Budget,
) -> dict[str, Any]:
    """The figures of interleaved rounds, with ratios to the plain variants."""
    compute = setting.compute
    seconds, joules = rounds(variants, args, ranks, EnergyMeter(compute.device), budget)
    facts = environment(compute) | {"load_average": os.getloadavg()[0]}
    known = devices.find(facts, RESULTS)
    peak = None if known is None or (compute.device.type == "cuda" and compute.dtype is not torch.bfloat16) else known.flops
    results = {}
    for name, variant in variants.items():
        parts = variant.parts(1 if compute.device.type == "cpu" else 5)
        results[name] = summary(variant, seconds[name], joules[name], parts, peak) | {"memory": variant.memory}
    for r in results.values():
        for key, base in (("ratio", PLAIN), ("ratio_compiled", COMPILED)):
            r[key] = r["tokens_per_second"] / results[base]["tokens_per_second"] if base in results else None
    return {
        "benchmark": "throughput",
        "settings": {k: getattr(args, k) for k in ("preset", "vocabulary", "micro_batch", "steps", "length")}
        | {"rounds": len(next(iter(seconds.values()))), "ranks": ranks.count},
        "agreement": worst, "results": results, "missing": dict(reasons), "environment": facts,
    }  # fmt: skip


def finish(record: dict[str, Any], args: argparse.Namespace, ranks: Ranks, budget: Budget, folder: Path, stem: str) -> None:
    """Fill in the memory, print and write."""
    known = {name: r.pop("memory") for name, r in record["results"].items()}
    if ranks.count == 1:
        memory(record["results"], known, args, budget, record)
    if ranks.rank == 0:
        print("\n".join(table(record)))
        write(record, folder, stem)


def memory(
    results: dict[str, Any],
    known: dict[str, dict[str, int] | None],
    args: argparse.Namespace,
    budget: Budget,
    record: dict[str, Any],
) -> None:
    """Fill in the memory of a step if it is not known, and with --largest the largest micro-batch, from separate processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    record["largest_micro_batch"] = {}
    for name, r in sorted(results.items(), key=lambda item: item[0] == COMPILED):
        enough = budget.allows(CHILD_SECONDS + 3 * r["step_seconds"])
        found = known[name] or (child("memory", name, args, max(budget.left, 1.0)) if enough else None)
        r["step_memory_bytes"], r["peak_memory_bytes"] = (found["step"], found["peak"]) if found else (None, None)
        if args.largest and record["environment"]["device"].startswith("CPU"):
            record["largest_micro_batch"] = "not measured on a CPU"
        elif args.largest:
            record["largest_micro_batch"][name] = child("largest", name, args, LARGEST_SECONDS)


def table(record: dict[str, Any]) -> list[str]:
    """The results as lines: rates, then where a step's time goes."""
    results, reasons = record["results"], record["missing"]

    def mib(size: int | None) -> str:
        return "-" if size is None else f"{size / (1 << 20):,.0f} MiB"

    def of(value: float | None, text: str) -> str:
        return "-" if value is None else format(value, text)

    lines = [
        f"{'variant':<16}{'tokens/s':>10}{'quartiles':>18}{'x mdlm':>8}{'x compiled':>11}{'a step adds':>13}{'peak':>12}"
        f"{'MFU all':>9}{'hidden':>8}{'W':>6}{'J/Mtok':>9}{'loss':>8}"
    ]
    for name in VARIANTS:
        if name in reasons:
            lines.append(f"{name:<16}{reasons[name]}")
        elif name in results:
            r = results[name]
            lines.append(
                f"{name:<16}{r['tokens_per_second']:>10,.0f}{r['low']:>9,.0f} -{r['high']:>7,.0f}{of(r['ratio'], '.2f'):>8}"
                f"{of(r['ratio_compiled'], '.2f'):>11}{mib(r.get('step_memory_bytes')):>13}{mib(r.get('peak_memory_bytes')):>12}"
                f"{of(r['mfu_all_rows'], '.1%'):>9}{of(r['mfu_hidden_rows'], '.1%'):>8}{of(r['watts'], '.0f'):>6}"
                f"{of(r['joules_per_million_tokens'], ',.0f'):>9}{r['mean_loss']:>8.3f}"
            )
    lines += ["", f"{'ms of a step':<16}" + "".join(f"{part:>10}" for part in PARTS) + f"{'sum':>10}{'step':>10}"]
    for name, r in results.items():
        total, step = sum(r["parts"].values()), r["step_seconds"]
        off = "" if abs(total / step - 1) <= 0.1 else f"   steps with timed parts took {total / step:.2f} of a plain one"
        lines.append(
            f"{name:<16}"
            + "".join(f"{r['parts'][part] * 1e3:>10.1f}" for part in PARTS)
            + f"{total * 1e3:>10.1f}{step * 1e3:>10.1f}{off}"
        )
    if record.get("largest_micro_batch"):
        lines += ["", "largest micro-batch: " + largest_text(record["largest_micro_batch"])]
    for name, kept in record.get("profile", {}).items():
        from profiling import op_table

        lines += ["", *op_table(name, kept)]
    if "sampling" in record:
        from bench_sampling import table as sampling_table

        lines += ["", *sampling_table(record["sampling"])]
    return lines


def largest_text(found: Any) -> str:
    """`atat_fast 64, mdlm at least 16`."""
    if isinstance(found, str):
        return found
    say = {None: "unknown"}
    return ", ".join(
        f"{name} {say[None] if x is None else ('' if x['full'] else 'at least ') + str(x['micro_batch'])}"
        for name, x in found.items()
    )


def write(record: dict[str, Any], folder: Path, stem: str) -> None:
    """The JSON and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    from report_pictures import throughput_png

    picture = path.with_suffix(".png")
    picture.write_bytes(throughput_png(record))
    print(f"written to {path} and {picture.name}")


def main() -> int:
    """The script: 0, or 2 on bad input."""
    args = arguments().parse_args()
    try:
        return measure(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
