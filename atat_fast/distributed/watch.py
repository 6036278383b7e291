"""A watch over ranks that wait for each other: if they stop, it names the rank that holds the others back.

The training loop calls `mark`, which adds one to a counter; every rank counts the same marks. A thread publishes this rank's
count through the launcher's store. After `timeout` seconds without a mark it reads the others', names the rank that is silent or
behind, and all ranks exit with status 1, after which a launcher restarts them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from atat_fast.distributed.ranks import Ranks


class RankState(NamedTuple):
    """How far a rank is. patient: whether it has no time limit now."""

    marks: int
    step: int
    doing: str
    patient: bool


class Watch:
    """Counts this rank's marks, and watches the other ranks in a thread; does nothing in a single process.

    timeout: seconds without a mark after which the run ends.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks, self.timeout = ranks, timeout
        self.state = RankState(0, 0, "starting", False)
        self._moved = time.monotonic()
        self._news = 0  # grows while the thread lives
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.size > 1:
            self._interval = min(5.0, timeout / 4)
            # Its own connection: the process group may be waiting in the other one.
            self._store = PrefixStore(
                f"atat_fast/watch/{ranks.launch.restarts}",
                TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=datetime.timedelta(seconds=max(5.0, timeout)),
                ),
            )
            self._tell()
            ranks.barrier()  # every rank has published a state
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def mark(self, step: int, doing: str) -> None:
        """Count one mark: this rank begins `doing`, which every rank does at this point."""
        self.state = self.state._replace(marks=self.state.marks + 1, step=step, doing=doing)
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """No time limit within: this rank does something slow that others wait for."""
        before = self.state
        self.state = before._replace(doing=doing, patient=True)
        try:
            yield
        finally:
            self.state = self.state._replace(doing=before.doing, patient=False)
            self._moved = time.monotonic()

    def stop(self) -> None:
        """End the watch."""
        self._done.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
            self._thread = None

    def _tell(self) -> None:
        self._news += 1
        self._store.set(str(self.ranks.rank), json.dumps([self._news, *self.state]))

    def _read(self) -> tuple[list[int], list[RankState]]:
        told = [json.loads(self._store.get(str(rank))) for rank in range(self.ranks.size)]
        return [news for news, *_ in told], [RankState(*state) for _, *state in told]

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ends with the launcher, which ends this process too
            while not self._done.wait(self._interval):
                self._tell()
                if not self.state.patient and time.monotonic() - self._moved > self.timeout:
                    self._look()

    def _look(self) -> None:
        """Find the ranks that hold the others back; if there are any, end the process."""
        marks, (before, _) = self.state.marks, self._read()
        if self._done.wait(3 * self._interval):
            return
        self._tell()
        news, now = self._read()
        silent = [r for r, (a, b) in enumerate(zip(before, news, strict=True)) if a == b]
        if self.state.marks != marks or any(state.patient for r, state in enumerate(now) if r not in silent):
            return
        least = min(state.marks for state in now)
        behind = silent or [r for r, state in enumerate(now) if state.marks == least]
        speaker = min(
            r for r in range(self.ranks.size) if r not in silent and (r not in behind or len(behind) == self.ranks.size)
        )
        if self.ranks.rank == speaker:
            print(f"error: {verdict(now, behind, silent, self.timeout)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # once one rank exits, the launcher ends all: let the speaker print first
        os._exit(1)


def verdict(states: list[RankState], behind: list[int], silent: list[int], seconds: float) -> str:
    """The sentence that the run ends with."""
    waited = f"for {seconds:g} seconds (parallel.timeout)"
    if len(behind) == len(states):
        where = states[0]
        return f"no rank has moved {waited}: all are {where.doing}, step {where.step + 1:,}; look at the network between them"
    names = f"rank {behind[0]} has" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} have"
    where, what = states[behind[0]], "said nothing" if silent else "not moved"
    return f"{names} {what} {waited}: last seen {where.doing}, step {where.step + 1:,}, while the others wait"
