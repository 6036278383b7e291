"""Checkpoints: folders of safetensors and JSON, complete or absent.

    checkpoints/step-00000120/  manifest.json  weights.safetensors  ema.safetensors  optimizer.safetensors  tokenizer/
    checkpoints/last -> step-00000120         checkpoints/best -> step-00000090

With importance there are also importance.safetensors and importance_ema.safetensors: the estimator, which evaluation does not
need, and sampling needs only in the estimator's order. A masking process that keeps tensors, such as the rates of a
token-identity schedule, has schedule.safetensors; weights that are learned from losses are in objective.safetensors.

A run on several ranks writes shards/*.safetensors instead of these files (runs/shards.py). Any number of ranks can read them, and
so can evaluation and sampling.

A checkpoint is written under a temporary name, flushed to disk and renamed. Links are replaced in one step, so `last` and `best`
always lead to a whole checkpoint. If the file system has no links, files that hold a checkpoint's name replace them. Nothing is
ever unpickled. The manifest holds the step, the settings, and every file's size and SHA-256, which are checked before use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atat_fast.config import Config, from_dict, to_dict
from atat_fast.data.tokenizers import Tokenizer
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.processes import process_named
from atat_fast.distributed.tensors import load_parts
from atat_fast.errors import UsageError, first_line
from atat_fast.files import ASIDE, disk_errors, remove, remove_leftovers
from atat_fast.models.dit import DiT, merge_modulation, misfit
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.runs import shards

FORMAT, SHARDED = 1, 2
SHARDS = "shards"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
WEIGHTS, EMA, OPTIMIZER = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
IMPORTANCE, IMPORTANCE_EMA = "importance.safetensors", "importance_ema.safetensors"
SCHEDULE, OBJECTIVE = "schedule.safetensors", "objective.safetensors"
LINKS = ("last", "best")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files were checked against its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.manifest["step"])

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return from_dict(self.manifest["config"])

    @property
    def sharded(self) -> bool:
        """Whether it was written by several ranks."""
        return bool(self.manifest.get("format") == SHARDED)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU, under parameters' current names."""
        if self.sharded:
            named = {key: torch.empty_like(kind, device="cpu") for key, kind in self.layout(name).items()}
            shards.read(self.path / SHARDS, {shard_key(name, key): value for key, value in named.items()})
            return named
        try:
            tensors = load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{self.path / name} cannot be read: {first_line(error)}") from error
        merge_modulation(tensors)
        return tensors

    def layout(self, name: str) -> dict[str, Tensor]:
        """One file's tensors on the meta device, under parameters' current names; {} if there is no such file."""
        if self.sharded:
            prefix = shard_key(name, "")
            found = shards.layout(self.path / SHARDS)
            return {key.removeprefix(prefix): kind for key, kind in found.items() if key.startswith(prefix)}
        if not (self.path / name).is_file():
            return {}
        return {key: value.to("meta") for key, value in self.tensors(name).items()}

    def restore(self, files: dict[str, dict[str, Tensor]], group: Any = None) -> None:
        """Fill tensors in place from the files, by name. They may be sharded in any way.

        group: the gloo group of the ranks that all call this, or None for one process. Raises UsageError naming the first tensor
        that does not fit.
        """
        for name, targets in files.items():
            check_fit(self, name, targets)
        if self.sharded:
            flat = {shard_key(name, key): value for name, named in files.items() for key, value in named.items()}
            shards.read(self.path / SHARDS, flat, group)
            return
        for name, targets in files.items():
            values = self.tensors(name)
            load_parts(targets, ((key, values[key]) for key in targets))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the model was trained with."""
        return Tokenizer.load(self.path / "tokenizer")


def save(
    folder: Path, step: int, config: Config, tensors: dict[str, dict[str, Tensor]], tokenizer: Tokenizer, facts: dict[str, Any]
) -> Path:
    """Write checkpoints/step-N under the run folder and point `last` at it. Returns its path.

    tensors: file name to named tensors. facts: other entries of the manifest (tokens seen, likelihood, ...).
    Raises UsageError if the disk refuses; earlier checkpoints are untouched.
    """
    root = folder / FOLDER
    final, aside = root / f"step-{step:08d}", root / f".step-{step:08d}{ASIDE}"
    with disk_errors(root):
        shutil.rmtree(aside, ignore_errors=True)  # left by a failed attempt
        aside.mkdir(parents=True)
        try:
            for name, named in tensors.items():
                save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, aside / name)
            tokenizer.save(aside / "tokenizer")
            files = {str(f.relative_to(aside)): fingerprint(f) for f in sorted(aside.rglob("*")) if f.is_file()}
            manifest = {"format": FORMAT, "step": step, "config": to_dict(config), "files": files, **facts}
            complete(aside, final, manifest)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        point(folder, "last", final, config.train.keep)
    return final


def complete(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of an otherwise complete checkpoint, flush everything to disk, and give the folder its name."""
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for f in aside.rglob("*"):
        _flush(f)
    _flush(aside)
    old = final.with_name(f".{final.name}.old{ASIDE}")
    if final.exists():  # the same step with the same content, after a resume
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def point(folder: Path, link: str, target: Path, keep: int = 1) -> None:
    """Make checkpoints/<link> lead to `target` in one step. Then remove checkpoints that no link leads to, except the `keep`
    newest. On a file system without links, a file that holds the target's name replaces the link.
    """
    root = folder / FOLDER
    with disk_errors(root):
        aside = root / f".{link}{ASIDE}"
        remove(aside)
        try:
            aside.symlink_to(target.name)
        except OSError:
            aside.write_text(target.name + "\n", encoding="utf-8")
        aside.replace(root / link)
        _flush(root)
        kept = {led_to(root, name) for name in LINKS}
        for path in steps(root)[keep:]:
            if path.resolve() not in kept:
                remove(path)


def tidy(folder: Path) -> None:
    """Put a run folder in order before its only writer resumes from a checkpoint.

    Removes what killed processes left unfinished. If a copy that followed links made folders of `last` and `best`, they become
    links again, `last` to the newest step.
    """
    root = folder / FOLDER
    with disk_errors(root):
        for place in (folder, root):
            remove_leftovers(place)
        whole = set(steps(root))
        older = [path for pattern in (".step-*", ".old-step-*", ".last.*", ".best.*") for path in root.glob(pattern)]
        for path in [*older, *(path for path in root.glob("step-*") if path not in whole)]:
            remove(path)
        for name in LINKS:
            path = root / name
            if not path.is_dir() or path.is_symlink():
                continue
            try:
                target = root / f"step-{open_checkpoint(path).step:08d}"
            except UsageError:
                if not whole:
                    raise
                target = max(whole)
            if target in whole:
                remove(path)
            else:
                path.rename(target)
                whole.add(target)
            point(folder, name, steps(root)[0] if name == "last" else target, keep=len(whole))


def led_to(root: Path, link: str) -> Path | None:
    """The complete checkpoint that checkpoints/<link> leads to, or None."""
    path = root / link
    if path.is_file():
        path = root / Path(path.read_text(encoding="utf-8", errors="replace").strip()).name
    path = path.resolve()
    return path if (path / MANIFEST).is_file() else None


def steps(root: Path) -> list[Path]:
    """The complete checkpoints in a folder, newest first."""
    return sorted((path for path in root.glob("step-*") if (path / MANIFEST).is_file()), reverse=True)


def find(run: Path, which: str = "last") -> Checkpoint:
    """The `last` or `best` checkpoint of a run folder, or a checkpoint folder itself. If no link leads to one, the newest.

    Raises UsageError if there is none, or it is damaged; then the error names a whole one.
    """
    if run.name in LINKS and run.is_file():
        run = led_to(run.parent, run.name) or run
    if (run / MANIFEST).is_file():
        return open_checkpoint(run)
    if not run.is_dir():
        raise UsageError(f"there is no run folder {run}; give the folder a training run wrote, such as runs/demo")
    for name in dict.fromkeys((which, "last")):
        path = led_to(run / FOLDER, name)
        if path is not None:
            return _open_or_offer(path)
    for path in steps(run / FOLDER):
        return _open_or_offer(path)
    raise UsageError(f"{run} holds no checkpoint: it has no {FOLDER}/{which}/{MANIFEST}")


class Damaged(UsageError):
    """A checkpoint whose files do not match its manifest."""


def _open_or_offer(path: Path) -> Checkpoint:
    """A checkpoint of a run. If it is damaged, the error names another one that is whole."""
    try:
        return open_checkpoint(path)
    except Damaged as error:
        other = next((found for found in steps(path.parent) if found != path and _whole(found)), None)
        if other is not None:
            step = int(other.name.removeprefix("step-"))
            raise Damaged(f"{error}; {other} (step {step:,}) is whole: delete {path.name} to go on from there") from None
        raise Damaged(f"{error}; there is no other one in {path.parent}") from None


def _whole(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except UsageError:
        return False
    return True


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and check every file. Raises UsageError for a foreign, truncated or damaged checkpoint."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
        int(manifest["step"]), from_dict(manifest["config"])
    except UsageError as error:
        raise UsageError(f"{path / MANIFEST} was written by another version of atat_fast: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / MANIFEST} is not an atat_fast checkpoint's manifest") from error
    if version not in (FORMAT, SHARDED):
        raise UsageError(f"{path} has checkpoint format {version}; this version of atat_fast reads format {FORMAT} or {SHARDED}")
    for name, saved in files.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != saved["bytes"]:
            raise Damaged(f"{path} is damaged: {name} has {file.stat().st_size} bytes instead of {saved['bytes']}")
        if fingerprint(file)["sha256"] != saved["sha256"]:
            raise Damaged(f"{path} is damaged: {name} is not what was saved (its SHA-256 differs)")
    return Checkpoint(path, manifest)


def load_model(checkpoint: Checkpoint, *, average: bool = True) -> tuple[DiT, Tokenizer]:
    """The model, on the CPU, and tokenizer of a checkpoint. average: the averaged weights, else the last step's."""
    tokenizer = checkpoint.tokenizer()
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **to_dict(checkpoint.config)["model"])
    load_weights(model, checkpoint, EMA if average else WEIGHTS)
    return model, tokenizer


def load_importance(checkpoint: Checkpoint, *, average: bool = True) -> ImportanceEstimator | None:
    """The importance estimator of a checkpoint, on the CPU, or None."""
    if checkpoint.config.importance.source == "none":
        return None
    counts = torch.zeros(checkpoint.manifest["vocabulary"])  # the table is in the file
    estimator = ImportanceEstimator.of(checkpoint.config, counts)
    assert estimator is not None
    load_weights(estimator, checkpoint, IMPORTANCE_EMA if average else IMPORTANCE)
    return estimator


def load_process(checkpoint: Checkpoint) -> Process:
    """The masking process of a checkpoint, on the CPU."""
    kind, file = process_named(checkpoint.config.diffusion.schedule), checkpoint.path / SCHEDULE
    try:
        found = checkpoint.tensors(SCHEDULE) if checkpoint.layout(SCHEDULE) else {}
        return kind.restored(found, checkpoint.manifest.get("vocabulary", 0))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{file} does not hold a {checkpoint.config.diffusion.schedule} schedule ({error})") from error


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors in a checkpoint: parameters, each once, and persistent buffers."""
    state = module.state_dict()
    return dict(module.named_parameters()) | {name: b for name, b in module.named_buffers() if name in state}


def load_weights(model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Copy one file's tensors into a module. Raises UsageError naming the first misfit."""
    checkpoint.restore({name: saved_tensors(model)})


def check_fit(checkpoint: Checkpoint, name: str, targets: dict[str, Tensor]) -> None:
    """Raise UsageError unless a file's tensors have the targets' names and shapes."""
    wrong = misfit(checkpoint.layout(name), targets)
    if wrong is not None:
        raise UsageError(f"{checkpoint.path / name} does not fit the model: {wrong}")


def shard_key(name: str, key: str) -> str:
    """A file's tensor's name in shards."""
    return f"{name.removesuffix('.safetensors')}/{key}"


def fingerprint(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest: bytes and sha256."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)
