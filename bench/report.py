"""Redraw what the README and the docs say from the files in bench/results.

    python bench/report.py                      rewrite the tables and pictures
    python bench/report.py --check              exit 1 where a table is not what the files give
    python bench/report.py --record runs/demo   first keep a run's settings, facts and metrics under bench/results
    python bench/report.py --record_compare compare/demo   first keep what a comparison of recipes found there

Tables stand between <!-- NAME --> and <!-- /NAME --> in their document. A table for a device appears when its files do.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from atat_fast.diffusion import audit
from atat_fast.errors import UsageError
from atat_fast.training.figures import compact, duration, measured, overview_png
from atat_fast.training.run_reader import Run, curves_of, read_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README, DOCS = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs"
COMPARED = DOCS / "atat.md"
IMAGES = DOCS / "images"
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl")


def throughput_table(results: Path) -> str:
    """Tokens a second of every recorded throughput run."""
    lines = [
        "| device | model | variant | tokens/s (quartiles) | against plain MDLM | memory of a step |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("*/throughput-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        facts, s = record["environment"], record["settings"]
        device = f"{facts['device']}, {facts['dtype']}"
        model = f"{s['preset']}, V={s['vocabulary']:,}, {s['micro_batch']} x {s['length']}"
        for name, r in record["results"].items():
            rate = f"{r['tokens_per_second']:,.0f} ({r['low']:,.0f} to {r['high']:,.0f})"
            memory = "unknown" if r["step_memory_bytes"] is None else f"{r['step_memory_bytes'] / (1 << 20):,.0f} MiB"
            lines.append(f"| {device} | {model} | {name} | {rate} | {r['ratio']:.2f}x | {memory} |")
            device = model = ""
    return "\n".join(lines)


def demo_table(run: Run) -> str:
    """What `make train` ended with."""
    last, facts = run.evals[-1], run.facts
    gain = last["unigram_entropy"] - last["nll"]
    rows = {
        "held-out bound (val/nll)": f"**{last['nll']:.3f} ± {last['nll_se']:.3f}** nats a token",
        "unigram entropy of that text": f"{last['unigram_entropy']:.3f} nats a token; the bound is {gain:.2f} below it",
        "bits per byte": f"{last['bits_per_byte']:.3f}",
        "seen in training": f"{compact(run.train[-1]['tokens'])} tokens in {duration(run.train[-1]['seconds'])}",
        "model": f"{facts['parameters']['total']:,} parameters",
        "on": f"{facts['device']}, {facts['cpu_threads']} threads, {facts['dtype']}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def compare_table(results: Path) -> str:
    """Recipes at equal cost, every device: the bound with its standard error, and paired differences from the first."""
    lines: list[str] = []
    for path in sorted(results.glob("*/compare.json")):
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


def head_table(results: Path) -> str:
    """linear_cross_entropy beside its peers, every device and shape."""
    lines = [
        "| device | shape | way | ms (quartiles) | against plain MDLM | over three bare products | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("*/linear_cross_entropy.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        facts, before = record["environment"], None
        device = f"{facts['device']}, {facts['dtype']}"
        for r in record["results"]:
            s = r["shape"]
            shape = f"N={s['n']:,}, D={s['d']}, V={s['v']:,}, {s['hidden']:.0%} hidden"
            memory = "" if r["memory_bytes"] is None else f"{r['memory_bytes'] / (1 << 20):,.0f} MiB"
            lines.append(
                f"| {device} | {'' if shape == before else shape} | {r['way']} "
                f"| {r['median_ms']:,.0f} ({r['low_ms']:,.0f} to {r['high_ms']:,.0f}) | {r['speedup_over_mdlm']:.2f}x "
                f"| {r['over_three_products']:.2f}x | {memory} |"
            )
            device, before = "", shape
    return "\n".join(lines)


def head_memory_png(results: Path) -> bytes | None:
    """Memory of one head call against the vocabulary, from the first device that has it; None without one."""
    from matplotlib.figure import Figure

    for path in sorted(results.glob("*/linear_cross_entropy.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.get("memory_by_vocabulary")
        if not found:
            continue
        figure = Figure(figsize=(6.4, 3.4), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        for name, sizes in found["bytes"].items():
            axes.plot(found["v"], [size / (1 << 20) for size in sizes], marker="o", markersize=3.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(found["v"], [f"{v:,}" for v in found["v"]])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("vocabulary")
        axes.set_ylabel("MiB a call adds, forward and backward")
        facts = record["environment"]
        axes.set_title(f"N={found['n']:,}, D={found['d']}, half hidden; {facts['device']}, {facts['dtype']}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, metadata={"Software": None})
        return picture.getvalue()
    return None


def tables() -> dict[Path, dict[str, str]]:
    """Every generated table by its document and its name there."""
    readme: dict[str, str] = {"throughput": throughput_table(RESULTS)}
    if (RESULTS / "cpu" / "demo" / "metrics.jsonl").is_file():
        readme["demo"] = demo_table(read_run(RESULTS / "cpu" / "demo"))
    atat = {"audit": audit.table()}
    if any(RESULTS.glob("*/compare.json")):
        atat["compare"] = compare_table(RESULTS)
    head = {"linear_cross_entropy": head_table(RESULTS)}
    return {README: readme, DOCS / "ops" / "linear_cross_entropy.md": head, COMPARED: atat}


def rewrite(text: str, generated: dict[str, str], name_of_document: str = "README.md") -> str:
    """`text` with each generated table in its place. Raises UsageError where a place is missing."""
    for name, table in generated.items():
        place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(place, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, count=1, flags=re.DOTALL)
        if not count:
            raise UsageError(f"{name_of_document} has no <!-- {name} --> ... <!-- /{name} --> to write the table into")
    return text


def record(folder: Path) -> None:
    """Keep what a run's pictures and tables are made from; home folders and the like are not part of it."""
    read_run(folder)
    kept = RESULTS / "cpu" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        shutil.copyfile(folder / name, kept / name)


def record_compare(folder: Path) -> Path:
    """Keep a comparison's compare.json and curves under its device's name. Raises UsageError where there is none."""
    path = folder / "compare.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["environment"]["device"]
        whole = found["benchmark"] == "compare" and found["results"] and found["differences"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(
            f"{folder} holds no compare.json of a finished comparison; give the --out of python -m atat_fast.compare"
        )
    kept = RESULTS / ("cpu" if device.startswith("CPU") else device.lower().replace(" ", "-"))
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kept / "compare.json")
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "curves.png", IMAGES / f"compare-{kept.name}.png")
    return kept / "compare.json"


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a document is out of step")
    parser.add_argument("--record", type=Path, help="a run folder of the demo preset to keep")
    parser.add_argument("--record_compare", type=Path, help="a folder of python -m atat_fast.compare to keep")
    args: Any = parser.parse_args(arguments)
    try:
        if args.record:
            record(args.record)
        if args.record_compare:
            record_compare(args.record_compare)
        stale = []
        for document, generated in tables().items():
            before = document.read_text(encoding="utf-8")
            after = rewrite(before, generated, document.name)
            if before != after:
                stale.append(document)
                if not args.check:
                    document.write_text(after, encoding="utf-8")
        if args.check:
            for document in stale:
                print(f"{document.name} is out of step with bench/results; run python bench/report.py", file=sys.stderr)
            return int(bool(stale))
        IMAGES.mkdir(parents=True, exist_ok=True)
        demo = RESULTS / "cpu" / "demo"
        if demo.is_dir():
            (IMAGES / "demo.png").write_bytes(overview_png(curves_of(read_run(demo))))
        if (picture := head_memory_png(RESULTS)) is not None:
            (IMAGES / "linear_cross_entropy_memory.png").write_bytes(picture)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
