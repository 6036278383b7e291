"""Checkpoints of several ranks, written while training goes on.

A save copies what it needs to host memory and returns. A thread then writes every rank's part under a temporary name and hashes
it; rank 0 writes the manifest, flushes everything to disk and renames. If every rank holds everything, rank 0 alone copies and
writes. If anything fails on one rank, all ranks know: there is no checkpoint, `last` and `best` stay, and `wait` raises the
reason on all ranks.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import Config, to_dict
from atat_fast.data.tokenizers import Tokenizer
from atat_fast.distributed.ranks import Ranks
from atat_fast.errors import UsageError
from atat_fast.files import ASIDE, disk_errors
from atat_fast.runs import checkpoint, shards


@dataclass
class Written:
    """A complete checkpoint: step, bytes of all ranks, seconds it took, and seconds that training waited."""

    step: int
    bytes: int
    seconds: float
    blocked: float


class Saver:
    """Writes a run's checkpoints from all of its ranks, one at a time. All ranks call all methods at the same places.

    folder: the run's. keep: how many of the newest checkpoints to keep. sharded: whether ranks hold parts, not everything.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, *, sharded: bool) -> None:
        self.folder, self.ranks, self.keep, self.sharded = folder, ranks, keep, sharded
        self.root = folder / checkpoint.FOLDER
        self.problem: str | None = None
        self._thread: threading.Thread | None = None
        self._written: list[Written] = []

    def save(
        self,
        step: int,
        config: Config,
        files: dict[str, dict[str, Tensor]],
        tokenizer: Tokenizer,
        facts: dict[str, Any],
        *,
        best: bool = False,
    ) -> None:
        """Start to write step-N. Once it is whole, `last` leads to it, and `best` if `best`. Other arguments: `checkpoint.save`.
        Raises UsageError if the save before this one failed.
        """
        self.wait()
        begin = time.perf_counter()
        aside = self.root / f".step-{step:08d}{ASIDE}"
        with self.ranks.agree():
            if self.ranks.first:
                with disk_errors(self.root):
                    shutil.rmtree(aside, ignore_errors=True)  # left by a failed attempt
                    aside.mkdir(parents=True)
                    tokenizer.save(aside / "tokenizer")
        writes = self.sharded or self.ranks.first
        flat = {checkpoint.shard_key(name, key): value for name, named in files.items() for key, value in named.items()}
        staged = shards.stage(flat) if writes else {}
        card = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        manifest = {"format": checkpoint.SHARDED, "step": step, "config": to_dict(config), "ranks": self.ranks.size} | facts
        blocked = time.perf_counter() - begin

        def finish() -> None:
            problem: str | None = None
            mine: dict[str, Any] = {}
            try:
                if card is not None:  # a thread begins at card 0, where the writer's stream would open a context
                    torch.cuda.set_device(card)
                if writes:
                    shards.write(aside / checkpoint.SHARDS, staged, self.ranks.disk if self.sharded else None)
                number = f"shard-{self.ranks.rank + 1:05d}-"
                mine = {
                    str(f.relative_to(aside)): checkpoint.fingerprint(f) for f in (aside / checkpoint.SHARDS).glob(f"{number}*")
                }
            except BaseException as error:  # of any kind: the other ranks wait to hear of it
                problem = shards.reason(error)
            staged.clear()
            try:
                self.problem = self._complete(aside, manifest, problem, mine, best)
            except RuntimeError as error:  # a rank is gone, and so is this run
                self.problem = shards.reason(error)
            if self.problem is None:
                size = sum(found["bytes"] for found in self._sizes)
                self._written.append(Written(step, size, time.perf_counter() - begin, blocked))

        self._thread = threading.Thread(target=finish, name="checkpoint", daemon=True)
        self._thread.start()

    def _complete(
        self, aside: Path, manifest: dict[str, Any], problem: str | None, mine: dict[str, Any], best: bool
    ) -> str | None:
        """If every rank wrote its part, rank 0 gives the checkpoint its name. Returns what went wrong, or None, on all ranks."""
        told = self.ranks.gather((problem, mine), self.ranks.disk)
        problem = next((found for found, _ in told if found is not None), None)
        self._sizes = [entry for _, files in told for entry in files.values()]
        if self.ranks.first:
            try:
                if problem is None:
                    final = self.root / aside.name.removeprefix(".").removesuffix(ASIDE)
                    files = {name: entry for _, part in told for name, entry in part.items()}
                    for f in sorted((aside / "tokenizer").rglob("*")):
                        if f.is_file():
                            files[str(f.relative_to(aside))] = checkpoint.fingerprint(f)
                    for name, entry in files.items():
                        if not (aside / name).is_file() or (aside / name).stat().st_size != entry["bytes"]:
                            raise UsageError(f"{aside / name}, which another rank wrote, is not whole here")
                    checkpoint.complete(aside, final, manifest | {"files": files})
                    checkpoint.point(self.folder, "last", final, self.keep)
                    if best:
                        checkpoint.point(self.folder, "best", final, self.keep)
            except (OSError, UsageError) as error:
                problem = shards.reason(error)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        answers = self.ranks.gather(problem, self.ranks.disk)
        return answers[0]  # type: ignore[no-any-return]

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last write failed; `wait` raises the error."""
        return self.problem is not None

    def finished(self) -> list[Written]:
        """Checkpoints that were completed since the last call."""
        done, self._written = self._written, []
        return done

    def wait(self) -> None:
        """Wait until nothing is being written. Raises UsageError if that failed; earlier checkpoints are untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise UsageError(problem if problem.startswith("cannot write") else f"cannot write to {self.root}: {problem}")
