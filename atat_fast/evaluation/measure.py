"""Figures that can be cited: what was measured, on which tokens, with which error, and whether it is a bound.

Every figure is a row with the SHA-256 of its tokens. Figures with the same hash, length and measure may be compared. Figures with
different hashes were measured on different text, whatever their names say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from atat_fast.config import EvalConfig
from atat_fast.data import TokenSplit
from atat_fast.data.zero_shot import tokens_hash
from atat_fast.diffusion.bound import Estimate
from atat_fast.diffusion.process import Process
from atat_fast.errors import UsageError
from atat_fast.evaluation.likelihood import evaluate, evaluating, model_nll, report, require_whole_texts, spread_sequences
from atat_fast.evaluation.orders import EXACT, evaluate_order
from atat_fast.evaluation.precision import estimate_to
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator

MASKS_BESIDE = 32
Figure = dict[str, Any]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Measures:
    """What to measure on each text.

    eval: sequences, draws, batch and seed of the uniform bound. se: draw masks until their error is this small, or up to
    most_draws of each sequence; None draws eval.draws. orders: also likelihoods in these orders, on order_sequences sequences
    (0: all), per_pass tokens at a time. tilt: of an importance order (None: the model's own).
    """

    eval: EvalConfig
    se: float | None = None
    most_draws: int = 256
    orders: tuple[str, ...] = ()
    order_sequences: int = 16
    per_pass: int = 1
    tilt: float | None = None


def uniform(model: DiT, split: TokenSplit, plan: Measures, autocast: Autocast) -> Figure:
    """The uniform bound of a split as a figure.

    With plan.se, nll_se is the error from masks alone (error_of: "masks"); without, that from masks and the choice of text, as in
    training's val/nll. nll_se_text is always both. Raises UsageError if plan.most_draws do not reach plan.se.
    """
    settings = plan.eval
    if settings.batch < 1 or settings.draws < 1 or settings.sequences < 0:
        raise UsageError(
            f"--batch and --draws must be at least 1 and --sequences at least 0, got {settings.batch}, {settings.draws} and "
            f"{settings.sequences}"
        )
    if plan.se is None:
        estimate = evaluate(model, split, settings, autocast())
        draws, of, text = settings.draws, "masks and text", estimate.se
    else:
        require_whole_texts(model, split)
        tokens, wanted = spread_sequences(split, model.config.length, settings.sequences, model.cos.device)
        with torch.no_grad(), autocast(), evaluating(model), _progress(f"{split.name}: drawing masks") as show:
            precise = estimate_to(
                model_nll(model),
                tokens,
                wanted,
                mask_id=model.mask_id,
                se=plan.se,
                most_draws=plan.most_draws,
                batch=settings.batch,
                seed=settings.seed,
                document_end=split.eos_id if model.config.document_mask else None,
                on_pass=lambda done, error: show(done, plan.most_draws, f"{done} masks each, ± {error:.4f}"),
            )
        estimate, draws, of, text = precise.estimate, precise.draws, "masks", precise.se_text
        if not precise.met:
            needed = math.ceil(draws * (estimate.se / plan.se) ** 2)
            raise UsageError(
                f"--se {plan.se:g} is not reached with {draws} masks of each of {wanted:,} sequences: the error is "
                f"{estimate.se:.4f}; about {needed:,} would do (--max_draws {needed + 10}), or ask for "
                f"--se {estimate.se * 1.05:.2g}"
            )
    return report(estimate, split) | {
        "measure": "uniform",
        "kind": "upper bound",
        "error_of": of,
        "nll_se_text": text,
        "draws": draws,
        "seed": settings.seed,
        "tokens_sha256": tokens_hash(split, model.config.length, settings.sequences),
    }


def beside_orders(model: DiT, split: TokenSplit, plan: Measures, autocast: Autocast) -> Estimate:
    """The uniform bound on the orders' sequences, 32 masks each, for paired comparison."""
    if plan.order_sequences < 0:
        raise UsageError(f"--order_sequences must be at least 0, which reads all, got {plan.order_sequences}")
    require_whole_texts(model, split)
    tokens, wanted = spread_sequences(split, model.config.length, plan.order_sequences, model.cos.device)
    with torch.no_grad(), autocast(), evaluating(model):
        return estimate_to(
            model_nll(model),
            tokens,
            wanted,
            mask_id=model.mask_id,
            se=1e-9,
            most_draws=MASKS_BESIDE,
            batch=plan.eval.batch,
            seed=plan.eval.seed,
            document_end=split.eos_id if model.config.document_mask else None,
        ).estimate


def in_order(
    model: DiT,
    split: TokenSplit,
    order: str,
    plan: Measures,
    autocast: Autocast,
    estimator: ImportanceEstimator | None,
    bound: Estimate,
) -> Figure:
    """The likelihood in an order as a figure: exact, or for an importance order a bound.

    minus_bound is its paired difference from the uniform bound of the same sequences, with a standard error in which the choice
    of text hardly matters.
    """
    with _progress(f"{split.name}: {order}") as show:
        estimate = evaluate_order(
            model,
            split,
            order,
            sequences=plan.order_sequences,
            batch=plan.eval.batch,
            seed=plan.eval.seed,
            autocast=autocast(),
            per_pass=plan.per_pass,
            estimator=estimator,
            tilt=plan.tilt,
            on_batch=lambda done, total: show(done, total, ""),
        )
    difference = estimate.values - bound.values
    figure = report(estimate, split) | {
        "measure": order,
        "kind": "exact" if order in EXACT else "upper bound",
        "error_of": "text" if order in EXACT else "orders and text",
        "nll_se_text": estimate.se,
        "tokens_per_pass": plan.per_pass,
        "minus_bound": float(difference.mean()),
        "minus_bound_se": float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf,
        "tokens_sha256": tokens_hash(split, model.config.length, plan.order_sequences),
    }
    if order not in EXACT and estimator is not None:
        figure |= {"tilt": estimator.config.tilt if plan.tilt is None else plan.tilt, "seed": plan.eval.seed}
    return figure


def measure(
    model: DiT,
    split: TokenSplit,
    plan: Measures,
    autocast: Autocast,
    estimator: ImportanceEstimator | None = None,
    process: Process | None = None,
) -> list[Figure]:
    """All figures of the plan for one text: the uniform bound first, then each order. If the process has its own bound, the first
    figure also has that, as schedule_nll, from plan.eval's draws.
    """
    figures = [uniform(model, split, plan, autocast)]
    if process is not None and process.own_bound:
        own = evaluate(model, split, plan.eval, autocast(), process=process)
        figures[0] |= {"schedule_nll": own.nll, "schedule_nll_se": own.se}
    if plan.orders:
        bound = beside_orders(model, split, plan, autocast)
        figures += [in_order(model, split, order, plan, autocast, estimator, bound) for order in plan.orders]
    return figures


def table(figures: list[Figure]) -> Table:
    """Figures as a table: one row for each, with the hash of its tokens."""
    shown = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, side in (
        ("text", "left"),
        ("measure", "left"),
        ("nats a token", "right"),
        ("± error of", "left"),
        ("perplexity", "right"),
        ("bits/byte", "right"),
        ("is", "left"),
        ("less the bound", "left"),
        ("sequences", "right"),
        ("tokens", "left"),
    ):
        if name == "less the bound" and not any("minus_bound" in f for f in figures):
            continue
        shown.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for f in figures:
        paired = [f"{f['minus_bound']:+.4f} ± {f['minus_bound_se']:.4f}" if "minus_bound" in f else ""]
        shown.add_row(
            str(f.get("text", "")),
            f["measure"] + (f", {f['tokens_per_pass']} a pass" if f.get("tokens_per_pass", 1) > 1 else ""),
            f"{f['nll']:.4f}",
            f"± {f['nll_se']:.4f} {f['error_of']}",
            f"{f['perplexity']:.3f}",
            "-" if f["bits_per_byte"] is None else f"{f['bits_per_byte']:.4f}",
            f["kind"],
            *(paired if len(shown.columns) == 10 else []),
            f"{f['sequences']:,} x {f['length']:,}",
            f["tokens_sha256"][:12],
        )
    return shown


def console() -> Console:
    """A console for tables, as wide as they need if standard output is not a terminal."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, soft_wrap=True, width=200)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """show(done, total, text): a bar on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, text="")
        yield lambda done, total, text: bars.update(task, completed=done, total=total, text=text)
