"""Text to tokens once: a flat memory map for each split, and a manifest that describes them.

A prepared folder holds train.bin and valid.bin, manifest.json and the tokenizer. A .bin file is ids as little-endian uint16, or
uint32 if the vocabulary needs it; one end-of-document token follows each document. The folder is written aside and renamed, so it
is whole or absent. Processes that prepare the same folder at once wait for the first.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from filelock import FileLock

from atat_fast.data.background import in_background
from atat_fast.data.corpora import Corpus, Split
from atat_fast.data.text import Prompted, pieces
from atat_fast.data.tokenizers import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer
from atat_fast.errors import UsageError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
BATCH_CHARACTERS = 1 << 17
HASHED_ON_OPEN = 256 << 20  # bytes; larger token files are checked by size alone, so that opening stays quick
CHUNK = 1 << 22
MUCH_UNKNOWN = 0.01  # of the characters
log = logging.getLogger("atat_fast.data")


class TokenSplit:
    """The tokens of one split, in a read-only memory map.

    Attributes:
        name: train or valid.
        tokens: [num_tokens] uint16 or uint32, documents one after another, each closed by its end-of-document token.
        num_tokens: Tokens, document ends included.
        num_bytes: UTF-8 bytes of the text.
        num_documents: Documents.
        rows: Of prompts and responses [num_documents, 2] int64: tokens of each document, its end included, and of its prompt.
            None for plain text.
        unknown_share: Share of the text's characters that the vocabulary lacks, 0 to 1; 0 if the manifest does not say.
        vocab_size: Ids a model of these tokens needs, the mask included.
        eos_id: The token that ends a document.
    """

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        counts = manifest["splits"][name]
        self.name = name
        self.num_tokens: int = counts["tokens"]
        self.num_bytes: int = counts["text_bytes"]
        self.num_documents: int = counts["documents"]
        self.unknown_share: float = counts.get("unknown_share", 0.0)
        self.vocab_size: int = manifest["tokenizer"]["model_vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.rows: np.ndarray | None = None
        self._fitting: dict[int, np.ndarray] = {}
        self._responses: tuple[int, int] = counts.get("response_tokens", 0), counts.get("response_bytes", 0)
        if "rows_sha256" in counts:
            self.rows = np.fromfile(folder / f"{name}.rows.bin", dtype="<i8").reshape(-1, 2)
            self._starts = np.concatenate(([0], self.rows[:, 0].cumsum()))
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.tokens: np.ndarray = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r", shape=(self.num_tokens,))

    def num_sequences(self, length: int) -> int:
        """Number of whole windows of `length` tokens; a partial last one does not count. Of prompts and responses the number of
        rows whose prompt leaves room for a token.
        """
        return self.num_tokens // length if self.rows is None else len(self._usable(length))

    def sequence(self, i: int, length: int) -> np.ndarray:
        """Window i: tokens i·length to (i+1)·length, a view [length]. Of prompts and responses row i, cut or padded with ends of
        document. Raises IndexError outside 0..num_sequences.
        """
        if not 0 <= i < self.num_sequences(length):
            raise IndexError(f"sequence {i} of {self.num_sequences(length)} in the {self.name} split")
        if self.rows is None:
            return self.tokens[i * length : (i + 1) * length]
        start, stop = self._starts[self._usable(length)[i] :][:2]
        tokens = self.tokens[start : min(stop, start + length)]
        return np.concatenate((tokens, np.full(length - len(tokens), self.eos_id, dtype=self.tokens.dtype)))

    def extents(self, sequences: list[int], length: int) -> np.ndarray | None:
        """Where responses of these sequences begin and end, [n, 2] int64: other tokens are never hidden. None for plain text."""
        if self.rows is None:
            return None
        rows = self.rows[self._usable(length)[sequences]]
        return np.stack((rows[:, 1], np.minimum(rows[:, 0], length)), axis=1)

    def _usable(self, length: int) -> np.ndarray:
        assert self.rows is not None
        if length not in self._fitting:
            self._fitting[length] = np.flatnonzero(self.rows[:, 1] < length)
        return self._fitting[length]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for; of prompts and responses that of the responses."""
        tokens, size = (self.num_tokens, self.num_bytes) if self.rows is None else self._responses
        return size / max(1, tokens)

    def require_sequences(self, length: int) -> None:
        """Raises UsageError if the split is shorter than one sequence."""
        if self.num_sequences(length) < 1:
            part = "training" if self.name == "train" else "held-out"
            if self.rows is not None:
                raise UsageError(
                    f"no prompt of the {part} rows is shorter than model.length {length:,}; the shortest has "
                    f"{int(self.rows[:, 1].min()):,} tokens"
                )
            raise UsageError(
                f"the {part} text is {self.num_tokens:,} tokens, shorter than one sequence of {length:,}; "
                f"use model.length {self.num_tokens} or less, or more text"
            )

    def token_counts(self) -> np.ndarray:
        """[vocab_size] int64: how often each id occurs; in responses, of prompts and responses."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, CHUNK):
            counts += np.bincount(self.tokens[start : start + CHUNK], minlength=self.vocab_size)
        if self.rows is not None:  # but for prompts
            prompts = self.rows[:, 1]
            place = np.repeat(self._starts[:-1] - prompts.cumsum() + prompts, prompts) + np.arange(prompts.sum())
            counts -= np.bincount(self.tokens[place], minlength=self.vocab_size)
        return counts

    def unigram_entropy(self) -> float:
        """Empirical entropy of a token of the split, in nats: the score of guessing by frequency alone."""
        counts = self.token_counts()
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())


def open_split(folder: str | Path, name: Split) -> TokenSplit:
    """A split of a prepared folder. Raises UsageError if the folder is damaged or no prepared corpus."""
    folder = Path(folder)
    manifest, problem = read_manifest(folder)
    if problem:
        raise UsageError(f"{folder} is not a prepared corpus that can be read: {problem}; delete it and prepare it again")
    return TokenSplit(folder, name, manifest)


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The folder's manifest, and what is wrong with the folder: '' if its files match the manifest."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return manifest, f"its format is {manifest['format']}, not {FORMAT}"
        size = np.dtype(manifest["dtype"]).itemsize
        for name in get_args(Split):
            file, counts = folder / f"{name}.bin", manifest["splits"][name]
            found = file.stat().st_size
            if found != counts["tokens"] * size:
                return manifest, f"{file.name} has {found:,} bytes instead of {counts['tokens'] * size:,}"
            if found <= HASHED_ON_OPEN and _sha256(file) != counts["sha256"]:
                return manifest, f"{file.name} is not what was written"
            if "rows_sha256" in counts and _sha256(folder / f"{name}.rows.bin") != counts["rows_sha256"]:
                return manifest, f"{name}.rows.bin is not what was written"
        fingerprint = manifest["tokenizer"]["fingerprint"]  # SHA-256 of the tokenizer's file
        if _sha256(folder / TOKENIZER_FILE) != fingerprint:
            return manifest, f"{TOKENIZER_FILE} is not what was written"
        if json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            return manifest, f"{SETTINGS_FILE} belongs to another tokenizer"
    except OSError as error:
        return {}, f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return {}, f"{MANIFEST_FILE} is damaged"
    return manifest, ""


def pack(
    folder: Path,
    corpus: Corpus,
    make_tokenizer: Callable[[], Tokenizer],
    settings: dict[str, Any],
    *,
    num_workers: int,
    progress: bool,
) -> None:
    """Make the prepared folder, unless another process made it meanwhile. Replace a damaged one, with a notice.

    Raises UsageError if the corpus has no text for a split, or the folder cannot be written.
    """
    parent = folder.parent
    with _write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parent / f".{folder.name}.lock")
        lock.acquire()
    try:
        if folder.exists():
            problem = read_manifest(folder)[1]
            if not problem:
                return
            log.warning("preparing %s anew: %s", folder, problem)
        for left_over in parent.glob(f".{folder.name}.part-*"):  # of a killed process: this one holds the lock
            shutil.rmtree(left_over, ignore_errors=True)
        with _write_errors(parent):
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=parent))
        try:
            tokenizer = make_tokenizer()
            with _write_errors(parent):
                _fill(aside, corpus, tokenizer, settings, num_workers, progress)
                aside.chmod(0o755)
                if folder.exists():
                    damaged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=parent))
                    folder.rename(damaged)  # onto an empty folder, which a rename replaces
                    shutil.rmtree(damaged, ignore_errors=True)
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        lock.release()


def _fill(folder: Path, corpus: Corpus, tokenizer: Tokenizer, settings: dict[str, Any], num_workers: int, progress: bool) -> None:
    dtype = "uint16" if tokenizer.model_vocab_size <= 1 << 16 else "uint32"
    splits = {}
    for name in get_args(Split):
        with _progress_bar(progress, f"tokenising {corpus.name}, {name}") as advance:
            path = folder / f"{name}.bin"
            splits[name] = _write_split(path, corpus.documents(name), tokenizer, dtype, num_workers, advance)
        if not splits[name]["documents"]:
            part = "for training" if name == "train" else "to hold out"
            raise UsageError(f"corpus {corpus.name} has no text {part}; choose another corpus, or give data.valid")
    tokenizer.save(folder)
    manifest = {
        "format": FORMAT,
        "corpus": corpus.name,
        "source": corpus.provenance(),
        "settings": settings,
        "settings_hash": settings_hash(settings),
        "tokenizer": {
            key: getattr(tokenizer, key) for key in ("name", "fingerprint", "vocab_size", "model_vocab_size", "mask_id", "eos_id")
        },
        "dtype": dtype,
        "splits": splits,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def identity(counts: dict[str, Any]) -> str:
    """What tells a split's tokens from others: their SHA-256, and that of the rows of prompts and responses."""
    return str(counts["sha256"]) + str(counts.get("rows_sha256", ""))


def settings_hash(settings: dict[str, Any]) -> str:
    """Twelve hexadecimal digits of a hash of the settings and the format."""
    return hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()[:12]


def _write_split(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: str, num_workers: int, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """Writes the split's token file; returns its counts."""
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0}
    extents: list[list[tuple[int, int]]] = []
    response_bytes = 0
    characters = unknown = 0
    example = ""
    digest = hashlib.sha256()
    little = np.dtype(dtype).newbyteorder("<")

    def encode(batch: list[Piece]) -> tuple[np.ndarray, int, int, int, int, str, list[tuple[int, int]], int]:
        texts = [piece.text for piece in batch]
        rows = tokenizer.encode_batch(texts)
        ids: list[int] = []
        found, responses, begin = [], 0, 0
        for i, (piece, row) in enumerate(zip(batch, rows, strict=True)):
            ids += row
            if piece.ends:
                ids.append(tokenizer.eos_id)
            if piece.answers:  # the piece before it is its prompt
                found.append((len(ids) - begin, len(rows[i - 1])))
                responses += len(piece.text.encode("utf-8"))
                begin = len(ids)
        tokens = np.array(ids, dtype=little)
        if (tokens == tokenizer.mask_id).any():
            raise UsageError(f"tokenizer {tokenizer.name} turns plain text into its mask token; choose another tokenizer")
        size = sum(len(text.encode("utf-8")) for text in texts)
        ended, characters = sum(piece.ends for piece in batch), sum(map(len, texts))
        return tokens, ended, size, characters, *tokenizer.lost(texts, rows), found, responses

    with path.open("wb") as file:
        for tokens, ended, size, length, lost, piece, found, responses in _ordered_map(
            encode, _batches(documents, tokenizer), num_workers
        ):
            data = tokens.tobytes()
            file.write(data)
            digest.update(data)
            counts["documents"] += ended
            counts["tokens"] += len(tokens)
            counts["text_bytes"] += size
            extents.append(found)
            response_bytes += responses
            characters, unknown, example = characters + length, unknown + lost, example or piece
            advance(ended, size)
        file.flush()
        os.fsync(file.fileno())
    share = unknown / max(characters, 1)
    if share > MUCH_UNKNOWN:
        log.warning(
            "tokenizer %s lacks %.1f %% of the characters of the %s split, %r for one: they become an unknown "
            "token or nothing; use a tokenizer made for this text, or bytes or bpe-N, which lose nothing",
            *(tokenizer.name, 100 * share, path.stem, example[:20]),
        )
    known: dict[str, Any] = {"unknown_share": share, "sha256": digest.hexdigest()}
    rows = np.array([extent for found in extents for extent in found], dtype="<i8").reshape(-1, 2)
    if len(rows):
        beside = path.with_suffix(".rows.bin")
        rows.tofile(beside)
        known["rows_sha256"] = _sha256(beside)
        known |= {"response_tokens": int((rows[:, 0] - rows[:, 1]).sum()), "response_bytes": response_bytes}
    return counts | known


class Piece(NamedTuple):
    """A part of a document. ends: whether it is the last.   answers: whether it is the response to the piece before it."""

    text: str
    ends: bool
    answers: bool = False


def _batches(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Pieces of about BATCH_CHARACTERS together. A prompt and its response are in one list."""
    # Some tokenizers mark the start of a text (a space put before it, say): their documents must stay whole.
    may_cut = tokenizer.encode("one two") == tokenizer.encode("one") + tokenizer.encode(" two")
    batch: list[Piece] = []
    characters = 0
    for document in documents:
        if isinstance(document, Prompted):
            batch += [Piece(document[: document.prompt], False), Piece(document[document.prompt :], True, answers=True)]
            characters += len(document)
        parts = [] if isinstance(document, Prompted) else list(pieces(document)) if may_cut else [document]
        for i, part in enumerate(parts):
            batch.append(Piece(part, i + 1 == len(parts)))
            characters += len(part)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ordered_map(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """map(function, items) on threads, results in order, at most two items ahead for each thread.

    Threads suffice: the tokenizers library works without Python's lock, and the rest (turning ids into an array) is a sixtieth of
    the work. Its own threads are switched off, so num_workers is the number that runs. An exception waits for the threads; Ctrl-C
    waits half a second.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    waiting: collections.deque[Future[Any]] = collections.deque()
    free, stop = threading.Semaphore(num_workers), threading.Event()

    def work(item: Any) -> Any:
        with free:
            return None if stop.is_set() else function(item)

    patience = None
    try:
        for item in items:
            waiting.append(in_background(work, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        patience = 0.5
        raise
    finally:
        stop.set()
        wait(waiting, timeout=patience)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _progress_bar(wanted: bool, title: str) -> Iterator[Callable[[int, int], None]]:
    if not (wanted and sys.stderr.isatty()):
        yield lambda documents, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    total = [0, 0]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, done="")

        def advance(documents: int, size: int) -> None:
            total[0] += documents
            total[1] += size
            bars.update(task, done=f"{total[0]:,} documents, {total[1] / 1e6:.1f} MB")

        yield advance


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise UsageError(f"no space is left for token files in {folder}; free some, or set another data.cache_dir") from error
        raise UsageError(
            f"cannot write token files in {folder} ({error.strerror or error}); set data.cache_dir or $ATAT_FAST_CACHE to a "
            "folder that can be written"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
