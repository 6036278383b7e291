"""Evaluate a run:  python -m atat_fast.evaluate --run runs/demo [--json FILE]"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from atat_fast.cli import make_parser, run_door
from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The door. Prints the held-out bound and what stands beside it; status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.evaluate", description="The held-out likelihood of a run's model.")
    parser.add_argument("--run", type=str, required=True, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="Averaged weights, or the last step's.")
    parser.add_argument("--corpus", type=str, default=None, help="Another corpus: a name or path, tokenised as the run's was.")
    parser.add_argument("--split", type=Literal["valid", "train"], default="valid", help="Which split of the corpus.")
    parser.add_argument("--sequences", type=int, default=0, help="Sequences read, spread over the split; 0 reads all.")
    parser.add_argument("--draws", type=int, default=1, help="Masks drawn for each sequence; more give a smaller error.")
    parser.add_argument("--batch", type=int, default=32, help="Sequences in one forward pass.")
    parser.add_argument("--seed", type=int, default=None, help="Seed of the masks; by default the run's own.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--dtype", type=Literal["auto", "bf16", "fp32"], default="auto", help="Precision.")
    parser.add_argument("--json", type=str, default=None, help="Also write the numbers to this file.")
    args = parser.parse_args(list(arguments))
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"cannot write {args.json}: its folder does not exist")

    from atat_fast.data import prepare
    from atat_fast.evaluation.likelihood import evaluate, report
    from atat_fast.training import checkpoint
    from atat_fast.training.device import environment, resolve

    saved = checkpoint.find(Path(args.run), args.checkpoint)
    model, tokenizer = checkpoint.load_model(saved, average=args.weights == "ema")
    config = saved.config
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"))
    data = config.data if args.corpus is None else dataclasses.replace(config.data, corpus=args.corpus, valid=None)
    dataset = prepare(data, tokenizer=tokenizer)
    split = dataset.valid if args.split == "valid" else dataset.train
    settings = dataclasses.replace(
        config.eval,
        sequences=args.sequences,
        draws=args.draws,
        batch=args.batch,
        seed=config.eval.seed if args.seed is None else args.seed,
    )
    estimate = evaluate(model.to(compute.device), split, settings, compute.autocast())
    row = report(estimate, split)
    print(f"{saved.path}  step {saved.step:,}  {args.weights} weights")
    print(dataset.describe())
    hashes = {name: dataset.manifest["splits"][name]["sha256"] for name in ("train", "valid")}
    if args.corpus is None and hashes != saved.manifest["data"]:
        print(f"note: the tokens of {data.corpus} are not those this run was trained with, which may differ between machines")
    print(f"sequences        {row['sequences']:,} of {row['length']:,} tokens, {args.draws} mask(s) each")
    print(f"nll              {row['nll']:.4f} ± {row['nll_se']:.4f} nats a token (upper bound)")
    print(f"perplexity       {row['perplexity']:.3f}")
    print(f"bits per token   {row['bits_per_token']:.4f}")
    print(f"bits per byte    {row['bits_per_byte']:.4f}  ({row['bytes_per_token']:.3f} bytes a token)")
    print(f"unigram entropy  {row['unigram_entropy']:.4f} nats a token")
    if args.json is not None:
        facts = {"checkpoint": str(saved.path), "step": saved.step, "weights": args.weights, "draws": args.draws}
        facts |= {"corpus": data.corpus, "split": args.split, "seed": settings.seed, "environment": environment(compute)}
        with checkpoint.disk_errors(Path(args.json)):
            Path(args.json).write_text(json.dumps(row | facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_door(main)
