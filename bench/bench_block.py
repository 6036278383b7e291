"""One whole DiT block, forward and backward: plain MDLM's and ours, in interleaved rounds.

    python bench/bench_block.py [--preset tiny] [--length 0] [--batch 8] [--rounds 15] [--out FOLDER]

A block here is a pre-norm block and the next norm, as ours are cut: attention, gated sum and norm, MLP, gated sum and norm. Both
hold the same weights, and outputs and every gradient must agree before anything is timed. The plain block is conditioned by a row
a sample, as in MDLM, ours by one row for all. Figures are medians with quartiles. On a GPU both are also timed compiled, in bf16;
on a CPU without bf16 hardware in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from mdlm import PlainMDLM, block_by_block, mdlm_network, modulate

from atat_fast.config import TrainConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, environment, resolve
from atat_fast.models import DiT
from atat_fast.models.trunk import BlockContext, Norm, add_and_norm
from atat_fast.ops import attention_cost

Outputs = tuple[torch.Tensor, torch.Tensor]


def plain_block(model: PlainMDLM, x: torch.Tensor, c: torch.Tensor) -> Outputs:
    """The residual stream after MDLM's block, and its norm."""
    length = x.shape[1]
    c = c.expand(len(x), -1)
    x = model.blocks[0](x, c, model.cos_table[:length], model.sin_table[:length])
    shift, scale = model.final_modulation(c).chunk(2, dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:]) * model.final_norm
    return x, modulate(normed, shift, scale)


def our_block(model: DiT, x: torch.Tensor, c: torch.Tensor) -> Outputs:
    """The residual stream after our block, and its norm."""
    length, block = x.shape[1], model.blocks[0]
    packed = model.modulation(c).unflatten(-1, (-1, model.config.dim))
    shift1, scale1, gate1, shift2, scale2, gate2, shift, scale = packed.unbind(1)
    context = BlockContext(model.cos[:length], model.sin[:length])
    x, branch = block(x, None, (gate1, shift1, scale1, gate1, shift2, scale2), context)  # the first gate is not read
    return add_and_norm(x, branch, gate2, None, Norm(model.final_norm), shift, scale)


class Variant:
    """A block with its weights, and a step: forward and backward."""

    def __init__(self, name: str, run: Callable[..., Outputs], model: torch.nn.Module, compute: Compute, compiled: bool) -> None:
        self.name, self.model, self.compute = name, model, compute
        self.run = torch.compile(run) if compiled else run
        self.parameters = {n: p for n, p in model.named_parameters() if n.startswith(("blocks.", "final_", "modulation."))}

    def step(self, x: torch.Tensor, c: torch.Tensor, upstream: torch.Tensor) -> tuple[Outputs, tuple[torch.Tensor, ...]]:
        """Outputs, and the gradients of x and of every parameter."""
        with self.compute.autocast():
            outputs = self.run(self.model, x, c)
        given = tuple(upstream.to(o.dtype) for o in outputs)
        return outputs, torch.autograd.grad(outputs, (x, *self.parameters.values()), given)


def check_agreement(variants: list[Variant], inputs: tuple[torch.Tensor, ...], limit: float) -> float:
    """The largest difference of an output or a gradient from the first variant's, relative to its size; raises above `limit`."""
    worst, wanted = 0.0, {}
    for variant in variants:
        outputs, grads = variant.step(*inputs)
        found = dict(zip(("x", *variant.parameters), grads, strict=True)) | {"stream": outputs[0], "norm": outputs[1]}
        if "modulation.weight" in found:
            found = block_by_block(found, 1)
        wanted = wanted or found
        for name, want in wanted.items():
            error = (found[name].detach().float() - want.detach().float()).norm() / want.detach().float().norm()
            worst = max(worst, float(error))
    if not worst < limit:
        raise RuntimeError(f"the blocks disagree: an output or gradient differs by up to {worst:.2e} of its size")
    return worst


def seconds(variant: Variant, inputs: tuple[torch.Tensor, ...], steps: int) -> float:
    """Seconds of one step, the mean of `steps`."""
    synchronize(variant.compute.device)
    begin = time.perf_counter()
    for _ in range(steps):
        variant.step(*inputs)
    synchronize(variant.compute.device)
    return (time.perf_counter() - begin) / steps


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: argparse.Namespace) -> int:
    """Check, time, print, write."""
    if min(args.rounds, args.batch) < 1 or args.length < 0:
        raise UsageError("--rounds and --batch must be at least 1, and --length at least 0")
    compute = resolve(TrainConfig(device=args.device, dtype=args.dtype))
    config = mdlm_network(load_preset(args.preset).model)
    config.layers, config.dropout, config.length = 1, 0.0, args.length or config.length
    torch.manual_seed(0)
    ours = DiT(8, 7, **vars(config))
    with torch.no_grad():  # not the all-zero start, so that no gradient is 0
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain = PlainMDLM(8, 7, config)
    plain.load_state_dict(block_by_block(ours.state_dict(), 1))
    ours.to(compute.device), plain.to(compute.device)
    shape = (args.batch, config.length, config.dim)
    x = torch.randn(shape, device=compute.device, requires_grad=True)
    c, upstream = torch.randn(1, config.conditioning_dim, device=compute.device), torch.randn(shape, device=compute.device)
    variants = [Variant("mdlm", plain_block, plain, compute, False), Variant("atat_fast", our_block, ours, compute, False)]
    if compute.compile:
        variants.append(Variant("mdlm, compiled", plain_block, plain, compute, True))
        variants.append(Variant("atat_fast, compiled", our_block, ours, compute, True))
    inputs = (x, c, upstream)
    worst = check_agreement(variants, inputs, 5e-2 if compute.dtype is torch.bfloat16 else 1e-3)

    steps = 20 if compute.device.type == "cuda" else 1
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for variant in variants:
        seconds(variant, inputs, 3)
    for _ in range(args.rounds):
        for variant in variants:
            times[variant.name].append(seconds(variant, inputs, steps))

    rows = args.batch * config.length
    products = 3 * 2 * (4 + 2 * config.mlp_ratio) * config.dim**2 * rows
    attended = attention_cost(args.batch, config.length, config.dim).flops * 3
    print(f"{compute.describe()}; a block of preset {args.preset}, {args.batch} x {config.length} x {config.dim}")
    print(f"checked: outputs and gradients agree to {worst:.1e}")
    print(f"{'variant':<20} {'ms':>9} {'quartiles':>18} {'ratio':>7} {'TFLOP/s':>8}")
    results: dict[str, Any] = {}
    base = statistics.median(times["mdlm"])
    for name, spent in times.items():
        low, middle, high = statistics.quantiles(spent, n=4) if len(spent) > 1 else (spent[0],) * 3
        results[name] = {"ms": middle * 1e3, "low": low * 1e3, "high": high * 1e3, "ratio": base / middle}
        spread = f"{low * 1e3:.2f} to {high * 1e3:.2f}"
        print(f"{name:<20} {middle * 1e3:9.2f} {spread:>18} {base / middle:6.2f}x {(products + attended) / middle / 1e12:8.3f}")
    settings = {k: getattr(args, k) for k in ("preset", "batch", "rounds")} | {"length": config.length, "dim": config.dim}
    record = {"benchmark": "block", "settings": settings, "agreement": worst, "flops": products + attended}
    record |= {"results": results, "environment": environment(compute)}
    name = "cpu" if compute.device.type == "cpu" else torch.cuda.get_device_name(compute.device).lower().replace(" ", "-")
    folder = args.out or Path(__file__).parent / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "block.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {folder / 'block.json'}")
    return 0


def main() -> int:
    """Parse, measure; status 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="model sizes")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence; 0 is the preset's")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON; bench/results/<device> by default")
    try:
        return measure(parser.parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
