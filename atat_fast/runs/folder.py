"""A run's folder: its name, its settings, its facts, and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from atat_fast.config import Config, from_dict, to_dict
from atat_fast.distributed.ranks import Ranks
from atat_fast.errors import UsageError
from atat_fast.files import disk_errors, expanded, write_text
from atat_fast.runs.checkpoint import FOLDER

LOCK = ".lock"
SETTINGS, FACTS, METRICS = "config.yaml", "run.json", "metrics.jsonl"
IMPORTANCE = "importance.json"

MAY_DIFFER = (
    "run.",
    "sample.",
    "parallel.",
    "data.",
    "eval.batch",
    "eval.every",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.micro_batch",
    "train.device",
    "train.compile",
    "train.cuda_graphs",
    "preset",
)
"""Settings a resumed run may change. They do not change what is learned; micro-batches and ranks change the rounding of sums.

The trainer checks that its tokens and tokenizer are the same.
"""

PATIENCE = 5.0
"""Seconds within which a file that rank 0 writes must be seen by all ranks."""

OF_A_HOST = ("data.cache_dir", "data.num_workers", "run.root")
"""Settings that may differ between the hosts of a run."""


def holds_run(folder: Path) -> bool:
    """Whether a training run has written to this folder."""
    return any((folder / name).exists() for name in (METRICS, SETTINGS, FOLDER))


def choose_folder(config: Config, *, resume: bool) -> Path:
    """The run's folder, not created yet.

    A named folder that holds a run is refused unless it is resumed. Without a name the preset's is used: the next free one of
    demo, demo-2, ... for a new run, the last existing one to resume. Raises UsageError.
    """
    root = expanded(config.run.root)
    if config.run.name is not None:
        folder = root / config.run.name
        if Path(config.run.name).name != config.run.name or config.run.name in ("", ".", ".."):
            raise UsageError(f"run.name {config.run.name!r} is not a folder name; use --run.root for the folder of all runs")
        if resume and not holds_run(folder):
            raise UsageError(f"there is no run {folder} to resume")
        if not resume and holds_run(folder):
            raise UsageError(f"{folder} already holds a run; add --resume to continue it, or choose another --run.name")
        return folder
    names = [config.preset]
    while holds_run(root / names[-1]):
        names.append(f"{config.preset}-{len(names) + 1}")
    if not resume:
        return root / names[-1]
    if len(names) == 1:
        raise UsageError(f"there is no run {root / names[0]} to resume")
    return root / names[-2]


def last_folder(config: Config) -> Path:
    """The folder that a run with these settings would resume in, whether it exists or not."""
    try:
        return choose_folder(config, resume=True)
    except UsageError:
        return expanded(config.run.root) / (config.run.name or config.preset)


def lock(folder: Path) -> FileLock:
    """Lock a run folder for this process. Raises UsageError if another process holds it. The lock ends with its process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"{folder} is in use: another training run writes there; choose another --run.name") from None
    return held


def begun_by(folder: Path, launch: str) -> bool:
    """Whether the launcher that restarts this process started the run in this folder. launch: as in run.json."""
    try:
        before = str(json.loads((folder / FACTS).read_text(encoding="utf-8"))["launch"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    name, same_name = (text.split("@")[0] for text in (launch, before))
    return launch == before or (name == same_name and name not in ("", "none"))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings a run was started with, as nested dictionaries."""
    try:
        settings = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{folder / SETTINGS} cannot be read, so {folder} cannot be resumed") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{folder / SETTINGS} holds no settings")
    return settings


def check_same_settings(config: Config, folder: Path) -> None:
    """Raise UsageError if a resumed run would learn differently. It may get more steps, not fewer."""
    before, now = flat(to_dict(from_dict(read_settings(folder)))), flat(to_dict(config))
    fixed = None
    if config.curriculum.kind == "adaptive":
        fixed = "train.log_every" if config.curriculum.watch == "train" else "eval.every"
    for name, value in now.items():
        if name == "train.max_steps" and value > before[name]:
            continue
        if before.get(name) != value and (name == fixed or not name.startswith(MAY_DIFFER)):
            raise UsageError(
                f"{folder} was started with {name} {before.get(name)}, but this is {value}; "
                "resume it with its own settings or start a new run"
            )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def open_folder(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Make the folder and write its settings and facts. Facts of an earlier start are kept too."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        named = dataclasses.replace(config, run=dataclasses.replace(config.run, name=folder.name))
        write_text(folder / SETTINGS, yaml.safe_dump(to_dict(named), sort_keys=False))
        write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise UsageError, on all ranks, if one does not see the run folder that rank 0 writes to: no checkpoint would be whole."""
    if ranks.size == 1:
        return
    probe = folder / f".seen-by-all-{ranks.share(secrets.token_hex(8))}"
    with ranks.agree():
        if ranks.first:
            with disk_errors(folder):
                probe.touch()
    end = time.monotonic() + PATIENCE  # file systems of several hosts take a moment to show a file
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.1)
    try:
        with ranks.agree():
            if not probe.exists():
                raise UsageError(
                    f"{folder.absolute()} on {socket.gethostname()} is not the folder that rank 0 writes to; give a --run.root "
                    "that all hosts share"
                )
    finally:
        if ranks.first:
            probe.unlink(missing_ok=True)


class Metrics:
    """metrics.jsonl: one JSON object a line, flushed after each."""

    def __init__(self, folder: Path, *, after: int | None) -> None:
        """Open the file. after: first remove what an interrupted run wrote past this step."""
        path = folder / METRICS
        with disk_errors(folder):
            if after is not None and path.exists():
                write_text(
                    path, "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if _until(line, after))
                )
            self._file = path.open("a", encoding="utf-8")
        self._folder = folder

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with disk_errors(self._folder):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False  # cut short when the writer died
