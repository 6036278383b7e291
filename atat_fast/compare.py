"""Compare ways to train:  python -m atat_fast.compare --recipes uniform,fast --preset plain --seeds 3 --budget minutes=1.5

Every recipe trains with the same data, seeds and budget and is evaluated on the same masks. The command prints paired differences
with their standard errors. Minutes are training time without evaluation: a few steps of each recipe are timed first, and the
recipe gets the steps that fit, so its schedules know their end. The same command continues an unfinished folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atat_fast.cli import make_parser, parse_config, path_text, run_command
from atat_fast.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The command. Status 0, 1 if a run diverged, 2 on bad input, 128 + N if signal N stopped it."""
    parser = make_parser(prog="python -m atat_fast.compare", description="Compare recipes of training at equal cost.")
    parser.add_argument(
        "--recipes",
        type=str,
        default="uniform,fast",
        help="Names or .yaml files, comma-separated: preset, mdlm, elbo, uniform, atat, fast; the first is the base.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each recipe, with seeds from train.seed on.")
    parser.add_argument("--budget", type=str, default="minutes=1.5", help="Of each run: minutes=1.5 of training, or tokens=2M.")
    parser.add_argument("--points", type=int, default=8, help="About how many evaluations a run has.")
    parser.add_argument("--out", type=path_text, default=None, help="Folder of results; by default compare/PRESET.")
    parser.add_argument(
        "--masks",
        type=int,
        default=0,
        help="Also draw masks this many times on the first recipe's first model, and print each way's standard error; 0 is off.",
    )
    parser.add_argument(
        "--masks_of", type=path_text, default=None, help="Do only that, on the model of this run (--masks 16 by default)."
    )
    config, args = parse_config(parser, arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UsageError(f"this version compares on one process, and {ranks} were started; start it without torchrun")
    if args.masks < 0 or args.masks == 1:
        raise UsageError(f"masks must be 0, or at least 2 draws to have a spread, got {args.masks}")
    if args.masks_of is not None:
        _print_masks(mask_errors_of(Path(args.masks_of), args.masks or 16, config))
        return 0

    from atat_fast.comparison import page as comparison_page
    from atat_fast.comparison import run as comparison
    from atat_fast.training.trainer import Interrupted

    budget = comparison.Budget.parse(args.budget)
    recipes = [name.strip() for name in args.recipes.split(",") if name.strip()]
    folder = Path(args.out) if args.out is not None else Path("compare") / config.preset
    plan = comparison.make_plan(config, recipes, args.seeds, budget, args.points, folder)
    print(f"{', '.join(plan.recipes)}: {plan.seeds} seed(s), {budget.describe()}, into {folder}")
    try:
        results = comparison.run_all(plan)
    except Interrupted as stop:
        print(f"{stop.args[0].split(';')[0]}; the same command goes on from there", file=sys.stderr)
        return stop.code
    found = comparison_page.summary(plan, results)
    text = comparison_page.table(found)
    print(text)
    if args.masks:
        rows = mask_errors_of(folder / "runs" / f"{next(iter(plan.recipes))}-seed{config.train.seed}", args.masks, config)
        found["masks"] = rows
        text += "\n\n" + _print_masks(rows)
    for path in comparison_page.write(plan, results, found, text):
        print(path)
    return int(any("diverged" in r for each in results.values() for r in each))


def mask_errors_of(run: Path, replicates: int, config: Any) -> list[dict[str, Any]]:
    """`mask_rows` of comparison/page.py for the averaged weights of a run's last checkpoint, on its own held-out text."""
    from atat_fast.comparison.mask_variance import model_mask_errors
    from atat_fast.comparison.page import mask_rows
    from atat_fast.data import prepare
    from atat_fast.hardware.compute import resolve
    from atat_fast.runs import checkpoint

    saved = checkpoint.find(run)
    model, tokenizer = checkpoint.load_model(saved)
    compute = resolve(config.train)
    split = prepare(saved.config.data, tokenizer=tokenizer, hashes=saved.manifest["data"]).valid
    errors = model_mask_errors(model.to(compute.device), split, config.eval, compute.autocast(), replicates=replicates)
    return [{"model": run.name, "replicates": replicates} | row for row in mask_rows(errors)]


def _print_masks(rows: list[dict[str, Any]]) -> str:
    from atat_fast.comparison.page import mask_table

    head = f"Standard error that masks leave in one estimate, {rows[0]['replicates']} draws of each, model of {rows[0]['model']}:"
    print(f"\n{head}\n{mask_table(rows)}")
    return f"{head}\n{mask_table(rows)}"


if __name__ == "__main__":
    run_command(main)
