"""Tokens a second of sampling: the package's samplers beside MDLM's ddpm_cache loop.

    python bench/bench_sampling.py                                        on a CPU 1 x 1,024 tokens in 128 steps, about 3 minutes
    python bench/bench_sampling.py --batch 1 8 32 --steps 128 1000        every combination
    python bench/bench_sampling.py --ways ddpm_cache first_hitting confidence entropy margin remdm_cap

The plain loop is MDLM's model (bench/mdlm.py) with the same weights, and MDLM's sampler: at each step fp32 logits of every
position, a log-softmax and SUBS over all of it, and a Gumbel draw at every position in fp64 (the authors' fp32 noise lowers the
temperature; see arXiv 2409.02908). If no token of the batch changed, the next step keeps the prediction. The package's samplers
compute only what a step reveals. Before anything is timed, both must fill their masks, keep the prompt, and use the same
distribution.

Plain steps run between the sampler's, so that a slower machine slows down both. All plain steps cost the same; if they do not fit
into --seconds, some are timed and the total is extrapolated, which the table and the file say. Writes sampling.json in
bench/results/<device>.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from mdlm import NEVER, PlainMDLM, block_by_block, mdlm_network
from timing import results_folder, seconds, spread, synchronize
from torch import Tensor

from atat_fast.config import TrainConfig, load_preset
from atat_fast.errors import UsageError, nearest
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.models import DiT
from atat_fast.sampling.samplers import SAMPLERS, sample

PLAIN = "plain MDLM loop"
STEPS = 128
ROUNDS = 3
PLAIN_BYTES = 12 << 30
"""The plain loop is skipped if its logits, about three copies in fp64, would take more bytes."""


@torch.no_grad()
def plain_sample(model: PlainMDLM, tokens: Tensor, steps: int, first: int = 0) -> Tensor:
    """MDLM's ddpm_cache sampler: [B, L] ids with masks to ids after `first` of `steps` steps, or after all if first is 0."""
    mask, times = model.mask_id, torch.linspace(1, 1e-5, steps + 1).tolist()
    prediction = None
    for step in range(first or steps):
        if prediction is None:
            logits = model.logits(tokens).float()
            logits[..., mask] += NEVER
            logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
            visible = tokens != mask
            logits[visible] = NEVER
            logits[visible, tokens[visible]] = 0
            prediction = logits.exp()
        moving = prediction * (times[step] - times[step + 1])
        moving[..., mask] = times[step + 1]
        moving = moving.double()
        noise = 1e-10 - (torch.rand_like(moving) + 1e-10).log()
        drawn = (moving / noise).argmax(dim=-1)
        after = torch.where(tokens != mask, tokens, drawn)
        if not torch.allclose(after, tokens):
            prediction = None
        tokens = after
    if first:
        return tokens
    logits = model.logits(tokens).float()
    logits[..., mask] += NEVER
    return torch.where(tokens != mask, tokens, logits.argmax(dim=-1))


def plain_model(model: DiT) -> PlainMDLM:
    """MDLM's model with a DiT's weights."""
    plain = PlainMDLM(model.vocab_size, model.mask_id, model.config).to(model.cos.device)
    plain.load_state_dict(block_by_block(dict(model.named_parameters()), model.config.layers), strict=False)
    return plain.eval()


def check(model: DiT, plain: PlainMDLM, compute: Compute, ways: Sequence[str], length: int) -> None:
    """Raise RuntimeError unless every way fills the masks, keeps the prompt, and uses the same distribution."""
    tokens = torch.full((1, length), model.mask_id, device=compute.device)
    tokens[0, :2] = torch.tensor([1, 2], device=compute.device)
    rows = torch.tensor([2, length - 1], device=compute.device)
    with torch.no_grad():
        some, every = model.logits(model.features(tokens, rows=rows)), plain.logits(tokens).flatten(0, 1)[rows].float()
        every[:, model.mask_id] = -torch.inf
        if not torch.allclose(some.softmax(-1), every.softmax(-1), rtol=1e-3, atol=1e-6):
            raise RuntimeError("the samplers' distribution is not the plain loop's")
        with compute.autocast():
            results = [plain_sample(plain, tokens, 2), *(sample(model, tokens, steps=2, sampler=way) for way in ways)]
    for name, out in zip((PLAIN, *ways), results, strict=True):
        if bool((out == model.mask_id).any()) or not torch.equal(out[0, :2], tokens[0, :2]):
            raise RuntimeError(f"{name} left a mask token, or changed its prompt")


def one_round(
    model: DiT, plain: PlainMDLM, tokens: Tensor, steps: int, way: str, seed: int, plain_steps: int
) -> tuple[float, float]:
    """Seconds of one whole sampling, and of `plain_steps` steps of the plain loop.

    The plain steps run in up to 16 pieces between steps of the sampler, and are not part of its time, so that a machine that
    becomes slower or faster does so for both.
    """
    device, pieces = tokens.device, min(16, steps)
    bounds = [steps * (i + 1) // pieces for i in range(pieces)]
    ours = theirs = 0.0
    done = 0
    synchronize(device)
    begin = time.perf_counter()

    def between(step: int, _: Tensor) -> None:
        nonlocal ours, theirs, done, begin
        if step + 1 < bounds[done]:
            return
        synchronize(device)
        ours += time.perf_counter() - begin
        before = done
        while done + 1 < pieces and bounds[done] <= step + 1:
            done += 1
        count = plain_steps * done // pieces - plain_steps * before // pieces
        if count:
            theirs += seconds(lambda: plain_sample(plain, tokens, steps, count), device)
        begin = time.perf_counter()

    sample(model, tokens, steps=steps, sampler=way, seed=seed, on_step=between)
    synchronize(device)
    ours += time.perf_counter() - begin
    rest = plain_steps - plain_steps * done // pieces
    if rest:
        theirs += seconds(lambda: plain_sample(plain, tokens, steps, rest), device)
    return ours, theirs


def time_samplers(
    model: DiT,
    compute: Compute,
    *,
    batch: int,
    steps: int = STEPS,
    budget: float = 60.0,
    length: int = 0,
    ways: Sequence[str] = ("ddpm_cache",),
) -> dict[str, Any]:
    """Tokens a second of each way with quartiles over up to three rounds, as many as there is time for, but at least one.

    The plain loop gets about half of `budget` seconds; if that is not enough for all its steps, fewer are timed.
    """
    length = length or model.config.length
    training = model.training
    model.eval()
    plain = plain_model(model)
    check(model, plain, compute, ways, min(length, 16))
    tokens = torch.full((batch, length), model.mask_id, device=compute.device)
    whole = batch * length
    taken: dict[str, list[float]] = {PLAIN: [], **{way: [] for way in ways}}
    timed = 0
    with torch.no_grad(), compute.autocast():
        sample(model, tokens, steps=2)
        if 3 * 8 * whole * model.vocab_size <= PLAIN_BYTES:
            one = min(seconds(lambda: plain_sample(plain, tokens, steps, 1), compute.device) for _ in range(2))
            timed = max(1, min(steps, int(budget / 2 / ROUNDS / len(ways) / one)))
        spent = 0.0
        for i in range(ROUNDS):
            before = spent
            for way in ways:
                ours, theirs = one_round(model, plain, tokens, steps, way, i, timed)
                taken[way].append(ours)
                taken[PLAIN] += [theirs * steps / timed] if timed else []
                spent += ours + theirs
            if spent + (spent - before) > budget:
                break
    model.train(training)
    results = {}
    for name, spent_on in taken.items():
        if not spent_on:
            continue
        low, middle, high = spread(sorted(whole / s for s in spent_on))
        results[name] = {"tokens_per_second": middle, "low": low, "high": high, "step_ms": whole / middle / steps * 1e3}
    for r in results.values():
        r["ratio"] = r["tokens_per_second"] / results[PLAIN]["tokens_per_second"] if PLAIN in results else None
    if 0 < timed < steps:
        results[PLAIN]["timed_steps"] = timed
    return {"batch": batch, "length": length, "denoising_steps": steps, "results": results}


def table(record: dict[str, Any]) -> list[str]:
    """The rates as lines."""
    lines = [
        f"sampling {record['batch']} x {record['length']:,} tokens in {record['denoising_steps']:,} steps",
        f"{'way':<18}{'tokens/s':>10}{'quartiles':>22}{'ms a step':>11}{'x plain':>9}",
    ]
    for name, r in record["results"].items():
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.2f}"
        note = f"   extrapolated from {r['timed_steps']} steps" if "timed_steps" in r else ""
        lines.append(
            f"{name:<18}{r['tokens_per_second']:>10,.1f}{r['low']:>11,.1f} -{r['high']:>9,.1f}{r['step_ms']:>11,.1f}"
            f"{ratio:>9}{note}"
        )
    if PLAIN not in record["results"]:
        lines.append(f"{PLAIN}: not run, its logits would take more than {PLAIN_BYTES >> 30} GiB")
    return lines


def main() -> int:
    """The script: 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="", help="model sizes; tiny on a CPU and small on a GPU by default")
    parser.add_argument("--vocabulary", type=int, default=0, help="ids of the model, the mask included; 30522 or 50258")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="sequences; 1 on a CPU, and 1 8 32 on a GPU by default")
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS], help="steps from masks to text")
    parser.add_argument("--ways", nargs="+", default=["ddpm_cache"], help="samplers to time beside the plain loop")
    parser.add_argument("--seconds", type=float, default=150.0, help="time for each combination, about")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    args = parser.parse_args()
    try:
        if min(args.vocabulary, args.length) < 0 or min([*args.batch, *args.steps]) < 1 or args.seconds <= 0:
            raise UsageError("--batch and --steps must be at least 1, --seconds above 0, and sizes at least 0")
        for way in args.ways:
            if way not in SAMPLERS or way == "importance":
                raise UsageError(f"there is no sampler {way!r} to time{nearest(way, SAMPLERS)}")
        compute = resolve(TrainConfig(device=args.device, dtype=args.dtype))
        on_gpu = compute.device.type == "cuda"
        preset, vocabulary = args.preset or ("small" if on_gpu else "tiny"), args.vocabulary or (50_258 if on_gpu else 30_522)
        config = mdlm_network(load_preset(preset).model)
        config.length, config.dropout = args.length or config.length, 0.0
        torch.manual_seed(0)
        model = DiT(vocabulary, vocabulary - 1, **vars(config)).to(compute.device)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        cases = []
        for steps in args.steps:
            for batch in args.batch or ([1, 8, 32] if on_gpu else [1]):
                case = time_samplers(model, compute, batch=batch, steps=steps, budget=args.seconds, ways=args.ways)
                print("\n".join(table(case)), flush=True)
                cases.append(case)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {"preset": preset, "vocabulary": vocabulary, "length": config.length, "dim": config.dim, "layers": config.layers}
    whole = {"benchmark": "sampling", "settings": settings, "results": cases, "environment": environment(compute)}
    folder = args.out or results_folder(compute.device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sampling.json"
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
