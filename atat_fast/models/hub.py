"""Models in folders and on the hub:  python -m atat_fast.models.hub --run runs/demo --out demo [--push owner/name]

A saved model is a folder of safetensors and JSON, nothing that has to be unpickled or run:

    config.json  model.safetensors            what DiT.from_pretrained reads
    tokenizer.json  tokenizer_config.json     what AutoTokenizer.from_pretrained reads, and Tokenizer.load
    importance.json  importance.safetensors   the importance estimator, where there is one
    schedule.safetensors                      the rates of a token-identity schedule, where it was trained with one
    atat_fast.json                            what it was trained on and how good it was
    README.md                                 the same as a model card

The lower half is a door like those of the package's top level, beside what it opens.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atat_fast import __version__
from atat_fast.config import Config, ImportanceConfig, ModelConfig, to_dict
from atat_fast.data import network as network
from atat_fast.data.local import without_folders
from atat_fast.data.tokenizers import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer, make_tokenizer
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.errors import UsageError, first_line
from atat_fast.files import disk_errors, replacing_folder
from atat_fast.models.card import model_card
from atat_fast.models.dit import MODEL_TYPE, DiT, merge_modulation, misfit
from atat_fast.models.importance import ImportanceEstimator

CONFIG, WEIGHTS, FACTS, CARD = "config.json", "model.safetensors", "atat_fast.json", "README.md"
IMPORTANCE, IMPORTANCE_WEIGHTS, SCHEDULE = "importance.json", "importance.safetensors", "schedule.safetensors"
FILES = (CONFIG, WEIGHTS, TOKENIZER_FILE, SETTINGS_FILE, IMPORTANCE, IMPORTANCE_WEIGHTS, SCHEDULE, FACTS, CARD)
"""All that a saved model consists of: what is read, downloaded, uploaded, and may be replaced."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Saved:
    """A model with what belongs to it, on the CPU. facts: what atat_fast.json says, {} for a model that came from elsewhere."""

    model: DiT
    tokenizer: Tokenizer
    estimator: ImportanceEstimator | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    identity: IdentitySchedule | None = None


def save_pretrained(
    folder: str | Path, saved: Saved, *, name: str | None = None, licence: str | None = None, overwrite: bool = False
) -> Path:
    """Write a model's folder, aside and then renamed. Returns its path.

    name: what the card calls it, by default the folder's name. licence: of the weights, for the card. overwrite replaces a
    folder that holds a saved model and nothing else. Raises UsageError; what was there before is untouched then.
    """
    folder = Path(folder)
    check_destination(folder, overwrite=overwrite)
    check_vocabulary(saved.model, saved.tokenizer, str(folder))
    model, estimator = saved.model, saved.estimator
    settings = {"model_type": MODEL_TYPE, "vocab_size": model.vocab_size, "mask_id": model.mask_id}
    settings |= dataclasses.asdict(model.config)
    with disk_errors(folder), replacing_folder(folder) as aside:
        save_file(_tensors(model), aside / WEIGHTS, metadata={"format": "pt"})
        _write(aside / CONFIG, settings)
        saved.tokenizer.save(aside, longest=model.config.length)
        if estimator is not None:
            save_file(_tensors(estimator), aside / IMPORTANCE_WEIGHTS, metadata={"format": "pt"})
            _write(aside / IMPORTANCE, dataclasses.asdict(estimator.config))
        if saved.identity is not None:
            save_file({"rates": saved.identity.rates.cpu()}, aside / SCHEDULE, metadata={"format": "pt"})
        facts = {"format": 1, "version": __version__, **saved.facts}
        _write(aside / FACTS, facts)
        (aside / CARD).write_text(model_card(facts, name=name or folder.name, licence=licence), encoding="utf-8")
    return folder


def from_pretrained(source: str | Path, *, longest: int | None = None, tokenizer: str | None = None) -> Saved:
    """The model in a folder, or on the hub as owner/name. Nothing is unpickled and no code that comes with it is run.

    longest: tokens the caller means to give it at once, refused where the model takes fewer. tokenizer: what reads text for a
    model saved without its own (MDLM's, converted): a tokenizer.json, a hub id such as gpt2, or bytes.
    Raises UsageError where files are missing, damaged or pickles, where weights and settings disagree, and where the tokenizer is
    not one of this model: another vocabulary, mask or length.
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
        raise UsageError(f"{source} takes at most {config.length:,} tokens, and {longest:,} are asked of it")
    reads = _tokenizer(folder, str(source), config.length) if tokenizer is None else make_tokenizer(tokenizer)
    model = DiT(vocab_size, mask_id, **dataclasses.asdict(config))
    check_vocabulary(model, reads, str(source))
    _load(model, folder / WEIGHTS)
    facts = _read(folder / FACTS) if (folder / FACTS).is_file() else {}
    return Saved(model, reads, _estimator(folder, model), facts, _identity(folder, model))


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False, kept: bool = True) -> str:
    """Upload a saved folder to the hub as owner/name, making the repository where needed. Returns its address.

    kept: whether the folder is still there for another try. Raises UsageError where the hub is out of reach or refuses.
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
    """Raise UsageError where this is no owner/name."""
    if repository.count("/") != 1 or not network.is_repository(repository):
        raise UsageError(f"--push takes a hub id such as owner/name, got {repository!r}")


def check_vocabulary(model: DiT, tokenizer: Tokenizer, where: str) -> None:
    """Raise UsageError where model and tokenizer do not belong together."""
    ours, theirs = (model.vocab_size, model.mask_id), (tokenizer.model_vocab_size, tokenizer.mask_id)
    if ours != theirs:
        raise UsageError(
            f"{where}: the model has {ours[0]:,} ids with mask {ours[1]:,}, and the tokenizer {theirs[0]:,} with mask "
            f"{theirs[1]:,}; they belong to different models"
        )


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise UsageError where the folder cannot be made, or holds what may not be replaced."""
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
        raise UsageError(f"{source} holds no {WEIGHTS}, so it is no saved model; make one with python -m atat_fast.models.hub")
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
            raise UsageError(f"{repository} is no folder here and cannot be had from the hub: {first_line(error)}") from error
        raise UsageError(
            f"{repository} is neither a folder here nor in the local cache, and the hub cannot be reached; download it where "
            "there is a network and give its folder"
        ) from error


def _tokenizer(folder: Path, source: str, length: int) -> Tokenizer:
    if not (folder / TOKENIZER_FILE).is_file():
        raise UsageError(
            f"{source} was saved without its tokenizer, so no text can be read with it; say which one it is, for example "
            "--tokenizer gpt2"
        )
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


def _identity(folder: Path, model: DiT) -> IdentitySchedule | None:
    if not (folder / SCHEDULE).is_file():
        return None
    try:
        rates = load_file(folder / SCHEDULE)["rates"]
        if tuple(rates.shape) != (model.vocab_size,):
            raise ValueError(f"rates are {tuple(rates.shape)}, and the vocabulary {model.vocab_size:,}")
        return IdentitySchedule(rates)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{folder / SCHEDULE} does not hold rates of this vocabulary: {first_line(error)}") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once however often it is used, and the buffers of the state."""
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


def portable_settings(config: Config) -> dict[str, Any]:
    """A run's settings without what is only true on the machine it ran on: folders, and where paths lead."""
    settings = to_dict(config)
    data = settings["data"]
    for name in ("corpus", "valid", "tokenizer"):
        data[name] = data[name] if data[name] is None else without_folders(data[name])
    data["cache_dir"], settings["run"]["root"] = None, Config().run.root
    return settings


def open_run(run: Path, which: str, *, average: bool) -> Saved:
    """The model of a run's checkpoint with the facts a card needs. Raises UsageError."""
    from atat_fast.runs import checkpoint
    from atat_fast.runs.reader import read_run

    found = checkpoint.find(run, which)
    model, tokenizer = checkpoint.load_model(found, average=average)
    config, manifest = found.config, found.manifest
    facts: dict[str, Any] = {
        "name": config.run.name,
        "step": found.step,
        "weights": "ema" if average else "raw",
        "vocabulary": model.vocab_size,
        "parameters": model.parameter_counts(),
        "config": portable_settings(config),
        "data": {
            "corpus": without_folders(config.data.corpus),
            "tokenizer": without_folders(config.data.tokenizer),
            "sha256": manifest.get("data", {}),
        },
    }
    facts |= {name: manifest[name] for name in ("tokens",) if name in manifest}
    if average and manifest.get("evaluation"):  # what is evaluated in training is the average
        facts["evaluation"] = manifest["evaluation"]
    estimator = checkpoint.load_importance(found, average=average)
    if estimator is not None:
        facts["importance"] = dataclasses.asdict(estimator.config)
    identity = checkpoint.load_identity(found)
    if identity is not None:
        facts["identity_strength"] = config.diffusion.identity_strength
    if (run / "metrics.jsonl").is_file():
        seen = read_run(run)
        counts = str(seen.facts.get("data", ""))
        facts["data"]["counts"] = counts.removeprefix(f"{config.data.corpus}: ")
        facts["name"] = seen.name
        facts["environment"] = {name: seen.facts[name] for name in ("device", "torch", "version") if name in seen.facts}
        facts["samples"] = seen.samples[-1]["texts"] if seen.samples else []
    return Saved(model, tokenizer, estimator, facts, identity)


def main(arguments: Sequence[str]) -> int:
    """The door. Saves a run's model, and pushes it where that is asked; status 0, or 2 on bad input."""
    from atat_fast.cli import make_parser, path_text

    parser = make_parser(prog="python -m atat_fast.models.hub", description="A run's model as a folder, or on the hub.")
    parser.add_argument("--run", type=path_text, required=True, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged weights, or the last step's.")
    parser.add_argument("--out", type=path_text, default=None, help="A folder to make.")
    parser.add_argument("--push", type=str, default=None, help="Upload it to the hub as owner/name.")
    parser.add_argument("--private", action="store_true", help="A repository that --push makes is private.")
    parser.add_argument(
        "--license", type=str, default=None, help="Licence of the weights, by the hub's name for it: mit, cc-by-4.0."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a saved model that is already at --out.")
    args = parser.parse_args(list(arguments))
    if args.out is None and args.push is None:
        raise UsageError("give --out FOLDER, --push owner/name, or both")
    if args.push is not None:
        check_repository(args.push)
    if args.out is not None:
        check_destination(Path(args.out), overwrite=args.overwrite)
    saved = open_run(Path(args.run), args.checkpoint, average=args.weights == "ema")
    name = args.push or str(saved.facts.get("name") or Path(args.out).name)
    with _out(args.out) as folder:
        save_pretrained(folder, saved, name=name, licence=args.license, overwrite=args.overwrite)
        total = saved.facts["parameters"]["total"]
        print(f"read   {args.run}: step {saved.facts['step']:,}, {args.weights} weights, {total:,} parameters")
        if args.out is not None:
            print(f"wrote  {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")
        if args.license is None:
            print(f"note   the card in {CARD} says that nobody stated a licence; --license states one")
        if args.push is not None:
            print(f"pushed {push_to_hub(folder, args.push, private=args.private, kept=args.out is not None)}")
    return 0


@contextmanager
def _out(folder: str | None) -> Iterator[Path]:
    """Where to save: the folder asked for, or one that is gone afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as away:
        yield Path(away) / "model"


if __name__ == "__main__":
    from atat_fast.cli import run_door

    run_door(main)
