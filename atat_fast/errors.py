"""The one exception for errors that a user can fix: a sentence with the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input from a user. Its text is one clear sentence; a command prints it and exits with status 2."""


SEEDS = 2**63
"""Number of seeds: an int64 tensor holds 63 bits without a sign."""


def check_seed(name: str, seed: int) -> None:
    """Raise UsageError for a seed outside 0 .. SEEDS - 1. name: of the setting."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"{name} is {seed}; give a whole number from 0 to {SEEDS - 1}")


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)', or '' if no known word is near. X: the known words that end in .word (--seed: --train.seed), else
    the one that `word` misspells or begins.
    """
    names, bare = list(known), word.lstrip("-")
    close = [name for name in names if name.endswith(f".{bare}")]
    close = close or difflib.get_close_matches(word, names, n=1, cutoff=0.65)
    close = close or [name for name in names if len(bare) > 2 and name.startswith(word)][:1]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The error's text, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
