"""How long a training step should take on a device: the ops' cost models over its rates, part by part. Nothing here is measured.

    products      2 N (4 + 2 r) D^2 a block, times 3 with backward: rate
    attention     its own products: rate
    head          three products over hidden rows, and a pass over their logits: rate, and bytes
    norm chains   gate, residual, LayerNorm, modulate: bytes
    elementwise   rotary, the MLP's activation, embedding, casts of weights, gradient sums: bytes
    gaps          kernels times the time between two of them
    recomputed    the forward pass of checkpointed blocks, a second time: all of the above
    optimizer     clipping, the optimizer, the average, once a step: bytes, and Muon's products

Peaks and the shares of them that are assumed to arrive come from `hardware/devices.py`. Communication is `parallel_cost.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atat_fast.config import ModelConfig
from atat_fast.hardware.devices import Device
from atat_fast.models.dit import step_cost
from atat_fast.ops import (
    adaptive_layer_norm_cost,
    attention_cost,
    gated_residual_norm_cost,
    linear_cross_entropy_cost,
    rotary_cost,
)
from atat_fast.ops.linear_cross_entropy.slabs import CHUNK_BYTES_GPU

# Kernels of one pass, counted from the model's own calls: a block's forward has four products, rotary, attention, activation and
# two norm chains; its backward two products for each, three for attention, two for each chain, bias sums; then casts of weights.
KERNELS_PER_BLOCK = 32
KERNELS_FORWARD = 10
KERNELS_PER_SLAB = 6
KERNELS_PER_PASS = 20
KERNELS_PER_STEP = 30

# Bytes a parameter: clipping reads the gradient twice and writes it (12), the optimizer reads gradient and weight and writes the
# weight (12) and reads and writes its moments, the average reads two and writes one (12).
CLIP_BYTES, WEIGHT_BYTES, AVERAGE_BYTES = 12, 12, 12
# Bytes a parameter and pass: a cast of the weight (read 4, write 2) and a sum into the gradient (read 2 + 4, write 4).
CAST_BYTES = 16
MUON_ITERATIONS = 5


@dataclass(frozen=True)
class Part:
    """One part of a step: what it does, and how long that is projected to take."""

    name: str
    flops: float
    bytes: float
    seconds: float

    def times(self, n: float) -> Part:
        """The same, n times."""
        return Part(self.name, self.flops * n, self.bytes * n, self.seconds * n)


def pass_parts(
    config: ModelConfig, vocabulary: int, batch: int, parameters: int, device: Device, *, hidden_rows: int | None = None,
    recomputed: int = 0,
) -> list[Part]:  # fmt: skip
    """The parts of one forward and backward pass over `batch` sequences.

    hidden_rows: rows the head sees, half of all by default. recomputed: blocks whose forward pass backward runs again.
    """
    rows, width, layers, size = batch * config.length, config.dim, config.layers, device.element
    hidden, shares = rows // 2 if hidden_rows is None else hidden_rows, device.shares
    head = linear_cross_entropy_cost(hidden, width, vocabulary, element_size=size)
    attend = [attention_cost(batch, config.length, width, element_size=size, backward=b) for b in (False, True)]
    # step_cost counts attention's backward as twice its forward; its own model counts what runs: scores again, five products.
    products = step_cost(config, vocabulary, batch, hidden).flops - head.flops - 3 * layers * attend[0].flops
    attention = layers * sum(cost.flops for cost in attend)

    chains = [gated_residual_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    first = [adaptive_layer_norm_cost(rows, width, branch_bytes=size, backward=b).bytes for b in (False, True)]
    norm_bytes = 2 * layers * sum(chains) + sum(first)
    turns = [
        layers * rotary_cost(rows, config.heads, width // config.heads, element_size=size, norm=config.qk_norm, backward=b).bytes
        for b in (False, True)
    ]
    activation = 5 * rows * config.mlp_ratio * width * size * layers
    embedding = 4 * rows * width * 4 + 4 * vocabulary * width
    casts = CAST_BYTES * parameters if size == 2 else 0
    plain = sum(turns) + activation + embedding + casts

    over_logits = 2 * hidden * vocabulary * size  # the row pass: it follows the product and cannot overlap it
    rate, moved = device.flops * shares.gemm, device.bandwidth * shares.bandwidth
    head_seconds = max(head.flops / rate, (head.bytes - over_logits) / moved) + over_logits / moved
    slabs = math.ceil(hidden * vocabulary * size / CHUNK_BYTES_GPU)
    kernels = KERNELS_PER_BLOCK * layers + KERNELS_PER_SLAB * slabs + KERNELS_PER_PASS
    parts = [
        Part("products", products, 0, products / rate),
        Part("attention", attention, 0, attention / (device.flops * shares.attention)),
        Part("head", head.flops, head.bytes, head_seconds),
        Part("norm chains", 0, norm_bytes, norm_bytes / moved),
        Part("elementwise", 0, plain, plain / moved),
        Part("gaps", 0, 0, kernels * shares.gap),
    ]
    if recomputed:
        share = recomputed / layers
        again, attend_again = products / 3 * share, attend[0].flops * recomputed
        bytes_again = 2 * recomputed * chains[0] + share * (turns[0] + 2 / 5 * activation)
        seconds = again / rate + attend_again / (device.flops * shares.attention) + bytes_again / moved
        seconds += KERNELS_FORWARD * recomputed * shares.gap
        parts.append(Part("recomputed", again + attend_again, bytes_again, seconds))
    return parts


def optimizer_part(parameters: int, device: Device, *, moment_bytes: float = 8.0, flops: float = 0.0) -> Part:
    """Clipping, the optimizer and the average over `parameters` numbers, whose moments take `moment_bytes` each together."""
    moved = (CLIP_BYTES + WEIGHT_BYTES + AVERAGE_BYTES + 2 * moment_bytes) * parameters
    seconds = moved / (device.bandwidth * device.shares.bandwidth) + flops / (device.flops * device.shares.gemm)
    return Part("optimizer", flops, moved, seconds + KERNELS_PER_STEP * device.shares.gap)


def muon_flops(config: ModelConfig) -> float:
    """Operations of Muon's orthogonalisation in a step: five Newton-Schulz iterations of every matrix inside the blocks.

    One of them on an m x n matrix, m <= n, takes X X^T and its product with X (2 m^2 n each), and one m x m product (2 m^3).
    """
    width, inner = config.dim, config.mlp_ratio * config.dim
    shapes = ((3 * width, width), (width, width), (inner, width), (width, inner))
    each = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in shapes)
    return float(MUON_ITERATIONS * each * config.layers)
