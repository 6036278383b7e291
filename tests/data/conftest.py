from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from atat_fast.config import DataConfig

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def story() -> Callable[[int], str]:
    """Document number i: a few sentences with accents, digits and line breaks, each number another text."""

    def write(i: int) -> str:
        words = [WORDS[(i * 7 + j * (j + i)) % len(WORDS)] for j in range(20 + i % 13)]
        return f"Chapter {i}: café\n" + " ".join(words) + ".\n\nThe end, naturally."

    return write


@pytest.fixture
def texts(story: Callable[[int], str]) -> list[str]:
    return [story(i) for i in range(200)]


@pytest.fixture
def corpus_file(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path, corpus_file: Path) -> DataConfig:
    return DataConfig(corpus=str(corpus_file), tokenizer="bytes", cache_dir=str(tmp_path / "cache"), num_workers=2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of larger test files, which only developers have."""
    root = Path(os.environ.get("ATAT_FAST_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    if not root.is_dir():
        pytest.skip(f"no folder of shared test files at {root}: set ATAT_FAST_SHARED to one")
    return root
