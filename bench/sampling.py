"""Tokens a second of sampling: the package's samplers beside a plain loop that computes every position's logits at every step.

    python bench/sampling.py [--preset tiny] [--vocabulary 30522] [--batch 2] [--denoising_steps 128] [--seconds 60]

The plain loop is ancestral sampling as MDLM's code does it: at each step the distribution of every position, a draw at every
position, and a coin that says which hidden ones keep theirs. `ancestral` and `ddpm_cache` compute what a step reveals. All three
follow the same law; before anything is timed, samples of all have to have no mask token left and their prompt unchanged, and the
plain loop's distribution at a position has to be the one the samplers draw from. Writes sampling.json in bench/results/<device>.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from timing import results_folder, seconds, spread
from torch import Tensor

from atat_fast.config import TrainConfig, load_preset
from atat_fast.diffusion.samplers import sample
from atat_fast.errors import UsageError
from atat_fast.models import DiT
from atat_fast.training.device import Compute, environment, resolve

PLAIN = "plain loop"
WAYS = (PLAIN, "ancestral", "ddpm_cache")
STEPS = 128
ROUNDS = 3


@torch.no_grad()
def plain_sample(model: DiT, tokens: Tensor, steps: int) -> Tensor:
    """[B, L] ids with masks to [B, L] without: all logits at every step, a draw everywhere, kept where the coin says so."""
    tokens = tokens.clone()
    for step in range(steps):
        shares = torch.softmax(model.logits(model.features(tokens)).float(), dim=-1)
        drawn = torch.multinomial(shares, 1).view_as(tokens)
        reveal = (tokens == model.mask_id) & (torch.rand(tokens.shape, device=tokens.device) < 1 / (steps - step))
        tokens = torch.where(reveal, drawn, tokens)
    return tokens


def ways(model: DiT, compute: Compute, steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each way to fill the masks of [B, L] ids."""

    def within(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(tokens: Tensor) -> Tensor:
            with torch.no_grad(), compute.autocast():
                return call(tokens)

        return run

    found: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: within(lambda tokens: plain_sample(model, tokens, steps))}
    for name in WAYS[1:]:
        found[name] = within(lambda tokens, name=name: sample(model, tokens, steps=steps, sampler=name))
    return found


def check(model: DiT, compute: Compute, steps: int, length: int) -> None:
    """Raise RuntimeError unless every way fills the masks, leaves the prompt alone, and reads the same distribution."""
    tokens = torch.full((1, length), model.mask_id, device=compute.device)
    tokens[0, :2] = torch.tensor([1, 2], device=compute.device)
    for name, call in ways(model, compute, steps).items():
        out = call(tokens)
        if bool((out == model.mask_id).any()) or not torch.equal(out[0, :2], tokens[0, :2]):
            raise RuntimeError(f"{name} left a mask token, or changed its prompt")
    with torch.no_grad():
        rows = torch.tensor([2, length - 1], device=compute.device)
        some, every = model.logits(model.features(tokens, rows=rows)), model.logits(model.features(tokens))
    if not torch.allclose(some.softmax(-1), every[rows].softmax(-1), atol=1e-5):
        raise RuntimeError("the samplers' distribution is not the plain loop's")


def time_samplers(
    model: DiT, compute: Compute, *, batch: int, steps: int = STEPS, budget: float = 60.0, length: int = 0
) -> dict[str, Any]:
    """Tokens a second of each way with quartiles over up to three interleaved rounds; one round, if there is time for no more.

    Where one round of full sampling does not fit into `budget` seconds, fewer denoising steps are taken, which is recorded.
    """
    length = length or model.config.length
    training = model.training
    model.eval()
    check(model, compute, 2, min(length, 16))
    tokens = torch.full((batch, length), model.mask_id, device=compute.device)
    begin = time.monotonic()
    one = seconds(lambda: ways(model, compute, 1)[PLAIN](tokens), compute.device)
    while steps > 1 and len(WAYS) * one * steps > budget:
        steps //= 2
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    calls = ways(model, compute, steps)
    for i in range(ROUNDS):
        for name, call in calls.items():
            taken[name].append(seconds(lambda call=call: call(tokens), compute.device))
        spent = time.monotonic() - begin
        if spent + spent / (i + 1) > budget:
            break
    model.train(training)
    results = {}
    for name, spent_on in taken.items():
        low, middle, high = spread(sorted(batch * length / s for s in spent_on))
        results[name] = {"tokens_per_second": middle, "low": low, "high": high}
    for r in results.values():
        r["ratio"] = r["tokens_per_second"] / results[PLAIN]["tokens_per_second"]
    return {"batch": batch, "length": length, "denoising_steps": steps, "results": results}


def table(record: dict[str, Any]) -> list[str]:
    """The rates as lines."""
    lines = [
        f"sampling {record['batch']} x {record['length']} tokens in {record['denoising_steps']} steps",
        f"{'way':<16}{'tokens/s':>10}{'quartiles':>20}{'x plain':>9}",
    ]
    return lines + [
        f"{name:<16}{r['tokens_per_second']:>10,.1f}{r['low']:>10,.1f} -{r['high']:>8,.1f}{r['ratio']:>9.2f}"
        for name, r in record["results"].items()
    ]


def main() -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="", help="model sizes; tiny on a CPU and small on a GPU by default")
    parser.add_argument("--vocabulary", type=int, default=0, help="ids of the model, the mask included; 30522 or 50258")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--batch", type=int, default=0, help="sequences; 2 on a CPU and 16 on a GPU by default")
    parser.add_argument("--denoising_steps", type=int, default=STEPS, help="steps from masks to text")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the rounds, about")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    args = parser.parse_args()
    try:
        if min(args.vocabulary, args.length, args.batch) < 0 or args.denoising_steps < 1 or args.seconds <= 0:
            raise UsageError("--denoising_steps must be at least 1, --seconds above 0, and sizes at least 0")
        compute = resolve(TrainConfig(device=args.device, dtype=args.dtype))
        on_gpu = compute.device.type == "cuda"
        preset, vocabulary = args.preset or ("small" if on_gpu else "tiny"), args.vocabulary or (50_258 if on_gpu else 30_522)
        config = load_preset(preset).model
        config.length = args.length or config.length
        torch.manual_seed(0)
        model = DiT(vocabulary, vocabulary - 1, **vars(config)).to(compute.device)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        record = time_samplers(
            model, compute, batch=args.batch or (16 if on_gpu else 2), steps=args.denoising_steps, budget=args.seconds
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(record)))
    settings = {"preset": preset, "vocabulary": vocabulary} | {k: record[k] for k in ("batch", "length", "denoising_steps")}
    whole = {"benchmark": "sampling", "settings": settings, "results": record["results"], "environment": environment(compute)}
    folder = args.out or results_folder(compute.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sampling.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
