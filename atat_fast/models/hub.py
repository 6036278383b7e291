"""Models in folders and on the hub.

A saved model is a folder of safetensors and JSON; reading it unpickles and runs nothing:

    config.json  model.safetensors            the model, for DiT.from_pretrained
    tokenizer.json  tokenizer_config.json     the tokenizer, for AutoTokenizer.from_pretrained and Tokenizer.load
    importance.json  importance.safetensors   the importance estimator, if there is one
    schedule.safetensors                      what its masking process keeps, such as the rates of a token-identity schedule
    atat_fast.json                            what it was trained on and how good it was
    README.md                                 the same as a model card

`python -m atat_fast.push` writes one from a run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atat_fast.config import Config, ImportanceConfig, ModelConfig, from_dict
from atat_fast.data import network as network
from atat_fast.data.tokenizers import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer, make_tokenizer
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.processes import name_of, process_named
from atat_fast.diffusion.uniform import UNIFORM
from atat_fast.errors import UsageError, first_line
from atat_fast.files import disk_errors, replacing_folder
from atat_fast.models.card import model_card
from atat_fast.models.dit import MODEL_TYPE, DiT, merge_modulation, misfit
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.version import __version__

CONFIG, WEIGHTS, FACTS, CARD = "config.json", "model.safetensors", "atat_fast.json", "README.md"
IMPORTANCE, IMPORTANCE_WEIGHTS, SCHEDULE = "importance.json", "importance.safetensors", "schedule.safetensors"
FILES = (CONFIG, WEIGHTS, TOKENIZER_FILE, SETTINGS_FILE, IMPORTANCE, IMPORTANCE_WEIGHTS, SCHEDULE, FACTS, CARD)
"""All files of a saved model: only these are read, downloaded, uploaded or replaced."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Saved:
    """A model on the CPU with what belongs to it, wherever it came from.

    tokenizer: None if the weights came without one.   facts: the content of atat_fast.json; {} if there is none.
    process: how its training hid tokens.   place: the folder or hub id.   what: the kind of source, in words.
    """

    model: DiT
    tokenizer: Tokenizer | None = None
    estimator: ImportanceEstimator | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    process: Process = UNIFORM
    place: str = ""
    what: str = ""

    @property
    def config(self) -> Config:
        """The settings it was trained under; the defaults if they are unknown."""
        known = self.facts.get("config")
        return from_dict(known) if isinstance(known, dict) else Config()

    @property
    def trained_on(self) -> dict[str, str]:
        """SHA-256 of the tokens of each split it was trained on; {} if they are unknown."""
        return dict(self.facts.get("data", {}).get("sha256", {}))

    @property
    def title(self) -> str:
        """Its name above a table."""
        step = f"  step {self.facts['step']:,}  {self.facts.get('weights', '')} weights" if "step" in self.facts else ""
        return f"{self.place}{step}"

    def reads(self) -> Tokenizer:
        """Its tokenizer. Raises UsageError if it has none."""
        if self.tokenizer is None:
            raise UsageError(
                f"{self.place} was saved without its tokenizer, so no text can be read with it; say which one it is, for example "
                "--tokenizer gpt2"
            )
        return self.tokenizer


def save_pretrained(
    folder: str | Path, saved: Saved, *, name: str | None = None, licence: str | None = None, overwrite: bool = False
) -> Path:
    """Write a model's folder, aside and then renamed. Returns its path.

    name: the card's name for it, by default the folder's. licence: of the weights, for the card. overwrite replaces a folder that
    holds a saved model and nothing else. Raises UsageError, and then leaves what was there untouched.
    """
    folder = Path(folder)
    check_destination(folder, overwrite=overwrite)
    model, tokenizer, estimator = saved.model, saved.reads(), saved.estimator
    check_vocabulary(model, tokenizer, str(folder))
    settings = {"model_type": MODEL_TYPE, "vocab_size": model.vocab_size, "mask_id": model.mask_id}
    settings |= dataclasses.asdict(model.config)
    with disk_errors(folder), replacing_folder(folder) as aside:
        save_file(_tensors(model), aside / WEIGHTS, metadata={"format": "pt"})
        _write(aside / CONFIG, settings)
        tokenizer.save(aside, longest=model.config.length)
        if estimator is not None:
            save_file(_tensors(estimator), aside / IMPORTANCE_WEIGHTS, metadata={"format": "pt"})
            _write(aside / IMPORTANCE, dataclasses.asdict(estimator.config))
        kept = {name: value.cpu() for name, value in saved.process.tensors().items()}
        if kept:
            save_file(kept, aside / SCHEDULE, metadata={"format": "pt", "schedule": name_of(saved.process)})
        facts = {"format": 1, "version": __version__, **saved.facts}
        _write(aside / FACTS, facts)
        (aside / CARD).write_text(model_card(facts, name=name or folder.name, licence=licence), encoding="utf-8")
    return folder


def from_pretrained(source: str | Path, *, longest: int | None = None, tokenizer: str | None = None, bare: bool = False) -> Saved:
    """The model in a folder, or on the hub as owner/name. Nothing is unpickled, and no code that comes with it is run.

    longest: tokens the caller will give it at once; refused if the model takes fewer. tokenizer: for a model saved without one
    (MDLM's, converted): a tokenizer.json, a hub id such as gpt2, or bytes. bare: accept weights without a tokenizer.
    Raises UsageError if files are missing, damaged or pickles, if weights and settings disagree, or if the tokenizer has another
    vocabulary, mask or length than the model.
    """
    folder = _folder(source)
    settings = _read(folder / CONFIG)
    kind = settings.pop("model_type", MODEL_TYPE)  # folders of earlier versions do not say
    if kind != MODEL_TYPE:
        raise UsageError(f"{folder / CONFIG} is of a model of type {kind!r}, not of one that atat_fast saved")
    try:
        vocab_size, mask_id = int(settings.pop("vocab_size")), int(settings.pop("mask_id"))
        config = ModelConfig(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / CONFIG} is not of a model that atat_fast saved: {first_line(error)}") from error
    if longest is not None and longest > config.length:
        raise UsageError(f"{source} takes at most {config.length:,} tokens, and {longest:,} are asked for")
    reads = _tokenizer(folder, str(source), config.length) if tokenizer is None else make_tokenizer(tokenizer)
    model = DiT(vocab_size, mask_id, **dataclasses.asdict(config))
    if reads is not None:
        check_vocabulary(model, reads, str(source))
    _load(model, folder / WEIGHTS)
    facts = _read(folder / FACTS) if (folder / FACTS).is_file() else {}
    saved = Saved(
        model, reads, _estimator(folder, model), facts, _process(folder, model), place=str(source), what="a model of atat_fast"
    )
    if not bare:
        saved.reads()
    return saved


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, kept: bool = True) -> str:
    """Upload a saved folder to the hub as owner/name, and make the repository if needed. Returns its address.

    kept: whether the folder stays for another try. Raises UsageError if the hub is out of reach or refuses.
    """
    import huggingface_hub

    check_repository(repository)
    if not network.reachable():
        way = (
            f"the folder {folder} is complete: push it later with  hf upload {repository} {folder}"
            if kept
            else ("give --out FOLDER to save the model here, and push it where there is a network")
        )
        raise UsageError(f"{repository} cannot be pushed: the hub cannot be reached; {way}")
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), allow_patterns=list(FILES), commit_message="Model saved by atat_fast"
        )
    except Exception as error:
        raise UsageError(
            f"{repository} cannot be pushed: {first_line(error)}; log in with  hf auth login  as someone who may write there"
        ) from error
    return str(address)


def check_repository(repository: str) -> None:
    """Raise UsageError if this is not owner/name."""
    if repository.count("/") != 1 or not network.is_repository(repository):
        raise UsageError(f"--push takes a hub id such as owner/name, got {repository!r}")


def check_vocabulary(model: DiT, tokenizer: Tokenizer, where: str) -> None:
    """Raise UsageError if model and tokenizer do not belong together."""
    ours, theirs = (model.vocab_size, model.mask_id), (tokenizer.model_vocab_size, tokenizer.mask_id)
    if ours != theirs:
        raise UsageError(
            f"{where}: the model has {ours[0]:,} ids with mask {ours[1]:,}, and the tokenizer {theirs[0]:,} with mask "
            f"{theirs[1]:,}; they belong to different models"
        )


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise UsageError if the folder cannot be made, or holds files that may not be replaced."""
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"cannot write {folder}: its folder does not exist")
    if not (folder.exists() or folder.is_symlink()):
        return
    if not overwrite:
        raise UsageError(f"{folder} is already there; give another name, or --overwrite to replace it")
    foreign = sorted({f.name for f in folder.iterdir()} - set(FILES)) if folder.is_dir() else [folder.name]
    if foreign or folder.is_symlink():
        raise UsageError(
            f"{folder} holds more than a saved model ({', '.join(foreign[:3]) or 'it is a link'}), so --overwrite does not "
            "replace it; give another name"
        )


def _folder(source: str | Path) -> Path:
    """The folder itself, or the hub's files in the local cache."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source))
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise UsageError(
                f"{source} has {pickles[0]} and no {WEIGHTS}: that is a pickle, and reading it could run code, so it is not "
                "read; python -m atat_fast.convert reads MDLM's checkpoints without running them"
            )
        if (folder / "checkpoints").is_dir():
            raise UsageError(f"{source} is a run, not a saved model; give it with --run")
        raise UsageError(f"{source} holds no {WEIGHTS}, so it is no saved model; make one with python -m atat_fast.push")
    return folder


def _downloaded(repository: str) -> Path:
    import huggingface_hub

    if repository.count("/") != 1 or not network.is_repository(repository):
        raise UsageError(f"there is no folder {repository}, and it is no hub id (owner/name)")
    reachable = network.reachable()
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(FILES), local_files_only=not reachable))
    except Exception as error:
        if reachable:
            raise UsageError(f"{repository} is no folder here and cannot be fetched from the hub: {first_line(error)}") from error
        raise UsageError(
            f"{repository} is neither a folder here nor in the local cache, and the hub cannot be reached; download it where "
            "there is a network and give its folder"
        ) from error


def _tokenizer(folder: Path, source: str, length: int) -> Tokenizer | None:
    """The folder's own tokenizer, or None. Raises UsageError if it belongs to another model."""
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    tokenizer = Tokenizer.load(folder)
    longest = _read(folder / SETTINGS_FILE).get("model_max_length", length)
    if longest != length:
        raise UsageError(
            f"{source}: the tokenizer is for {longest} tokens and the model for {length}; one of them belongs to another model"
        )
    return tokenizer


def _estimator(folder: Path, model: DiT) -> ImportanceEstimator | None:
    if not (folder / IMPORTANCE).is_file():
        return None
    try:
        config = ImportanceConfig(**_read(folder / IMPORTANCE))
        counts = torch.zeros(model.vocab_size)  # the table itself is in the file
        estimator = ImportanceEstimator(config, model.config.dim, model.config.length, counts)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / IMPORTANCE} is not of an estimator that atat_fast saved: {first_line(error)}") from error
    _load(estimator, folder / IMPORTANCE_WEIGHTS)
    return estimator


def _process(folder: Path, model: DiT) -> Process:
    """The masking process it was trained with."""
    file = folder / SCHEDULE
    if not file.is_file():
        return UNIFORM
    try:
        with safe_open(file, "pt") as opened:
            name = (opened.metadata() or {}).get("schedule", "token_identity")  # earlier versions did not write it
        return process_named(name).restored(load_file(file), model.vocab_size)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{file} does not hold a schedule of this vocabulary: {first_line(error)}") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once however often it is used, and the buffers of the state dict."""
    state = module.state_dict()
    named = dict(module.named_parameters()) | {name: b for name, b in module.named_buffers() if name in state}
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def _load(module: nn.Module, file: Path) -> None:
    """Copy a file's tensors into a module. Raises UsageError naming the first that does not fit."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read as safetensors: {first_line(error)}") from error
    merge_modulation(tensors)
    wrong = misfit(tensors, _tensors(module))
    if wrong is not None:
        raise UsageError(f"{file} does not fit its config.json: {wrong}")
    with torch.no_grad():
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if name in tensors:
                value.copy_(tensors[name])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}, not names with values")
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":  # the command's earlier name; the next release drops it
    import runpy

    runpy.run_module("atat_fast.push", run_name="__main__", alter_sys=True)
