"""Starting a new run from the weights of another model."""

from __future__ import annotations

from atat_fast.data.tokenizers import Tokenizer, make_tokenizer
from atat_fast.distributed.tensors import load_parts
from atat_fast.errors import UsageError
from atat_fast.files import expanded
from atat_fast.models.dit import DiT, misfit
from atat_fast.models.hub import Saved
from atat_fast.models.importance import ImportanceEstimator

MEANING = ("heads", "activation")
"""Settings that change the meaning of weights but not their shapes."""


def same_tokenizer(own: Tokenizer, setting: str) -> bool:
    """Whether data.tokenizer names this tokenizer, by name or by a file's content."""
    if own.name == setting:
        return True
    try:
        return expanded(setting).exists() and make_tokenizer(setting).fingerprint == own.fingerprint
    except UsageError:
        return False


def check_tokenizer(origin: Saved, setting: str) -> None:
    """Raise UsageError if the weights belong to another tokenizer than data.tokenizer."""
    own = origin.tokenizer
    if own is not None and not same_tokenizer(own, setting):
        raise UsageError(
            f"the weights of {origin.place} read text with tokenizer {own.name}, and data.tokenizer is {setting}; "
            f"add --data.tokenizer {own.name}"
        )


def begin_from(origin: Saved, model: DiT, estimator: ImportanceEstimator | None) -> str:
    """Copy another model's weights into a new run's model, and its estimator's if both have one of the same shapes.

    Returns what was done, as a sentence. Raises UsageError if weights differ in shape (naming the file's first) or in meaning.
    """
    wrong = misfit(dict(origin.model.named_parameters()), dict(model.named_parameters()))
    if wrong is not None:
        raise UsageError(f"the weights of {origin.place} do not fit this run: {wrong}")
    for setting in MEANING:
        have, need = getattr(origin.model.config, setting), getattr(model.config, setting)
        if have != need:
            raise UsageError(f"{origin.place} has model.{setting} {have}, and this run {need}; add --model.{setting} {have}")
    if origin.model.mask_id != model.mask_id:
        raise UsageError(
            f"the mask of {origin.place} is token {origin.model.mask_id:,}, and that of data.tokenizer {model.mask_id:,}: they "
            "belong to different vocabularies"
        )
    load_parts(dict(model.named_parameters()), origin.model.named_parameters())
    sentence = f"weights begin as those of {origin.place} ({origin.what})"
    if estimator is None or estimator.network is None:
        return sentence
    shapes = [{n: p.shape for n, p in e.named_parameters()} for e in (origin.estimator, estimator) if e is not None]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        return f"{sentence}; the importance estimator begins anew"
    assert origin.estimator is not None
    load_parts(dict(estimator.named_parameters()), origin.estimator.named_parameters())
    return f"{sentence}, the importance estimator's too"
