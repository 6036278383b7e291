"""Tokens a second of block diffusion: with the cache of finished blocks, without it, in BD3-LM's way, and MDLM's loop.

    python bench/bench_blocks.py [--block 16] [--steps 8] [--length 1024] [--longest 4096] [--rounds 3] [--out FOLDER]

One text of random weights at preset tiny's sizes. Ways:

    uncached     the same samplers and model, every pass over all finished tokens and the block, which sees them
    bd3lm        from the same cache, as BD3-LM's paper says: at each step logits of the whole block, and a Gumbel draw in fp64
                 at every position; a prediction is kept if nothing changed
    cached       `sample` of a model with blocks
    mdlm loop    MDLM's sampler (bench/bench_sampling.py) on the whole text with a model of the same size, in as many steps as all
                 blocks have together; a few steps are timed and the total is extrapolated

Before anything is timed the first two must give the same text. Then texts of doubling lengths show how the time of a block grows.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from bench_sampling import plain_model, plain_sample
from timing import interleaved, seconds, spread, write_record
from torch import Tensor

from atat_fast.config import TrainConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.models import DiT
from atat_fast.models.blocks import masked_attention
from atat_fast.models.trunk import BlockContext, Norm, run_trunk
from atat_fast.ops.registry import autocast_dtype
from atat_fast.sampling.samplers import sample

WAYS = ("uncached", "bd3lm", "cached")


class Uncached:
    """The model of blocks without its cache: a denoiser that keeps finished tokens and runs on all of them again."""

    graph_safe = False

    def __init__(self, model: DiT) -> None:
        self.model, self.mask_id, self.vocab_size, self.config = model, model.mask_id, model.vocab_size, model.config
        self.output_head, self.logits = model.output_head, model.logits

    def cache(self, batch: int) -> Uncached:
        """An empty one, in the place of the model's cache."""
        self.done = torch.zeros(batch, 0, dtype=torch.int64, device=self.model.cos.device)
        return self

    def append(self, tokens: Tensor) -> None:
        """Take in a finished block."""
        self.done = torch.cat((self.done, tokens), 1)

    def keep(self, which: Tensor) -> None:
        """Go on with these texts alone."""
        self.done = self.done[which]

    def features(self, tokens: Tensor, hidden_share: Tensor | None = None, *, rows: Tensor | None = None) -> Tensor:
        """Rows of the block, from a pass over [finished, block] under the rule that a block sees blocks up to itself."""
        model, text = self.model, torch.cat((self.done, tokens), 1)
        batch, length = text.shape
        number = torch.arange(length, device=text.device) // self.config.block
        x = model.embedding(text)
        cos, sin = model.tables(length)
        layout = (number[None, :] <= number[:, None]).expand(batch, 1, -1, -1)
        context = BlockContext(cos, sin, layout, masked_attention(x.device, autocast_dtype(x), 2 * cos.shape[-1]))
        width, begin = tokens.shape[1], self.done.shape[1]
        if rows is None:
            rows = torch.arange(batch * width, device=text.device)
        rows = rows // width * length + begin + rows % width
        modulation = model.modulation(model.conditioning(None)).unflatten(-1, (-1, self.config.dim)).unbind(1)
        blocks: list[Any] = list(model.blocks)
        return run_trunk(x, blocks, modulation, Norm(model.final_norm), context, rates=[0.0] * len(blocks), rows=rows)


@torch.no_grad()
def bd3lm_sample(model: DiT, tokens: Tensor, steps: int) -> Tensor:
    """Block after block from a cache; each as in MDLM's ddpm_cache loop, on logits of the whole block."""
    cache, out, width = model.cache(len(tokens)), tokens.clone(), model.config.block
    times = torch.linspace(1, 1e-5, steps + 1).tolist()
    for start in range(0, tokens.shape[1], width):
        block, prediction = out[:, start : start + width], None
        for step in range(steps):
            if prediction is None:
                prediction = torch.log_softmax(model.logits(cache.features(block)).double(), -1).exp().view(*block.shape, -1)
            moving = prediction * (times[step] - times[step + 1])
            moving[..., model.mask_id] = times[step + 1]
            noise = 1e-10 - (torch.rand_like(moving) + 1e-10).log()
            after = torch.where(block != model.mask_id, block, (moving / noise).argmax(-1))
            if not torch.equal(after, block):
                prediction = None
            block = after
        left = model.logits(cache.features(block)).view(*block.shape, -1).argmax(-1)
        block = torch.where(block != model.mask_id, block, left)
        out[:, start : start + width] = block
        cache.append(block)
    return out


def made(model: DiT, way: str, length: int, steps: int) -> Tensor:
    """One text of `length` tokens."""
    tokens = torch.full((1, length), model.mask_id, device=model.cos.device)
    if way == "bd3lm":
        return bd3lm_sample(model, tokens, steps)
    denoiser: Any = model if way == "cached" else Uncached(model)
    return sample(denoiser, tokens, steps=steps)


def model_of(preset: str, vocabulary: int, length: int, block: int, compute: Compute) -> DiT:
    """A model with random weights, in evaluation mode."""
    config = load_preset(preset).model
    config.length, config.block, config.dropout = length, block, 0.0
    torch.manual_seed(0)
    model = DiT(vocabulary, vocabulary - 1, **vars(config)).to(compute.device).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def measure(args: argparse.Namespace) -> int:
    """Check, time, print, write."""
    if min(args.rounds, args.steps, args.block, args.length) < 1 or args.vocabulary < 2:
        raise UsageError("--rounds, --steps, --block and --length must be at least 1, and --vocabulary at least 2")
    compute = resolve(TrainConfig())
    model = model_of(args.preset, args.vocabulary, args.length, args.block, compute)
    print(f"{compute.describe()}; preset {args.preset}, V={args.vocabulary:,}, blocks of {args.block} in {args.steps} steps")
    with torch.no_grad():
        short = 4 * args.block
        if not torch.equal(made(model, "cached", short, args.steps), made(model, "uncached", short, args.steps)):
            raise RuntimeError("the cache changes the text")
        with compute.autocast():
            calls = {way: functools.partial(made, model, way, args.length, args.steps) for way in WAYS}
            taken: dict[str, list[float]] = interleaved(calls, compute.device, args.rounds)
            whole = model_of(args.preset, args.vocabulary, args.length, 0, compute)
            plain, steps = plain_model(whole), args.steps * (args.length // args.block)
            tokens = torch.full((1, args.length), whole.mask_id, device=compute.device)
            some = min(8, steps)
            taken["mdlm loop"] = [
                seconds(lambda: plain_sample(plain, tokens, steps, some), compute.device) * steps / some
                for _ in range(args.rounds)
            ]
            growth = []
            length = 2 * args.block
            long = model_of(args.preset, args.vocabulary, max(args.longest, length), args.block, compute)
            while length <= args.longest:
                spent = seconds(functools.partial(made, long, "cached", length, args.steps), compute.device)
                growth.append({"length": length, "seconds": spent})
                length *= 2
    results = []
    for way, times in taken.items():
        low, middle, high = spread([args.length / t for t in times])
        ratios = spread([a / b for a, b in zip(taken["uncached"], times, strict=True)])
        results.append(
            {
                "way": way,
                "tokens_per_second": middle,
                "low": low,
                "high": high,
                "ratio": ratios[1],
                "ratio_low": ratios[0],
                "ratio_high": ratios[2],
            }
        )
        print(f"{way:<12}{middle:>10,.1f} tokens/s   {ratios[1]:.2f} times uncached ({ratios[0]:.2f} to {ratios[2]:.2f})")
    for row in growth:
        each = row["seconds"] / row["length"] * args.block * 1e3
        print(f"{row['length']:>6,} tokens in {row['seconds']:.2f} s, {each:.1f} ms a block")
    settings = {name: getattr(args, name) for name in ("preset", "vocabulary", "block", "steps", "length", "longest", "rounds")}
    record = {
        "benchmark": "blocks",
        "settings": settings,
        "results": results,
        "growth": growth,
        "environment": environment(compute),
    }
    write_record(record, compute.device, args.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure; status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model sizes")
    parser.add_argument("--vocabulary", type=int, default=30_522, help="ids of the model, the mask included")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a block")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the text that all ways make")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest text that shows how time grows")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    try:
        return measure(parser.parse_args(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
