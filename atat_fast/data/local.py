"""Documents of local files, read as a stream.

- `.txt`: one document, or several where a line holds nothing but <|endoftext|> or where there is a form feed. Blank lines
  separate nothing: they are part of most texts. UTF-8, with or without a byte order mark; CR LF becomes LF.
- `.jsonl`: one document per line, in the text column of an object.
- `.parquet`: one document per row, in the text column.
- A folder: all such files under it, in the order of their paths; hidden ones are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from atat_fast.errors import UsageError

SUFFIXES = (".txt", ".jsonl", ".parquet")
SEPARATOR = "<|endoftext|>"
ROWS_AT_ONCE = 256


def find_files(path: str) -> list[Path]:
    """The files that `path` stands for. Raises UsageError when there is nothing to read."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UsageError(f"there is no file or folder {path}")
    if root.is_dir():
        found = [file for file in sorted(root.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        if not found:
            raise UsageError(f"folder {path} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
        return found
    if root.suffix not in SUFFIXES:
        raise UsageError(f"{path} is none of {', '.join(SUFFIXES)}; convert it, or rename plain text to .txt")
    return [root]


def without_folders(setting: str) -> str:
    """A corpus or tokenizer setting that may be shown to others: a path's last part, and any other setting as it is."""
    looks_local = setting.startswith(("/", ".", "~")) or setting.endswith((*SUFFIXES, ".json")) or exists(setting)
    return Path(setting).name or setting if looks_local else setting


def exists(path: str) -> bool:
    """Whether there is a file or folder `path`."""
    return Path(path).expanduser().exists()


def identity(path: str) -> dict[str, Any]:
    """Path, size and modification time of every file: what tells one state of the text from another."""
    stats = [(file, file.stat()) for file in find_files(path)]
    return {
        "path": str(Path(path).expanduser().resolve()),
        "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    }


def documents(path: str, text_column: str | None) -> Iterator[str]:
    """Every document under `path`. Raises UsageError with the file, and the line or byte, where one cannot be read."""
    for file in find_files(path):
        try:
            if file.suffix == ".txt":
                yield from _text(file)
            elif file.suffix == ".jsonl":
                yield from _jsonl(file, text_column)
            else:
                yield from _parquet(file, text_column)
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror or error}") from error


def choose_column(strings: Sequence[str], columns: Sequence[str], asked: str | None, where: str) -> str:
    """The text column: `asked`, else "text", else the only one of `strings`. Raises UsageError naming the columns."""
    if asked is not None:
        if asked not in strings:
            fault = "is not text" if asked in columns else "is missing"
            raise UsageError(f"column {asked!r} {fault} in {where}; its columns are {', '.join(columns) or 'none'}")
        return asked
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UsageError(
        f"{where} has {'no' if not strings else 'more than one'} text column; its columns are "
        f"{', '.join(columns) or 'none'}: choose one with data.text_column"
    )


def _lines(file: Path) -> Iterator[str]:
    offset = 0
    with file.open("rb") as stream:
        for raw in stream:
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{file} is not UTF-8 at byte {offset + error.start:,}; convert it to UTF-8") from error
            if offset == 0:
                line = line.removeprefix("\ufeff")
            offset += len(raw)
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _text(file: Path) -> Iterator[str]:
    kept: list[str] = []
    for line in _lines(file):
        parts = ["", ""] if line.strip() == SEPARATOR else line.split("\f")
        kept.append(parts[0])
        for part in parts[1:]:
            yield "".join(kept).strip("\n")
            kept = [part]
    yield "".join(kept).strip("\n")


def _jsonl(file: Path, text_column: str | None) -> Iterator[str]:
    column = None
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number:,} of {file} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f'line {number:,} of {file} is not a JSON object such as {{"text": "..."}}')
        if column is None:
            strings = [name for name, value in row.items() if isinstance(value, str)]
            column = choose_column(strings, list(row), text_column, f"{file}, line {number:,}")
        text = row.get(column, row)
        if text is None:
            continue
        if not isinstance(text, str):
            fault = "is missing" if text is row else "is not text"
            raise UsageError(f"column {column!r} {fault} in line {number:,} of {file}; its columns are {', '.join(row)}")
        yield text


def _parquet(file: Path, text_column: str | None) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            fields = list(table.schema_arrow)
            strings = [field.name for field in fields if _is_string(field.type)]
            column = choose_column(strings, [field.name for field in fields], text_column, str(file))
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not a parquet file that can be read: {str(error).splitlines()[0]}") from error


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
