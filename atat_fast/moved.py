"""Modules that moved. Their old names still import, with a DeprecationWarning, until the next release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "data.hub": "data.network",
    "diffusion.audit": "audit.masks",
    "diffusion.audit_schedules": "audit.schedules",
    "diffusion.categorical": "sampling.categorical",
    "diffusion.graphs": "sampling.graphs",
    "diffusion.objective": "diffusion.bound",
    "diffusion.remask": "sampling.remask",
    "diffusion.reveal": "sampling.reveal",
    "diffusion.samplers": "sampling.samplers",
    "evaluation.lm_eval": "lm_eval",
    "evaluation.mask_variance": "comparison.mask_variance",
    "evaluation.paired": "comparison.paired",
    "ops.attention_products": "ops.attention.products",
    "ops.cross_entropy": "ops.linear_cross_entropy.row_pass",
    "ops.slabs": "ops.linear_cross_entropy.slabs",
    "training.checkpoint": "runs.checkpoint",
    "training.comparison": "comparison.run",
    "training.comparison_page": "comparison.page",
    "training.compute": "hardware.compute",
    "training.devices": "hardware.devices",
    "training.figures": "runs.figures",
    "training.hardware": "hardware.monitor",
    "training.low_precision": "training.optimizers.low_precision",
    "training.muon": "training.optimizers.muon",
    "training.objective": "training.loss",
    "training.parallel": "distributed.wrap",
    "training.ranks": "distributed.ranks",
    "training.recipes": "comparison.recipes",
    "training.run_folder": "runs.folder",
    "training.run_reader": "runs.reader",
    "training.saver": "runs.saver",
    "training.shards": "runs.shards",
    "training.telemetry": "runs.telemetry",
    "training.trackers": "runs.trackers",
    "training.watch": "distributed.watch",
}
"""Old name to new name, within atat_fast."""


class Finder:
    """Finds a module under its old name: the same module object as under the new one."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for a name that moved, or None."""
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "atat_fast" and old in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name."""
        new = f"atat_fast.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It was executed already. Put its own spec back, which the import system replaced."""
        module.__spec__ = self._spec


def install() -> None:
    """Let old names import."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
