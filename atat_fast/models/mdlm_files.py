"""Read MDLM's checkpoints from disk or the hub without running anything in them.

Files of torch.save are pickles, and plain unpickling may run any code. Here only torch's restricted reader (weights_only=True)
sees one. MDLM's Lightning files carry a configuration and a tokenizer beside the weights. Objects of such known packages are read
as `Absent`, an empty stand-in; their classes are neither imported nor called. A file that refers to anything else is refused,
with a sentence on how its owner can save the tensors alone.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from atat_fast.errors import UsageError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SETTINGS = "config.json"
STATED = {"heads": ("n_heads", int), "length": ("model_length", int), "time_conditioning": ("time_conditioning", bool)}
STATED |= {"mask_id": ("mask_id", int), "dropout": ("dropout", float), "block": ("block_size", int)}
"""What a config.json, or the metadata of a safetensors file, may say about a model: our name, the published one and its type."""

INERT_PACKAGES = ("omegaconf", "transformers", "tokenizers", "typing", "lightning", "pytorch_lightning", "lightning_fabric")
INERT_NAMES = {
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
}

Facts = dict[str, Any]


class Absent:
    """Stands for an object whose class is not loaded; takes any arguments and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Absent:
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(source: str | Path) -> tuple[Mapping[str, Any], Facts]:
    """The dictionary in a file, folder or hub repository, and what its config.json or metadata says of the model.

    Raises UsageError if there is nothing, it cannot be read, or reading it could run code.
    """
    path = Path(source)
    if path.is_dir():
        name = next((name for name in WEIGHTS if (path / name).is_file()), None)
        if name is None:
            raise UsageError(f"{path} holds neither {' nor '.join(WEIGHTS)}; give the checkpoint file itself")
        return _read_beside(path / name, path / SETTINGS)
    if path.is_file():
        return _read_beside(path, path.with_name(SETTINGS) if path.name in WEIGHTS else None)
    return _from_hub(str(source))


def _read_beside(file: Path, settings: Path | None) -> tuple[Mapping[str, Any], Facts]:
    facts: Facts = {}
    if file.suffix == ".safetensors":
        content, metadata = _read_safetensors(file)
        facts = _stated({name: _parsed(value) for name, value in metadata.items()}, str(file))
    else:
        content = _read_torch(file)
    if settings is not None and settings.is_file():
        try:
            stated = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{settings} cannot be read as JSON: {first_line(error)}") from error
        facts |= _stated(stated, str(settings)) if isinstance(stated, dict) else {}
    return content, facts


def _read_safetensors(file: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read as safetensors: {first_line(error)}") from error


def _stated(facts: Mapping[str, Any], where: str) -> Facts:
    if facts.get("causal") is True:
        raise UsageError(f"{where} says that the model is causal: an autoregressive baseline, which DiT does not compute")
    found = {}
    for ours, (published, kind) in STATED.items():
        value = facts.get(published)
        if value is None:
            continue
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind:
            raise UsageError(f"{where} says {published} is {value!r}, which is not of type {kind.__name__}")
        found[ours] = value
    return found


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read_torch(file: Path) -> Mapping[str, Any]:
    foreign: set[str] = set()
    zipped = False
    with contextlib.suppress(Exception):  # an older format or no checkpoint: the reader below decides
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        zipped = True
    refused = sorted(name for name in foreign if not _inert(name))
    if refused:
        raise UsageError(_refusal(file, refused))
    try:
        with torch.serialization.safe_globals([(Absent, name) for name in foreign]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UsageError(_refusal(file, [])) from error
        raise UsageError(f"{file} is no checkpoint that torch can read: {first_line(error)}") from error
    except Exception as error:  # torch does not document what a damaged file raises
        raise UsageError(f"{file} is no checkpoint that torch can read: {first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{file} is no checkpoint: it holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _inert(name: str) -> bool:
    return name in INERT_NAMES or name.split(".")[0] in INERT_PACKAGES


def _refusal(file: Path, names: list[str]) -> str:
    listed = f" ({', '.join(names[:3])}{' and more' if len(names) > 3 else ''})" if names else ""
    return (
        f"{file} holds more than tensors and settings{listed}, and reading that could run code, so it is not read; "
        f"if you trust it, keep its tensors with  python -c \"import torch; c = torch.load('{file}', weights_only=False); "
        "torch.save({k: c[k] for k in ('state_dict', 'ema') if k in c}, 'tensors.ckpt')\"  and give tensors.ckpt"
    )


def _from_hub(repository: str) -> tuple[Mapping[str, Any], Facts]:
    from atat_fast.data import network as hub

    if repository.count("/") != 1 or not hub.is_repository(repository) or Path(repository).suffix in (".ckpt", ".bin", ".pt"):
        raise UsageError(f"there is no file or folder {repository}, and it is no hub id (owner/name)")
    files: dict[str, Path] = {}
    for name in (*WEIGHTS, SETTINGS):
        if name == WEIGHTS[1] and WEIGHTS[0] in files:
            continue
        found = _hub_file(repository, name)
        if found is not None:
            files[name] = found
    weights = next((files[name] for name in WEIGHTS if name in files), None)
    if weights is not None:
        return _read_beside(weights, files.get(SETTINGS))
    if hub.reachable():
        raise UsageError(f"the hub has no repository {repository} with {' or '.join(WEIGHTS)}")
    raise UsageError(
        f"{repository} is neither a file nor a folder here, it is not in the local cache, and the hub cannot be reached; "
        f"download its {WEIGHTS[0]} where there is a network and give its path"
    )


def _hub_file(repository: str, name: str) -> Path | None:
    """The file in the local cache, else downloaded; None if the repository lacks it or the hub does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    from atat_fast.data import network as hub

    with contextlib.suppress(OSError):
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True))
    if not hub.reachable():
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    except Exception as error:
        raise UsageError(f"{name} of {repository} cannot be downloaded: {first_line(error)}") from error
