"""Documents of local files, read as a stream.

- `.txt`: one document. A line that holds only <|endoftext|>, or a form feed, starts another; a blank line does not.
- `.jsonl`, `.ndjson`: one document per line, in the text column of an object. `.json`: such lines, or one array of objects.
- `.csv`, `.tsv`: one document per row, in the text column; the first row names the columns.
- `.parquet`: one document per row, in the text column.
- A folder: all such files under it, in the order of their paths; links are followed, hidden files are left out.

All but parquet may be packed (`.gz`, `.zst`). Text is UTF-8, or UTF-16 with a byte order mark; CR LF becomes LF. All files of one
`path` share one text column; a row without text in it is left out.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from atat_fast.data.text import Prompted
from atat_fast.errors import UsageError, first_line
from atat_fast.files import expanded

log = logging.getLogger(__name__)

LINES, TABLES = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
PACKED = (".gz", ".zst")
KINDS = (".txt", *LINES, *TABLES, ".parquet")
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS[:-1] for packed in PACKED))
SEPARATOR = "<|endoftext|>"
ROWS_AT_ONCE = 256
ROWS_LOOKED_AT = 20_000
"""Rows of all files together that are read to choose the text column: of each file at least 20 and at most 1,000."""
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
FORMATS = "a .txt, .jsonl, .json, .csv or .parquet file"

TEXT, NOTHING, OTHER = "text", "nothing", "other"
"""What was seen in a column."""
Columns = dict[str, set[str]]


def find_files(path: str) -> list[Path]:
    """The files that `path` stands for. Raises UsageError if there is nothing to read."""
    root = expanded(path)
    if not root.exists():
        raise UsageError(f"there is no file or folder {path}")
    if not root.is_dir():
        if _kind(root) is None:
            raise UsageError(f"{path} is not {FORMATS}; convert it, or rename plain text to .txt")
        return [root]
    found = [file for file in _walk(root) if _kind(file) is not None]
    if not found:
        raise UsageError(f"folder {path} holds no text: there is not {FORMATS} in it")
    return found


def _walk(root: Path) -> list[Path]:
    """Every visible file under a folder, in path order. Links are followed; each folder and file comes once."""
    seen: set[str] = set()
    files: list[Path] = []
    for folder, inside, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    once: dict[str, Path] = {}
    for file in sorted(files):
        if file.is_file():
            once.setdefault(os.path.realpath(file), file)
    return list(once.values())


def _kind(file: Path) -> str | None:
    """A file's kind by its name, such as .jsonl for DATA.JSONL.GZ; None if that kind is not read."""
    name = file.name.lower()
    return next((suffix.removesuffix(_packing(file)) for suffix in SUFFIXES if name.endswith(suffix)), None)


def _packing(file: Path) -> str:
    return next((packed for packed in PACKED if file.name.lower().endswith(packed)), "")


def without_folders(setting: str) -> str:
    """A corpus or tokenizer setting to show to others: a path's last part, any other setting as it is."""
    looks_local = setting.startswith(("/", ".", "~")) or setting.lower().endswith(SUFFIXES) or exists(setting)
    return Path(setting).name or setting if looks_local else setting


def exists(path: str) -> bool:
    """Whether there is a file or folder `path`."""
    return expanded(path).exists()


class TextFiles:
    """The documents under a path.

    path: a file, or a folder of them.   column: the text column; None finds it.   prompt: the column of prompts, if rows are
    prompts and responses; documents are then `Prompted`, and the text column is `response` unless it is named.
    Raises UsageError if there is nothing to read.
    """

    def __init__(self, path: str, column: str | None = None, prompt: str | None = None) -> None:
        self.path, self.asked, self.prompt = path, response_column(column, prompt), prompt
        self.files = find_files(path)
        self._column: str | None = None
        self._without: list[Path] = []
        self._noted = False

    def fingerprint(self) -> dict[str, Any]:
        """Path, size and modification time of every file: these change when the text does."""
        stats = [(file, file.stat()) for file in self.files]
        return {
            "path": str(expanded(self.path).resolve()),
            "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        }

    def documents(self) -> Iterator[str]:
        """Every document. Raises UsageError with the file, and the line or byte, if one cannot be read."""
        column = self._choose()
        empty: dict[Path, int] = defaultdict(int)
        for file in self.files:
            if file in self._without:
                continue
            with _readable(file):
                if _kind(file) == ".txt":
                    yield from _text(file)
                    continue
                read = [column, *([] if self.prompt is None else [self.prompt])]
                for place, row in _parquet(file, read) if _kind(file) == ".parquet" else _rows(file):
                    text = _text_in(row, column, place)
                    if self.prompt is not None:
                        blank = text is None or not text or text.isspace()
                        text = None if blank else Prompted.of(_text_in(row, self.prompt, place) or "", text or "")
                    if text is None:
                        empty[file] += 1
                    else:
                        yield text
        self._note(column, empty)

    def _choose(self) -> str:
        """The text column of all files; '' if no file has columns. Sets aside files that have columns but not this one."""
        if self._column is None:
            tables = [file for file in self.files if _kind(file) != ".txt"]
            most = max(20, min(1_000, ROWS_LOOKED_AT // max(1, len(tables))))
            seen = {file: _look(file, most) for file in tables}
            if self.prompt is not None and len(tables) < len(self.files):
                plain = next(file for file in self.files if file not in tables)
                raise UsageError(f"data.prompt_column {self.prompt!r} needs rows with columns, and {plain} is plain text")
            if not any(seen.values()):  # nothing but plain text, or no row anywhere
                self._column = ""
                return ""
            together: Columns = defaultdict(set)
            for columns in seen.values():
                for name, kinds in columns.items():
                    together[name] |= kinds
            where = str(self.files[0]) if len(self.files) == 1 else f"the {len(tables)} files of {self.path} that have columns"
            self._column = choose_column(together, self.asked, where)
            if self.prompt is not None:
                choose_column(together, self.prompt, where)
            self._without = [file for file, columns in seen.items() if columns and self._column not in columns]
        return self._column

    def _note(self, column: str, empty: Mapping[Path, int]) -> None:
        """Log once what was left out."""
        if self._noted:
            return
        self._noted = True
        root = expanded(self.path)
        other = [] if not root.is_dir() else [file for file in _walk(root) if _kind(file) is None]
        for what, files in ((f"no column {column!r}", self._without), ("a kind that is not read", other)):
            if files:
                names = ", ".join(str(file.relative_to(root)) for file in files[:5])
                more = f" and {len(files) - 5} more" if len(files) > 5 else ""
                log.warning("%s: left out %s%s (%s)", self.path, names, more, what)
        for file, count in empty.items():
            log.warning("%s: %s row(s) without text in column %r are left out", file, f"{count:,}", column)


def documents(path: str, text_column: str | None) -> Iterator[str]:
    """Every document under `path`; see `TextFiles`."""
    return TextFiles(path, text_column).documents()


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(its place in the file, object) for every line of a .jsonl, packed or not; nothing if it is missing or another kind."""
    if file.is_file() and _kind(file) == ".jsonl":
        with _readable(file):
            yield from _rows(file)


def response_column(asked: str | None, prompt: str | None) -> str | None:
    """The text column to look for: of rows with prompts it is `response` unless another is asked for."""
    return "response" if prompt is not None and asked is None else asked


def _text_in(row: Mapping[str, Any], column: str, place: str) -> str | None:
    text = row.get(column)
    if text is None or isinstance(text, str):
        return text
    raise UsageError(f"column {column!r} is not text in {place}: it is {json.dumps(text)[:40]}")


def choose_column(columns: Mapping[str, set[str]], asked: str | None, where: str) -> str:
    """The text column: `asked`, else "text", else the only one that holds text. Raises UsageError naming the columns.

    columns: what was seen in each. A column with NOTHING so far may turn out to be text; one with no kind at all will not.
    """
    names = ", ".join(columns) or "none"
    if asked is not None:
        if asked in columns and columns[asked] != {OTHER}:
            return asked
        fault = "is not text" if asked in columns else "is missing"
        raise UsageError(f"column {asked!r} {fault} in {where}; its columns are {names}")
    if "text" in columns and columns["text"] != {OTHER}:
        return "text"
    possible = [name for name, kinds in columns.items() if kinds and OTHER not in kinds]
    if len(possible) == 1:
        return possible[0]
    raise UsageError(
        f"{where} has {'no' if not possible else 'more than one'} text column; its columns are {names}: choose one with "
        "data.text_column"
    )


def _look(file: Path, most: int) -> Columns:
    """What the first rows of a file hold, by column, for `choose_column`."""
    if _kind(file) == ".parquet":
        return _parquet_columns(file)
    columns: Columns = defaultdict(set)
    with _readable(file):
        for count, (_, row) in enumerate(_rows(file), 1):
            for name, value in row.items():
                columns[name].add(TEXT if isinstance(value, str) else NOTHING if value is None else OTHER)
            if count == most:
                return columns
    return {name: kinds - {NOTHING} for name, kinds in columns.items()}


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except OSError as error:
        damaged = "; it is damaged or cut short" if _packing(file) and not error.errno else ""
        raise UsageError(f"cannot read {file}: {error.strerror or first_line(error)}{damaged}") from error
    except (pyarrow.ArrowException, csv.Error) as error:
        raise UsageError(f"{file} is not a {_kind(file)} file that can be read: {first_line(error)}") from error


def _open(file: Path) -> BinaryIO:
    """The file's bytes, unpacked."""
    if not _packing(file):
        return file.open("rb")
    import pyarrow

    name = {".gz": "gzip", ".zst": "zstd"}[_packing(file)]
    stream: Any = io.BufferedReader(pyarrow.input_stream(str(file), compression=name))
    return stream  # type: ignore[no-any-return]


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends. Raises UsageError if the file is neither UTF-8 nor UTF-16 with a mark."""
    with _open(file) as stream:
        start = stream.read(2)
        encoding = MARKS.get(start)
    with _open(file) as stream:
        if encoding is not None:
            yield from _utf16_lines(file, stream)
            return
        offset = 0
        for raw in stream:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{file} is not UTF-8 at byte {offset + error.start:,}; convert it, if it is Latin-1 with  "
                    "iconv -f LATIN1 -t UTF-8"
                ) from error
            if offset == 0:
                line = line.removeprefix("\ufeff")
                if "\0" in line[1:4:2] and len(raw) > 3:
                    raise UsageError(f"{file} looks like UTF-16 without a byte order mark; convert it to UTF-8")
            offset += len(raw)
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _utf16_lines(file: Path, stream: BinaryIO) -> Iterator[str]:
    try:
        for line in io.TextIOWrapper(stream, encoding="utf-16", newline="\n"):
            yield line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} begins as UTF-16 but is not valid ({error.reason}); convert it to UTF-8") from error


def _text(file: Path) -> Iterator[str]:
    kept: list[str] = []
    for line in _lines(file):
        parts = ["", ""] if line.strip() == SEPARATOR else line.split("\f")
        kept.append(parts[0])
        for part in parts[1:]:
            yield "".join(kept).strip("\n")
            kept = [part]
    yield "".join(kept).strip("\n")


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(its place in the file, row) for each row of a JSON file or a table."""
    kind = _kind(file) or ""
    if kind in TABLES:
        yield from _table(file, TABLES[kind])
        return
    lines = ((number, line) for number, line in enumerate(_lines(file), 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    rows: Iterator[tuple[str, Any]]
    if kind == ".json" and not _is_object(first[1]):
        found = _parse("".join([first[1], *(line for _, line in lines)]), str(file))
        several = found if isinstance(found, list) else [found]
        rows = ((f"row {number:,} of {file}", row) for number, row in enumerate(several, 1))
    else:
        places = ((f"line {number:,} of {file}", line) for number, line in itertools.chain([first], lines))
        rows = ((place, _parse(line, place)) for place, line in places)
    for place, row in rows:
        if not isinstance(row, dict):
            raise UsageError(f'{place} is not a JSON object such as {{"text": "..."}}')
        yield place, row


def _table(file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(_lines(file), delimiter=delimiter, strict=True)
    names = table.fieldnames or []
    if len(names) == 1 and any(other in names[0] for other in ";\t"):
        raise UsageError(
            f"the columns of {file} are not separated by {delimiter!r}: its first row is {names[0]!r}; a .csv has commas and a "
            ".tsv tabs, so convert or rename it"
        )
    for number, row in enumerate(table, 1):
        yield f"row {number:,} of {file}", {name: value for name, value in row.items() if name is not None}


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON: {error}") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_columns(file: Path) -> Columns:
    from pyarrow import parquet, types

    def kind(of: Any) -> str:
        of = of.value_type if types.is_dictionary(of) else of
        if types.is_null(of):
            return NOTHING
        return TEXT if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of) else OTHER

    with _readable(file), parquet.ParquetFile(file) as table:
        return {field.name: {kind(field.type)} for field in table.schema_arrow}


def _parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            known = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=known):
                for row in zip(*(batch.column(name).to_pylist() for name in known), strict=True):
                    yield str(file), dict(zip(known, row, strict=True))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} holds text that is not UTF-8: {error}") from error
