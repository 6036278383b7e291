"""Undo a benchmark's word splitting: " , " back to ", ", " 's" back to "'s".

These are the replacements of MDLM's evaluation (from Megatron-LM), in its order, quirks included, because zero-shot perplexities
move by a tenth with them and models must be compared on the same characters. They are part of a frozen protocol: any change
changes a set's hash, which is printed beside its figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Step = tuple[str, str] | tuple[re.Pattern[str], str]
"""A replacement of a string, or of a pattern."""


def _run(text: str, steps: Sequence[Step]) -> str:
    for found, instead in steps:
        text = text.replace(found, instead) if isinstance(found, str) else found.sub(instead, text)
    return text


_WIKITEXT: list[Step] = [
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *((re.compile(rf"{left}\s*([^{right}]*?)\s*{right}"), instead) for left, right, instead in (
        (r"\(", r"\)", r"(\1)"), (r"\[", r"\]", r"[\1]"), ("{", "}", r"{\1}"), ('"', '"', r'"\1"'), ("'", "'", r"'\1'"),
    )),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]  # fmt: skip

_PTB: list[Step] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *[(" N ", " 1 ")] * 10,  # neighbours share a space, so one pass misses every other one
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]

_LM1B: list[Step] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("\N{POUND SIGN} ", "\N{POUND SIGN}"),
]


def wikitext(text: str) -> str:
    """WikiText's spaced punctuation, @-@ marks and headings."""
    return _run(text, _WIKITEXT)


def ptb(text: str) -> str:
    """Penn Treebank's contractions, N for numbers and <unk>."""
    return _run(text, _PTB)


def lm1b(text: str) -> str:
    """The One Billion Word benchmark's spaced punctuation and addresses."""
    return _run(text, _LM1B)


def lambada(text: str) -> str:
    """LAMBADA: straight quotation marks, and a line break before each passage."""
    return "\n" + _run(text, [("\N{LEFT DOUBLE QUOTATION MARK}", '"'), ("\N{RIGHT DOUBLE QUOTATION MARK}", '"')]).strip()


def scientific_papers(text: str) -> str:
    """PubMed's and arXiv's articles: WikiText's replacements, then LM1B's."""
    return lm1b(wikitext(text))


def plain(text: str) -> str:
    """The text as it is."""
    return text


Detokenizer = Callable[[str], str]
