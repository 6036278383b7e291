"""Models to begin with (a run's, a saved one, an MDLM checkpoint), and a new run's start from one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atat_fast.data.tokenizers import TOKENIZER_FILE, Tokenizer, make_tokenizer
from atat_fast.errors import UsageError, first_line
from atat_fast.files import expanded
from atat_fast.models import hub
from atat_fast.models.dit import DiT, misfit
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.models.mdlm import load_mdlm
from atat_fast.runs import checkpoint

MEANING = ("heads", "activation")
"""Settings that change what weights mean and not their shapes."""


@dataclass(frozen=True)
class Origin:
    """A model on the CPU, where it is from and what it is, in words. tokenizer: None where the weights came without one."""

    source: str
    what: str
    model: DiT
    tokenizer: Tokenizer | None = None
    estimator: ImportanceEstimator | None = None


def open_origin(source: str, overrides: dict[str, Any] | None = None, *, ema: bool = True) -> Origin:
    """The model at `source`: a run folder or one of its checkpoints, a saved model's folder, or an MDLM checkpoint (a file, a
    folder or a hub id).

    overrides: what to take for facts that an MDLM checkpoint does not state. ema: the averaged weights rather than the last
    step's. Raises UsageError.
    """
    path, overrides = expanded(source), overrides or {}
    weights = "averaged" if ema else "last step's"
    if (path / checkpoint.MANIFEST).is_file() or (path / checkpoint.FOLDER).is_dir():
        _no_overrides(source, "a run", overrides)
        saved = checkpoint.find(path, "best")
        model, tokenizer = checkpoint.load_model(saved, average=ema)
        estimator = checkpoint.load_importance(saved, average=ema)
        return Origin(source, f"step {saved.step:,} of a run, {weights} weights", model, tokenizer, estimator)
    if _is_ours(path):
        _no_overrides(source, "a model of atat_fast", overrides)
        if not ema:
            raise UsageError(f"{source} holds one set of weights, so --no_ema has nothing to choose; leave it out")
        if (path / TOKENIZER_FILE).is_file():
            found = hub.from_pretrained(path)
            return Origin(source, "a model of atat_fast", found.model, found.tokenizer, found.estimator)
        try:
            return Origin(source, "a model of atat_fast", DiT.from_pretrained(path, strict=True))
        except Exception as error:
            raise UsageError(f"{source} cannot be read: {first_line(error)}") from error
    average = "its average where it has one" if ema else f"{weights} weights"
    place = str(path) if path.exists() else source
    return Origin(source, f"an MDLM checkpoint, {average}", load_mdlm(place, ema=ema, **overrides))


def same_tokenizer(own: Tokenizer, setting: str) -> bool:
    """Whether data.tokenizer names this tokenizer, by its name or by a file's content."""
    if own.name == setting:
        return True
    try:
        return expanded(setting).exists() and make_tokenizer(setting).fingerprint == own.fingerprint
    except UsageError:
        return False


def check_tokenizer(origin: Origin, setting: str) -> None:
    """Raise UsageError where the weights read text with another tokenizer than data.tokenizer names."""
    own = origin.tokenizer
    if own is not None and not same_tokenizer(own, setting):
        raise UsageError(
            f"the weights of {origin.source} read text with tokenizer {own.name}, and data.tokenizer is {setting}; "
            f"add --data.tokenizer {own.name}"
        )


def begin_from(origin: Origin, model: DiT, estimator: ImportanceEstimator | None) -> str:
    """Give a new run's model the weights of another, and its estimator where both have one of the same shapes.

    Returns what was done, as a sentence. Raises UsageError where weights have other shapes, naming the first in the file's order,
    or another meaning.
    """
    wrong = misfit(dict(origin.model.named_parameters()), dict(model.named_parameters()))
    if wrong is not None:
        raise UsageError(f"the weights of {origin.source} do not fit this run: {wrong}")
    for setting in MEANING:
        have, need = getattr(origin.model.config, setting), getattr(model.config, setting)
        if have != need:
            raise UsageError(f"{origin.source} has model.{setting} {have}, and this run {need}; add --model.{setting} {have}")
    if origin.model.mask_id != model.mask_id:
        raise UsageError(
            f"the mask of {origin.source} is token {origin.model.mask_id:,}, and that of data.tokenizer {model.mask_id:,}: they "
            "belong to different vocabularies"
        )
    _copy(origin.model, model)
    sentence = f"weights begin as those of {origin.source} ({origin.what})"
    if estimator is None or estimator.network is None:
        return sentence
    shapes = [{n: p.shape for n, p in e.named_parameters()} for e in (origin.estimator, estimator) if e is not None]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        return f"{sentence}; the importance estimator begins anew"
    assert origin.estimator is not None
    _copy(origin.estimator, estimator)
    return f"{sentence}, the importance estimator's too"


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(values[name])


def _is_ours(path: Path) -> bool:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"vocab_size", "mask_id"} <= settings.keys()


def _no_overrides(source: str, what: str, overrides: dict[str, Any]) -> None:
    if overrides:
        options = ", ".join(f"--{name}" for name in overrides)
        raise UsageError(f"{source} is {what} and says itself what it is; leave {options} out, which MDLM checkpoints need")
