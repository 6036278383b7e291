"""A corpus by name or path: the documents of its two splits, and where they came from.

`python-docs` needs no download, known names and hub:owner/name come through `datasets`, anything else is a local path. If a
corpus has no held-out split, a hash of each document's text decides its side. The choice depends neither on the order of the
documents nor on the machine, and a repeated text is never on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from atat_fast.config import DataConfig
from atat_fast.data import local, python_docs
from atat_fast.data import network as hub
from atat_fast.data.text import Prompted, valid_unicode
from atat_fast.errors import UsageError, nearest

Split = Literal["train", "valid"]
HELD_OUT_SEED = b"atat_fast held out 1"
HUB = "hub:"
VALID_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class HubSource:
    """A known corpus on the hub. `valid` None holds documents out of `train`; `regroup` joins WikiText's lines into articles."""

    repository: str
    configuration: str | None = None
    revision: str | None = None
    train: str = "train"
    valid: str | None = "validation"
    regroup: bool = False


KNOWN = {
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", regroup=True),
    "wikitext103": HubSource("Salesforce/wikitext", "wikitext-103-raw-v1", regroup=True),
    # It has no validation split; MDLM and its successors hold out the last 100,000 documents.
    "openwebtext": HubSource("Skylion007/openwebtext", train="train[:-100000]", valid="train[-100000:]"),
    # The repository is a loading script, which `datasets` no longer runs: this is the hub's own conversion.
    "lm1b": HubSource("billion-word-benchmark/lm1b", revision="refs/convert/parquet", valid="test"),
    "text8": HubSource("afmck/text8"),
}
NAMES = ("python-docs", *KNOWN)


@dataclass(frozen=True)
class Corpus:
    """Documents of two splits.

    Attributes:
        name: As in DataConfig.corpus.
        fingerprint: Plain values that change when the text does, known without reading it.
        provenance: Called after the text was read: where it came from, in plain values.
    """

    name: str
    fingerprint: dict[str, Any]
    read: Callable[[Split], Iterable[str]]
    provenance: Callable[[], dict[str, Any]]
    max_documents: int = 0

    def documents(self, split: Split) -> Iterator[str]:
        """Texts of `split` in a fixed order; blank ones are left out. Raises UsageError when the text cannot be read."""
        texts = (valid_unicode(text) for text in self.read(split) if text and not text.isspace())
        return itertools.islice(texts, self.max_documents or None)


class HeldOut:
    """Splits documents by a seeded hash of their text. A single document has its end held out.

    Args:
        read: Starts reading all documents anew.
        fraction: Expected share that is held out. Each side gets at least one document.
        remedy: What the user can do if all documents are the same.
    """

    def __init__(self, read: Callable[[], Iterable[str]], fraction: float, name: str, remedy: str) -> None:
        if not 0 < fraction < 1:
            raise UsageError(f"data.valid_fraction is {fraction}; it must lie between 0 and 1, for example 0.05")
        self._read, self._fraction, self._name, self._remedy = read, fraction, name, remedy
        self._threshold: int | None = None
        self._cut: int | None = None

    def provenance(self) -> dict[str, Any]:
        """What the manifest says if the split cut a single document; call it after documents were read."""
        return {} if self._cut is None else {"held_out": "the end of its one document"}

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of `split`. The first call may read up to the first document of each side once more."""
        if self._threshold is None:
            self._threshold = self._choose()
        for text in self._read():
            if self._cut is not None:
                if text and not text.isspace():
                    yield text[: self._cut] if split == "train" else text[self._cut :]
            elif (_hash(text) < self._threshold) == (split == "valid"):
                yield text

    def _choose(self) -> int:
        threshold = int(self._fraction * 2**64)
        lowest, highest, count, last = 2**64, -1, 0, ""
        for text in self._read():
            if text and not text.isspace():
                count, last = count + 1, text
                lowest, highest = min(lowest, _hash(text)), max(highest, _hash(text))
                if lowest < threshold <= highest:
                    return threshold
        if highest < 0:
            raise UsageError(f"corpus {self._name} holds no text")
        if count == 1 and isinstance(last, Prompted):
            raise UsageError(f"corpus {self._name} is one row, and nothing is left to hold out: {self._remedy}")
        if count == 1:
            self._cut = _end_of_text(last, self._fraction)
            return threshold
        if lowest == highest:
            raise UsageError(
                f"corpus {self._name} is {count:,} times the same document, so what is held out would be learned too: "
                f"{self._remedy}"
            )
        return highest if highest < threshold else lowest + 1


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` names; nothing is read yet. Raises UsageError for a name or path that does not exist."""
    name = config.corpus
    if config.max_documents < 0:
        raise UsageError(f"data.max_documents is {config.max_documents}; give a positive number, or 0 for all")
    if config.valid is not None and (name in NAMES or name.startswith(HUB)):
        raise UsageError(f"data.valid goes with a corpus that is a path; {name} has its own held-out text, so leave it out")
    if config.prompt_column is not None and (name == "python-docs" or name in KNOWN):
        raise UsageError(f"data.prompt_column {config.prompt_column!r} needs rows with columns, and corpus {name} has plain text")
    if name == "python-docs":
        held_out = HeldOut(python_docs.documents, config.valid_fraction, name, "this Python has no documentation; use a path")
        known = python_docs.fingerprint() | {"valid_fraction": config.valid_fraction}
        return Corpus(name, known, held_out.documents, python_docs.provenance, config.max_documents)
    if name in KNOWN or name.startswith(HUB):
        return _HubCorpus(config).corpus()
    return _local_corpus(config)


def _local_corpus(config: DataConfig) -> Corpus:
    name, column = config.corpus, config.text_column
    try:
        text = local.TextFiles(name, column, config.prompt_column)
    except UsageError:
        looks_like_path = name.lower().endswith(local.SUFFIXES) or name.startswith((".", "/", "~")) or local.exists(name)
        if looks_like_path:
            raise
        if hub.is_repository(name) and "/" in name:
            raise UsageError(f"there is no file or folder {name}; a data set of that name on the hub is hub:{name}") from None
        raise UsageError(
            f"there is no corpus {name!r}{nearest(name, NAMES)}; corpora are {', '.join(NAMES)}, hub:owner/name, or the path of "
            f"{local.FORMATS} or of a folder of them"
        ) from None
    train = text.fingerprint()
    known: dict[str, Any] = {"train": train, "text_column": column} | _prompts(config)
    source: dict[str, Any] = {"source": "local", "path": name, "bytes": sum(size for _, size, _ in train["files"])}
    if config.valid is None:
        held_out = HeldOut(text.documents, config.valid_fraction, name, "give held-out text with data.valid")
        known["valid_fraction"] = source["valid_fraction"] = config.valid_fraction
        return Corpus(name, known, held_out.documents, lambda: source | held_out.provenance(), config.max_documents)
    held = local.TextFiles(config.valid, column, config.prompt_column)
    valid = held.fingerprint()
    if valid["path"] == train["path"]:
        raise UsageError(f"data.valid and data.corpus are both {name}: a model must be measured on text it did not see")
    known["valid"], source["valid"] = valid, config.valid
    texts = {"train": text, "valid": held}
    return Corpus(name, known, lambda split: texts[split].documents(), lambda: source, config.max_documents)


def _prompts(config: DataConfig) -> dict[str, Any]:
    """What a fingerprint says of prompts."""
    return {} if config.prompt_column is None else {"prompt_column": config.prompt_column}


class _HubCorpus:
    """A corpus that `datasets` loads when the first document is asked for.

    Its fingerprint is its name and revision, so prepared tokens open without a network, and a change of the data set on the hub
    goes unnoticed. The manifest records the fingerprint of what was read.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.name = config.corpus
        if self.name in KNOWN:
            self.source = KNOWN[self.name]
        else:
            repository, _, configuration = self.name.removeprefix(HUB).partition(":")
            if not hub.is_repository(repository):
                raise UsageError(f"{self.name!r} names no data set; write hub:owner/name or hub:owner/name:configuration")
            self.source = HubSource(repository, configuration or None)
        self.held_out: HeldOut | None = None
        self.tables: dict[str, Any] = {}

    def corpus(self) -> Corpus:
        source = self.source
        known = {
            "repository": source.repository,
            "configuration": source.configuration,
            "revision": source.revision,
            "splits": [source.train, source.valid],
            "regroup": source.regroup,
            "text_column": self.config.text_column,
            "valid_fraction": self.config.valid_fraction,
        } | _prompts(self.config)
        return Corpus(self.name, known, self.read, self.provenance, self.config.max_documents)

    def read(self, split: Split) -> Iterable[str]:
        if not self.tables:
            self._load()
        if self.held_out is not None:
            return self.held_out.documents(split)
        return self._texts(split)

    def provenance(self) -> dict[str, Any]:
        return {
            "source": "hub",
            "repository": self.source.repository,
            "configuration": self.source.configuration,
            "revision": self.source.revision,
            "splits": {split: str(getattr(table, "split", split)) for split, table in self.tables.items()},
            "dataset_fingerprints": {split: str(getattr(table, "_fingerprint", "")) for split, table in self.tables.items()},
            "valid_fraction": self.config.valid_fraction if self.held_out is not None else None,
        } | (self.held_out.provenance() if self.held_out is not None else {})

    def _load(self) -> None:
        source = self.source
        if self.name in KNOWN:
            asked = {"train": source.train, "valid": source.valid}
            for split, expression in asked.items():
                self.tables[split] = hub.load_dataset(
                    source.repository, source.configuration, source.revision, expression, self.name
                )
            return
        found = hub.load_dataset(source.repository, source.configuration, source.revision, None, self.name)
        train = "train" if "train" in found else next(iter(found))
        valid = next((split for split in VALID_NAMES if split in found and split != train), None)
        self.tables["train"] = found[train]
        if valid is not None:
            self.tables["valid"] = found[valid]
        else:
            self.held_out = HeldOut(lambda: self._texts("train"), self.config.valid_fraction, self.name, "use another data set")

    def _texts(self, split: Split) -> Iterator[str]:
        table = self.tables[split]
        kinds = {"string": local.TEXT, "large_string": local.TEXT, "null": local.NOTHING}
        columns = {name: {kinds.get(getattr(kind, "dtype", ""), local.OTHER)} for name, kind in table.features.items()}
        asked, where = (
            local.response_column(self.config.text_column, self.config.prompt_column),
            f"data set {self.source.repository}",
        )
        column = local.choose_column(columns, asked, where)
        if self.config.prompt_column is not None:
            prompt = local.choose_column(columns, self.config.prompt_column, where)
            batches = table.select_columns([prompt, column]).iter(local.ROWS_AT_ONCE)
            return (
                Prompted.of(first or "", text)
                for batch in batches
                for first, text in zip(batch[prompt], batch[column], strict=True)
                if text and not text.isspace()
            )
        rows = (text or "" for batch in table.select_columns([column]).iter(local.ROWS_AT_ONCE) for text in batch[column])
        return articles(rows) if self.source.regroup else rows


_HEADING = re.compile(r" = (?!= ).+(?<! =) = ")


def articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's lines joined into articles.

    An article starts at a line ` = Title = ` between two blank lines. ` = = Section = = ` does not start one; nor does a formula
    that looks like a title, because text stands around it.
    """
    kept: list[str] = []
    lines = itertools.chain((row.rstrip("\r\n") for row in rows), [""])
    before, line = "", next(lines)
    for after in lines:
        if _HEADING.fullmatch(line) and not before.strip() and not after.strip() and any(kept):
            yield "\n".join(kept).strip("\n")
            kept = []
        kept.append(line)
        before, line = line, after
    yield "\n".join(kept).strip("\n")


def _end_of_text(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: after the next blank line, else line end, else space, if one comes soon."""
    end = len(text.rstrip())
    target = min(max(1, round(end * (1 - fraction))), max(1, end - 1))
    most = target + (end - target) // 2  # the end keeps at least half of its share
    for boundary in ("\n\n", "\n", " "):
        place = text.find(boundary, target, most)
        if place >= 0:
            return place + len(boundary)
    return target


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=HELD_OUT_SEED)
    return int.from_bytes(digest.digest(), "big")
