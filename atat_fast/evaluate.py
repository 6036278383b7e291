"""Evaluate a model:  python -m atat_fast.evaluate --run runs/demo [--se 0.005] [--order confidence] [--zero_shot all]

Or the quality of generated text:  python -m atat_fast.evaluate --samples samples.jsonl [--causal_lm gpt2-large]
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atat_fast.cli import make_parser, path_text, run_command
from atat_fast.config import DataConfig, TrainConfig
from atat_fast.errors import UsageError, check_seed
from atat_fast.files import check_target, disk_errors, write_text

if TYPE_CHECKING:
    from atat_fast.data import Dataset
    from atat_fast.models.hub import Saved


def _parser() -> Any:
    parser = make_parser(prog="python -m atat_fast.evaluate", description="Likelihoods of a model, or the quality of samples.")
    parser.add_argument("--run", type=path_text, default=None, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--model", type=path_text, default=None, help="A saved model instead of a run: a folder, or owner/name.")
    parser.add_argument("--tokenizer", type=path_text, default=None, help="Tokenizer of a --model that was saved without one.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged weights, or the last step's.")
    parser.add_argument(
        "--corpus", type=path_text, default=None, help="Another corpus, a name or path, read with the run's tokenizer."
    )
    parser.add_argument("--split", type=Literal["valid", "train"], default="valid", help="Which split of the corpus.")
    parser.add_argument(
        "--zero_shot", type=str, default=None, help="Zero-shot sets instead, by MDLM's protocol: all, or ptb,lambada=FILE,..."
    )
    parser.add_argument("--sequences", type=int, default=0, help="Sequences read, spread over the text; 0 reads all.")
    parser.add_argument("--draws", type=int, default=1, help="Masks drawn for each sequence; more give a smaller error.")
    parser.add_argument("--se", type=float | None, default=None, help="Draw masks until the standard error is at most this.")
    parser.add_argument("--max_draws", type=int, default=256, help="Masks of each sequence after which --se gives up.")
    parser.add_argument(
        "--order",
        type=str,
        default=None,
        help="Also likelihoods in these orders: left_to_right, confidence, margin, entropy (exact), importance (a bound).",
    )
    parser.add_argument("--order_sequences", type=int, default=16, help="Sequences read for --order; 0 reads all.")
    parser.add_argument("--tokens_per_pass", type=int, default=1, help="Tokens that an order reveals at a time.")
    parser.add_argument("--tilt", type=float | None, default=None, help="Tilt of the importance order; by default the run's own.")
    parser.add_argument("--samples", type=path_text, default=None, help="Measure these texts instead: .jsonl, .txt or .parquet.")
    parser.add_argument("--causal_lm", type=str, default=None, help="Generative perplexity of --samples under this model.")
    parser.add_argument("--reference", type=path_text, default=None, help="Human text to compare --samples with (MAUVE).")
    parser.add_argument("--batch", type=int, default=32, help="Sequences in one forward pass.")
    parser.add_argument("--seed", type=int | None, default=None, help="Seed of the masks; by default the run's own.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--dtype", type=Literal["auto", "bf16", "fp32"], default="auto", help="Precision.")
    parser.add_argument("--json", type=path_text, default=None, help="Also write the numbers to this file.")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command. Prints figures with their errors. Status 0, or 2 on bad input."""
    args = _parser().parse_args(list(arguments))
    if args.json is not None:
        check_target(args.json)
    if args.samples is not None:
        return _samples(args)
    for name in ("causal_lm", "reference"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} measures samples; give them with --samples FILE")
    if args.run is None and args.model is None:
        raise UsageError("nothing to evaluate: give --run runs/NAME, --model FOLDER, or --samples FILE")
    if args.seed is not None:
        check_seed("--seed", args.seed)
    if args.zero_shot is not None and args.corpus is not None:
        raise UsageError("give --corpus, one text, or --zero_shot, sets with their own protocol, but not both")
    return _likelihoods(args)


def _likelihoods(args: Any) -> int:
    from atat_fast.data.zero_shot import open_set, parse_sets
    from atat_fast.evaluation import measure as figures_of
    from atat_fast.evaluation.orders import check_orders
    from atat_fast.hardware.compute import environment, resolve

    sets = parse_sets(args.zero_shot) if args.zero_shot is not None else {}
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"), "--")
    saved = _saved(args)
    orders = tuple(dict.fromkeys(part.strip() for part in (args.order or "").split(",") if part.strip()))
    check_orders(list(orders), saved.estimator)
    seed = saved.config.eval.seed if args.seed is None else args.seed
    settings = dataclasses.replace(saved.config.eval, sequences=args.sequences, draws=args.draws, batch=args.batch, seed=seed)
    plan = figures_of.Measures(settings, args.se, args.max_draws, orders, args.order_sequences, args.tokens_per_pass, args.tilt)
    model = saved.model.to(compute.device)
    if saved.estimator is not None:
        saved.estimator.to(compute.device)
    process = saved.process.to(compute.device)

    out = figures_of.console()
    out.print(saved.title, markup=False)
    written: dict[str, Any] = {}
    figures: list[dict[str, Any]] = []

    def finish() -> None:
        if sets or len(figures) > 1:
            out.print(figures_of.table(figures))
        _write(args.json, written | _known(args, saved) | {"figures": figures, "seed": seed, "environment": environment(compute)})

    if sets:
        # Open all sets before measuring any: a missing one must not waste the others' time.
        opened = {name: open_set(name, saved.reads(), model.config.length, path) for name, path in sets.items()}
        try:
            for name, blocks in opened.items():
                out.print(blocks.describe(model.config.length), markup=False)
                found = figures_of.measure(model, blocks, plan, compute.autocast, saved.estimator, process)
                figures += [{"text": name, "source": blocks.source} | figure for figure in found]
        except (UsageError, KeyboardInterrupt):  # keep what is measured so far
            if figures:
                finish()
            raise
    else:
        dataset = _dataset(args, saved)
        split = dataset.valid if args.split == "valid" else dataset.train
        out.print(dataset.describe(), markup=False)
        if args.corpus is None and saved.trained_on and dataset.hashes() != saved.trained_on:
            out.print(
                f"note: the tokens of {dataset.manifest['corpus']} are not those this model was trained with, which may differ "
                "between machines",
                markup=False,
            )
        found = figures_of.measure(model, split, plan, compute.autocast, saved.estimator, process)
        corpus = str(dataset.manifest["corpus"])
        figures = [{"text": f"{Path(corpus).name} {args.split}"} | figure for figure in found]
        written = found[0] | {"corpus": corpus, "split": args.split}
        _print_bound(out, found[0])
    finish()
    return 0


def _print_bound(out: Any, f: dict[str, Any]) -> None:
    from atat_fast.evaluation.likelihood import per_byte

    lines = [
        ("sequences", f"{f['sequences']:,} of {f['length']:,} tokens, {f['draws']} mask(s) each"),
        ("nll", f"{f['nll']:.4f} ± {f['nll_se']:.4f} nats a token (upper bound; the error of {f['error_of']})"),
    ]
    if f["error_of"] == "masks":
        lines.append(("", f"{'':6} ± {f['nll_se_text']:.4f} with the choice of text"))
    own = []
    if "schedule_nll" in f:
        bound = f"{f['schedule_nll']:.4f} ± {f['schedule_nll_se']:.4f}"
        own = [("schedule nll", f"{bound} nats a token (the bound of the schedule it was trained under)")]
    lines += [
        ("perplexity", f"{f['perplexity']:.3f}"),
        ("bits per token", f"{f['bits_per_token']:.4f}"),
        ("bits per byte", f"{per_byte(f).removesuffix(' bits per byte')}  ({f['bytes_per_token']:.3f} bytes a token)"),
        *own,
        ("unigram entropy", f"{f['unigram_entropy']:.4f} nats a token"),
        ("tokens", f"sha256 {f['tokens_sha256'][:12]}"),
    ]
    for name, value in lines:
        out.print(f"{name:17}{value}", markup=False)


def _saved(args: Any) -> Saved:
    from atat_fast.runs.loaded import open_model

    ordered = "importance" in (args.order or "")  # no other figure needs the estimator
    return open_model(
        run=args.run,
        model=args.model,
        tokenizer=args.tokenizer,
        which=args.checkpoint,
        average=args.weights == "ema",
        importance=ordered,
    )


def _known(args: Any, saved: Saved) -> dict[str, Any]:
    """Which model was measured, for the record."""
    kept = {name: saved.facts[name] for name in ("step", "weights") if name in saved.facts}
    return {"checkpoint" if args.run is not None else "model": saved.place} | kept


def _dataset(args: Any, saved: Saved) -> Dataset:
    from atat_fast.data import prepare

    data: DataConfig = saved.config.data
    hashes = saved.trained_on if args.corpus is None else None
    if args.corpus is not None:
        data = dataclasses.replace(data, corpus=args.corpus, valid=None)
    elif "config" not in saved.facts:
        raise UsageError(f"{args.model} does not say what it was trained on; give --corpus NAME-OR-PATH, or --zero_shot all")
    return prepare(data, tokenizer=saved.reads(), hashes=hashes)


def _samples(args: Any) -> int:
    """Print the quality of generated text."""
    from atat_fast.evaluation import generation
    from atat_fast.evaluation.measure import console
    from atat_fast.hardware.compute import environment, resolve

    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"), "--")
    tokenizer = _saved(args).reads() if args.run is not None or args.model is not None else None
    found = generation.measure_samples(
        args.samples, tokenizer=tokenizer, causal_lm=args.causal_lm, reference=args.reference, batch=args.batch, compute=compute
    )
    out = console()
    for line in generation.describe(found):
        out.print(line, markup=False)
    _write(args.json, found | {"environment": environment(compute)})
    return 0


def _write(path: str | None, values: dict[str, Any]) -> None:
    """Write values as JSON, with null for NaN and inf."""
    if path is None:
        return
    with disk_errors(path):
        write_text(path, json.dumps(_finite(values), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_command(main)
