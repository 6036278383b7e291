"""Opening models: of a run, a saved folder or the hub, or an MDLM checkpoint. Each becomes a `Saved`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from atat_fast.config import to_dict
from atat_fast.errors import UsageError
from atat_fast.files import expanded
from atat_fast.models import hub
from atat_fast.models.dit import DiT
from atat_fast.models.hub import Saved
from atat_fast.runs import checkpoint


def open_run(run: Path, which: str = "best", *, average: bool = True, importance: bool = True) -> Saved:
    """The model of a run folder, or of one of its checkpoints.

    which: the best or last checkpoint. average: the averaged weights rather than the last step's. importance: read its estimator
    too. Raises UsageError.
    """
    found = checkpoint.find(run, which)
    model, tokenizer = checkpoint.load_model(found, average=average)
    estimator = checkpoint.load_importance(found, average=average) if importance else None
    kept = {name: found.manifest[name] for name in ("tokens", "evaluation") if name in found.manifest}
    facts = {
        "step": found.step,
        "weights": "ema" if average else "raw",
        "config": to_dict(found.config),
        "data": {"sha256": found.manifest.get("data", {})},
    }
    weights = "averaged" if average else "last step's"
    what = f"step {found.step:,} of a run, {weights} weights"
    return Saved(model, tokenizer, estimator, facts | kept, checkpoint.load_process(found), str(found.path), what)


def open_model(
    *,
    run: str | None,
    model: str | None,
    tokenizer: str | None = None,
    which: str = "best",
    average: bool = True,
    importance: bool = True,
) -> Saved:
    """The model that a command was given, with a tokenizer. run: a run folder or one of its checkpoints. model: a saved model
    instead (a folder, or owner/name on the hub). tokenizer: for a model saved without one. Raises UsageError.
    """
    if (run is None) == (model is None):
        raise UsageError("say which model: --run runs/NAME, a folder of training, or --model FOLDER, a saved model")
    if tokenizer is not None and model is None:
        raise UsageError("--tokenizer goes with --model; a run carries its own")
    if run is not None:
        return open_run(Path(run), which, average=average, importance=importance)
    assert model is not None
    return hub.from_pretrained(model, tokenizer=tokenizer)


def open_any(source: str, overrides: dict[str, Any] | None = None, *, average: bool = True) -> Saved:
    """The model at `source`: a run folder or one of its checkpoints, a saved model's folder, or an MDLM checkpoint (a file, a
    folder or a hub id).

    overrides: facts that an MDLM checkpoint does not state. average: the averaged weights rather than the last step's.
    Raises UsageError.
    """
    path, overrides = expanded(source), overrides or {}
    if (path / checkpoint.MANIFEST).is_file() or (path / checkpoint.FOLDER).is_dir():
        _no_overrides(source, "a run", overrides)
        return dataclasses.replace(open_run(path, average=average), place=source)
    if _is_ours(path):
        _no_overrides(source, "a model of atat_fast", overrides)
        if not average:
            raise UsageError(f"{source} holds one set of weights, so --no_ema has nothing to choose; leave it out")
        return dataclasses.replace(hub.from_pretrained(path, bare=True), place=source)
    place = str(path) if path.exists() else source
    weights = "its average if it has one" if average else "last step's weights"
    what = f"an MDLM checkpoint, {weights}"
    return Saved(DiT.from_mdlm(place, ema=average, **overrides), place=source, what=what)


def _is_ours(path: Path) -> bool:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"vocab_size", "mask_id"} <= settings.keys()


def _no_overrides(source: str, what: str, overrides: dict[str, Any]) -> None:
    if overrides:
        options = ", ".join(f"--{name}" for name in overrides)
        raise UsageError(f"{source} is {what} and has its own settings; leave {options} out: only MDLM checkpoints need that")
