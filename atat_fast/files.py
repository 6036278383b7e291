"""Writing files so that nothing is lost: a reader sees the old file or the new one, never half of one.

A file is written under a unique temporary name beside its target and renamed. If two writers write one file, the last to finish
wins. Links are followed. A target that is not a regular file (a pipe, /dev/stdout) is written directly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from atat_fast.errors import UsageError, first_line

ASIDE = ".part"
"""Ending of temporary names, which begin with a dot and the target's name."""


def expanded(path: str | Path) -> Path:
    """The path with ~ and ~user expanded, or unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def replacing(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """An open file that replaces `path` at the end of the block, or disappears if the block raises.

    Text is UTF-8; lone surrogates are written as U+FFFD. Raises OSError if the disk refuses.
    """
    target = Path(os.path.realpath(path))
    text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "errors": "replace"}
    mode = "wb" if binary else "w"
    try:
        found: int | None = target.stat().st_mode
    except FileNotFoundError:
        found = None
    if found is not None and not stat.S_ISREG(found):
        with target.open(mode, **text) as stream:
            yield stream
        return
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=ASIDE, dir=target.parent)
    try:
        with open(handle, mode, **text) as stream:
            yield stream
            stream.flush()
            os.fsync(handle)
        os.chmod(name, _new_file_mode() if found is None else stat.S_IMODE(found))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def check_target(path: str | Path) -> None:
    """Raise UsageError for a file that cannot be written, as far as can be known before writing."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: its folder does not exist")


def write_text(path: str | Path, text: str) -> None:
    """Write this text as the whole file. Raises OSError."""
    with replacing(path) as stream:
        stream.write(text)


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill. It replaces `folder` at the end of the block, or disappears if the block raises."""
    folder = Path(folder).absolute()
    aside = _empty_folder(folder)
    try:
        aside.chmod(0o777 & ~_umask())
        yield aside
        if not folder.exists():
            aside.rename(folder)
            return
        old = folder.rename(_empty_folder(folder))  # a rename replaces an empty folder
        try:
            aside.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left unfinished in this folder. Only for its single writer."""
    for path in folder.glob(f".*{ASIDE}"):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, or leave it if the disk refuses.

    A folder is renamed first: if the process is killed meanwhile, `remove_leftovers` finds the rest.
    """
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not path.name.endswith(ASIDE):
            path = path.rename(_empty_folder(path))
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(place: str | Path) -> Iterator[None]:
    """Turn disk errors into a UsageError that says where and why."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UsageError(f"cannot write to {place}: {reason}") from error


def _empty_folder(beside: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=ASIDE, dir=beside.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _new_file_mode() -> int:
    return 0o666 & ~_umask()
