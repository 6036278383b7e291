"""A watch over ranks that wait for each other: if they stop, it names the rank that holds the others back.

The training loop calls `mark`, which adds one to a counter; every rank counts the same marks. A thread publishes this rank's
count through the launcher's store. After `timeout` seconds without a mark it reads the others', names the rank that is silent or
behind, and all ranks exit with status 1, after which a launcher restarts them.

A rank that waits inside a collective is deaf to SIGTERM, for Python's handlers run between its own instructions. So the thread
hears of signals too, and ends a rank that has not moved soon after one. What the ranks did lies in the run's folder then:
hang/rank-N.json has this rank's stack and torch's record of its last collectives.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from atat_fast.distributed.ranks import Ranks

GRACE = 8.0
"""Seconds after a signal without a mark, and at least twice the longest time between two marks, after which a rank is ended."""
HANG = "hang"
"""Folder in a run's for what hanging ranks were doing."""


class RankState(NamedTuple):
    """How far a rank is. patient: whether it has no time limit now."""

    marks: int
    step: int
    doing: str
    patient: bool


class Watch:
    """Counts this rank's marks, and watches the other ranks in a thread; does nothing in a single process.

    timeout: seconds without a mark after which the run ends. folder: the run's.
    """

    def __init__(self, ranks: Ranks, timeout: float, folder: Path) -> None:
        self.ranks, self.timeout, self.folder = ranks, timeout, folder
        self.state = RankState(0, 0, "starting", False)
        self._moved = time.monotonic()
        self._longest = 0.0  # seconds between two marks so far
        self._told = 0  # the signal that came, if any
        self._news = 0  # grows while the thread lives
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if ranks.size > 1:
            self._interval = min(5.0, timeout / 4)
            self._bell, bell = socket.socketpair()
            bell.setblocking(False)
            self._bells = bell, signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
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
        now = time.monotonic()
        if not self.state.patient:
            self._longest = max(self._longest, now - self._moved)
        self.state = self.state._replace(marks=self.state.marks + 1, step=step, doing=doing)
        self._moved = now

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
            bell, before = self._bells
            signal.set_wakeup_fd(before)
            bell.close()  # which wakes the thread
            self._thread.join(timeout=10)
            self._thread = None
            self._bell.close()

    def _tell(self) -> None:
        self._news += 1
        self._store.set(str(self.ranks.rank), json.dumps([self._news, *self.state]))

    def _read(self) -> tuple[list[int], list[RankState]]:
        told = [json.loads(self._store.get(str(rank))) for rank in range(self.ranks.size)]
        return [news for news, *_ in told], [RankState(*state) for _, *state in told]

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ends with the launcher, which ends this process too
            while not self._wait(1.0 if self._told else self._interval):
                self._tell()
                still = 0.0 if self.state.patient else time.monotonic() - self._moved
                if self._told and still > max(GRACE, 2 * self._longest):
                    self._end_deaf(still)
                elif still > self.timeout:
                    self._look()

    def _wait(self, seconds: float) -> bool:
        """Wait for a signal, or for so long. Returns whether the watch is over."""
        if select.select([self._bell], [], [], seconds)[0]:
            for number in self._bell.recv(64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._told = self._told or number
        return self._done.is_set()

    def _end_deaf(self, seconds: float) -> None:
        """End this process after a signal that its main thread cannot hear. One rank says so for all."""
        name, where = signal.Signals(self._told).name, self.state
        try:
            self._write_hang()
            if self._store.add("leaving", 1) == 1:
                still = f"rank {self.ranks.rank} has not moved for {seconds:.0f} seconds ({where.doing}, step {where.step + 1:,})"
                look = f"{self.folder / HANG} has what each rank was doing"
                sentence = f"{name}: not saved, for {still}; {look}; add --resume to go on from the last checkpoint"
                print(sentence, file=sys.stderr, flush=True)
        finally:
            os._exit(128 + self._told)

    def _write_hang(self) -> None:
        """Write what this rank is doing, for whoever looks into why it hangs."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        found = {"time": now} | self.state._asdict() | {"stack": traceback.format_stack(frame), "collectives": collectives()}
        with contextlib.suppress(OSError):
            (self.folder / HANG).mkdir(exist_ok=True)
            path = self.folder / HANG / f"rank-{self.ranks.rank}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _look(self) -> None:
        """Find the ranks that hold the others back; if there are any, end the process."""
        marks, (before, _) = self.state.marks, self._read()
        for _ in range(3):  # telling meanwhile: a rank that looks too would take this one for silent
            if self._done.wait(self._interval):
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
        self._write_hang()
        if self.ranks.rank == speaker:
            sentence = f"{verdict(now, behind, silent, self.timeout)}; {self.folder / HANG} has what each rank was doing"
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        else:
            time.sleep(2.0)  # once one rank exits, the launcher ends all: let the speaker print first
        os._exit(1)


def collectives() -> dict[str, Any]:
    """torch's record of this process's last collectives, of each kind of group that has one."""
    found: dict[str, Any] = {}
    for kind in ("fr", "nccl"):
        dump = getattr(torch._C._distributed_c10d, f"_dump_{kind}_trace_json", None)
        if dump is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                found[kind] = json.loads(dump())
    return found


def verdict(states: list[RankState], behind: list[int], silent: list[int], seconds: float) -> str:
    """The sentence that the run ends with."""
    waited = f"for {seconds:g} seconds (parallel.timeout)"
    if len(behind) == len(states):
        where = states[0]
        return f"no rank has moved {waited}: all are {where.doing}, step {where.step + 1:,}; look at the network between them"
    names = f"rank {behind[0]} has" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} have"
    where, what = states[behind[0]], "said nothing" if silent else "not moved"
    return f"{names} {what} {waited}: last seen {where.doing}, step {where.step + 1:,}, while the others wait"
