"""Long library calls on threads of their own, so that Ctrl-C works while they run."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

INTERRUPTED = 130
"""Exit status of a process that Ctrl-C ended."""
_in_background: set[Future[Any]] = set()


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call `function` on a thread of its own. Ctrl-C interrupts waiting for the result; it could not interrupt the call itself.

    An interrupted caller may leave the call running: the process does not wait for it at exit.
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
    """End the process at once if a call left by Ctrl-C still runs: it would crash Python by returning during exit."""
    if wait(set(_in_background), timeout=0.5).not_done:
        with contextlib.suppress(OSError, ValueError):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(INTERRUPTED)
