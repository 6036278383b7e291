"""The table of masking processes, by their names in diffusion.schedule."""

from __future__ import annotations

from atat_fast.config import DiffusionConfig, ImportanceConfig
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.uniform import Uniform
from atat_fast.errors import UsageError, nearest

PROCESSES: dict[str, type[Process]] = {"log_linear": Uniform, "token_identity": IdentitySchedule}


def process_named(name: str) -> type[Process]:
    """The process of that name. Raises UsageError if it is unknown."""
    if name not in PROCESSES:
        known = ", ".join(PROCESSES)
        raise UsageError(f"there is no diffusion.schedule {name!r}{nearest(name, PROCESSES)}; choose one of {known}")
    return PROCESSES[name]


def check_process(config: DiffusionConfig, importance: ImportanceConfig) -> None:
    """Raise UsageError for a schedule that cannot be trained with."""
    process_named(config.schedule).check(config)
    if config.schedule == "log_linear":
        return
    if config.masking != "exact" or config.mirror:
        what = "diffusion.mirror" if config.mirror else f"diffusion.masking {config.masking}"
        raise UsageError(
            f"{what} hides every token alike, and diffusion.schedule {config.schedule} does not; "
            "set diffusion.masking exact and diffusion.mirror false, or diffusion.schedule log_linear"
        )
    if importance.source != "none":
        raise UsageError(
            f"importance.source {importance.source} and diffusion.schedule {config.schedule} both choose what is hidden; "
            "set importance.source none, or diffusion.schedule log_linear"
        )


def name_of(process: Process) -> str:
    """The name of a process in the table."""
    return next(name for name, kind in PROCESSES.items() if isinstance(process, kind))
