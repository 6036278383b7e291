"""The processes of a run: how torchrun's ranks find each other, agree, vote to stop, and leave.

Every rank runs the same program on its part of each batch. If one finds an error at the start, all raise it, so that one sentence
is printed and every process exits with the same status. In a single process these calls do nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from atat_fast.errors import UsageError, first_line
from atat_fast.hardware.devices import lacks_peer_access

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each of several processes, besides WORLD_SIZE."""
SLACK = 120.0
"""Seconds after `parallel.timeout` at which PyTorch itself gives up: the watch, which names the rank, should come first."""
PATIENCE = datetime.timedelta(days=1)
"""Timeout of the gloo groups: a host may be tokenising, or writing to a slow disk. The watch catches ranks that hang."""
FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""Variables, as versions name them, for how many collectives torch remembers; the watch writes them down if ranks hang."""
GO_ON, STOP, FAILED = 0, 1, 2
"""Votes after a step; the highest wins: go on, save and stop, writing a checkpoint failed."""


@dataclass(frozen=True)
class Launch:
    """What the launcher set for this process: its number among all and on its host, and how often the run was restarted."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    name: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """From the environment. Raises UsageError if WORLD_SIZE is above 1 and a variable is missing or invalid."""
        size = _number(environment, "WORLD_SIZE", 1)
        restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
        name = f"{environment.get('TORCHELASTIC_RUN_ID', '')}@{socket.gethostname()}:{os.getppid()}"
        if size == 1:
            return cls(restarts=restarts, name=name)
        missing = [key for key in NEEDED if not environment.get(key)]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so the ranks "
                "cannot find each other; start them with torchrun"
            )
        rank, local_rank = (_number(environment, key, 0) for key in NEEDED[:2])
        local_size = _number(environment, "LOCAL_WORLD_SIZE", size)
        if not 0 <= rank < size:
            raise UsageError(f"RANK is {rank}, outside the {size} ranks of WORLD_SIZE; start the ranks with torchrun")
        return cls(rank, size, local_rank, local_size, restarts, name)


def _number(environment: Mapping[str, str], key: str, default: int) -> int:
    text = environment.get(key, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{key} is {text!r}, not a whole number; start the ranks with torchrun") from None


class Ranks:
    """The ranks of a run as one of them sees them. `start` joins them; `leave` leaves.

    Attributes:
        rank, size: This rank's number, and the number of ranks.
        control: A gloo group for messages between hosts, for which no device waits; None in one process.
        disk: Another gloo group, for the thread that writes checkpoints.
        notes: Sentences for the first lines of a run.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.rank, self.size = launch.rank, launch.size
        self.control: Any = None
        self.disk: Any = None
        self.notes: list[str] = []
        self._vote: tuple[Tensor, Any] | None = None

    @classmethod
    def start(cls, device: str, timeout: float, launch: Launch | None = None) -> Ranks:
        """Join the ranks the launcher started: gloo on CPUs, nccl on cards. device: cpu or cuda.

        Raises UsageError if there are fewer cards than ranks, or MASTER_ADDR does not answer.
        """
        ranks = cls(launch or Launch.of())
        if ranks.size == 1:
            return ranks
        at = ranks.launch
        for name in FLIGHT_RECORDER:
            os.environ.setdefault(name, "2000")
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        limit = datetime.timedelta(seconds=timeout + SLACK)
        try:
            store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=min(timeout, 300))))
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"rank {at.rank} does not reach the meeting point {place}: {first_line(error)}") from error
        few = device == "cuda" and torch.cuda.device_count() < at.local_size
        card = None
        if device == "cuda" and not few:
            card = torch.device("cuda", at.local_rank)
            torch.cuda.set_device(card)
            name = torch.cuda.get_device_name(card)
            if lacks_peer_access(name) and os.environ.setdefault("NCCL_P2P_DISABLE", "1") == "1":  # else NCCL may hang
                ranks.notes.append(f"NCCL_P2P_DISABLE=1: a {name} cannot read another card's memory")
        try:
            dist.init_process_group(
                "gloo" if card is None else "cpu:gloo,cuda:nccl",
                # A prefix for each restart: the launcher's store still holds the addresses of earlier processes.
                store=PrefixStore(f"atat_fast/{at.restarts}", store),
                rank=at.rank,
                world_size=at.size,
                timeout=limit,
                device_id=card,
            )
        except RuntimeError as error:
            raise UsageError(f"rank {at.rank} does not find the others at {place}: {first_line(error)}") from error
        ranks.control, ranks.disk = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        with ranks.agree():
            if few:
                have = torch.cuda.device_count()
                raise UsageError(
                    f"{at.local_size} ranks were started on {socket.gethostname()}, which has {have} CUDA device(s); "
                    f"use --nproc-per-node={max(1, have)}"
                )
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints for all."""
        return self.rank == 0

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a CPU tensor, in fp64, added in rank order."""
        return torch.stack([v.double() for v in self.gather(values)]).sum(0) if self.size > 1 else values

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """If the block raises a UsageError on any rank, raise the first such rank's on all of them."""
        problem: str | None = None
        try:
            yield
        except UsageError as error:
            if self.size == 1:
                raise
            problem = str(error)
        problems = self.gather(problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise UsageError(found if rank == 0 else f"rank {rank}: {found}")

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise UsageError on all ranks if a value differs on any of them. what: a word for the values, such as 'settings'."""
        everyone = self.gather(dict(values))
        for rank, theirs in enumerate(everyone):
            for name in everyone[0].keys() | theirs.keys():
                mine, other = everyone[0].get(name), theirs.get(name)
                if mine != other:
                    raise UsageError(
                        f"rank {rank} has {name} {other} where rank 0 has {mine}; start all ranks with the same {what}"
                    )

    def vote(self, wish: int) -> int:
        """The highest wish of all ranks at the previous call; in one process, this call's own.

        The result of a vote is read at the next one, so no rank waits for another's step, and all act at the same step.
        """
        if self.size == 1:
            return wish
        decided = self.last_vote()
        ballot = torch.tensor([wish])
        self._vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.control, async_op=True)
        return decided

    def last_vote(self) -> int:
        """The result of the vote still under way; GO_ON without one. All ranks must call it, or none."""
        if self._vote is None:
            return GO_ON
        (ballot, work), self._vote = self._vote, None
        work.wait()
        return int(ballot)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.gather(None)

    def leave(self) -> None:
        """Leave the process group, even after an error."""
        if self.size > 1 and dist.is_initialized():
            self.control = self.disk = None
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def lost_contact(error: RuntimeError) -> bool:
    """Whether this error means that another rank died. The error does not say which, or why."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)


def leave_to_rank_0(status: int, ranks: Ranks | None = None, seconds: float = 20.0) -> NoReturn:
    """End a rank that has nothing to add to what rank 0 prints. It first waits until rank 0 is gone (`ranks` shows it: a sum that
    rank 0 never joins fails then), or the launcher ends it: if it exited first, the launcher would kill rank 0 before it printed.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(status)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with_rank_0 = None if ranks is None else dist.all_reduce(torch.zeros(1), group=ranks.control, async_op=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (with_rank_0 and with_rank_0.is_completed()):
        time.sleep(0.05)
    time.sleep(1.0)  # its connections close a moment before it exits
    os._exit(status)
