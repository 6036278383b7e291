"""Ways a run ends before its last step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Diverged(RuntimeError):
    """The loss or a gradient is no longer finite. Its text names the step, the rank and the last good checkpoint.

    everywhere: whether all ranks raise it, so that only rank 0 prints it.
    """

    def __init__(self, text: str, *, everywhere: bool = True) -> None:
        super().__init__(text)
        self.everywhere = everywhere


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the run, which was saved. code: the exit status, 128 + the signal; launchers restart on it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM go into the list instead of ending the process; a second one ends it."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
