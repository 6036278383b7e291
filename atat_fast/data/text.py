"""Two small things done to text on its way to tokens: made valid, and cut where cutting changes no token."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 17
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 holds, turned into U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Consecutive parts of `text` of about `size` characters, each but the first starting with a single space and a word.

    There every pre-tokenizer that splits at spaces splits anyway, so the parts' tokens are the whole text's.
    """
    start = 0
    while len(text) - start > size:
        cut = _BETWEEN_WORDS.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text
