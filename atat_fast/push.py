"""A run's model as a folder, or on the hub:  python -m atat_fast.push --run runs/demo --out demo [--push owner/name]

docs/hub.md says what the folder holds and what reads it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.config import Config, to_dict
from atat_fast.data.local import without_folders
from atat_fast.errors import UsageError
from atat_fast.models.hub import CARD, Saved, check_destination, check_repository, push_to_hub, save_pretrained
from atat_fast.runs.loaded import open_run
from atat_fast.runs.reader import read_run


def portable_settings(config: Config) -> dict[str, Any]:
    """A run's settings without those of its machine: folders, and where paths lead."""
    settings = to_dict(config)
    data = settings["data"]
    for name in ("corpus", "valid", "tokenizer"):
        data[name] = data[name] if data[name] is None else without_folders(data[name])
    data["cache_dir"], settings["run"]["root"] = None, Config().run.root
    return settings


def with_card(run: Path, which: str, *, average: bool) -> Saved:
    """The model of a run's checkpoint, with facts for its card. Raises UsageError."""
    saved = open_run(run, which, average=average)
    model, config, evaluation = saved.model, saved.config, saved.facts.get("evaluation")
    facts: dict[str, Any] = {
        "name": config.run.name,
        "step": saved.facts["step"],
        "weights": saved.facts["weights"],
        "vocabulary": model.vocab_size,
        "parameters": model.parameter_counts(),
        "config": portable_settings(config),
        "data": {
            "corpus": without_folders(config.data.corpus),
            "tokenizer": without_folders(config.data.tokenizer),
            "sha256": saved.trained_on,
        },
    }
    if "tokens" in saved.facts:
        facts["tokens"] = saved.facts["tokens"]
    if average and evaluation:  # training evaluates the average
        facts["evaluation"] = evaluation
    if saved.estimator is not None:
        facts["importance"] = dataclasses.asdict(saved.estimator.config)
    said = saved.process.describe(config.diffusion)
    if said:
        facts["schedule"] = said
    if (run / "metrics.jsonl").is_file():
        seen = read_run(run)
        counts = str(seen.facts.get("data", ""))
        facts["data"]["counts"] = counts.removeprefix(f"{config.data.corpus}: ")
        facts["name"] = seen.name
        facts["environment"] = {name: seen.facts[name] for name in ("device", "torch", "version") if name in seen.facts}
        facts["samples"] = seen.samples[-1]["texts"] if seen.samples else []
    return dataclasses.replace(saved, facts=facts)


def main(arguments: Sequence[str]) -> int:
    """The command. Saves a run's model, and pushes it if asked to. Status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.push", description="A run's model as a folder, or on the hub.")
    parser.add_argument("--run", type=path_text, required=True, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged weights, or the last step's.")
    parser.add_argument("--out", type=path_text, default=None, help="A folder to make.")
    parser.add_argument("--push", type=str, default=None, help="Upload it to the hub as owner/name.")
    parser.add_argument("--private", action="store_true", help="Make the repository that --push creates private.")
    parser.add_argument(
        "--license", type=str, default=None, help="Licence of the weights by its name on the hub: mit, cc-by-4.0."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a saved model that is already at --out.")
    args = parser.parse_args(list(arguments))
    if args.out is None and args.push is None:
        raise UsageError("give --out FOLDER, --push owner/name, or both")
    if args.push is not None:
        check_repository(args.push)
    if args.out is not None:
        check_destination(Path(args.out), overwrite=args.overwrite)
    saved = with_card(Path(args.run), args.checkpoint, average=args.weights == "ema")
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
    """Where to save: the given folder, or a temporary one."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as away:
        yield Path(away) / "model"


if __name__ == "__main__":
    run_command(main)
