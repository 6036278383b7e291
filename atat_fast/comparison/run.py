"""Recipes at equal cost: the same data, seeds, evaluation masks and budget, run one by one, in a folder that can be resumed.

FOLDER/comparison.json     the plan: budget, shared settings, steps of each recipe
FOLDER/recipes/NAME.yaml   the whole settings of each recipe
FOLDER/runs/NAME-seedN/    one run: a run folder, with result.json and values.npy (its last evaluation by sequence) when done
FOLDER/compare.json, table.txt, curves.png   the results
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from atat_fast.comparison.recipes import label, with_recipe
from atat_fast.config import Config, to_dict
from atat_fast.errors import UsageError
from atat_fast.files import disk_errors, write_text
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.training.plan import batches, check
from atat_fast.training.trainer import Diverged, Trainer

IDENTITY, RESULT, VALUES = "comparison.json", "result.json", "values.npy"
WARM_UP, TIMED = 5, 12
"""Steps of a calibration pass: the first ones compile and allocate; the others, spread over the schedule, are timed."""
PASSES = 5
"""Calibration passes over all recipes, so that a slow moment hits each of them. A step's time is the lower quartile: other
processes only add time."""
LOG_LINES = 5
"""Log lines between two points of a curve."""


@dataclass(frozen=True)
class Budget:
    """Cost of each run: `tokens` seen in training, or `minutes` of training time without evaluation."""

    kind: str
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """'tokens=2M' or 'minutes=1.5'. Raises UsageError."""
        match = re.fullmatch(r"(tokens|minutes)=(\d+(?:\.\d*)?(?:e\d+)?)([kMB]?)", text.strip())
        amount = float(match[2]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[3]] if match else 0.0
        if match is None or not amount > 0 or (match[1] == "minutes" and match[3]):
            raise UsageError(f"budget {text!r} is not understood; give tokens=2M or minutes=1.5")
        return Budget(match[1], amount)

    def describe(self) -> str:
        """In words."""
        return f"{self.amount:,.0f} tokens a run" if self.kind == "tokens" else f"{self.amount:g} min of training a run"


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison."""

    folder: Path
    base: Config
    recipes: dict[str, Config]
    seeds: int
    budget: Budget
    points: int


def make_plan(base: Config, recipes: Sequence[str], seeds: int, budget: Budget, points: int, folder: Path) -> Plan:
    """Plan a comparison and check it before anything runs. Raises UsageError."""
    if seeds < 1 or points < 1:
        raise UsageError(f"seeds and points must be at least 1, got {seeds} and {points}")
    names = [label(name) for name in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice:
        raise UsageError(f"recipe {twice!r} is named twice" if twice else "name at least one recipe, such as uniform,fast")
    configs = {label(name): with_recipe(base, name) for name in recipes}
    for name, config in configs.items():
        try:
            check(config)
        except UsageError as error:
            raise UsageError(f"recipe {name}: {error}") from None
        if budget.kind == "tokens" and budget.amount < tokens_per_step(config):
            raise UsageError(f"{budget.describe()} is less than one step of recipe {name}, {tokens_per_step(config):,} tokens")
    plan = Plan(folder, base, configs, seeds, budget, points)
    _check_folder(plan)
    return plan


def tokens_per_step(config: Config) -> int:
    """Tokens of one optimizer step."""
    return batches(config).global_batch * config.model.length


def _what_it_compares(plan: Plan) -> dict[str, Any]:
    """What a folder must keep to be continued; seeds and recipes may be added."""
    shared = {group: values for group, values in to_dict(plan.base).items() if group not in ("run", "sample", "preset")}
    return {"budget": vars(plan.budget), "points": plan.points, "settings": shared}


def _check_folder(plan: Plan) -> None:
    """Raise UsageError if the folder holds another comparison, or something else."""
    if not plan.folder.exists():
        return
    if not plan.folder.is_dir() or (any(plan.folder.iterdir()) and not (plan.folder / IDENTITY).is_file()):
        raise UsageError(f"{plan.folder} exists and holds no comparison; choose another --out")
    if not (plan.folder / IDENTITY).is_file():
        return
    try:
        kept = json.loads((plan.folder / IDENTITY).read_text(encoding="utf-8"))
        before = {"budget": kept["budget"], "points": kept["points"], "settings": kept["settings"]}
        recipes = {name: yaml.safe_load(_recipe_file(plan, name).read_text(encoding="utf-8")) for name in kept["steps"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{plan.folder / IDENTITY} cannot be read ({error}); choose another --out") from None
    differing = _difference(before, _what_it_compares(plan))
    for name, config in plan.recipes.items():
        if name in recipes:
            differing = differing or _difference(
                recipes[name], to_dict(config), f"recipe {name}, ", skip=("run", "sample", "preset")
            )
    if differing:
        raise UsageError(f"{plan.folder} holds a comparison with other settings ({differing}); choose another --out")


def _difference(before: Any, now: Any, where: str = "", skip: Sequence[str] = ()) -> str:
    """The first setting that differs, in words, or ''."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "" if before == now else f"{where.rstrip('.')} was {before}, is {now}"
    for name in [*now, *(name for name in before if name not in now)]:
        found = "" if name in skip else _difference(before.get(name), now.get(name), f"{where}{name}.")
        if found:
            return found
    return ""


def _recipe_file(plan: Plan, name: str) -> Path:
    return plan.folder / "recipes" / f"{name}.yaml"


def run_all(plan: Plan, say: Callable[[str], None] = print) -> dict[str, list[dict[str, Any]]]:
    """Calibrate, then run what is not finished, seed by seed. Returns each recipe's results in the seeds' order.

    Raises Interrupted (the stopped run is saved and goes on next time) or UsageError.
    """
    steps = _steps(plan, say)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.recipes}
    total, done = plan.seeds * len(plan.recipes), 0
    for i in range(plan.seeds):
        for name, recipe in plan.recipes.items():
            done += 1
            config = _run_config(plan, name, recipe, steps[name]["steps"], recipe.train.seed + i)
            say(f"run {done} of {total}: {name}, seed {config.train.seed}, {steps[name]['steps']:,} steps")
            results[name].append(_run(plan, config))
    seen = {json.dumps(result["data"], sort_keys=True) for found in results.values() for result in found}
    if len(seen) > 1:
        raise UsageError(f"runs in {plan.folder} saw different tokens of {plan.base.data.corpus}; start again in another --out")
    return results


def _steps(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Steps of each recipe, kept in the folder: a continued comparison does not measure again."""
    path = plan.folder / IDENTITY
    kept = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.is_file() else {}
    missing = [name for name in plan.recipes if name not in kept]
    with disk_errors(plan.folder):
        (plan.folder / "recipes").mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_what_it_compares(plan) | {"steps": kept}, indent=1) + "\n")
        for name, found in _calibrate(plan, missing, say).items():
            write_text(_recipe_file(plan, name), yaml.safe_dump(to_dict(plan.recipes[name]), sort_keys=False))
            kept[name] = found
        write_text(path, json.dumps(_what_it_compares(plan) | {"steps": kept}, indent=1) + "\n")
    return kept


def _calibrate(plan: Plan, names: Sequence[str], say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Steps that the budget allows each recipe. Minutes become steps by timing a few steps."""
    amount = plan.budget.amount
    if plan.budget.kind == "tokens":
        return {name: {"steps": max(1, round(amount / tokens_per_step(plan.recipes[name])))} for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(PASSES):
        for name in names:
            seconds[name] += _time_steps(plan, name)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if any(math.isnan(each) for each in seconds[name]):
            raise UsageError(f"recipe {name} diverges within its first steps, so its time cannot be measured; lower its optim.lr")
        each = statistics.quantiles(seconds[name], n=4)[0]
        found[name] = {"steps": max(1, round(amount * 60 / each)), "seconds_a_step": each}
        steps = f"{found[name]['steps']:,} steps in {amount:g} min"
        say(f"{name}: {each:.4g} s a step (lower quartile of {PASSES * TIMED}), so {steps}")
    return found


def _time_steps(plan: Plan, name: str) -> list[float]:
    """Seconds of steps spread over the schedule of a run of this recipe; NaN if it diverges."""
    scratch = plan.folder / "calibration"
    shutil.rmtree(scratch, ignore_errors=True)
    trial = copy.deepcopy(plan.recipes[name])
    trial.train.max_steps = 1000
    trial.run.root, trial.run.name, trial.run.tensorboard = str(scratch), name, False
    trainer = Trainer(trial, show_progress=False)
    spread = [round(i * 999 / (TIMED - 1)) for i in range(TIMED)]
    try:
        return trainer.time_steps([*range(WARM_UP), *spread])[WARM_UP:]
    except Diverged:
        return [math.nan]
    finally:
        trainer.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _run_config(plan: Plan, name: str, recipe: Config, steps: int, seed: int) -> Config:
    config = copy.deepcopy(recipe)
    config.train.max_steps, config.train.seed = steps, seed
    config.train.log_every = -(-steps // (plan.points * LOG_LINES))
    config.eval.every = config.train.log_every * LOG_LINES
    config.train.checkpoint_every, config.sample.num_samples = 0, 0
    config.run.root, config.run.name, config.run.tensorboard = str(plan.folder / "runs"), f"{name}-seed{seed}", False
    return config


def _run(plan: Plan, config: Config) -> dict[str, Any]:
    """The result of one run, which is run unless it finished before."""
    folder = plan.folder / "runs" / str(config.run.name)
    if (folder / RESULT).is_file():
        return read_result(folder)
    resume = False
    if folder.exists():  # unfinished: resume from its checkpoint, or start again if it has none
        try:
            checkpoint.find(folder)
            resume = True
        except UsageError:
            shutil.rmtree(folder)
    trainer = Trainer(config, resume=resume, show_progress=False)
    result: dict[str, Any] = {
        "seed": config.train.seed,
        "steps": config.train.max_steps,
        "tokens": config.train.max_steps * trainer.facts["tokens_per_step"],
        "data": trainer.parts.data.hashes(),
        "environment": {k: v for k, v in trainer.facts.items() if k not in ("parameters", "data", "resumed_from")},
        "parameters": trainer.facts["parameters"]["total"],
    }
    try:
        last = trainer.train()
        assert trainer.estimate is not None
        result |= {name: last[name] for name in ("nll", "nll_se", "bits_per_byte", "unigram_entropy", "sequences")}
        with disk_errors(folder):
            np.save(folder / VALUES, trainer.estimate.values.numpy(), allow_pickle=False)
    except Diverged as error:
        result["diverged"] = str(error)
    result |= _curve(folder)
    with disk_errors(folder):
        write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return read_result(folder)


def _curve(folder: Path) -> dict[str, Any]:
    """Points of the held-out bound, with tokens and training seconds until then, and the seconds of the whole run."""
    rows = [json.loads(line) for line in (folder / run_folder.METRICS).read_text(encoding="utf-8").splitlines()]
    train = {row["step"]: row for row in rows if row["kind"] == "train"}
    evals = {row["step"]: row for row in rows if row["kind"] == "eval"}  # a run stopped after its last step has two rows there
    points = [(train[step], row) for step, row in sorted(evals.items())]
    curve = [{"tokens": t["tokens"], "seconds": t["seconds"], "nll": e["nll"], "nll_se": e["nll_se"]} for t, e in points]
    return {"curve": curve, "seconds": max((row["seconds"] for row in train.values()), default=0.0)}


def read_result(folder: Path) -> dict[str, Any]:
    """A finished run's result.json, with the last evaluation's `values` [sequences] fp64 unless it diverged."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if "diverged" not in result:
            result["values"] = torch.from_numpy(np.load(folder / VALUES, allow_pickle=False))
        return result
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds a result that cannot be read ({error}); delete it to run it again") from None
