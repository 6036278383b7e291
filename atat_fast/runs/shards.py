"""Tensors of several ranks in one folder of safetensors files, which any number of ranks can read.

torch.distributed.checkpoint plans which rank writes and reads what: a replicated tensor once, a sharded one in parts. Its Hugging
Face storage writes safetensors whose headers say where a part belongs. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from atat_fast.errors import UsageError, first_line

SCALAR = "/scalar"
"""Ending of a scalar's name."""


def stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, for `write`. Sharded tensors stay sharded."""
    return {name: t.to("cpu", copy=True) for name, t in _sliceable(tensors).items()}


def write(folder: Path, staged: dict[str, Tensor], group: Any = None) -> None:
    """Write staged tensors (plain ones equal on all ranks, or DTensors) under `folder`.

    group: a gloo group that nothing else uses meanwhile, whose ranks all call this with the same names; None writes alone.
    Raises CheckpointException, on all ranks, if one could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        save(dict(staged), storage_writer=writer, process_group=group, no_dist=group is None)


def layout(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder, on the meta device. Raises UsageError if files cannot be read."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise UsageError(f"{folder} cannot be read: {first_line(error)}") from error
    kinds = {
        name: torch.empty(() if name.endswith(SCALAR) else entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    return {name.removesuffix(SCALAR): kind for name, kind in kinds.items()}


def read(folder: Path, targets: dict[str, Tensor], group: Any = None) -> None:
    """Fill tensors in place from the folder, by name. They may be plain or DTensors, sharded in any way.

    group: the ranks that read together, or None to read alone. Raises UsageError if files cannot be read.
    """
    wanted = _sliceable(targets)
    try:
        with _quiet():
            load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"{folder} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written or read, in words. Of several ranks, the first one's reason and number."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items())
        return f"{reason(inner)} (rank {rank})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def _sliceable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached tensors. Scalars, which cannot be sliced, become vectors of one with names that end in SCALAR."""
    plain = {name: t.detach() for name, t in tensors.items()}
    return {name if t.dim() else name + SCALAR: t if t.dim() else t.view(1) for name, t in plain.items()}


class _quiet(warnings.catch_warnings):
    """Silences warnings, such as those about reading alone or a deprecated scalar type."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
