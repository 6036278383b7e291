"""Sample from a run:  python -m atat_fast.sample --run runs/demo [--num_samples 2] [--prompt TEXT] [--infill TEXT]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from atat_fast.cli import make_parser, run_door
from atat_fast.config import TrainConfig
from atat_fast.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """The door. Prints samples; status 0, or 2 on bad input."""
    parser = make_parser(prog="python -m atat_fast.sample", description="Text from a run's model.")
    parser.add_argument("--run", type=str, required=True, help="A run folder, or one of its checkpoints.")
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="Which checkpoint of the run.")
    parser.add_argument("--num_samples", type=int, default=1, help="How many.")
    parser.add_argument("--prompt", type=str, default="", help="Text each sample begins with; the model continues it.")
    parser.add_argument("--infill", type=str, default=None, help="Text to complete where it says [MASK], one token for each.")
    parser.add_argument("--length", type=int, default=0, help="Tokens of a sample; 0 means the model's length.")
    parser.add_argument("--steps", type=int, default=128, help="Denoising steps.")
    parser.add_argument(
        "--sampler",
        type=Literal["auto", "ddpm_cache", "ancestral"],
        default="auto",
        help="auto is ddpm_cache, or ancestral for a model that is told the time.",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Divides the logits.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--dtype", type=Literal["auto", "bf16", "fp32"], default="auto", help="Precision.")
    args = parser.parse_args(list(arguments))
    if args.num_samples < 1:
        raise UsageError(f"num_samples must be at least 1, got {args.num_samples}")
    if args.infill is not None and args.prompt:
        raise UsageError("give either --prompt, which is continued, or --infill, which is completed")

    import torch

    from atat_fast.diffusion.samplers import sample
    from atat_fast.training import checkpoint
    from atat_fast.training.device import resolve

    saved = checkpoint.find(Path(args.run), args.checkpoint)
    model, tokenizer = checkpoint.load_model(saved)
    start = _start(args, tokenizer, model.config.length)
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype, compile="off"))
    model.eval().to(compute.device)
    tokens = torch.tensor(start, device=compute.device).expand(args.num_samples, -1)
    sampler = args.sampler
    if sampler == "auto":
        sampler = "ancestral" if model.time_conditioning else "ddpm_cache"
    with compute.autocast():
        drawn = sample(model, tokens, steps=args.steps, sampler=sampler, temperature=args.temperature, seed=args.seed)
    for i, ids in enumerate(drawn.tolist()):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        print(tokenizer.decode(ids))
    return 0


def _start(args: Any, tokenizer: Any, longest: int) -> list[int]:
    """The ids a sample begins as: what is given, and the mask where something is to be filled in."""
    if args.length < 0 or args.length > longest:
        raise UsageError(f"length must be in 1..{longest}, the model's own, got {args.length}")
    if args.infill is not None:
        ids: list[int] = tokenizer.encode_prompt(args.infill)
        if tokenizer.mask_id not in ids:
            raise UsageError("--infill has no [MASK] in it; write [MASK] wherever a token is to be filled in")
        if len(ids) > (args.length or longest):
            raise UsageError(f"--infill has {len(ids)} tokens, but the model takes at most {args.length or longest}")
        return ids
    ids = tokenizer.encode_prompt(args.prompt)
    length = args.length or longest
    if len(ids) >= length:
        raise UsageError(f"--prompt has {len(ids)} tokens, which leaves nothing of {length} to fill in; shorten it")
    return ids + [tokenizer.mask_id] * (length - len(ids))


if __name__ == "__main__":
    run_door(main)
