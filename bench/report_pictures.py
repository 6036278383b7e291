"""Pictures of benchmark results: tokens a second, memory, rooflines. Each function takes records and returns a PNG's bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import devices

COLOURS = {
    "mdlm": "#9aa3ab",
    "mdlm+compile": "#5f6b76",
    "atat_fast": "#1f77b4",
    "atat_fast+atat": "#17a589",
    "atat_fast+spread": "#4aa3df",
    "atat_fast+hidden": "#76c7b0",
}
MIB = 1 << 20


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, metadata={"Software": None})
    return picture.getvalue()


def title_of(record: dict[str, Any]) -> str:
    """'tiny, V=30,522, 8 x 256; CPU (...), bf16'."""
    s, facts = record["settings"], record["environment"]
    return f"{s['preset']}, V={s['vocabulary']:,}, {s['micro_batch']} x {s['length']}; {facts['device']}, {facts['dtype']}"


def throughput_png(record: dict[str, Any]) -> bytes:
    """Tokens a second with quartiles, a step's memory, and where its time goes, as far as the record has them."""
    results = record["results"]
    names = list(results)
    sizes = [results[name].get("step_memory_bytes") for name in names]
    parts = [results[name].get("parts") for name in names]
    panels = 1 + any(s is not None for s in sizes) + all(parts)
    figure = _figure(3.4 * panels + 1.2, 3.2)
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    colours = [COLOURS.get(name, "#1f77b4") for name in names]

    rate = next(axes)
    values = [results[name]["tokens_per_second"] for name in names]
    errors = [
        [v - results[n]["low"] for n, v in zip(names, values, strict=True)],
        [results[n]["high"] - v for n, v in zip(names, values, strict=True)],
    ]
    bars = rate.bar(names, values, color=colours, yerr=errors, capsize=3, error_kw={"lw": 0.8})
    ratios = [results[name].get("ratio") for name in names]
    rate.bar_label(bars, [f"{v:,.0f}" + (f"\n{r:.2f}x" if r else "") for v, r in zip(values, ratios, strict=True)], fontsize=7)
    rate.set_ylim(0, 1.25 * max(results[name]["high"] for name in names))
    rate.set_ylabel("tokens/s")
    if any(s is not None for s in sizes):
        memory = next(axes)
        bars = memory.bar(names, [(s or 0) / MIB for s in sizes], color=colours)
        memory.bar_label(bars, ["-" if s is None else f"{s / MIB:,.0f}" for s in sizes], fontsize=7)
        memory.set_ylabel("MiB a step adds")
        memory.margins(y=0.15)
    if all(parts):
        time = next(axes)
        bottom = [0.0] * len(names)
        for part in parts[0]:
            heights = [p[part] * 1e3 for p in parts]
            time.bar(names, heights, bottom=bottom, label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        time.set_ylabel("ms of a step")
        time.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for panel in figure.axes:
        panel.tick_params(axis="x", labelsize=7, rotation=15)
        panel.tick_params(axis="y", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title_of(record), fontsize=9)
    return _png(figure)


def head_memory_png(results: Path) -> bytes | None:
    """Memory of one head call by vocabulary, from the first device that has it, GPUs before CPUs; None without one."""
    for path in sorted(results.glob("*/linear_cross_entropy.json"), key=lambda path: (path.parent.name == "cpu", path)):
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.get("memory_by_vocabulary")
        if not found:
            continue
        figure = _figure(6.4, 3.4)
        axes = figure.add_subplot()
        for name, sizes in found["bytes"].items():
            axes.plot(found["v"], [size and size / MIB for size in sizes], marker="o", markersize=3.5, label=name)
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
        return _png(figure)
    return None


def latest_throughput_png(results: Path) -> bytes | None:
    """Bars of one throughput run: a GPU's before a CPU's, then the largest model's."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*/throughput-*.json"))]
    if not found:
        return None
    return throughput_png(
        max(
            found,
            key=lambda r: (not r["environment"]["device"].startswith("CPU"), r["settings"]["vocabulary"], len(r["results"])),
        )
    )


def roofline_png(results: Path) -> bytes | None:
    """Rate by arithmetic intensity of every profiled group with a cost model, under its device's roofline.

    None if no profile is of a device whose peaks are known.
    """
    for path in sorted(results.glob("*/throughput-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        device = devices.find(record["environment"], results)
        if device is None or not record.get("profile"):
            continue
        figure = _figure(6.4, 4.0)
        axes = figure.add_subplot()
        for name, kept in record["profile"].items():
            points = [
                (g["flops"] / g["bytes"], g["flops"] / g["seconds"], group)
                for group, g in kept["groups"].items()
                if g["flops"] and g["bytes"]
            ]
            axes.scatter([x for x, _, _ in points], [y / 1e9 for _, y, _ in points], s=18, color=COLOURS.get(name), label=name)
            for x, y, group in points:
                axes.annotate(group, (x, y / 1e9), fontsize=6, xytext=(3, 3), textcoords="offset points")
        edges = [10 ** (i / 10) for i in range(-10, 51)]
        axes.plot(edges, [min(device.flops, x * device.bandwidth) / 1e9 for x in edges], color="black", lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOP a byte, as the cost models count")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(title_of(record), fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
        return _png(figure)
    return None


def blocks_png(results: Path) -> bytes | None:
    """Time of a text by its length with the cache, and tokens a second of each way; None without a file."""
    path = results / "cpu" / "blocks.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    s, facts = record["settings"], record["environment"]
    figure = _figure(7.6, 3.0)
    left, right = figure.subplots(1, 2)
    names = [r["way"] for r in record["results"]]
    bars = left.bar(names, [r["tokens_per_second"] for r in record["results"]], color="#1f77b4")
    left.bar_label(bars, [f"{r['tokens_per_second']:,.0f}" for r in record["results"]], fontsize=7)
    left.set_ylabel(f"tokens/s of a text of {s['length']:,}")
    left.margins(y=0.15)
    sizes = [row["length"] for row in record["growth"]]
    right.plot(sizes, [row["seconds"] for row in record["growth"]], marker="o", markersize=3, color="#1f77b4")
    right.set_xlabel("tokens of the text")
    right.set_ylabel("seconds, cached")
    right.set_ylim(0)
    for panel in (left, right):
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{s['preset']}, V={s['vocabulary']:,}, blocks of {s['block']}, {s['steps']} steps; {facts['device']}, {facts['dtype']}",
        fontsize=9,
    )
    return _png(figure)


DOCUMENT: dict[str, Callable[[Path], bytes | None]] = {
    "throughput.png": latest_throughput_png,
    "roofline.png": roofline_png,
    "linear_cross_entropy_memory.png": head_memory_png,
    "cpu-blocks.png": blocks_png,
}
"""Pictures of the documents by their names in docs/images."""
