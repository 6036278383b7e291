"""A corpus of 200 small documents, and its settings."""

import pytest

from atat_fast.config import DataConfig

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his")


@pytest.fixture
def config(tmp_path):
    """Each document has accents, digits and line breaks, and is another text."""
    lines = [" ".join(WORDS[(i * 7 + j * (j + i)) % len(WORDS)] for j in range(20 + i % 13)) for i in range(200)]
    texts = [f"Chapter {i}: café\n{line}.\n\nThe end, naturally." for i, line in enumerate(lines)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    cache = str(tmp_path / "cache")
    return DataConfig(corpus=str(tmp_path / "stories.txt"), tokenizer="bytes", cache_dir=cache, num_workers=2)
