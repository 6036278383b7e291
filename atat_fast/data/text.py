"""Small things done to text on its way to tokens: made valid, cut where cutting changes no token, worked on in the background."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

PIECE_CHARACTERS = 1 << 17
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended
_in_background: set[Future[Any]] = set()
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

    A caller that was interrupted may leave the call running: a process that ends does not wait for it.
    """
    future: Future[Any] = Future()
    _in_background.add(future)
    future.add_done_callback(_in_background.discard)

    def run() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future


os.register_at_fork(after_in_child=_in_background.clear)  # a fork has none of these threads


@atexit.register
def _end_with_calls_running() -> None:
    """Ends the process at once if a call left by Ctrl-C still runs: one that returns while Python ends would crash it."""
    if wait(set(_in_background), timeout=0.5).not_done:
        with contextlib.suppress(OSError, ValueError):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(INTERRUPTED)
