"""A corpus and a model small enough to train in a second, and ranks that torchrun starts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ("the", "a", "of", "to", "list", "dict", "value", "key", "returns", "raises", "file", "path", "open", "read", "close")
CASES = Path(__file__).parent / "rank_cases.py"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 documents."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [f'{{"text": "{i} {" ".join(chooser.choices(WORDS, k=60))}"}}' for i in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_at(corpus: Path) -> Callable[[Path], list[str]]:
    """Arguments of the train door for a run of 12 steps under a folder."""

    def arguments(folder: Path) -> list[str]:
        settings = {
            "data.corpus": corpus, "data.tokenizer": "bytes", "data.cache_dir": corpus.parent / "cache",
            "model.dim": 16, "model.layers": 1, "model.heads": 2, "model.length": 16, "model.dropout": 0.1,
            "train.max_steps": 12, "train.global_batch": 4, "train.log_every": 5, "eval.every": 6, "eval.sequences": 8,
            "sample.num_samples": 1, "sample.steps": 4, "run.root": folder / "runs", "run.tensorboard": "false",
        }  # fmt: skip
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return arguments


@pytest.fixture
def small(small_at: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    """The same under tmp_path."""
    return small_at(tmp_path)


def start_ranks(ranks: int, *command: Any, restarts: int = 0, **more: str) -> subprocess.Popen[str]:
    """torchrun with so many ranks of a command: rank_cases.py and a case's name, or -m and a module."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | more
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `start_ranks` to its end: torchrun(2, "case", *arguments, restarts=0, SETTING="value")."""

    def run(ranks: int, case: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        process = start_ranks(ranks, CASES, case, *arguments, **options)
        try:
            out, err = process.communicate(timeout=800)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def torchrun_started() -> Callable[..., subprocess.Popen[str]]:
    """Starts the train door on ranks and does not wait: torchrun_started(2, *arguments)."""
    return lambda ranks, *arguments, **options: start_ranks(ranks, "-m", "atat_fast.train", *arguments, **options)
