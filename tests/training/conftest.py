"""A corpus and a model small enough to train in a second."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = ("the", "a", "of", "to", "list", "dict", "value", "key", "returns", "raises", "file", "path", "open", "read", "close")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 documents."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [f'{{"text": "{i} {" ".join(chooser.choices(WORDS, k=60))}"}}' for i in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> list[str]:
    """Arguments of the train door for a run of 12 steps under tmp_path."""
    settings = {
        "data.corpus": corpus, "data.tokenizer": "bytes", "data.cache_dir": corpus.parent / "cache",
        "model.dim": 16, "model.layers": 1, "model.heads": 2, "model.length": 16, "model.dropout": 0.1,
        "train.max_steps": 12, "train.global_batch": 4, "train.log_every": 5, "eval.every": 6, "eval.sequences": 8,
        "sample.num_samples": 1, "sample.steps": 4, "run.root": tmp_path / "runs", "run.tensorboard": "false",
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
