"""A model that is evaluated, sampled or played with: from a run's checkpoint, or from a saved model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atat_fast.config import Config, from_dict
from atat_fast.data.tokenizers import Tokenizer
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.runs import checkpoint


@dataclass(frozen=True)
class Subject:
    """A model on the CPU with what belongs to it.

    config: the settings it was trained under, the defaults where nobody knows them.   place: the folder it was read from.
    facts: step and weights, as records say them.   corpus: what it was trained on; None where nobody knows.
    trained_on: SHA-256 of the tokens of each split, {} where nobody knows.
    """

    model: DiT
    tokenizer: Tokenizer
    estimator: ImportanceEstimator | None
    identity: IdentitySchedule | None
    config: Config
    place: str
    facts: dict[str, Any]
    title: str
    corpus: str | None
    trained_on: dict[str, Any]


def open_subject(
    *, run: str | None, model: str | None, tokenizer: str | None = None, which: str = "best", average: bool = True,
    importance: bool = True,
) -> Subject:  # fmt: skip
    """The model of a run (a run folder, or one of its checkpoints), or a saved model (a folder, or owner/name on the hub).

    which: best or last checkpoint of the run. average: its averaged weights rather than the last step's. importance: whether the
    estimator of a run is read too. tokenizer: what reads text for a saved model that has none. Raises UsageError.
    """
    if (run is None) == (model is None):
        raise UsageError("say which model: --run runs/NAME, a folder of training, or --model FOLDER, a saved model")
    if tokenizer is not None and model is None:
        raise UsageError("--tokenizer goes with --model; a run carries its own")
    if run is not None:
        saved = checkpoint.find(Path(run), which)
        network, reads = checkpoint.load_model(saved, average=average)
        estimator = checkpoint.load_importance(saved, average=average) if importance else None
        weights = "ema" if average else "raw"
        facts = {"checkpoint": str(saved.path), "step": saved.step, "weights": weights}
        title = f"{saved.path}  step {saved.step:,}  {weights} weights"
        trained_on, config = saved.manifest.get("data", {}), saved.config
        identity = checkpoint.load_identity(saved)
        place = str(saved.path)
        return Subject(network, reads, estimator, identity, config, place, facts, title, config.data.corpus, trained_on)
    assert model is not None
    found = hub.from_pretrained(model, tokenizer=tokenizer)
    known = found.facts.get("config")
    config = from_dict(known) if isinstance(known, dict) else Config()
    facts = {"model": model} | {name: found.facts[name] for name in ("step", "weights") if name in found.facts}
    title = f"{model}" + (f"  step {facts['step']:,}  {facts.get('weights', '')} weights" if "step" in facts else "")
    trained_on = found.facts.get("data", {}).get("sha256", {})
    corpus = config.data.corpus if isinstance(known, dict) else None
    return Subject(found.model, found.tokenizer, found.estimator, found.identity, config, model, facts, title, corpus, trained_on)
