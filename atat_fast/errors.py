"""The one exception that stands for "you can fix this": a sentence with the value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input from a user. Its text is one clear sentence; a command-line door prints it and exits with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word closest to `word`, or '' when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
