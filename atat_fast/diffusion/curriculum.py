"""The curriculum: one level over training progress, which multiplies the tilt or spread of masks and the focus of weights.

Level 1 applies importance in full, 0 is the uniform process, below 0 is its opposite. The defaults stress easy tokens first and
hard ones last. Over the last 5 % of the run the level returns to 0, so the final model was trained on the reported bound. Every
kind but `adaptive` is a function of progress; `adaptive` also has its phase and that phase's best loss, which checkpoints keep.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from atat_fast.config import CurriculumConfig
from atat_fast.errors import UsageError

SHARPNESS = 5.0  # of the exponential kind: it is within e^-5 of the next level at a phase's end


@dataclass(frozen=True)
class Stage:
    """Where a run is: the phase's name and the level."""

    phase: str
    level: float


class Curriculum:
    """A level for each share of the run."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        self.phase, self.best, self.stale = 0, math.inf, 0

    def at(self, progress: float) -> Stage:
        """The stage at `progress`, the share of the run that is done, in 0 to 1."""
        config = self.config
        if config.kind == "none":
            return Stage("all", 1.0)
        index = self.phase if config.kind == "adaptive" else sum(progress >= end for end in config.boundaries)
        level = config.levels[index]
        if config.kind in ("linear", "exponential") and index + 1 < len(config.levels):
            start = config.boundaries[index - 1] if index else 0.0
            part = (progress - start) / (config.boundaries[index] - start)
            if config.kind == "exponential":
                part = math.expm1(-SHARPNESS * part) / math.expm1(-SHARPNESS)
            level += part * (config.levels[index + 1] - level)
        left = 1.0 if config.cooldown == 0 else min(1.0, max(0.0, (1 - progress) / config.cooldown))
        return Stage(config.phases[index], level * left)

    def observe(self, loss: float) -> bool:
        """Give `adaptive` a new value of its watched loss. Returns whether that ended the phase; other kinds ignore it.

        A phase ends after `patience` values in a row that are not below its best by more than `threshold`. The next phase starts
        without a best: if training loss is watched, its loss is another quantity.
        """
        if self.config.kind != "adaptive":
            return False
        if loss < self.best - self.config.threshold:
            self.best, self.stale = loss, 0
            return False
        self.stale += 1
        if self.stale < self.config.patience or self.phase + 1 == len(self.config.levels):
            return False
        self.phase, self.best, self.stale = self.phase + 1, math.inf, 0
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. An infinite best is None, because JSON cannot hold it."""
        return {"phase": self.phase, "best": self.best if math.isfinite(self.best) else None, "stale": self.stale}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.phase, self.stale = int(state["phase"]), int(state["stale"])
        self.best = math.inf if state["best"] is None else float(state["best"])

    def describe(self) -> str:
        """One line for people: 'linear: easy to 30 %, mixed to 70 %, hard to 95 %, then back to 0'."""
        config = self.config
        if config.kind == "none":
            return "none: level 1 throughout"
        ends = [*config.boundaries, 1 - config.cooldown]
        if config.kind == "adaptive":
            parts = [f"{name} ({_signed(level)})" for name, level in zip(config.phases, config.levels, strict=True)]
            return f"adaptive: {', '.join(parts)}, the next when {config.watch} loss stops falling{self._end()}"
        phases = zip(config.phases, config.levels, ends, strict=True)
        parts = [f"{name} ({_signed(level)}) to {end:.0%}" for name, level, end in phases]
        return f"{config.kind}: {', '.join(parts)}{self._end()}"

    def _end(self) -> str:
        return f", to 0 over the last {self.config.cooldown:.0%}" if self.config.cooldown else ""


def _signed(level: float) -> str:
    return f"{level:+g}" if level else "0"


def highest_level(config: CurriculumConfig) -> float:
    """The largest absolute level of a run."""
    return 1.0 if config.kind == "none" else max((abs(level) for level in config.levels), default=1.0)


def check_curriculum(config: CurriculumConfig, *, max_steps: int, eval_every: int, log_every: int) -> None:
    """Raise UsageError for invalid curriculum settings."""
    if config.kind == "none":
        return
    if not config.levels or len(config.phases) != len(config.levels) or len(config.boundaries) + 1 != len(config.levels):
        raise UsageError(
            f"curriculum.levels has {len(config.levels)} entries, phases {len(config.phases)} and boundaries "
            f"{len(config.boundaries)}; there must be a level for each phase and one boundary fewer"
        )
    if not all(math.isfinite(level) for level in config.levels):
        raise UsageError(f"curriculum.levels must be numbers, got {config.levels}")
    if not 0 <= config.cooldown < 1:
        raise UsageError(f"curriculum.cooldown must be in [0, 1), got {config.cooldown}")
    ends = [0.0, *config.boundaries, 1.0]
    if config.kind != "adaptive" and not all(a < b for a, b in itertools.pairwise(ends)):
        raise UsageError(f"curriculum.boundaries {config.boundaries} are out of order; they must rise between 0 and 1")
    if config.kind == "adaptive":
        if config.patience < 1 or not config.threshold >= 0:
            raise UsageError(
                f"curriculum.patience must be at least 1 and threshold at least 0, got {config.patience} and {config.threshold}"
            )
        every, name = (eval_every, "eval.every") if config.watch == "valid" else (log_every, "train.log_every")
        values, most = (max_steps - 1) // every, max(1, (max_steps - 1) // (config.patience + 1))
        if values < config.patience + 1:
            raise UsageError(
                f"curriculum.kind adaptive sees {values} values of the {config.watch} loss before the last of {max_steps} steps, "
                f"too few for a patience of {config.patience}; make {name} {most} or less"
            )
