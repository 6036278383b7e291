"""Trackers of a run's rows: metrics.jsonl always, TensorBoard by default, Weights & Biases and Trackio on request.

A tracker takes rows, each of one kind (train, eval, sample), and knows nothing of training. `require` says how to install a
missing package before anything is made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from atat_fast.config import RunConfig
from atat_fast.errors import UsageError
from atat_fast.runs.folder import Metrics

Row = Mapping[str, Any]
PROJECT = "atat_fast"
SERVICES = ("wandb", "trackio")


class Tracker(Protocol):
    """Takes rows until it is closed."""

    def write(self, kind: str, row: Row) -> None:
        """Take a row of train, eval or sample, with its `step`."""

    def close(self) -> None:
        """Flush everything and close."""


def require(config: RunConfig) -> None:
    """Raise UsageError if a requested tracker's package is not installed."""
    for name in SERVICES:
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise UsageError(f"--run.{name} needs the package {name}, which is not installed: pip install {name}")


def open_trackers(
    config: RunConfig, folder: Path, *, first_step: int, resumed: bool, settings: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """All trackers that a run's settings ask for. settings: for services to show."""
    trackers: list[Tracker] = [Jsonl(folder, after=first_step if resumed else None)]
    if config.tensorboard:
        trackers.append(TensorBoard(folder, purge_step=first_step + 1 if resumed else None))
    trackers += [Service(name, folder, settings or {}, resumed=resumed) for name in SERVICES if getattr(config, name)]
    return trackers


def scalars(kind: str, row: Row) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a row that is drawn as a curve, such as ('val/nll', 3.2)."""
    prefix = "val" if kind == "eval" else kind
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("step", "tokens"):
            yield f"{prefix}/{name}", value


class Jsonl:
    """metrics.jsonl: one object a line."""

    def __init__(self, folder: Path, *, after: int | None) -> None:
        self._metrics = Metrics(folder, after=after)

    def write(self, kind: str, row: Row) -> None:
        """Write the row as it is."""
        self._metrics.write({"kind": kind, **row})

    def close(self) -> None:
        """Close the file."""
        self._metrics.close()


class TensorBoard:
    """Event files under <run>/tensorboard."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, kind: str, row: Row) -> None:
        """Write numbers as curves, samples as text."""
        for name, value in scalars(kind, row):
            self._board.add_scalar(name, value, row["step"])
        if kind == "sample":
            self._board.add_text("samples", "\n\n---\n\n".join(row["texts"]), row["step"])

    def close(self) -> None:
        """Close the files."""
        self._board.close()


class Service:
    """Weights & Biases or Trackio, which share an interface: init, log, finish.

    The run has its folder's name, also when resumed. Place and account are the service's own configuration (`wandb login`,
    WANDB_MODE=offline, TRACKIO_DIR, ...).
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any], *, resumed: bool) -> None:
        self._module: Any = importlib.import_module(name)
        options: dict[str, Any] = {"project": PROJECT, "name": folder.name, "config": dict(settings)}
        options["resume"] = "allow" if resumed else "never"
        if name == "wandb":  # wandb finds a run by its id; --resume without a run was refused before this
            options |= {"id": folder.name, "dir": str(folder), "resume": "allow"}
        self._module.init(**options)
        self._step = 0

    def write(self, kind: str, row: Row) -> None:
        """Write numbers as curves. Services refuse past steps, so a late row, such as a checkpoint's, gets the last step."""
        self._step = max(self._step, int(row["step"]))
        self._module.log(dict(scalars(kind, row)), step=self._step)

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()
