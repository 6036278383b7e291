"""Results of a comparison: paired differences, a table, curves, and one JSON file with every seed's numbers."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atat_fast.comparison.mask_variance import WAYS, MaskError
from atat_fast.comparison.paired import mean_over_seeds, share_to_match
from atat_fast.comparison.run import Plan
from atat_fast.diffusion.bound import evaluation_strata
from atat_fast.files import disk_errors, write_text
from atat_fast.runs.figures import LIGHT, STYLE, compact, duration, measured

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, in the order of the recipes."""

Results = dict[str, list[dict[str, Any]]]


def summary(plan: Plan, results: Results) -> dict[str, Any]:
    """The content of compare.json: a row a recipe, every run, and the paired difference of every two recipes that finished.

    Differences are earlier minus later recipe, in the order named: above 0 the later one is better. se: of the mean over seeds.
    """
    names = list(results)
    whole = {name: [r for r in found if "diverged" not in r] for name, found in results.items()}
    sequences = next((len(r["values"]) for found in whole.values() for r in found), 0)
    strata = evaluation_strata(sequences, plan.base.eval.draws, seed=plan.base.eval.seed) if sequences else None
    values = {
        name: torch.stack([r["values"] for r in found])
        for name, found in whole.items()
        if len(found) == plan.seeds and strata is not None
    }
    rows, first = [], names[0]
    for name in names:
        found = results[name]
        row: dict[str, Any] = {
            "recipe": name,
            "steps": found[0]["steps"],
            "tokens": found[0]["tokens"],
            "train_seconds": statistics.median(r["seconds"] for r in found),
            "parameters": found[0]["parameters"],
            "diverged": sum("diverged" in r for r in found),
        }
        if name in values and strata is not None:
            mean = mean_over_seeds(values[name], strata)
            bits = found[0]["bits_per_byte"]
            row |= {"nll": mean.mean, "nll_se": mean.se}
            row["bits_per_byte"] = None if bits is None else mean.mean * bits / found[0]["nll"]
            row["share_of_first"] = _share(plan, results, first, name) if first in values else None
        rows.append(row)
    differences = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if a in values and b in values and strata is not None:
                d = mean_over_seeds(values[a] - values[b], strata)
                better = sum(value > 0 for value in d.seeds)
                differences.append(
                    {"of": a, "minus": b, "difference": d.mean, **_errors(d), "by_seed": d.seeds, "better": better}
                )
    runs = [{"recipe": name} | {k: v for k, v in r.items() if k != "values"} for name, found in results.items() for r in found]
    settings = {"preset": plan.base.preset, "budget": f"{plan.budget.kind}={plan.budget.amount:g}", "seeds": plan.seeds}
    settings |= {"corpus": plan.base.data.corpus, "draws": plan.base.eval.draws, "sequences": sequences}
    environment = results[first][0]["environment"]
    page: dict[str, Any] = _finite(
        {
            "benchmark": "compare",
            "settings": settings,
            "environment": environment,
            "results": rows,
            "differences": differences,
            "runs": runs,
        }
    )
    return page


def _errors(d: Any) -> dict[str, float]:
    return {"se": d.se, "se_data": d.se_data, "se_seeds": d.se_seeds}


def _finite(value: Any) -> Any:
    """JSON has no NaN: None means unknown."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_curve(found: list[dict[str, Any]], x: str) -> tuple[Tensor, Tensor]:
    """The bound over `x` (tokens or seconds), averaged point by point over the seeds' runs."""
    kept = [r["curve"] for r in found if "diverged" not in r]
    xs = torch.tensor([[point[x] for point in curve] for curve in kept], dtype=torch.float64)
    ys = torch.tensor([[point["nll"] for point in curve] for curve in kept], dtype=torch.float64)
    return xs.mean(0), ys.mean(0)


def _share(plan: Plan, results: Results, first: str, name: str) -> float:
    """Share of the first recipe's tokens (or training time) that this one needs to reach the first one's final bound."""
    x = "tokens" if plan.budget.kind == "tokens" else "seconds"
    ends, level = (curve[-1] for curve in mean_curve(results[first], x))
    xs, ys = mean_curve(results[name], x)
    return share_to_match(xs, ys, float(level)) * float(xs[-1]) / float(ends)


def table(found: dict[str, Any]) -> str:
    """The rows as aligned text, each compared with the first."""
    first = found["results"][0]["recipe"]
    against = {d["minus"]: d for d in found["differences"] if d["of"] == first}
    by = "tokens" if found["settings"]["budget"].startswith("tokens") else "time"
    rows = [["recipe", "steps", "tokens", "training", "val/nll", "bits/byte", f"below {first}", "better in", "as low after"]]
    for row in found["results"]:
        name = row["recipe"]
        cells = [name, f"{row['steps']:,}", compact(row["tokens"]), duration(row["train_seconds"])]
        if row.get("nll") is None:
            rows.append([*cells, f"diverged in {row['diverged']}" if row["diverged"] else "", "", "", "", ""])
            continue
        d, share = against.get(name), row["share_of_first"]
        bits = row["bits_per_byte"]
        cells += [measured(row["nll"], row["nll_se"]), "-" if bits is None else f"{bits:.3f}"]
        cells += [measured(d["difference"], d["se"] or math.nan), f"{d['better']} of {len(d['by_seed'])}"] if d else ["", ""]
        rows.append([*cells, "" if name == first else "never" if share is None else f"{share:.0%} of its {by}"])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows as text in aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def mask_rows(errors: dict[str, MaskError]) -> list[dict[str, Any]]:
    """The masks' errors, with ratios to MDLM's stratified draws and to independent ones."""
    mdlm, independent = errors["mdlm"].se, errors["independent"].se
    return [
        {"masks": way, "what": WAYS[way], "nll": e.nll, "se": e.se, "of_mdlm": e.se / mdlm, "of_independent": e.se / independent}
        for way, e in errors.items()
    ]


def mask_table(rows: list[dict[str, Any]]) -> str:
    """`mask_rows` as aligned text."""
    lines = [["masks", "nll", "se of an estimate", "over mdlm's", "over independent"]]
    lines += [
        [r["masks"], f"{r['nll']:.4f}", f"{r['se']:.4f}", f"{r['of_mdlm']:.2f}x", f"{r['of_independent']:.2f}x"] for r in rows
    ]
    return aligned(lines)


def curves_png(plan: Plan, results: Results) -> bytes:
    """The held-out bound over tokens and over training time: a line for a recipe's mean over seeds, dots for each seed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = STYLE | {"text.color": LIGHT.ink, "axes.labelcolor": LIGHT.ink, "grid.color": LIGHT.grid}
    with rc_context(style):
        figure = Figure(figsize=(8.6, 3.8), dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        ends: list[float] = []
        for axes, x, words in zip(panels, ("tokens", "seconds"), ("tokens seen", "seconds of training"), strict=True):
            for colour, (name, found) in zip(COLOURS * (1 + len(results) // len(COLOURS)), results.items(), strict=False):
                kept = [r for r in found if "diverged" not in r]
                for r in kept:
                    points = [(p[x], p["nll"]) for p in r["curve"]]
                    axes.plot(*np.array(points).T, ".", color=colour, markersize=3, alpha=0.5)
                    ends += [nll for _, nll in points]
                if kept:
                    axes.plot(*(part.numpy() for part in mean_curve(found, x)), color=colour, linewidth=1.4, label=name)
            axes.set_xlabel(words)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(lambda value, _: compact(value, 1_000))
        panels[0].set_ylabel("val/nll, nats a token")
        if ends:
            panels[0].legend()
        buffer = io.BytesIO()
        canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def write(plan: Plan, results: Results, found: dict[str, Any], text: str) -> list[Path]:
    """Write compare.json, table.txt and curves.png in the comparison's folder."""
    paths = [plan.folder / name for name in ("table.txt", "compare.json", "curves.png")]
    with disk_errors(plan.folder):
        write_text(paths[0], text + "\n")
        write_text(paths[1], json.dumps(found, indent=1) + "\n")
        paths[2].write_bytes(curves_png(plan, results))
    return paths
