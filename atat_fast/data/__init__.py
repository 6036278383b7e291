"""Text for training: corpora, tokenizers, packed token files, and batches that depend only on the step.

Example:
    dataset = prepare(config.data)
    loader = SequenceLoader(dataset.train, length=1024, seed=1)
    tokens, sample_ids = loader.batch(first_sample=0, count=24)
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atat_fast.config import DataConfig
from atat_fast.data import packing
from atat_fast.data.corpora import open_corpus
from atat_fast.data.loader import SequenceLoader
from atat_fast.data.packing import TokenSplit, open_split
from atat_fast.data.tokenizers import Tokenizer, check_setting, make_tokenizer, setting_fingerprint
from atat_fast.errors import UsageError
from atat_fast.files import expanded

__all__ = ["Dataset", "SequenceLoader", "TokenSplit", "Tokenizer", "make_tokenizer", "open_split", "prepare"]


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus.

    Attributes:
        train: Tokens to learn from.
        valid: Held-out tokens.
        tokenizer: The tokenizer that made them.
        manifest: Source, tokenizer, counts and hashes, as in manifest.json.
        folder: The prepared folder.
    """

    train: TokenSplit
    valid: TokenSplit
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    folder: Path

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each split's tokens; a resumed run must have the same."""
        return {name: packing.identity(self.manifest["splits"][name]) for name in ("train", "valid")}

    def describe(self) -> str:
        """One line with the counts of both splits."""

        def counts(split: TokenSplit) -> str:
            return f"{split.num_documents:,} documents, {_megabytes(split.num_bytes)}, {split.num_tokens:,} tokens"

        end = self.manifest["source"].get("held_out")
        return f"{self.manifest['corpus']}: {counts(self.train)} for training; {counts(self.valid)} held out" + (
            f", {end}" if end else ""
        )


def prepare(
    config: DataConfig, progress: bool = True, tokenizer: Tokenizer | None = None, hashes: dict[str, str] | None = None
) -> Dataset:
    """The corpus as tokens: packed at the first call, opened at later ones. Several processes may call this at once.

    Args:
        config: What to read and where to keep it.
        progress: Show a bar on a terminal while text is tokenised.
        tokenizer: Use this instead of config.tokenizer; an evaluation passes the one its run carries.
        hashes: SHA-256 of each split's tokens, from a manifest. Prepared tokens with these hashes are used even if the text has
            changed since; if there are none, the text is read.

    Raises UsageError, one sentence each, for what the user can put right.
    """
    if config.num_workers < 0:
        raise UsageError(f"data.num_workers is {config.num_workers}; give a positive number, or 0 for one per core")
    cache = cache_folder(config)
    found = _with_hashes(cache, hashes, tokenizer) if hashes else None
    if found is not None:
        return found
    try:
        corpus = open_corpus(config)
    except UsageError as error:
        if hashes:
            raise UsageError(f"{error} (and {cache} does not hold the tokens that were made of it)") from error
        raise
    base = {"corpus": config.corpus, "source": corpus.fingerprint, "max_documents": config.max_documents}
    named = tokenizer is None or tokenizer.name == config.tokenizer
    if tokenizer is None:
        check_setting(config.tokenizer)
    candidates = []
    if named:
        candidates.append(base | {"tokenizer": setting_fingerprint(config.tokenizer)})
    if tokenizer is not None:
        candidates.append(base | {"tokenizer": tokenizer.fingerprint})
    for settings in candidates:
        dataset = _open(_folder(cache, settings), tokenizer)
        if dataset is not None:
            return dataset

    def make() -> Tokenizer:
        return tokenizer if tokenizer is not None else make_tokenizer(config.tokenizer, corpus.documents("train"))

    settings = candidates[-1]
    folder = _folder(cache, settings)
    packing.pack(folder, corpus, make, settings, num_workers=config.num_workers or _cores(), progress=progress)
    dataset = _open(folder, tokenizer)
    if dataset is None:
        raise UsageError(f"{folder} was damaged while it was being written; run again")
    return dataset


def cache_folder(config: DataConfig) -> Path:
    """The folder of prepared corpora: config.cache_dir, else $ATAT_FAST_CACHE, else ~/.cache/atat_fast."""
    return expanded(config.cache_dir or os.environ.get("ATAT_FAST_CACHE") or "~/.cache/atat_fast")


def _with_hashes(cache: Path, hashes: dict[str, str], tokenizer: Tokenizer | None) -> Dataset | None:
    """The prepared folder whose splits have these SHA-256 and this tokenizer, or None."""
    for file in sorted(cache.glob(f"*/{packing.MANIFEST_FILE}")):
        try:
            splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
            same = all(packing.identity(splits[name]) == value for name, value in hashes.items())
        except (OSError, ValueError, KeyError, TypeError):  # a damaged folder is no match
            continue
        dataset = _open(file.parent, tokenizer) if same else None
        if dataset is not None:
            return dataset
    return None


def _folder(cache: Path, settings: dict[str, Any]) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(settings["corpus"]).name).strip("-.")[:40] or "corpus"
    return cache / f"{name}-{packing.settings_hash(settings)}"


def _open(folder: Path, tokenizer: Tokenizer | None) -> Dataset | None:
    """The prepared folder, or None if it is missing, damaged, or made with a tokenizer other than the one given."""
    if not folder.is_dir():
        return None
    manifest, problem = packing.read_manifest(folder)
    if problem or (tokenizer is not None and tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]):
        return None
    train, valid = (TokenSplit(folder, name, manifest) for name in ("train", "valid"))
    return Dataset(train, valid, tokenizer or Tokenizer.load(folder), manifest, folder)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"
