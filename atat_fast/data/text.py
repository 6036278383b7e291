"""Two steps of text on its way to tokens: make it valid, and cut it where a cut changes no token."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 17
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def valid_unicode(text: str) -> str:
    """`text` with each lone surrogate, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Prompted(str):
    """A row of a prompt and a response: both texts, one after the other. prompt: characters of the first."""

    prompt: int

    @classmethod
    def of(cls, prompt: str, response: str) -> Prompted:
        """The row of these, each made valid Unicode."""
        first = valid_unicode(prompt)
        row = cls(first + valid_unicode(response))
        row.prompt = len(first)
        return row


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Consecutive parts of `text` of about `size` characters. Every part but the first starts with a single space and a word.

    Any pre-tokenizer that splits at spaces splits there, so the parts' tokens are those of the whole text.
    """
    start = 0
    while len(text) - start > size:
        cut = _BETWEEN_WORDS.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text
