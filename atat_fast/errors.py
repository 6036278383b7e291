"""The one exception that stands for "you can fix this": a sentence with the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input from a user. Its text is one clear sentence; a command-line door prints it and exits with status 2."""


SEEDS = 2**63
"""How many seeds there are: random numbers take 64 bits of one, and no tensor holds more than 63 without a sign."""


def check_seed(name: str, seed: int) -> None:
    """Raise UsageError for a seed that no random number takes. name: of the setting."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"{name} is {seed}; give a whole number from 0 to {SEEDS - 1}")


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word that `word` begins or is closest to, or '' when nothing is close."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.65)
    close = close or [longer for longer in words if len(word) > 2 and longer.startswith(word)]
    return f" (did you mean {close[0]}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
