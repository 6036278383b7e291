"""A sample's history: what each denoising step revealed or hid again, as a page that replays it or a view in the terminal.

A `Recorder` is an `on_step` of `atat_fast.sampling.samplers.sample`. It keeps each step's changes of one sequence and, with an
importance estimator, each position's score just before it was revealed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from atat_fast.data.text import valid_unicode
from atat_fast.evaluation.pieces import HIDDEN, PART, Pieces
from atat_fast.files import disk_errors, write_text

Scores = Callable[[Tensor, Tensor], Tensor]
PLACE = "__TRAJECTORY__"


class Recorder:
    """Records how sequence `row` of a batch is filled.

    tokens:  [B, L] first ids of the batch.   mask_id: the mask token.   length: tokens of the sequence, 0 for all.
    scores:  (tokens [1, L], hidden share [1]) -> importance [1, L] in [0, 1], or None.
    """

    def __init__(self, tokens: Tensor, mask_id: int, *, row: int = 0, length: int = 0, scores: Scores | None = None) -> None:
        self.mask_id, self.row, self.scores = mask_id, row, scores
        self.length = length or tokens.shape[1]
        self.before = tokens[row, : self.length].cpu().clone()
        self.start: list[int] = self.before.tolist()
        self.steps: list[tuple[int, list[tuple[int, int]]]] = []
        self.importance: list[float | None] = [None] * self.length

    def __call__(self, step: int, tokens: Tensor) -> list[int]:
        """Record what changed. Returns the positions."""
        after = tokens[self.row, : self.length].cpu().clone()
        changed = (after != self.before).nonzero()[:, 0].tolist()
        if changed and self.scores is not None:
            with torch.no_grad():
                seen = self.before[None].to(tokens.device)
                share = (seen == self.mask_id).float().mean(1)
                made = self.scores(seen, share)[0].float().cpu()
            for i in changed:
                if int(after[i]) != self.mask_id:
                    self.importance[i] = round(float(made[i]), 4)
        if changed:
            self.steps.append((step, [(i, int(after[i])) for i in changed]))
        self.before = after
        return changed

    @property
    def tokens(self) -> list[int]:
        """The present sequence."""
        return list(self.before.tolist())


def show(tokens: Sequence[int], start: Sequence[int], changed: Sequence[int], pieces: Pieces) -> Text:
    """A sequence for the terminal: given text bold, drawn text green, new text marked, hidden tokens shaded."""
    text, new = Text(), set(changed)
    for first, end, what in pieces(tokens):
        fresh = not new.isdisjoint(range(first, end))
        if what is None:
            text.append(HIDDEN, style="red" if fresh else "dim")
        elif pieces.mask_id not in start[first:end]:
            text.append(what, style="bold")
        else:
            text.append(what, style="black on green" if fresh else "green")
    return text


def page(recorder: Recorder, pieces: Pieces, facts: dict[str, Any]) -> str:
    """A self-contained HTML page that replays a recording: no other file, no network.

    pieces: of the recording's tokenizer. facts: lines on what was sampled and how.
    """
    now, cells = list(recorder.start), _cells(recorder.start, pieces)
    data: dict[str, Any] = {
        "facts": {str(name): valid_unicode(str(value)) for name, value in facts.items()},
        "signs": {"hidden": HIDDEN, "part": PART},
        "given": [token != pieces.mask_id for token in recorder.start],
        "start": cells,
        "steps": [],
        "importance": recorder.importance if any(score is not None for score in recorder.importance) else None,
    }
    for step, changes in recorder.steps:
        for i, token in changes:
            now[i] = token
        before, cells = cells, _cells(now, pieces)
        shown = [(i, cell) for i, cell in enumerate(cells) if cell != before[i]]
        data["steps"].append([step, [i for i, _ in changes], shown])
    template = resources.files("atat_fast.evaluation").joinpath("trajectory.html").read_text(encoding="utf-8")
    # Inside a script element only "</" and "<!--" mean something to a browser; \u003c is the same character to JSON.
    return template.replace(PLACE, json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def _cells(tokens: Sequence[int], pieces: Pieces) -> list[str | None]:
    """The page's text at each position: None if hidden, else a piece's text at its first position and "" at its others."""
    cells: list[str | None] = [""] * len(tokens)
    for first, _, text in pieces(tokens):
        cells[first] = text
    return cells


def write_page(path: Path, content: str) -> None:
    """Write the page. Raises UsageError if the disk refuses."""
    with disk_errors(path):
        write_text(path, content)
