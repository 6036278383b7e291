"""Pictures of what benchmarks recorded: tokens a second, memory, and rooflines. Each takes records and gives a PNG's bytes."""

from __future__ import annotations

import io
from typing import Any

COLOURS = {"mdlm": "#9aa3ab", "mdlm+compile": "#5f6b76", "atat_fast": "#1f77b4", "atat_fast+atat": "#17a589"}
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
    """Tokens a second with quartiles, what a step adds to memory, and where its time goes, as far as the record has them."""
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
    errors = [[v - results[n]["low"] for n, v in zip(names, values, strict=True)],
              [results[n]["high"] - v for n, v in zip(names, values, strict=True)]]  # fmt: skip
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
