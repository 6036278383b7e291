"""Where a training step's time goes, op by op: a Chrome trace, and a table against the ops' cost models.

Every event of torch.profiler belongs to one group, by the nearest op above it that is named here. Its own time (on a GPU, that of
the kernels it launched) counts once. The rest of the step is `between ops`: Python and the profiler's own work on a CPU, waiting
on a GPU. So the groups add up to the profiled step; the time of a step without the profiler is recorded beside it. FLOPs and
bytes are the least that a group must do, from the `*_cost` functions. A share of the roofline is the least time for them over the
time taken, if the device's peaks are known (bench/devices.py).
"""

from __future__ import annotations

import gzip
import re
import time
from pathlib import Path
from typing import Any

import torch
from devices import Device
from timing import synchronize
from torch.profiler import ProfilerActivity
from variants import MDLM, Variant

from atat_fast.models.dit import step_cost
from atat_fast.ops import (
    Cost,
    adaptive_layer_norm_cost,
    attention_cost,
    gated_residual_norm_cost,
    linear_cross_entropy_cost,
    mask_tokens_cost,
    rotary_cost,
)

LARGEST_TRACE = 10 * 10**6
BETWEEN = "between ops"
CLIP, ADAMW, AVERAGE = 12, 28, 12
"""Bytes a parameter: the norm reads the gradient and scaling reads and writes it; AdamW reads four and writes three; the average
reads two and writes one."""

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
NAMED = (
    ("average", re.compile(r"^part:average$")),
    ("optimizer", re.compile(r"^part:optimizer$|Optimizer\.step")),
    ("clip", re.compile(r"^part:clip$")),
    ("data", re.compile(r"^part:data$")),
    ("head row pass", re.compile(r"cross_entropy_$|cross_entropy_rows|log_?softmax|logsumexp|LogSoftmax|Logsumexp")),
    ("head", re.compile(r"linear_cross_entropy")),
    ("masking", re.compile(r"mask_tokens|^part:masking$")),
    ("norm chains", re.compile(r"residual_norm|adaptive_layer_norm|native_layer_norm|NativeLayerNorm")),
    ("rotary", re.compile(r"rotary")),
    ("attention", re.compile(r"scaled_dot_product|ScaledDotProduct|flash_attn|FlashAttn|attention_products")),
    ("activation", re.compile(r"(?i)gelu|relu")),
    ("embedding", re.compile(r"embedding|Embedding")),
    ("compiled region", re.compile(r"CompiledFunction|CompiledFxGraph|Torch-Compiled|inductor|triton_")),
)
FALLBACK = (
    ("copies and casts", re.compile(r"copy_|_to_copy|contiguous|clone|aten::cat")),
    ("fills", re.compile(r"fill_|zero|ones")),
    ("allocation and views", re.compile(r"empty|view|reshape|transpose|permute|slice|select|expand|as_strided|unbind|aten::t$")),
)


def group_of(event: Any, vocabulary: int) -> str:
    """The group of an event's own time."""
    name = event.name
    is_product = name in PRODUCTS
    head_shaped = any(vocabulary <= size < vocabulary + 128 for shape in (event.input_shapes or []) for size in (shape or []))
    at: Any = event
    while at is not None:
        for group, pattern in NAMED:
            if pattern.search(at.name):
                if group in ("head", "head row pass") and is_product:
                    return "head products"
                if group == "head":
                    return "head row pass" if name.startswith("atat_fast_c::") else "head, around them"
                return group
        at = at.cpu_parent
    if is_product:
        return "head products" if head_shaped else "block products"
    if head_shaped:
        return "head row pass"
    return next((group for group, pattern in FALLBACK if pattern.search(name)), "other elementwise and sums")


def costs(variant: Variant) -> dict[str, Cost]:
    """The least work of each group of a step, for the groups that have a cost model."""
    s = variant.setting
    c, size = s.config.model, s.compute.dtype.itemsize
    rows, width, layers = s.batch * c.length, c.dim, c.layers
    ours = variant.name not in MDLM
    reach = rows // 2 if ours else rows
    head = linear_cross_entropy_cost(reach, width, s.vocabulary, element_size=size)
    attend = [attention_cost(s.batch, c.length, width, element_size=size, backward=b) for b in (False, True)]
    whole = step_cost(c, s.vocabulary, s.batch, reach).flops - head.flops - 3 * layers * attend[0].flops
    weights = (4 + 2 * c.mlp_ratio) * width * width * layers
    chains = [gated_residual_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    first = [adaptive_layer_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    turns = [rotary_cost(rows, c.heads, width // c.heads, element_size=size, norm=c.qk_norm, backward=b) for b in (False, True)]
    over_logits = 2 * reach * s.vocabulary * size
    parameters = sum(p.numel() for p in variant.losses_of.parameters())
    return {
        "block products": Cost(whole, 3 * weights * size),
        "attention": Cost(layers * sum(x.flops for x in attend), layers * sum(x.bytes for x in attend)),
        "head products": Cost(head.flops, head.bytes - over_logits),
        "head row pass": Cost(0, over_logits),
        "norm chains": Cost(0, 2 * layers * sum(chains) + sum(first)),
        "rotary": Cost(0, layers * sum(turn.bytes for turn in turns)),
        "masking": Cost(0, mask_tokens_cost(s.batch, c.length, reach).bytes),
        "activation": Cost(0, 5 * rows * c.mlp_ratio * width * size * layers),
        "embedding": Cost(0, 4 * rows * width * 4 + 4 * s.vocabulary * width),
        "clip": Cost(0, CLIP * parameters),
        "optimizer": Cost(0, ADAMW * parameters),
        "average": Cost(0, AVERAGE * parameters),
    }


def least_seconds(cost: Cost, device: Device) -> float:
    """The roofline: the longer of the times for computing and for moving, at the device's peaks."""
    return max(cost.flops / device.flops, cost.bytes / device.bandwidth)


def profile(variant: Variant, path: Path, device: Device | None, steps: int = 2) -> dict[str, Any]:
    """Profile `steps` steps and write the trace to `path`. Returns each group's seconds, FLOPs, bytes and roofline share."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if variant.device.type == "cuda" else [])
    on_gpu = variant.device.type == "cuda"
    alone = variant.timed(steps)
    with torch.profiler.profile(activities=activities, record_shapes=True) as watched, variant.clock.started():
        synchronize(variant.device)
        begin = time.perf_counter()
        for _ in range(steps):
            variant.step()
        synchronize(variant.device)
        step = (time.perf_counter() - begin) / steps
    kept = write_trace(watched, path)
    seconds: dict[str, float] = {}
    for event in watched.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, counted at the op that launched it
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / steps
        if own > 0 and not (event.name.startswith(("part:forward", "part:backward", "ProfilerStep"))):
            group = group_of(event, variant.setting.vocabulary)
            seconds[group] = seconds.get(group, 0.0) + own
    seconds[BETWEEN] = max(0.0, step - sum(seconds.values()))
    known, groups = costs(variant), {}
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        cost = known.get(name)
        share = None if cost is None or device is None or not spent else least_seconds(cost, device) / spent
        groups[name] = {"seconds": spent, "flops": cost and cost.flops, "bytes": cost and cost.bytes, "share_of_roofline": share}
    return {
        "step_seconds": step,
        "unwatched_step_seconds": alone,
        "groups": groups,
        "trace": kept,
        "device": None if device is None else device.name,
    }


def write_trace(watched: Any, path: Path) -> str | None:
    """Write the Chrome trace as gzip. Returns its name, or None if it is over 10 MB and not kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("")
    watched.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes(), mtime=0)
    plain.unlink()
    if len(packed) > LARGEST_TRACE:
        return None
    path.write_bytes(packed)
    return path.name


def op_table(name: str, kept: dict[str, Any]) -> list[str]:
    """A profile as lines."""
    step = kept["step_seconds"]
    lines = [
        f"{name}: a profiled step of {step * 1e3:,.1f} ms ({step / kept['unwatched_step_seconds']:.2f} of an unprofiled one)",
        f"{'op':<28}{'ms':>10}{'share':>8}{'GFLOP':>10}{'MB':>10}{'of roofline':>13}",
    ]
    for group, g in kept["groups"].items():
        work = [f"{x / scale:,.1f}" if x else "-" for x, scale in ((g["flops"], 1e9), (g["bytes"], 1e6))]
        share = "-" if g["share_of_roofline"] is None else f"{g['share_of_roofline']:.0%}"
        lines.append(f"{group:<28}{g['seconds'] * 1e3:>10.1f}{g['seconds'] / step:>8.1%}{work[0]:>10}{work[1]:>10}{share:>13}")
    total = sum(g["seconds"] for g in kept["groups"].values())
    lines.append(f"{'sum':<28}{total * 1e3:>10.1f}{total / step:>8.1%}")
    lines.append(f"trace: {kept['trace'] or 'not kept: it is larger than 10 MB'}")
    if kept["device"] is None:
        lines.append(
            "shares of a roofline need the device's peaks: python bench/ceilings.py measures a CPU's, on an idle machine"
        )
    return lines
