"""Convert a checkpoint:  python -m atat_fast.convert SOURCE DESTINATION [--to mdlm]

An MDLM checkpoint becomes a folder that `DiT.from_pretrained` reads. With --to mdlm, our model or run becomes one safetensors
file under MDLM's names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.errors import UsageError
from atat_fast.files import disk_errors, replacing, replacing_folder
from atat_fast.models.dit import DiT
from atat_fast.models.mdlm import OVERRIDES, to_mdlm_state_dict
from atat_fast.models.mdlm_files import STATED
from atat_fast.runs.loaded import open_any

SAVED = {"config.json", "model.safetensors", "README.md"}
"""What save_pretrained writes, and --overwrite may replace."""


def main(arguments: Sequence[str]) -> int:
    """The command. Writes the converted model and prints what it is. Status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.convert", description="MDLM's and BD3-LM's checkpoints in and out.")
    parser.add_argument(
        "source", type=path_text, help="An MDLM checkpoint (file, folder, hub id), a folder of ours, or a run folder."
    )
    parser.add_argument("destination", type=path_text, help="A folder to make; with --to mdlm, a .safetensors file.")
    parser.add_argument("--to", type=Literal["atat_fast", "mdlm"], default="atat_fast", help="Whose names and layout to write.")
    parser.add_argument(
        "--heads", type=int | None, default=None, help="Attention heads; by default what the file says, or dim / 64."
    )
    parser.add_argument(
        "--length", type=int | None, default=None, help="Longest sequence; by default what the file says, or 1024."
    )
    parser.add_argument("--mask_id", type=int | None, default=None, help="The mask token; by default the head's untrained row.")
    parser.add_argument("--time_conditioning", type=bool | None, default=None, help="Whether the model is told the time.")
    parser.add_argument("--dropout", type=float | None, default=None, help="Dropout in further training.")
    parser.add_argument(
        "--block", type=int | None, default=None, help="Tokens of a block (BD3-LM); by default what the file says."
    )
    parser.add_argument("--no_ema", action="store_true", help="Take the last step's weights, not their moving average.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model that is already at the destination.")
    args = parser.parse_args(list(arguments))
    destination = Path(args.destination)
    check_destination(destination, to_mdlm=args.to == "mdlm", overwrite=args.overwrite)
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    found = open_any(args.source, overrides, average=not args.no_ema)
    model = found.model
    if args.to == "mdlm":
        write_mdlm(model, destination)
    else:
        write_folder(model, destination)
    config, total = model.config, model.parameter_counts()["total"]
    print(f"read   {args.source}: {found.what}")
    print(f"model  {config.layers} layers of {config.dim}, {config.heads} heads, length {config.length:,}, {total:,} parameters")
    if config.block:
        print(f"       blocks of {config.block}")
    time = "on" if config.time_conditioning else "off"
    print(f"       vocabulary {model.vocab_size:,} with mask {model.mask_id:,}, time conditioning {time}")
    print(f"wrote  {destination}")
    return 0


def write_folder(model: DiT, destination: Path) -> None:
    """`save_pretrained` to a temporary folder beside `destination`, then rename it."""
    with disk_errors(destination.parent), replacing_folder(destination) as aside:
        model.save_pretrained(aside)


def write_mdlm(model: DiT, destination: Path) -> None:
    """One safetensors file under MDLM's names; its metadata holds what weights cannot say."""
    from safetensors.torch import save

    known = {**vars(model.config), "mask_id": model.mask_id}
    metadata = {"format": "pt"} | {published: json.dumps(known[ours]) for ours, (published, _) in STATED.items()}
    with disk_errors(destination.parent), replacing(destination, binary=True) as stream:
        stream.write(save(to_mdlm_state_dict(model), metadata=metadata))


def check_destination(destination: Path, *, to_mdlm: bool, overwrite: bool) -> None:
    """Raise UsageError if the destination's parent folder is missing, or something there may not be replaced."""
    if not destination.absolute().parent.is_dir():
        raise UsageError(f"cannot write {destination}: its folder does not exist")
    if to_mdlm and destination.suffix != ".safetensors":
        raise UsageError(f"--to mdlm writes one file, so its name ends in .safetensors; got {destination}")
    if not (destination.exists() or destination.is_symlink()):
        return
    if not overwrite:
        raise UsageError(f"{destination} is already there; give another name, or --overwrite to replace it")
    if to_mdlm and not destination.is_file():
        raise UsageError(f"{destination} is not a file, so --overwrite does not replace it; give another name")
    if not to_mdlm:
        foreign = sorted({f.name for f in destination.iterdir()} - SAVED) if destination.is_dir() else [destination.name]
        if foreign or destination.is_symlink():
            raise UsageError(
                f"{destination} holds more than a saved model ({', '.join(foreign[:3]) or 'it is a link'}), so --overwrite does "
                "not replace it; give another name"
            )


if __name__ == "__main__":
    run_command(main)
