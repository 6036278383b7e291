"""What a run shows while it runs: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atat_fast.training.figures import compact
from atat_fast.training.run_folder import Metrics

QUIET_SECONDS = 15.0  # between lines where there is no terminal to redraw


class Telemetry:
    """Rows go to metrics.jsonl and TensorBoard; the latest of them stand beside the progress bar.

    Where standard output is no terminal, a plain line takes the bar's place at every evaluation and every 15 seconds. On ranks
    other than 0 nothing is shown and nothing written.
    """

    def __init__(self, folder: Path, *, max_steps: int, first_step: int, resumed: bool, tensorboard: bool, rank: int = 0) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=rank != 0)
        self.metrics = Metrics(folder, after=first_step if resumed else None) if rank == 0 else None
        self.board: Any = None
        if tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if resumed else None)
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
        """A row of the training loss."""
        self._text["loss"] = f"loss {row['loss']:.3f}"
        speed = f"{compact(row['tokens_per_second'])} tok/s"
        self._text["speed"] = speed + (f"  mfu {row['mfu']:.1%}" if "mfu" in row else "")
        self._write("train", row)
        self._line(row["step"], now=False)

    def evaluation(self, row: dict[str, Any]) -> None:
        """A row of the held-out bound."""
        self._text["nll"] = f"val/nll {row['nll']:.3f} ± {row['nll_se']:.3f}"
        self._write("eval", row)
        self._line(row["step"], now=True)

    def samples(self, row: dict[str, Any]) -> None:
        """A row of generated texts."""
        self._write("sample", row)

    def checkpoint(self, row: dict[str, Any]) -> None:
        """A row of a checkpoint that was written: its step, bytes, seconds, and the seconds that training waited for it."""
        self._write("checkpoint", row)

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self._bar is not None:
            self._bar.stop()
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            self.board.close()

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write({"kind": kind, **row})
        if self.board is None:
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "tokens"):
                self.board.add_scalar(f"{'val' if kind == 'eval' else kind}/{name}", value, row["step"])
        if kind == "sample":
            self.board.add_text("samples", "\n\n---\n\n".join(row["texts"]), row["step"])

    def _line(self, step: int, *, now: bool) -> None:
        text = "  ".join(part for part in self._text.values() if part)
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif now or time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step:,} of {self.max_steps:,}  {text}")
