"""Display of a run: a progress bar, and rows for its trackers (metrics.jsonl, TensorBoard, services).

Only rank 0 shows or writes anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atat_fast.config import RunConfig
from atat_fast.runs.figures import compact
from atat_fast.runs.trackers import Tracker, open_trackers

SLOW = 0.2
"""The slowest rank is shown if its own time exceeds the median by more than this share."""
QUIET_SECONDS = 15.0  # between lines if there is no terminal to redraw


class Telemetry:
    """Rows go to the trackers; the latest figures stand beside the progress bar.

    If standard output is not a terminal, a plain line replaces the bar at every evaluation and every 15 seconds. Ranks other than
    0 show and write nothing.

    Args:
        folder: The run's folder.
        run: Which trackers to use besides metrics.jsonl.
        max_steps, first_step: The run's last step, and the step it starts or resumes at.
        resumed: Whether an earlier start wrote to the folder.
        rank: This process's number.
        settings: The run's settings, nested or flat, for services to show.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        *,
        max_steps: int,
        first_step: int,
        resumed: bool,
        rank: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=rank != 0)
        self.trackers: list[Tracker] = []
        if rank == 0:
            self.trackers = open_trackers(run, folder, first_step=first_step, resumed=resumed, settings=settings)
        self.max_steps = max_steps
        self._text = {"loss": "", "nll": "", "speed": ""}
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if rank == 0 and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=first_step, text="")
            self._bar.start()

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.print(sentence, markup=False)

    def train(self, row: dict[str, Any]) -> None:
        """Take a row of the training loss."""
        self._text["loss"] = f"loss {row['loss']:.3f}"
        speed = f"{compact(row['tokens_per_second'])} tok/s"
        self._text["speed"] = speed + (f"  mfu {row['mfu']:.1%}" if "mfu" in row else "") + _cards(row)
        self._write("train", row)
        self.line(row["step"], now=False)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Take a row of the held-out bound; `line` shows it."""
        self._text["nll"] = f"val/nll {row['nll']:.3f} ± {row['nll_se']:.3f}"
        self._write("eval", row)

    def samples(self, row: dict[str, Any]) -> None:
        """Take a row of generated texts."""
        self._write("sample", row)

    def checkpoint(self, row: dict[str, Any]) -> None:
        """Take a row of a written checkpoint: its step, bytes, seconds, and the seconds that training waited."""
        self._write("checkpoint", row)

    def line(self, step: int, *, now: bool = True) -> None:
        """Show the latest figures beside the bar. Without a bar, print a line if `now` or the last line is long ago."""
        text = "  ".join(part for part in self._text.values() if part)
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif now or time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step:,} of {self.max_steps:,}  {text}")

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self._bar is not None:
            self._bar.stop()
        for tracker in self.trackers:
            tracker.close()

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.write(kind, row)


def _cards(row: Mapping[str, Any]) -> str:
    """Power of all cards and whether they are throttled, if the driver says so, and a rank that slows the others."""
    watts = row.get("watts_total", row.get("watts"))
    text = "" if watts is None else f"  {watts:.0f} W"
    text += "  throttled" if row.get("throttled") else ""
    return text + (f"  rank {row['slowest_rank']} is slow" if row.get("spread", 0.0) > SLOW else "")
