"""Write the tables and pictures of the README and docs from the files in bench/results.

    python bench/report.py                      rewrite the tables and pictures
    python bench/report.py --check              exit 1 if a table or picture is not what the files give
    python bench/report.py --record runs/demo   first copy a run's settings, facts and metrics to bench/results
    python bench/report.py --record_compare compare/demo   first copy a comparison of recipes there

A table is between <!-- NAME --> and <!-- /NAME --> in its document, and has rows for the devices that have files.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

import report_pictures
import report_tables

from atat_fast.audit import blocks as audit_blocks
from atat_fast.audit import masks as audit
from atat_fast.audit import schedules as audit_schedules
from atat_fast.errors import UsageError
from atat_fast.runs.figures import compact, duration, overview_png
from atat_fast.runs.reader import Run, curves_of, read_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README, DOCS = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs"
COMPARED = DOCS / "atat.md"
IMAGES = DOCS / "images"
NOTHING = "Nothing is recorded yet."
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl")


def demo_table(run: Run) -> str:
    """The final figures of `make train`."""
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


def tables() -> dict[Path, dict[str, str]]:
    """Every generated table by its document and its name there."""
    readme: dict[str, str] = {"throughput": report_tables.throughput(RESULTS)}
    if (RESULTS / "cpu" / "demo" / "metrics.jsonl").is_file():
        readme["demo"] = demo_table(read_run(RESULTS / "cpu" / "demo"))
    atat = {
        "audit": audit.table(),
        "audit_blind": audit.blind_table(),
        "audit_counts": audit_schedules.counts_table(),
        "audit_identity": audit_schedules.identity_table(),
    }
    for name, preset in (("compare", "plain"), ("compare_demo", "demo")):
        if any(RESULTS.glob(f"*/compare-{preset}-*.json")):
            atat[name] = report_tables.compare(RESULTS, preset)
    return {
        README: readme,
        DOCS / "ops" / "linear_cross_entropy.md": {"linear_cross_entropy": report_tables.head(RESULTS)},
        COMPARED: atat,
        DOCS / "blocks.md": {
            "compare_blocks": report_tables.compare(RESULTS, "demo", "blocks") or NOTHING,
            "audit_blocks": audit_blocks.block_table(),
            "blocks": report_tables.blocks(RESULTS) or NOTHING,
        },
        DOCS / "accelerate.md": {"accelerate": report_tables.accelerate(RESULTS) or NOTHING},
        DOCS / "distributed.md": {name: table(RESULTS) or NOTHING for name, table in report_tables.DISTRIBUTED.items()},
        DOCS / "benchmarks.md": {name: table(RESULTS) or NOTHING for name, table in report_tables.DOCUMENT.items()},
    }


def pictures() -> dict[str, bytes]:
    """Every picture that has files, by its name in docs/images."""
    demo, drawn = RESULTS / "cpu" / "demo", {}
    if demo.is_dir():
        drawn["demo.png"] = overview_png(curves_of(read_run(demo)))
    for name, draw in report_pictures.DOCUMENT.items():
        picture = draw(RESULTS)
        if picture is not None:
            drawn[name] = picture
    return drawn


def rewrite(text: str, generated: dict[str, str], name_of_document: str = "README.md") -> str:
    """`text` with each generated table in its place. Raises UsageError if a place is missing."""
    for name, table in generated.items():
        place = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(place, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, count=1, flags=re.DOTALL)
        if not count:
            raise UsageError(f"{name_of_document} has no <!-- {name} --> ... <!-- /{name} --> to write the table into")
    return text


def record(folder: Path) -> None:
    """Copy the files of a run from which its pictures and tables are made; none holds paths of this machine."""
    read_run(folder)
    kept = RESULTS / "cpu" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        shutil.copyfile(folder / name, kept / name)


def record_compare(folder: Path, called: str = "") -> Path:
    """Copy a comparison's compare.json and curves under its device, preset and budget, and what it is called; a new one replaces
    the one of that name. Of a corpus that is a path, its last part is kept. Raises UsageError if the folder has none.
    """
    path = folder / "compare.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        device = found["environment"]["device"]
        whole = found["benchmark"] == "compare" and found["results"] and found["differences"] is not None
        kind, amount = found["settings"]["budget"].split("=")
        preset = found["settings"]["preset"]
        name = "-".join(["compare", preset, kind, f"{float(amount):.12g}", *([called] if called else [])])
        found["settings"]["corpus"] = Path(found["settings"]["corpus"]).name
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(
            f"{folder} holds no compare.json of a finished comparison; give the --out of python -m atat_fast.compare"
        )
    kept = RESULTS / ("cpu" if device.startswith("CPU") else device.lower().replace(" ", "-"))
    kept.mkdir(parents=True, exist_ok=True)
    (kept / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "curves.png", IMAGES / f"{kept.name}-{name}.png")
    return kept / f"{name}.json"


def main(arguments: list[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is out of step")
    parser.add_argument("--record", type=Path, help="a run folder of the demo preset to keep")
    parser.add_argument("--record_compare", type=Path, help="a folder of python -m atat_fast.compare to keep")
    parser.add_argument("--called", default="", help="a word in the kept name of --record_compare, beside its preset and budget")
    args: Any = parser.parse_args(arguments)
    try:
        if args.record:
            record(args.record)
        if args.record_compare:
            record_compare(args.record_compare, args.called)
        stale = []
        for document, generated in tables().items():
            before = document.read_text(encoding="utf-8")
            after = rewrite(before, generated, document.name)
            if before != after:
                stale.append(document)
                if not args.check:
                    document.write_text(after, encoding="utf-8")
        if args.check:
            absent = [IMAGES / name for name in pictures() if not (IMAGES / name).is_file()]
            for path in absent:
                print(f"{path.name} is not in docs/images; run python bench/report.py", file=sys.stderr)
            for document in stale:
                print(f"{document.name} is out of step with bench/results; run python bench/report.py", file=sys.stderr)
            return int(bool(stale or absent))
        IMAGES.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures().items():
            (IMAGES / name).write_bytes(picture)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
