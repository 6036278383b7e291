"""Reading a run folder in any state: its settings, facts, rows and curves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atat_fast.errors import UsageError, nearest
from atat_fast.runs.figures import Curves, ImportanceCurves

Row = dict[str, Any]

NUMBERS = ("loss", "tokens", "tokens_per_second", "seconds", "nll", "nll_se", "bits_per_byte", "unigram_entropy", "sequences")


@dataclass(frozen=True)
class Run:
    """The content of a run folder: rows in the order of steps. notes: sentences on what is missing."""

    name: str
    settings: Row
    settings_text: str
    facts: Row
    train: list[Row]
    evals: list[Row]
    samples: list[Row]
    notes: list[str]
    importance: Row


def read_run(folder: Path) -> Run:
    """Read a run folder. config.yaml and run.json may be missing; metrics.jsonl may not. Raises UsageError."""
    if not folder.is_dir():
        known = [path.parent.name for path in sorted(folder.parent.glob("*/metrics.jsonl"))]
        have = f"; {folder.parent} has {', '.join(known[:8])}" if known else "; give --run the folder a training run wrote"
        raise UsageError(f"there is no run folder {folder}{nearest(folder.name, known)}{have}")
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} holds no metrics.jsonl, so it is no run folder; give --run the folder a training run wrote")
    notes: list[str] = []
    rows = _read_metrics(folder / "metrics.jsonl", notes)
    text = _read(folder / "config.yaml", notes)
    try:
        settings = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{folder / 'config.yaml'} is not YAML ({why}); repair it or move it away") from None
    try:
        facts = json.loads(_read(folder / "run.json", notes) or "{}")
    except ValueError as error:
        raise UsageError(f"{folder / 'run.json'} is not JSON ({error}); repair it or move it away") from None
    try:
        importance = json.loads(_read(folder / "importance.json") if (folder / "importance.json").exists() else "{}")
    except ValueError as error:
        raise UsageError(f"{folder / 'importance.json'} is not JSON ({error}); repair it or move it away") from None
    for name, value in (("config.yaml", settings), ("run.json", facts), ("importance.json", importance)):
        if not isinstance(value, dict):
            raise UsageError(f"{folder / name} holds a {type(value).__name__}, not names with values; repair it or move it away")
    own = settings.get("run")
    name = (own.get("name") if isinstance(own, dict) else None) or folder.resolve().name
    return Run(str(name), settings, text, facts, rows["train"], rows["eval"], rows["sample"], notes, importance)


def _read(path: Path, notes: list[str] | None = None) -> str:
    if notes is not None and not path.exists():
        notes.append(f"There is no {path.name} in this run, so its content is missing here.")
        return ""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); check its permissions, and that it is UTF-8 text") from None


def _read_metrics(path: Path, notes: list[str]) -> dict[str, list[Row]]:
    """Rows by kind. If a resumed run wrote a step twice, the last row counts."""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}); check its permissions") from None
    rows: dict[str, dict[Any, Row]] = {"train": {}, "eval": {}, "sample": {}}
    for number, line in enumerate([*lines, tail], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            if number > len(lines):  # only a last line without a line end can be cut off
                notes.append("The last line of metrics.jsonl was cut off and is left out.")
                continue
            raise UsageError(f"line {number} of {path} is not JSON ({error}); repair or delete that line") from None
        wrong = _wrong(row)
        if wrong:
            raise UsageError(f"line {number} of {path} {wrong}; repair or delete that line")
        if row["kind"] in rows:
            key = (row["step"], *(str(row.get(name)) for name in ("sampler", "steps") if row["kind"] == "sample"))
            rows[row["kind"]][key] = row
    return {kind: sorted(by_step.values(), key=lambda row: row["step"]) for kind, by_step in rows.items()}


def _wrong(row: Any) -> str:
    """What is wrong with a row of metrics.jsonl, or ''. Unknown kinds and fields pass."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return "is not a row with a kind"
    if row["kind"] not in ("train", "eval", "sample"):
        return ""
    if type(row.get("step")) is not int or row["step"] < 0:
        return f"has step {row.get('step')!r}, not a whole number"
    if row["kind"] == "sample":
        texts = row.get("texts")
        return "" if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else "has no list of texts"
    odd = [name for name in NUMBERS if type(row.get(name)) not in (int, float, type(None))]
    return f"has {odd[0]} {row[odd[0]]!r}, not a number" if odd else ""


def curves_of(run: Run) -> Curves:
    """The curves of a run. Tokens come from the rows or from tokens_per_step; without either, x counts steps."""
    import numpy as np

    def column(rows: list[Row], name: str) -> Any:
        return np.array([number_in(row, name) for row in rows], dtype=float)

    per_step = number_in(run.facts, "tokens_per_step")
    if not per_step > 0 and run.train and run.train[-1]["step"]:
        per_step = number_in(run.train[-1], "tokens") / run.train[-1]["step"]
    known = math.isfinite(per_step) and per_step > 0
    scale = per_step if known else 1.0
    seen = column(run.train, "tokens")
    train_x = np.where(np.isfinite(seen) & known, seen, column(run.train, "step") * scale)
    unigram = unigram_entropy(run)
    return Curves(
        train_x=train_x,
        loss=column(run.train, "loss"),
        throughput=column(run.train, "tokens_per_second"),
        eval_x=column(run.evals, "step") * scale,
        nll=column(run.evals, "nll"),
        nll_se=column(run.evals, "nll_se"),
        unigram=unigram if math.isfinite(unigram) else None,
        tokens_per_step=scale if known else None,
    )


def importance_of(run: Run) -> ImportanceCurves | None:
    """The curves of importance, or None for a run without it. Missing or invalid values are NaN."""
    import numpy as np

    rows = [row for row in run.train if "tilt" in row]
    if not rows:
        return None
    per_step = number_in(run.facts, "tokens_per_step")
    known = math.isfinite(per_step) and per_step > 0

    def numbers(values: Any, count: int) -> list[float]:
        found = values if isinstance(values, list) and len(values) == count else [None] * count
        return [number_in({"value": value}, "value") for value in found]

    last: Row = next((row["reliability"] for row in reversed(run.evals) if isinstance(row.get("reliability"), dict)), {})
    bins = len(last["count"]) if isinstance(last.get("count"), list) else 0
    count, predicted, observed = (
        np.nan_to_num(np.array(numbers(last.get(name), bins), dtype=float)) for name in ("count", "predicted", "observed")
    )
    return ImportanceCurves(
        x=np.array([row["step"] * (per_step if known else 1.0) for row in rows], dtype=float),
        tilt=np.array([number_in(row, "tilt") for row in rows]),
        focus=np.array([number_in(row, "focus") for row in rows]),
        quarters=np.array([numbers(row.get("nll_quarters"), 4) for row in rows]),
        count=count,
        predicted=predicted,
        observed=observed,
        tokens_per_step=per_step if known else None,
    )


def number_in(row: Row, name: str) -> float:
    """A row's number as a float, or NaN."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def unigram_entropy(run: Run) -> float:
    """Nats a token of the held-out text, from the facts or the last evaluation, or NaN."""
    rows = [*reversed(run.evals), run.facts]
    return next((u for row in rows if math.isfinite(u := number_in(row, "unigram_entropy"))), math.nan)
