"""Text of a canvas (token ids, some of them hidden), in the pieces that a reader sees.

A token is not always text by itself. It may be one byte of a character, or the end of one and the beginning of the next, and its
space may show only beside its neighbours. So neighbours are decoded together.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

HIDDEN = "\N{MEDIUM SHADE}"  # a hidden token
PART = "\N{DOTTED CIRCLE}"  # known tokens of a partly hidden character
BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # bytes of a character in UTF-8
MOST_JOINED = 16  # most tokens of one piece
JOINER = "\N{ZERO WIDTH JOINER}"
MODIFIERS = JOINER + "".join(map(chr, range(0x1F3FB, 0x1F400)))  # and skin colours
FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # two of these letters are a flag
_SHOWN = {i: f"^{chr(i ^ 64)}" for i in (*range(32), 127) if chr(i) not in "\t\n"}  # ^[ is a terminal's escape
_SHOWN |= {i: f"[U+{i:04X}]" for i in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Piece(NamedTuple):
    """Positions first .. end - 1 of a canvas. text: their text together, or None for one hidden token."""

    first: int
    end: int
    text: str | None


class Pieces:
    """Splits canvases of one tokenizer into pieces. Caches decoded tokens, since a sample's frames are much alike.

    decode:  ids -> text, broken UTF-8 as U+FFFD.   mask_id: the id of a hidden token.
    """

    def __init__(self, decode: Callable[[list[int]], str], mask_id: int) -> None:
        self.mask_id = mask_id
        self._decode: Callable[[tuple[int, ...]], str] = functools.lru_cache(maxsize=1 << 16)(lambda ids: decode(list(ids)))
        self._texts = functools.lru_cache(maxsize=1 << 11)(self._run)

    def __call__(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a canvas, from left to right; together they cover it.

        A character of several tokens is one piece, with its combining marks. Visible tokens of a partly hidden one are PART.
        Signs replace control characters, among them those that change text direction; tab and line feed stay. Apart from these
        signs, the texts of a canvas without hidden tokens add up to its decoded ids.
        """
        found: list[Piece] = []
        first = 0
        while first < len(ids):
            if ids[first] == self.mask_id:
                found.append(Piece(first, first + 1, None))
                first += 1
                continue
            end = next((i for i in range(first, len(ids)) if ids[i] == self.mask_id), len(ids))
            for size, text in self._texts(tuple(ids[first:end]), first > 0, end < len(ids)):
                found.append(Piece(first, first + size, text))
                first += size
        return found

    def _run(self, ids: tuple[int, ...], after_hidden: bool, before_hidden: bool) -> list[tuple[int, str]]:
        """(tokens, text) of the pieces of visible neighbours."""
        texts: list[tuple[int, str]] = []
        first, context = 0, (self.mask_id,) * after_hidden
        while first < len(ids):
            own = ids[first : first + 1]
            if BROKEN in (text := self._text(context, own)):
                own = ids[first : first + self._size(context, ids[first : first + MOST_JOINED])]
                text = self._text(context, own)
            texts.append((len(own), text))
            context, first = own, first + len(own)
        if after_hidden:
            texts = _part(texts, str.lstrip)
        if before_hidden:
            texts = _part(texts[::-1], str.rstrip)[::-1]
        if after_hidden and _is_mark(texts[0][1][:1]):
            texts[0] = (texts[0][0], PART + texts[0][1])
        found: list[tuple[int, str]] = []
        for size, text in texts:
            if found and _belong(found[-1][1], text):
                found[-1] = (found[-1][0] + size, found[-1][1] + text)
            else:
                found.append((size, text))
        return [(size, text.translate(_SHOWN)) for size, text in found]

    def _size(self, context: tuple[int, ...], ids: tuple[int, ...]) -> int:
        """How many ids to join, from a broken first one, so that less is broken. At least one."""
        size, broken = 1, self._text(context, ids[:1]).count(BROKEN)
        for more in range(2, len(ids) + 1):
            alone = self._decode(ids[more - 1 : more]).count(BROKEN)
            if not broken or not alone or more - size >= LONGEST:
                break
            together = self._text(context, ids[:more]).count(BROKEN)
            # Some tokenizers decode a character's bytes one by one until all are there: only the last one mends it.
            if not together or (more == size + 1 and together < broken + alone):
                size, broken = more, together
        return size

    def _text(self, context: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """The text that ids add after `context`, which decides their spaces; their text alone if its bytes break theirs."""
        before, both, alone = self._decode(context), self._decode(context + ids), self._decode(ids)
        added = both[len(before) :]
        return added if both.startswith(before) and added.count(BROKEN) <= alone.count(BROKEN) else alone


def _part(texts: list[tuple[int, str]], strip: Callable[[str, str], str]) -> list[tuple[int, str]]:
    """(tokens, text) that begin beside a hidden token, with broken bytes there as one PART. strip: strips that side."""
    count = tokens = 0
    for size, text in texts:
        if not text or text.strip(BROKEN) or tokens + size >= LONGEST:
            break
        count, tokens = count + 1, tokens + size
    if count:
        return [(tokens, PART), *texts[count:]]
    size, text = texts[0]
    rest = strip(text, BROKEN)
    if rest != text:
        text = PART + rest if strip is str.lstrip else rest + PART
    return [(size, text), *texts[1:]]


def _belong(left: str, right: str) -> bool:
    """Whether the end of `left` and the start of `right` read as one character, or `right` is empty."""
    if right[:1] in FLAGS:  # also if right is empty
        return not right or (len(left) - len(left.rstrip(FLAGS))) % 2 == 1
    return _is_mark(right[0]) or left.endswith(JOINER)


def _is_mark(letter: str) -> bool:
    return letter > "\u02ff" and (unicodedata.category(letter)[0] == "M" or letter in MODIFIERS)
