"""Recipes: named ways to train, compared at equal cost. A recipe is a set of settings that override a preset."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from atat_fast.config import Config, from_dict, preset_settings, to_dict
from atat_fast.errors import UsageError, nearest

Settings = dict[str, Any]

BLIND: Settings = {"spread": 0.0, "gap_power": 0.0}
PLAIN: Settings = BLIND | {"counts": "uniform", "mirror": False, "ce_until": 0.0, "schedule": "log_linear"}
RECIPES: dict[str, Settings] = {
    "preset": {},
    "mdlm": {"diffusion": PLAIN | {"masking": "bernoulli", "pairing": "stratified", "weighting": "uniform"}},
    "elbo": {"diffusion": PLAIN | {"masking": "exact", "pairing": "antithetic", "weighting": "uniform"}},
    "uniform": {"diffusion": PLAIN | {"masking": "exact", "pairing": "antithetic"}},
    "identity": {"diffusion": PLAIN | {"masking": "exact", "pairing": "antithetic", "schedule": "token_identity"}},
}
WHAT = {
    "preset": "the preset as it is",
    "mdlm": "each token hidden by chance at MDLM's stratified times, with MDLM's weights",
    "elbo": "exactly k tokens hidden, k uniform, with the bound's own weights",
    "uniform": "exactly k tokens hidden, k uniform, weighed as the preset says",
    "identity": "uniform under a token-identity schedule: rare tokens stay hidden longer, with the bound's own term for it",
    "atat": "what preset atat sets: masks chosen by an estimator, and a curriculum",
    "fast": "what preset demo sets: bell counts, weights, the model's and optimizer's options",
}
FROM_PRESETS = {"atat": "atat", "fast": "demo"}
"""Recipes that take a preset's settings."""
SIZES = ("dim", "layers", "heads", "length", "mlp_ratio", "conditioning_dim", "time_conditioning", "block", "document_mask")
"""Model settings that all recipes share."""
SHARED = ("data", "eval", "run", "sample", "preset", "train.max_steps", "train.seed", "model.length", "model.document_mask")
"""Settings no recipe may set: they change what is compared, or the budget and the seeds decide them."""


def recipe_settings(name: str) -> Settings:
    """The settings of a recipe by name, or of a YAML file. Raises UsageError for an unknown name or an invalid file."""
    if name in FROM_PRESETS:
        return _from_preset(FROM_PRESETS[name])
    if name in RECIPES:
        return copy.deepcopy(RECIPES[name])
    if not name.endswith((".yaml", ".yml")):
        known = [*RECIPES, *FROM_PRESETS]
        raise UsageError(
            f"there is no recipe {name!r}{nearest(name, known)}; recipes are {', '.join(known)}, or the path of a .yaml file"
        )
    try:
        settings = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {name} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise UsageError(f"recipe {name} must hold groups of settings, such as diffusion: {{counts: bell}}")
    for group, values in settings.items():
        for setting in values:
            if group in SHARED or f"{group}.{setting}" in SHARED:
                raise UsageError(
                    f"recipe {name} sets {group}.{setting}, which all recipes share; give the comparison --{group}.{setting}"
                )
    return settings


def _from_preset(name: str) -> Settings:
    """A preset's recipe: its settings, without shared ones and the model's sizes."""
    settings = {group: value for group, value in preset_settings(name).items() if group not in (*SHARED, "train")}
    settings["diffusion"] = BLIND | settings.get("diffusion", {})
    if "model" in settings:
        settings["model"] = {key: value for key, value in settings["model"].items() if key not in SIZES}
    return settings


def _typed(recipe: str, group: str, key: str, value: Any) -> Any:
    """A recipe's value as its setting's type, as the command line's parser does for options. Raises UsageError."""
    hints = get_type_hints(Config.__dataclass_fields__[group].default_factory)
    if key not in hints:
        raise UsageError(f"recipe {recipe}: there is no setting {group}.{key}{nearest(key, hints)}")
    kind = hints[key]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-3 as text
    if get_origin(kind) is Literal:
        good, wanted = value in get_args(kind), f"one of {', '.join(map(str, get_args(kind)))}"
    else:
        good, wanted = type(value) is kind if isinstance(kind, type) else True, getattr(kind, "__name__", str(kind))
    if not good:
        raise UsageError(f"recipe {recipe}: {group}.{key} must be {wanted}, got {value!r}")
    return value


def label(name: str) -> str:
    """A recipe's name in tables and folders: a file's name without folder and ending."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name


def with_recipe(base: Config, name: str) -> Config:
    """`base` with a recipe's settings."""
    settings, changes = to_dict(base), recipe_settings(name)
    if name in RECIPES and name != "preset":  # plain masks: no token is preferred
        for group, off in (("importance", {"source": "none"}), ("curriculum", {"kind": "none"})):
            changes |= {group: off} if group in settings else {}
        changes["diffusion"].setdefault("weighting", "ce" if settings["diffusion"]["weighting"] == "ce" else "uniform")
    for group, values in changes.items():
        if group not in settings:
            raise UsageError(f"recipe {name} has an unknown group {group!r}{nearest(group, settings)}")
        settings[group] = settings[group] | {key: _typed(name, group, key, value) for key, value in values.items()}
    try:
        return from_dict(settings)
    except UsageError as error:
        raise UsageError(f"recipe {name}: {error}") from None
