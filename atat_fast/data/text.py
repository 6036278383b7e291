"""Small things done to text on its way to tokens: made valid, cut where cutting changes no token, worked on in the background."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

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


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Calls `function` on a thread of its own. Waiting for the result hears Ctrl-C, which a long call of a library does not.

    The thread is a daemon: a process that is told to end does not wait for the call.
    """
    future: Future[Any] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future
