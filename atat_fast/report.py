"""The report of a run: one self-contained page with its numbers, curves, samples and settings, and the pictures beside it.

    python -m atat_fast.report --run runs/demo [--out FOLDER]

Reads config.yaml, run.json and metrics.jsonl of a run, finished or still going. Same input, same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import html
import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.config import Config, to_dict
from atat_fast.errors import UsageError
from atat_fast.files import replacing
from atat_fast.runs.figures import (
    DARK,
    Curves,
    compact,
    duration,
    importance_png,
    loss_png,
    measured,
    overview_png,
    throughput_png,
)
from atat_fast.runs.reader import Row, Run, curves_of, importance_of, number_in, read_run, unigram_entropy

FACTS = {
    "data": "data",
    "vocabulary": "vocabulary",
    "sequence_length": "sequence length",
    "tokens_per_step": "tokens per step",
    "bytes_per_token": "bytes per token",
    "device": "device",
    "dtype": "precision",
    "compile": "torch.compile",
    "cpu_threads": "CPU threads",
    "version": "atat_fast",
    "commit": "commit",
    "torch": "torch",
    "triton": "triton",
    "python": "python",
    "started": "started",
}
BOUND = (
    "<b>val/nll</b> is the exact-count bound (NELBO) on the negative log-likelihood of held-out text, in nats per token: a "
    "count k is drawn, exactly k tokens are hidden, and their cross-entropies weigh (L + 1) / k each. It is computed with the "
    "EMA weights; no training weight or curriculum enters it. The number after ± is its standard error over sequences and masks. "
    "Perplexity and bits follow from it, so they are upper bounds too."
)
STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1f2226; --faint: #646a73; --line: #e2e5e9; --wash: #f6f7f8; --accent: #0072b2; --hot: #d55e00 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #16181c; --ink: #dfe2e6; --faint: #9aa0a9; --line: #2c3036; --wash: #1d2025; --accent: #56b4e9; --hot: #e69f00 } }
* { box-sizing: border-box }
body { max-width: 46rem; margin: 0 auto; padding: clamp(1.25rem, 5vw, 3.5rem) clamp(1rem, 4vw, 2rem); background: var(--paper);
  color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.05rem }
.faint, figcaption, dt, .headline small, th { color: var(--faint); font-size: .875rem; font-weight: 400 }
.headline { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.25rem 1.5rem; margin: 2rem 0;
  padding: 1.5rem 0; border-block: 1px solid var(--line) }
.headline div:first-child { grid-column: 1 / -1 }
.headline dd { margin: 0; font-size: 1.3rem; line-height: 1.35; font-variant-numeric: tabular-nums }
.headline div:first-child dd { font-size: 2.5rem; letter-spacing: -.02em; color: var(--accent) }
.headline small { display: block; line-height: 1.4; letter-spacing: 0; color: var(--faint) }
figure { margin: 1.25rem 0 } img { display: block; width: 100%; height: auto }
.note { margin: .4rem 0; padding-left: .75rem; border-left: 3px solid var(--line); color: var(--faint); font-size: .925rem }
.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { white-space: nowrap } .numbers th + th, .numbers td { text-align: right; white-space: nowrap; padding: .35rem 0 .35rem 1rem }
.best td, .best th { font-weight: 600; color: var(--ink) }
.sample, pre { margin: .35rem 0 0; padding: 1rem 1.25rem; background: var(--wash); border-radius: .4rem; white-space: pre-wrap }
.sample { max-height: 26rem; overflow: auto; unicode-bidi: plaintext; tab-size: 4;
  font: 1.02rem/1.65 Charter, "Bitstream Charter", Cambria, Georgia, serif }
.share { display: block; height: 3px; margin-top: .3rem; background: var(--accent); border-radius: 2px; min-width: 1px }
summary { cursor: pointer; color: var(--faint); padding: .35rem 0 }
pre { font: .85rem/1.55 ui-monospace, Menlo, Consolas, monospace }
"""
STYLE += "".join(f".i{i} {{ background: color-mix(in srgb, var(--hot) {7 * i}%, transparent) }}\n" for i in range(1, 10))


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write report.html, loss.png, throughput.png and overview.png into `out` (by default the run folder), and importance.png
    if the run has importance.

    Returns the path of report.html. Raises UsageError if the run cannot be read or the folder cannot be written. An earlier
    report's files are replaced only once all new ones are complete.
    """
    found = read_run(Path(run))
    curves = curves_of(found)
    pictures = {"loss.png": loss_png(curves), "throughput.png": throughput_png(curves), "overview.png": overview_png(curves)}
    dark = {"loss.png": loss_png(curves, DARK), "throughput.png": throughput_png(curves, DARK)}
    importance = importance_of(found)
    if importance is not None:
        pictures["importance.png"], dark["importance.png"] = importance_png(importance), importance_png(importance, DARK)
    page = _page(found, curves, pictures, dark)
    folder = Path(run if out is None else out)
    _write_all(folder, {**pictures, "report.html": page.encode()})
    return folder / "report.html"


def visible(text: str) -> str:
    """Text with control, direction and surrogate characters made visible, so that no sample can rearrange the page."""

    def shown(match: re.Match[str]) -> str:
        code = ord(match[0])
        if unicodedata.category(match[0]) == "Cc" and code < 128:
            return "\u2421" if code == 127 else chr(0x2400 + code)
        return f"⟨U+{code:04X}⟩"

    controls = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
    return re.sub(controls, shown, text.replace("\r\n", "\n"))


def _text(value: Any) -> str:
    return html.escape(visible(str(value)))


def _perplexity(nll: float) -> str:
    return "not finite" if not nll < 700 else f"{math.exp(nll):.2f}" if nll < 4.6 else compact(math.exp(nll))


def _bits_per_byte(run: Run, row: Row) -> float:
    given = number_in(row, "bits_per_byte")
    if "unknown_share" in row:  # the tokenizer loses text: no bound
        return math.nan
    per_token = number_in(run.facts, "bytes_per_token")
    return given if math.isfinite(given) or not per_token > 0 else number_in(row, "nll") / math.log(2) / per_token


def _headline(run: Run, curves: Curves) -> str:
    cards: list[tuple[str, str, str]] = []
    unigram = unigram_entropy(run)
    nll = number_in(run.evals[-1], "nll") if run.evals else math.nan
    if run.evals:
        last = run.evals[-1]
        cards.append(("val/nll", measured(nll, number_in(last, "nll_se")), f"nats per token, at step {last['step']:,}"))
        cards.append(("perplexity", _perplexity(nll), "per token, exp(val/nll)"))
        if math.isfinite(_bits_per_byte(run, last)):
            cards.append(("bits per byte", f"{_bits_per_byte(run, last):.3f}", "of held-out text"))
    else:
        cards.append(("val/nll", "none yet", "no evaluation has been made"))
    if math.isfinite(unigram):
        gain = unigram - nll
        words = f"val/nll is {abs(gain):.2f} {'below' if gain >= 0 else 'above'} it" if math.isfinite(gain) else "nats per token"
        cards.append(("unigram entropy", f"{unigram:.3f}", words))
    rates = [r for r in map(float, curves.throughput) if math.isfinite(r)]
    if rates:
        cards.append(("throughput", compact(statistics.median(rates)), "tokens per second, median"))
    if run.train:
        step = run.train[-1]["step"]
        cards.append(("training time", duration(number_in(run.train[-1], "seconds")), ""))
        if curves.tokens_per_step is not None:
            cards.append(("tokens seen", compact(float(curves.train_x[-1])), f"{step:,} steps"))
    items = (f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in cards)
    return f'<dl class="headline">{"".join(items)}</dl>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "", best: int | None = None) -> str:
    """A table of cells that are HTML already. The first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for index, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body += f'<tr{" class=best" if index == best else ""}><th scope="row">{first}</th>{cells}</tr>\n'
    head_row = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def _evaluations(run: Run, curves: Curves) -> str:
    if not run.evals:
        return "<p>None yet.</p>"
    head = ["step", "tokens", "val/nll", "perplexity", "bits/token", "bits/byte", "sequences", "time"]
    rows, finite = [], []
    for index, row in enumerate(run.evals):
        nll, sequences, bpb = number_in(row, "nll"), number_in(row, "sequences"), _bits_per_byte(run, row)
        finite += [(nll, index)] if math.isfinite(nll) else []
        tokens = compact(float(curves.eval_x[index])) if curves.tokens_per_step is not None else "-"
        rows.append(
            [
                f"{row['step']:,}",
                tokens,
                measured(nll, number_in(row, "nll_se")),
                _perplexity(nll),
                f"{nll / math.log(2):.3f}" if math.isfinite(nll) else "-",
                f"{bpb:.3f}" if math.isfinite(bpb) else "-",
                compact(sequences) if math.isfinite(sequences) else "-",
                duration(number_in(row, "seconds")),
            ]
        )
    table = _table(head, rows, "numbers", min(finite)[1] if len(finite) > 1 else None)
    recent = 12
    if len(rows) > recent:
        everything = f"<details><summary>All {len(rows)} evaluations</summary>{table}</details>"
        table = _table(head, rows[-recent:], "numbers") + everything
    return table


def _samples(run: Run) -> str:
    """The latest samples in full, earlier ones folded."""
    blocks: dict[bool, str] = {True: "", False: ""}
    for row in reversed(run.samples):
        for text in row["texts"]:
            how = ", ".join([str(row["sampler"])] * ("sampler" in row) + [f"{row['steps']} steps"] * ("steps" in row))
            caption = _text(f"step {row['step']:,}" + (f", drawn by {how}" if how else ""))
            block = f'<div class="sample" dir="auto" tabindex="0">{_text(text)}</div>'
            blocks[row["step"] == run.samples[-1]["step"]] += f"<figure><figcaption>{caption}</figcaption>{block}</figure>\n"
    earlier = f"<details><summary>Earlier samples</summary>{blocks[False]}</details>" if blocks[False] else ""
    return (blocks[True] or "<p>None yet.</p>") + earlier


def _importance(run: Run, light: dict[str, bytes], dark: dict[str, bytes]) -> list[str]:
    """The section on importance: pictures, the estimator's calibration and two passages. Empty for a run without importance."""
    if "importance.png" not in light:
        return []
    caption = (
        "Quarters are of each batch's hidden tokens by their score. In the last picture an area is the share of tokens, and the "
        "broken line is where predictions are right on average; the masks are those of training."
    )
    parts = [
        "<h2>Importance</h2>",
        _figure("importance.png", "Curriculum, loss by importance, and reliability", caption, light, dark),
    ]
    last: Row = next((row for row in reversed(run.train) if "importance_loss" in row), {})
    loss, floor = number_in(last, "importance_loss"), number_in(last, "importance_baseline")
    if math.isfinite(loss) and math.isfinite(floor):
        words = f"Cross-entropy of the scores at step {last['step']:,}: {loss:.4f} nats; always the mean would pay {floor:.4f}."
        parts.append(f'<p class="note">{_text(words)}</p>')
    passages = run.importance.get("passages")
    for number, passage in enumerate(passages if isinstance(passages, list) else [], 1):
        caption = f"Held-out passage {number} at step {run.importance.get('step')}: the darker, the more important a token"
        parts.append(f"<figure><figcaption>{_text(caption)}</figcaption>{_coloured(passage)}</figure>")
    return parts


def _coloured(passage: Any) -> str:
    """A passage's tokens, shaded in ten strengths. Hovering over a token shows its score."""
    tokens, scores = (passage.get(name) if isinstance(passage, dict) else None for name in ("tokens", "scores"))
    pairs = zip(tokens, scores, strict=False) if isinstance(tokens, list) and isinstance(scores, list) else ()
    spans = ""
    for token, score in pairs:
        value = number_in({"score": score}, "score")
        shade = min(9, max(0, int(10 * value))) if math.isfinite(value) else 0
        spans += f'<span class="i{shade}" title="{value:.2f}">{_text(token)}</span>'
    return f'<div class="sample" dir="auto" tabindex="0">{spans}</div>'


def _flat(tree: Row, where: str = "") -> Row:
    flat: Row = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) and value else {f"{where}{name}": value}
    return flat


def _settings(run: Run) -> str:
    if not run.settings:
        return "<p>Not recorded.</p>"
    usual = _flat(to_dict(Config()))
    rows = []
    for name, value in _flat(run.settings).items():
        if isinstance(usual.get(name), float) and isinstance(value, str):  # YAML reads 1e-4, without a dot, as text
            value = float(value) if re.fullmatch(r"[-+\d.eE]*\d", value) else value
        if name not in ("preset", "run.name") and (name not in usual or value != usual[name]):
            rows.append([_text(name), _text(value), _text(usual.get(name, "-"))])
    changed = _table(["setting", "this run", "default"], rows) if rows else "<p>Every setting is at its default.</p>"
    return f"{changed}<details><summary>All settings (config.yaml)</summary><pre>{_text(run.settings_text)}</pre></details>"


def _facts(run: Run) -> str:
    facts = dict(run.facts)
    parts = facts.pop("parameters", None)
    facts.pop("unigram_entropy", None)
    named = {label: facts.pop(name) for name, label in FACTS.items() if facts.get(name) is not None}
    rows = []
    for label, value in [*named.items(), *_flat(facts).items()]:
        shown = f"{value:,}" if type(value) is int else f"{value:.4g}" if type(value) is float else value
        shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else shown
        rows.append([_text(label), _text(shown)])
    result = _table([], rows) if rows else "<p>Not recorded.</p>"
    if isinstance(parts, dict):
        counts = {name: n for name in parts if math.isfinite(n := number_in(parts, name))}
        total = counts.pop("total", 0) or sum(counts.values()) or 1
        rows = []
        for name, count in counts.items():
            bar = f'<span class="share" style="width:{min(100.0, 100 * count / total):.1f}%"></span>'
            rows.append([_text(name), f"{count:,.0f}{bar}"])
        result += f"<h2>Parameters</h2>{_table([], [*rows, ['total', f'{total:,.0f} ({compact(total)})']])}"
    return result


def _figure(name: str, alt: str, caption: str, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    day, night = (f"data:image/png;base64,{base64.b64encode(pictures[name]).decode()}" for pictures in (light, dark))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{night}">'
    words = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><picture>{source}<img alt="{_text(alt)}" src="{day}"></picture>{words}</figure>'


def _page(run: Run, curves: Curves, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    flat = _flat(run.settings)
    step, goal = max((row["step"] for row in [*run.train, *run.evals]), default=0), flat.get("train.max_steps")
    progress = f"step {step:,}" + (f" of {goal:,}" if type(goal) is int else "")
    about = [f"preset {flat['preset']}" if flat.get("preset") else "", progress, str(run.facts.get("device") or "")]
    lost = sum(not math.isfinite(value) for value in curves.loss)
    notes = list(run.notes)
    if lost:
        notes.append(f"The loss is not finite in {lost:,} of {len(curves.loss):,} training rows; crosses mark them below.")
    caption = "Dots are training steps as logged. "
    if flat.get("diffusion.weighting") == "ce":
        caption += "The training loss is the plain mean over hidden tokens, another quantity than val/nll."
    elif flat.get("importance.source", "none") != "none":
        caption += "In training, masks and weights go by importance: its loss is another quantity than val/nll."
    elif isinstance(until := flat.get("diffusion.ce_until"), float) and 0 < until <= 1:
        caption += f"Until {until:.0%} of the run the training loss is the plain mean over hidden tokens, "
        caption += "another quantity than val/nll; after that it is the bound on a few sequences with fresh masks."
    else:
        caption += "The training loss is the bound on a few sequences with fresh masks, hence the scatter."
    sections = [
        _headline(run, curves),
        *(f'<p class="note">{_text(note)}</p>' for note in notes),
        _figure("loss.png", "Training loss and val/nll against tokens seen, with the unigram entropy", caption, light, dark),
        _figure("throughput.png", "Training tokens per second against tokens seen", "", light, dark),
        *_importance(run, light, dark),
        "<h2>Samples</h2>",
        _samples(run),
        "<h2>Evaluations</h2>",
        _evaluations(run, curves),
        f'<p class="faint">{BOUND}</p>',
        "<h2>Settings that differ from the defaults</h2>",
        _settings(run),
        "<h2>Facts</h2>",
        _facts(run),
    ]
    # A second lock: text that slips past the escaping can still load and run nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{_text(run.name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>
<body><header><h1>{_text(run.name)}</h1><span class="faint">{_text(" · ".join(filter(None, about)))}</span></header>
<main>
{chr(10).join(sections)}
</main></body></html>
"""


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write every file under a temporary name, then rename all: a failure before the end leaves the earlier files unchanged."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                stream = stack.enter_context(replacing(folder / name, binary=True))
                stream.write(content)
                stream.flush()
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"the report cannot be written to {folder} ({why}); give --out a folder you can write to") from None


def main(arguments: Sequence[str]) -> int:
    """The command. Prints the report's path. Status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.report", description="The report of a training run.")
    parser.add_argument("--run", type=path_text, required=True, help="A run folder, such as runs/demo.")
    parser.add_argument("--out", type=path_text, default=None, help="Folder of the report; by default the run folder.")
    args = parser.parse_args(list(arguments))
    print(write_report(Path(args.run), None if args.out is None else Path(args.out)))
    return 0


if __name__ == "__main__":
    run_command(main)
