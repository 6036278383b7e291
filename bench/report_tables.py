"""Markdown tables of benchmark results. Each function takes the folder of results and returns a table, or '' without files.

Files are in bench/results/<device>/; the top of bench/compare.py describes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from atat_fast.runs.figures import compact, duration, measured

MIB = 1 << 20
ELSEWHERE = ("-blocks",)
"""Ends of names of comparisons that have a page of their own."""


def records(results: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(device and dtype, record) of every file of that name (a glob), in the order of folders."""
    for path in sorted(results.glob(f"*/{name}.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        facts = record["environment"]
        yield f"{facts['device']}, {facts['dtype']}", record


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. A leading cell is empty if it equals the one above."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    before: Sequence[str] = ()
    for row in rows:
        same = 0
        while before and same < min(2, len(row)) and row[same] == before[same]:
            same += 1
        lines.append("| " + " | ".join(["", *[""] * (same - 1), *row[same:]] if same else row) + " |")
        before = row
    return "\n".join(lines) if rows else ""


def rate(r: dict[str, Any]) -> str:
    """'1,198 (1,128 to 1,257)' tokens a second."""
    return f"{r['tokens_per_second']:,.0f} ({r['low']:,.0f} to {r['high']:,.0f})"


def or_dash(value: float | None, text: str, unit: str = "") -> str:
    """The value in that format, or a dash."""
    return "-" if value is None else format(value, text) + unit


def model_of(s: dict[str, Any]) -> str:
    """'tiny, V=30,522, 8 x 256'."""
    return f"{s['preset']}, V={s['vocabulary']:,}, {s['micro_batch']} x {s['length']}" + (
        f", {s['ranks']} ranks" if s.get("ranks", 1) > 1 else ""
    )


def compare(results: Path, preset: str, called: str = "") -> str:
    """Recipes over a preset at equal cost, every device: the bound with its error, and paired differences from the first.

    called: only comparisons kept under this word; without it all but those that another page shows.
    """
    lines: list[str] = []
    for path in sorted(results.glob(f"*/compare-{preset}-*.json")):
        if not path.stem.endswith(f"-{called}") if called else path.stem.endswith(ELSEWHERE):
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        facts, s, first = found["environment"], found["settings"], found["results"][0]["recipe"]
        differences = {d["minus"]: d for d in found["differences"] if d["of"] == first}
        kind, amount = s["budget"].split("=")
        cost = f"{compact(float(amount))} tokens" if kind == "tokens" else f"{amount} min of training"
        what = f"Preset {s['preset']} on {s['corpus']}, {cost} a run, {s['seeds']} seeds; {facts['device']}, {facts['dtype']}."
        lines += [*([""] if lines else []), what, ""]
        lines += [
            f"| recipe | steps | tokens | training | val/nll | bits per byte | below {first} | better in | as low after |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in found["results"]:
            name, d = r["recipe"], differences.get(r["recipe"])
            row = [name, f"{r['steps']:,}", compact(r["tokens"]), duration(r["train_seconds"])]
            if r.get("nll") is None:
                lines.append(f"| {' | '.join(row)} | diverged | | | | |")
                continue
            share = r["share_of_first"]
            as_low = (
                "" if d is None else "never" if share is None else f"{share:.0%} of its {'time' if kind == 'minutes' else kind}"
            )
            row += [measured(r["nll"], r["nll_se"]), f"{r['bits_per_byte']:.3f}"]
            row += [
                "" if d is None else measured(d["difference"], d["se"]),
                "" if d is None else f"{d['better']} of {s['seeds']}",
            ]
            lines.append(f"| {' | '.join([*row, as_low])} |")
        if found.get("masks"):
            lines += ["", "| masks | se of an estimate | over MDLM's | over independent |", "|---|---|---|---|"]
            for r in found["masks"]:
                ratios = f"{r['of_mdlm']:.2f}x | {r['of_independent']:.2f}x"
                lines.append(f"| {r['masks']}: {r['what']} | {r['se']:.4f} | {ratios} |")
    return "\n".join(lines)


def throughput(results: Path) -> str:
    """The README's columns of every throughput run."""
    rows = []
    for device, record in records(results, "throughput-*"):
        for name, r in record["results"].items():
            size = r.get("step_memory_bytes")
            rows.append([
                device, model_of(record["settings"]), name, rate(r), or_dash(r["ratio"], ".2f", "x"),
                or_dash(r.get("ratio_compiled"), ".2f", "x"), "unknown" if size is None else f"{size / MIB:,.0f} MiB",
            ])  # fmt: skip
    heads = (
        "device",
        "model",
        "variant",
        "tokens/s (quartiles)",
        "against plain MDLM",
        "against it compiled",
        "memory of a step",
    )
    return markdown(heads, rows)


def throughput_details(results: Path) -> str:
    """More columns of every throughput run: memory, utilisation, energy, losses, and why a variant is missing."""
    heads = (
        "device",
        "model",
        "variant",
        "peak memory",
        "largest micro-batch",
        "MFU, all rows",
        "hidden rows",
        "W",
        "J per M tokens",
        "mean loss",
    )
    rows = []
    for device, record in records(results, "throughput-*"):
        largest = record.get("largest_micro_batch") or {}
        for name, r in record["results"].items():
            peak = r.get("peak_memory_bytes")
            found = largest.get(name) if isinstance(largest, dict) else None
            rows.append([
                device, model_of(record["settings"]), name, "-" if peak is None else f"{peak / MIB:,.0f} MiB",
                "-" if found is None else ("" if found["full"] else "at least ") + str(found["micro_batch"]),
                or_dash(r.get("mfu_all_rows"), ".1%"), or_dash(r.get("mfu_hidden_rows"), ".1%"), or_dash(r.get("watts"), ".0f"),
                or_dash(r.get("joules_per_million_tokens"), ",.0f"), f"{r['mean_loss']:.3f}",
            ])  # fmt: skip
        for name, reason in record.get("missing", {}).items():
            rows.append([device, model_of(record["settings"]), name, reason, *["-"] * 6])
    return markdown(heads, rows)


def step_parts(results: Path) -> str:
    """Milliseconds of a step by part, for the runs that measured parts."""
    rows, names = [], ()
    for device, record in records(results, "throughput-*"):
        for name, r in record["results"].items():
            if "parts" in r:
                names = tuple(r["parts"])
                total = sum(r["parts"].values())
                rows.append(
                    [
                        device,
                        model_of(record["settings"]),
                        name,
                        *(f"{x * 1e3:,.1f}" for x in r["parts"].values()),
                        f"{total * 1e3:,.1f}",
                        f"{r['step_seconds'] * 1e3:,.1f}",
                    ]
                )
    return markdown(("device", "model", "variant", *names, "sum", "a timed step"), rows)


def profile(results: Path) -> str:
    """Where a profiled step's time went, by group of ops."""
    rows = []
    for device, record in records(results, "throughput-*"):
        for name, kept in record.get("profile", {}).items():
            for group, g in kept["groups"].items():
                rows.append(
                    [
                        device,
                        name,
                        group,
                        f"{g['seconds'] * 1e3:,.1f}",
                        f"{g['seconds'] / kept['step_seconds']:.1%}",
                        or_dash(g["flops"] and g["flops"] / 1e9, ",.1f"),
                        or_dash(g["bytes"] and g["bytes"] / 1e6, ",.1f"),
                        or_dash(g["share_of_roofline"], ".0%"),
                    ]
                )
    return markdown(("device", "variant", "op", "ms", "share", "GFLOP", "MB", "of the roofline"), rows)


def sampling(results: Path) -> str:
    """Samplers' tokens a second, from bench/bench_sampling.py and from throughput runs with --sampling."""
    rows = []
    found = [(d, r["settings"] | case) for d, r in records(results, "sampling") for case in r["results"]]
    found += [(d, r["settings"] | r["sampling"]) for d, r in records(results, "throughput-*") if "sampling" in r]
    for device, s in found:
        what = f"{s['preset']}, V={s['vocabulary']:,}, {s['batch']} x {s['length']:,} in {s['denoising_steps']:,} steps"
        for way, r in s["results"].items():
            note = f", extrapolated from {r['timed_steps']} steps" if "timed_steps" in r else ""
            rows.append([device, what, way + note, rate(r), or_dash(r["ratio"], ".2f", "x")])
    return markdown(("device", "model", "way", "tokens/s (quartiles)", "against the plain loop"), rows)


def head(results: Path) -> str:
    """linear_cross_entropy beside its peers, every device and shape."""
    rows = []
    for device, record in records(results, "linear_cross_entropy"):
        for r in record["results"]:
            s, size = r["shape"], r["memory_bytes"]
            rows.append([
                device, f"N={s['n']:,}, D={s['d']}, V={s['v']:,}, {s['hidden']:.0%} hidden", r["way"],
                _milliseconds(r), or_dash(r["speedup_over_mdlm"], ".2f", "x"),
                f"{r['over_three_products']:.2f}x", "" if size is None else f"{size / MIB:,.0f} MiB",
            ])  # fmt: skip
    heads = ("device", "shape", "way", "ms (quartiles)", "against plain MDLM", "over three bare products", "memory")
    return markdown(heads, rows)


def _milliseconds(r: dict[str, Any]) -> str:
    digits = ",.0f" if r["median_ms"] >= 100 else ",.2f"
    return f"{r['median_ms']:{digits}} ({r['low_ms']:{digits}} to {r['high_ms']:{digits}})"


def head_sweep(results: Path) -> str:
    """The head by backend and size of slab, from bench/head.py."""
    rows = []
    for device, record in records(results, "head"):
        s = record["settings"]
        for r in record["results"]:
            rows.append([
                device, f"R={r['rows']:,}, D={s['width']}, V={s['vocabulary']:,}", r["way"], f"{r['budget_mb']:,}",
                _milliseconds(r), f"{r['tflops']:,.0f}", f"{r['over_best_products']:.2f}x",
            ])  # fmt: skip
    heads = ("device", "shape", "way", "slab, MB", "ms (quartiles)", "TFLOP/s", "over the best three products")
    return markdown(heads, rows)


def ceilings(results: Path) -> str:
    """The best rates of devices."""
    rows = []
    for device, record in records(results, "ceilings"):
        for r in record["results"]:
            product = r["kind"] == "product"
            rate = f"{r['rate'] / 1e12:,.1f} TFLOP/s" if product else f"{r['rate'] / 1e9:,.0f} GB/s read and written"
            rows.append([device, f"{r['kind']}, {r['dtype']}", " x ".join(f"{n:,}" for n in r["shape"]), rate])
    return markdown(("device", "what", "shape", "fastest round"), rows)


def _microseconds(r: dict[str, Any]) -> str:
    return f"{r['median_us']:,.1f} ({r['low_us']:,.1f} to {r['high_us']:,.1f})"


def _op(name: str, heads: tuple[str, ...], cells: Callable[[dict[str, Any]], list[str]]) -> Callable[[Path], str]:
    """The table of an op whose rows have median_us: device, shape, then `cells` of a row."""

    def table(results: Path) -> str:
        rows = []
        for device, record in records(results, name):
            for r in record["results"]:
                rows.append([device, " x ".join(f"{n:,}" for n in r["shape"]), *cells(r)])
        return markdown(("device", "shape", *heads), rows)

    table.__doc__ = f"{name}, every device, shape and way."
    return table


def _bandwidth(r: dict[str, Any]) -> str:
    return f"{r['bytes'] / r['median_us'] / 1e3:,.2f}"


masking = _op(
    "masking",
    ("way", "us (quartiles)", "GB/s", "against eager"),
    lambda r: [r["way"], _microseconds(r), _bandwidth(r), or_dash(r["speedup_over_eager"], ".2f", "x")],
)
adaptive_norm = _op(
    "adaptive_norm",
    ("op", "direction", "cache", "way", "us (quartiles)", "GB/s", "against eager"),
    lambda r: [
        r["op"],
        r["direction"],
        r["cache"],
        r["way"],
        _microseconds(r),
        _bandwidth(r),
        or_dash(r["speedup_over_eager"], ".2f", "x"),
    ],
)
linear_categorical = _op(
    "linear_categorical",
    ("way", "us (quartiles)", "GFLOP/s", "against fp64 Gumbel"),
    lambda r: [
        r["way"],
        _microseconds(r),
        f"{r['flops'] / r['median_us'] / 1e3:,.1f}",
        or_dash(r["speedup_over_eager"], ".2f", "x"),
    ],
)
rotary = _op(
    "rotary",
    ("kind", "way", "us (quartiles)", "GB/s", "against eager"),
    lambda r: [r["kind"], r["way"], _microseconds(r), _bandwidth(r), or_dash(r["speedup_over_eager"], ".2f", "x")],
)
attention = _op(
    "attention",
    ("documents", "kind", "implementation", "us (quartiles)", "GFLOP/s", "over the direct call"),
    lambda r: [
        "kept apart" if r["documents"] else "-",
        r["kind"],
        r["name"],
        _microseconds(r),
        f"{r['flops'] / r['median_us'] / 1e3:,.1f}",
        or_dash(r.get("over_direct"), ".3f", "x"),
    ],
)


def block(results: Path) -> str:
    """One block, forward and backward."""
    rows = []
    for device, record in records(results, "block"):
        s = record["settings"]
        for name, r in record["results"].items():
            rows.append(
                [
                    device,
                    f"{s['batch']} x {s['length']} x {s['dim']}",
                    name,
                    f"{r['ms']:,.2f} ({r['low']:,.2f} to {r['high']:,.2f})",
                    f"{r['ratio']:.2f}x",
                ]
            )
    return markdown(("device", "shape", "variant", "ms (quartiles)", "against plain MDLM"), rows)


def scaling_measured(results: Path) -> str:
    """The trainer on several ranks of one machine, and what a sum in bf16 costs."""
    rows, sentences = [], []
    for device, record in records(results, "scaling"):
        cores = record["settings"]["cores"]
        for r in record["results"]:
            sent = ", ".join(f"{count / 1e6:.2f} {kind}" for kind, count in r["sent"].items())
            share = sum(r["sent"].values()) / (sum(r["formula"].values()) or 1.0)
            rows.append([
                f"{device}, {cores} cores", record["settings"]["preset"], str(r["ranks"]), r["mode"], f"{r['step_ms']:,.0f}",
                f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f}x", f"{r['loss_difference']:.0e}",
                f"{sent} ({share:.1%})" if sent else "",
            ])  # fmt: skip
        sums = record["sums"]
        sentences.append(
            f"A gradient of {record['settings']['preset']} summed over {sums['ranks']} ranks in bf16 is wrong by "
            f"{sums['error']['bf16']:.1e} of its size, in fp32 by {sums['error']['fp32']:.0e}; the gradients of a batch's two "
            f"halves are {sums['halves_apart']:.2f} apart."
        )
    heads = ("device", "model", "ranks", "mode", "ms a step", "tokens/s of all", "against one", "losses within")
    table = markdown((*heads, "MB sent by a rank in a step (of the formula)"), rows)
    return "\n\n".join([table, *sentences])


def projected_six(results: Path) -> str:
    """Six RTX 4090, projected (bench/project.py --six)."""
    path = results / "projected-six-rtx4090.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            r["what"], f"{r['memory_bytes'] / (1 << 30):.1f}", f"{r['wire_bytes'] / 1e9:.2f}", f"{r['seconds']:.3f}",
            f"{r['waiting_seconds'] / r['seconds']:.0%}", f"{r['tokens_per_second']:,.0f}", f"{r['minutes']:.0f}",
        ]
        for r in record["six"]
    ]  # fmt: skip
    heads = ("six RTX 4090, preset small", "GiB a card", "GB sent a step", "s a step", "of that waiting", "tokens/s", "minutes")
    return "\n".join([markdown(heads, rows), "", f"In a sentence: {record['verdict']}."])


def accelerate(results: Path) -> str:
    """Training steps of transformers' models before and after accelerate, and their heads alone."""
    rows = []
    for device, record in records(results, "accelerate"):
        by = {(r["model"], r["part"], r["way"]): r for r in record["results"]}
        for (model, part, way), r in by.items():
            own = by[model, part, "transformers"]
            what = f"{model}, V={r['vocabulary']:,}, {r['batch']} x {r['length']}, {r['share']:.0%} hidden"
            ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
            rows.append(
                [
                    device,
                    what,
                    part,
                    way,
                    f"{r['ms']:,.0f} ms",
                    ratio,
                    f"{r['bytes'] / MIB:,.0f} MiB",
                    f"{own['bytes'] / r['bytes']:.1f}",
                ]
            )
    return markdown(["device", "model", "part", "way", "time", "times as fast", "memory added", "times less"], rows)


def blocks(results: Path) -> str:
    """Tokens a second of block diffusion, with its cache and without."""
    rows = []
    for device, record in records(results, "blocks"):
        s = record["settings"]
        what = f"{s['preset']}, V={s['vocabulary']:,}, 1 x {s['length']:,}, blocks of {s['block']} in {s['steps']} steps"
        for r in record["results"]:
            ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
            rows.append([device, what, r["way"], rate(r), ratio])
    return markdown(["device", "text", "way", "tokens/s (quartiles)", "against uncached"], rows)


DISTRIBUTED: dict[str, Callable[[Path], str]] = {"scaling-measured": scaling_measured, "projected-six": projected_six}
"""Tables of docs/distributed.md by their names there."""

DOCUMENT: dict[str, Callable[[Path], str]] = {
    "throughput": throughput, "throughput-details": throughput_details, "step-parts": step_parts, "profile": profile,
    "sampling": sampling, "block": block, "linear_cross_entropy": head, "adaptive_norm": adaptive_norm, "rotary": rotary,
    "attention": attention, "masking": masking, "linear_categorical": linear_categorical, "head": head_sweep,
    "ceilings": ceilings,
}  # fmt: skip
"""Tables of docs/benchmarks.md by their names there."""
