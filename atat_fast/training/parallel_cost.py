"""What one card of many holds, sends and takes for a step, under each way of sharing the work. Arithmetic; nothing is started.

    ddp     every card holds everything; gradients are summed over all cards once a step
    fsdp    weights, gradients, moments and average are spread over all cards; blocks are gathered when they are needed
    hsdp    spread over the cards of a host, and every host holds a copy: summed between hosts as ddp does

Accumulation communicates once a step in all of them, so under fsdp and hsdp the gradients of earlier passes wait unsharded.
The work of a step is `step_time.py`'s, and the devices are `devices.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from atat_fast.config import Config
from atat_fast.diffusion.counts import expected_share
from atat_fast.hardware.compute import Compute
from atat_fast.hardware.devices import Device
from atat_fast.models.dit import step_cost
from atat_fast.models.importance import importance_cost
from atat_fast.training.plan import empty_estimator, empty_model, estimate_memory
from atat_fast.training.step_time import Part, muon_flops, optimizer_part, pass_parts

GIB = 1 << 30
RESERVED_BYTES = 3 * GIB // 2
"""Context, workspaces of libraries, and what the allocator cannot use. An assumption."""
NCCL_BYTES = GIB // 4
"""What NCCL keeps for its channels. An assumption."""
HOP_SECONDS = 1e-5
"""What a ring's step from one card to the next costs before a byte moves. An assumption."""
BUCKET_BYTES = 25 << 20
"""DDP's bucket of gradients."""
BLOCKS_IN_FLIGHT = 3
"""Gathered blocks that exist at once where blocks are let go: the one at work, the next one, and one being freed."""

MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0 + 4 / 256}
"""Bytes of one moment of one parameter; 8-bit ones have an fp32 scale for every 256."""


@dataclass(frozen=True)
class Sizes:
    """Numbers a model holds: all that are trained, and those of its blocks."""

    total: int
    blocks: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Sizes:
        """Of a run's model and, where it has one, its importance estimator."""
        counts = empty_model(config, vocab_size, vocab_size - 1).parameter_counts()
        estimator = empty_estimator(config, vocab_size)
        extra = 0 if estimator is None else estimator.parameter_count()
        return cls(counts["total"] + extra, counts["blocks"], config.model.layers, vocab_size)


@dataclass(frozen=True)
class Layout:
    """How a step is shared.

    mode: none, ddp, fsdp or hsdp.    world: cards in all.   shard: cards that one copy of the parameters is spread over.
    hosts: machines.   gathered: whether parameters stay gathered between a forward pass and its backward pass.
    param_bytes, reduce_bytes: size of a number when blocks are gathered and when gradients are summed. What is no block
    (embedding, head, modulation) is gathered in fp32 and stays so from its forward to its backward pass.
    micro_batch, accumulation: sequences of a pass, and passes a step.
    checkpoint: every n-th block is computed again in the backward pass; 0 keeps all.
    moments: fp32, bf16 or 8bit.
    """

    mode: str
    world: int
    shard: int
    hosts: int
    gathered: bool
    param_bytes: int
    reduce_bytes: int
    micro_batch: int
    accumulation: int
    checkpoint: int = 0
    moments: str = "fp32"

    @property
    def replicas(self) -> int:
        """Copies of the parameters that there are."""
        return self.world // self.shard

    def recomputed(self, layers: int) -> int:
        """Blocks whose forward pass is run again."""
        return layers // self.checkpoint if self.checkpoint else 0


@dataclass(frozen=True)
class Estimate:
    """A step of one layout on one device: bytes a card holds, bytes a card sends, seconds by part."""

    layout: Layout
    device: Device
    memory: dict[str, int]
    wire: dict[str, float]
    parts: tuple[Part, ...]
    tokens: int
    flops: float
    link_seconds: float
    """What communication would take if none of it ran beside computing."""

    @property
    def bytes(self) -> int:
        """What a card holds at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is what the card has."""
        return self.bytes <= self.device.memory

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def waiting(self) -> float:
        """Seconds of a step that nothing but communication fills."""
        return sum(part.seconds for part in self.parts if part.name == "communication")

    @property
    def hidden(self) -> float:
        """Share of the communication that runs beside computing; 1 where there is none."""
        return 1 - self.waiting / self.link_seconds if self.link_seconds else 1.0

    @property
    def efficiency(self) -> float:
        """Share of a step in which cards compute."""
        return 1 - self.waiting / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all cards."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the data sheets' rate, counting hidden rows through the head."""
        return self.flops / self.seconds / self.layout.world / self.device.flops


def estimate(config: Config, sizes: Sizes, layout: Layout, device: Device) -> Estimate:
    """Memory, traffic and time of a step of `config` in `layout` on `device`s."""
    m = config.model
    sequences = layout.world * layout.accumulation * layout.micro_batch
    share = expected_share(config.diffusion, m.length)
    hidden = round(layout.micro_batch * m.length * share)
    once = pass_parts(
        m, sizes.vocabulary, layout.micro_batch, sizes.total, device, hidden_rows=hidden, recomputed=layout.recomputed(m.layers)
    )
    scoring = importance_cost(config.importance, m, layout.micro_batch).flops
    if scoring:
        once.append(Part("importance", scoring, 0, scoring / (device.flops * device.shares.gemm)))
    orthogonal = muon_flops(m) / layout.shard if config.optim.name == "muon" else 0.0
    moments = MOMENT_BYTES[layout.moments] * (1 if config.optim.name == "muon" else 2)
    own = -(-sizes.total // layout.shard)
    parts = [*(p.times(layout.accumulation) for p in once)]
    parts.append(optimizer_part(own, device, moment_bytes=moments, flops=orthogonal))
    wire = bytes_sent(sizes, layout)
    busy = sum(p.seconds for p in once)
    if layout.world > 1:
        seconds = exposed_seconds(sizes, layout, device, busy, device.shares.overlap)
        parts.append(Part("communication", 0, sum(wire.values()), seconds))
    flops = step_cost(m, sizes.vocabulary, sequences, round(sequences * m.length * share)).flops
    flops += importance_cost(config.importance, m, sequences).flops
    return Estimate(
        layout, device, card_memory(config, sizes, layout, device), wire, tuple(parts), sequences * m.length, flops,
        exposed_seconds(sizes, layout, device, busy, 0.0),
    )  # fmt: skip


def card_memory(config: Config, sizes: Sizes, layout: Layout, device: Device) -> dict[str, int]:
    """Bytes one card holds at once, by what holds them."""
    kind = torch.device("cpu" if device.key == "cpu" else "cuda")
    compute = Compute(kind, torch.bfloat16 if device.element == 2 else torch.float32, compile=True)
    whole = estimate_memory(
        config, sizes.total, sizes.vocabulary, layout.micro_batch, compute, recomputed=layout.recomputed(config.model.layers)
    )
    own = -(-sizes.total // layout.shard)
    share = own / sizes.total
    moments = 1 if config.optim.name == "muon" else 2
    small = device.element
    blocks, rest = sizes.blocks, sizes.total - sizes.blocks
    copies = small * (rest + (blocks if small < layout.param_bytes else 0))
    parts = {
        "parameters": 4 * own,
        "gradients": 4 * own,
        "optimizer": round(moments * MOMENT_BYTES[layout.moments] * own),
        "average": round(whole.average * share),
        "activations": whole.activations,
        "head": whole.head,
        "copies in bf16": copies if small == 2 else 0,
    }
    if layout.shard > 1:
        some = min(blocks, BLOCKS_IN_FLIGHT * (blocks // sizes.layers))
        parts["gathered parameters"] = 4 * rest + layout.param_bytes * (blocks if layout.gathered else some)
        parts["unsharded gradients"] = layout.reduce_bytes * (rest + (blocks if layout.accumulation > 1 else some))
    if layout.world > 1:
        parts["communication"] = NCCL_BYTES + 2 * BUCKET_BYTES
    parts["reserved"] = RESERVED_BYTES
    return parts


def gathered_bytes(sizes: Sizes, layout: Layout) -> tuple[int, int]:
    """Bytes that are put together before a forward pass, and again before its backward pass where blocks were let go."""
    blocks = layout.param_bytes * sizes.blocks
    return 4 * (sizes.total - sizes.blocks) + blocks, 0 if layout.gathered else blocks


def bytes_sent(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Bytes a card sends in a step, by collective, in rings: (n - 1) / n of the data for a gather or a scatter, twice a sum."""
    sent: dict[str, float] = {}
    if layout.shard > 1:
        part = (layout.shard - 1) / layout.shard
        sent["all-gather"] = layout.accumulation * part * sum(gathered_bytes(sizes, layout))
        sent["reduce-scatter"] = part * layout.reduce_bytes * sizes.total
    if layout.replicas > 1:
        part = 2 * (layout.replicas - 1) / layout.replicas
        sent["all-reduce"] = part * layout.reduce_bytes * sizes.total / layout.shard
    return sent


def exposed_seconds(sizes: Sizes, layout: Layout, device: Device, once: float, overlap: float) -> float:
    """Seconds of a step that communication adds to computing, which takes `once` for each pass.

    A forward pass is a third of it. Gathers of a pass hide behind the forward (and the backward) pass that needs them, sums of
    gradients behind the last backward pass, each for the share `overlap` of that pass.
    """
    forward, backward = once / 3, 2 * once / 3
    groups = sizes.layers + 1
    exposed, last = 0.0, 0.0
    if layout.shard > 1:
        part, rate = (layout.shard - 1) / layout.shard, between(layout, device, layout.shard)
        first, second = (n and part * n / rate + groups * (layout.shard - 1) * HOP_SECONDS for n in gathered_bytes(sizes, layout))
        exposed += layout.accumulation * max(0.0, first - overlap * forward)
        exposed += (layout.accumulation - 1) * max(0.0, second - overlap * backward)
        last = second + part * layout.reduce_bytes * sizes.total / rate + groups * (layout.shard - 1) * HOP_SECONDS
    if layout.replicas > 1:
        summed = 2 * (layout.replicas - 1) / layout.replicas * layout.reduce_bytes * sizes.total / layout.shard
        # Under hsdp all cards of a host sum their parts with other hosts' at the same time, through one network port.
        rate = device.network / layout.shard if layout.shard > 1 else between(layout, device, layout.world)
        collectives = groups if layout.shard > 1 else math.ceil(layout.reduce_bytes * sizes.total / BUCKET_BYTES)
        last += summed / rate + collectives * 2 * (layout.replicas - 1) * HOP_SECONDS
    return exposed + max(0.0, last - overlap * backward)


def between(layout: Layout, device: Device, cards: int) -> float:
    """Bytes a second of a ring over `cards` cards: the link inside a host, and no more than the network where it leaves one."""
    inside = layout.world // layout.hosts
    return device.between if cards <= inside else min(device.between, device.network)


def largest_micro_batch(config: Config, sizes: Sizes, layout: Layout, device: Device) -> int:
    """Most sequences a pass can have before memory is full; 0 where not even one fits."""

    def fits(batch: int) -> bool:
        memory = card_memory(config, sizes, replace(layout, micro_batch=batch), device)
        return sum(memory.values()) <= device.memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
