"""The zero-shot sets of MDLM's table, tokenised by its protocol, each with a hash of the tokens.

The protocol is frozen. Rows are read in order, blank ones included, and detokenised (data/detokenize.py). Each row is tokenised
by itself and closed by the end-of-document token. Every 1,000 rows are joined and cut into blocks of L - 2 tokens; the last part
is dropped. A block gets the start token before it and the end token after it (for GPT-2 both are <|endoftext|>), and all its L
tokens count in a likelihood. MDLM's own result depends on the number of tokenising processes, because each cuts its share by
itself; this is the result of one process.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from atat_fast.data import detokenize, local
from atat_fast.data import network as hub
from atat_fast.data.packing import TokenSplit
from atat_fast.data.text import valid_unicode
from atat_fast.data.tokenizers import Tokenizer
from atat_fast.errors import UsageError, nearest

ROWS_JOINED = 1_000
MOSTLY = 0.9  # of a set's tokens; a figure from less than that is not the set's
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a repository that is a loading script


@dataclass(frozen=True)
class ZeroShotSet:
    """Where a set lies on the hub, the split and column MDLM reads, and the detokenizer of its text."""

    repository: str
    split: str
    detokenizer: detokenize.Detokenizer
    configuration: str | None = None
    revision: str | None = None
    column: str = "text"


SETS = {
    "ptb": ZeroShotSet(
        "ptb-text-only/ptb_text_only", "validation", detokenize.ptb, revision=CONVERTED, column="sentence",
    ),
    "wikitext2": ZeroShotSet("Salesforce/wikitext", "validation", detokenize.wikitext, "wikitext-2-raw-v1"),
    "wikitext103": ZeroShotSet("Salesforce/wikitext", "validation", detokenize.wikitext, "wikitext-103-raw-v1"),
    "lm1b": ZeroShotSet("billion-word-benchmark/lm1b", "test", detokenize.lm1b, revision=CONVERTED),
    "lambada": ZeroShotSet("EleutherAI/lambada_openai", "test", detokenize.lambada, "default", CONVERTED),
    "ag_news": ZeroShotSet("fancyzhx/ag_news", "test", detokenize.plain),
    "pubmed": ZeroShotSet(
        "armanc/scientific_papers", "validation", detokenize.scientific_papers, "pubmed", CONVERTED, "article"
    ),
    "arxiv": ZeroShotSet("armanc/scientific_papers", "validation", detokenize.scientific_papers, "arxiv", CONVERTED, "article"),
}  # fmt: skip
MDLM_TABLE = ("ptb", "wikitext103", "lm1b", "lambada", "ag_news", "pubmed", "arxiv")
"""The seven columns of MDLM's zero-shot table; `all` stands for them."""


class TokenBlocks(TokenSplit):
    """Blocks of L tokens as a split that can be evaluated.

    blocks: [n, L] ids. text_bytes: UTF-8 bytes of the detokenised text in these blocks. source: where the rows came from; the
    numbers of rows, bytes and tokens in all of them; and tokens_kept, the share of the tokens that is in a block.
    """

    def __init__(self, name: str, blocks: np.ndarray, text_bytes: float, tokenizer: Tokenizer, source: dict[str, Any]) -> None:
        self.name, self.source = name, source
        self.tokens = blocks.reshape(-1)
        self.num_tokens = int(blocks.size)
        self.num_bytes = round(text_bytes)
        self.num_documents = int(source["rows"])
        self.rows = None
        self.unknown_share: float = source["unknown_share"]
        self.vocab_size, self.eos_id = tokenizer.model_vocab_size, tokenizer.eos_id

    def describe(self, length: int) -> str:
        """One line: the size of the set, and how much of it blocks of `length` hold."""
        kept = self.source["tokens_kept"]
        line = (
            f"set {self.name}: {self.source['rows']:,} rows, {self.source['tokens']:,} tokens; {kept:.1%} of them are in "
            f"{self.num_sequences(length):,} blocks of {length:,}"
        )
        if kept < MOSTLY:
            line += (
                f". What is measured is that part, not the set: the protocol drops what is left of every {ROWS_JOINED:,} rows; a "
                "model of a smaller length keeps more"
            )
        return line


def parse_sets(text: str) -> dict[str, str | None]:
    """The value of --zero_shot: names, or name=path for rows in a local file; `all` is MDLM's seven. Raises UsageError."""
    asked: dict[str, str | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, path = part.partition("=")
        for one in MDLM_TABLE if part == "all" else (name,):
            if one not in SETS:
                raise UsageError(f"there is no zero-shot set {one!r}{nearest(one, SETS)}; sets are {', '.join(SETS)}, or all")
            asked[one] = path or None
    if not asked:
        raise UsageError(f"--zero_shot names no set; sets are {', '.join(SETS)}, or all")
    return asked


def open_set(name: str, tokenizer: Tokenizer, length: int, path: str | None = None) -> TokenBlocks:
    """The set in blocks of `length` tokens. With `path`, rows come from a local .txt (a line is a row), .jsonl or .parquet.

    Raises UsageError if the set is unknown, out of reach, or does not fill a block.
    """
    if name not in SETS:
        raise UsageError(f"there is no zero-shot set {name!r}{nearest(name, SETS)}; sets are {', '.join(SETS)}")
    if length < 3:
        raise UsageError(f"a block has a start token, an end token and text, so {length} tokens are too few")
    known = SETS[name]
    counts = {"rows": 0, "bytes": 0, "tokens": 0, "characters": 0, "unknown": 0}
    rows = _local_rows(path, known.column) if path is not None else _hub_rows(name, known)
    detokenized = (valid_unicode(known.detokenizer(row)) for row in rows)
    blocks = list(_blocks(detokenized, tokenizer, length, counts))
    where = f"set {name}" if path is None else f"set {name}, read from {path},"
    if not blocks:
        joined_rows = f"every {ROWS_JOINED:,} of them are joined, and " if counts["rows"] > ROWS_JOINED else ""
        raise UsageError(
            f"{where} has {counts['rows']:,} rows and {counts['tokens']:,} tokens; {joined_rows}that is too few for one block of "
            f"{length:,}: give more text, or a model of a smaller length"
        )
    source: dict[str, Any] = {"repository": known.repository, "configuration": known.configuration, "split": known.split}
    source = {"path": path} if path is not None else source
    joined = np.concatenate(blocks)
    kept = joined.shape[0] * (length - 2) / counts["tokens"]
    source |= {count: counts[count] for count in ("rows", "bytes", "tokens")} | {"tokens_kept": kept}
    source["unknown_share"] = counts["unknown"] / max(1, counts["characters"])
    return TokenBlocks(name, joined, counts["bytes"] * kept, tokenizer, source)


def tokens_hash(split: TokenSplit, length: int, sequences: int = 0) -> str:
    """SHA-256 of the tokens an evaluation of `sequences` sequences (0: all) reads: L, then ids as little-endian uint32."""
    available = split.num_sequences(length)
    wanted = min(sequences or available, available)
    digest = hashlib.sha256(f"{length}\n".encode())
    for i in range(wanted):
        digest.update(np.ascontiguousarray(split.sequence(i * available // wanted, length), dtype="<u4").tobytes())
    return digest.hexdigest()


def _blocks(rows: Iterable[str], tokenizer: Tokenizer, length: int, counts: dict[str, int]) -> Iterator[np.ndarray]:
    """[n, length] for each group of rows that fills a block. Adds to `counts` as rows are read."""
    for group in _groups(rows, ROWS_JOINED):
        encoded = tokenizer.encode_batch(group)
        ids = [i for row in encoded for i in (*row, tokenizer.eos_id)]
        counts["rows"] += len(group)
        counts["bytes"] += sum(len(row.encode("utf-8")) for row in group)
        counts["tokens"] += len(ids)
        counts["characters"] += sum(map(len, group))
        counts["unknown"] += tokenizer.lost(group, encoded)[0]
        inner = length - 2
        count = len(ids) // inner
        if count:
            blocks = np.empty((count, length), dtype=np.uint32)
            blocks[:, 0], blocks[:, -1] = tokenizer.bos_id, tokenizer.eos_id
            blocks[:, 1:-1] = np.array(ids[: count * inner], dtype=np.uint32).reshape(count, inner)
            if (blocks == tokenizer.mask_id).any():
                raise UsageError(f"tokenizer {tokenizer.name} turns plain text into its mask token; choose another tokenizer")
            yield blocks


def _groups(rows: Iterable[str], size: int) -> Iterator[list[str]]:
    rows = iter(rows)
    while group := list(itertools.islice(rows, size)):
        yield group


def _hub_rows(name: str, known: ZeroShotSet) -> Iterator[str]:
    remedy = f"give its rows as a file with {name}=PATH, or download the data set where there is a network"
    table = hub.load_dataset(
        known.repository, known.configuration, known.revision, known.split, name, what="zero-shot set", remedy=remedy
    )
    if known.column not in table.features:
        raise UsageError(f"zero-shot set {name}: data set {known.repository} has no column {known.column}")
    for batch in table.select_columns([known.column]).iter(local.ROWS_AT_ONCE):
        yield from (text or "" for text in batch[known.column])


def _local_rows(path: str, column: str) -> Iterator[str]:
    files = local.find_files(path)
    if len(files) > 1:
        raise UsageError(f"a zero-shot set is one file, and {path} holds {len(files)}; give the one with the rows")
    if files[0].suffix == ".txt":
        try:
            yield from files[0].read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {files[0]} as UTF-8: {error}") from error
        return
    try:
        next(local.documents(path, column), None)
    except UsageError as error:
        if f"column {column!r} is missing" not in str(error):
            raise
        yield from local.documents(path, None)
    else:
        yield from local.documents(path, column)
