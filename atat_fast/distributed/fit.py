"""Whether a run fits its cards, and how it is shared over them: arithmetic of memory and one rule. Nothing is started or timed.

    ddp     every card holds everything
    fsdp    weights, gradients, moments and average are spread over all cards; blocks are gathered when they are needed
    hsdp    as fsdp within groups of cards; each group holds a copy

parallel.mode auto is ddp if that fits a card, else fsdp. If neither fits, the run is refused with the largest micro-batch that
does. Weights, gradients, moments and the average are counted exactly; `activation_bytes` estimates activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from atat_fast.config import Config, ModelConfig
from atat_fast.errors import UsageError
from atat_fast.ops.linear_cross_entropy.slabs import default_budget
from atat_fast.ops.processor import multiplies_bf16

GIB = 1 << 30
RESERVED_BYTES = 3 * GIB // 2
"""CUDA's context, libraries' workspaces, and memory lost to fragmentation. An assumption."""
NCCL_BYTES = GIB // 4
"""NCCL's buffers for its channels. An assumption."""
BUCKET_BYTES = 25 << 20
"""DDP's bucket of gradients."""
BLOCKS_IN_FLIGHT = 3
"""Gathered blocks that exist at once if blocks are freed after use: the one at work, the next one, and one being freed."""
MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0 + 4 / 256}
"""Bytes of one moment of one parameter; 8-bit moments have an fp32 scale for every 256."""
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Sizes:
    """Counts of a run: trained parameters, those of them in blocks, blocks, and ids in the vocabulary."""

    total: int
    blocks: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Layout:
    """How a run is shared over `world` ranks.

    mode: none, ddp, fsdp or hsdp.   shard: number of ranks over which one copy of the parameters is spread; 1 under ddp.
    keep_gathered: whether a block's weights stay gathered between its forward and its backward pass.   reason: why, in words.
    gathers, sums: fp32 or bf16, in which blocks' weights are gathered and gradients are summed.
    """

    mode: str
    world: int
    shard: int
    keep_gathered: bool = True
    reason: str = ""
    gathers: str = "fp32"
    sums: str = "fp32"

    @property
    def name(self) -> str:
        """'fsdp, weights kept'."""
        if self.shard == 1:
            return self.mode
        over = f" over {self.shard}" if self.mode == "hsdp" else ""
        return f"{self.mode}{over}, weights {'kept' if self.keep_gathered else 'freed'}"

    def describe(self) -> str:
        """'fsdp over 4 ranks (reason)'."""
        if self.mode == "none":
            return f"one process ({self.reason})"
        copies = f", {self.world // self.shard} copies in shards of {self.shard}" if self.mode == "hsdp" else ""
        return f"{self.mode} over {self.world} ranks{copies} ({self.reason}), {self.wire}"

    @property
    def wire(self) -> str:
        """'sums in bf16, gathers in fp32'."""
        return f"sums in {self.sums}" + (f", gathers in {self.gathers}" if self.shard > 1 else "")


@dataclass(frozen=True)
class Card:
    """A device for memory arithmetic: its bytes, its kind (cuda or cpu), and the bytes of a number in products.

    peers: whether such devices read each other's memory.
    """

    memory: int
    kind: str
    element: int
    peers: bool = True


def check_parallel(config: Config, world: int, on_host: int) -> None:
    """Raise UsageError for settings that are invalid, or do not fit `world` ranks, `on_host` of them on each host."""
    parallel = config.parallel
    mode, shard = parallel.mode, parallel.shard_size
    if not parallel.timeout > 0:
        raise UsageError(f"parallel.timeout must be above 0 seconds, got {parallel.timeout}")
    if min(parallel.activation_checkpointing, shard, parallel.world_size) < 0:
        raise UsageError("parallel.activation_checkpointing, parallel.shard_size and parallel.world_size must be at least 0")
    if mode == "none" and world > 1:
        raise UsageError(
            f"parallel.mode none is one process, and {world} were started; use --nproc-per-node=1, or another parallel.mode"
        )
    if shard and mode != "hsdp":
        raise UsageError(f"parallel.shard_size {shard} is for parallel.mode hsdp, and this is {mode}")
    if parallel.param_dtype == "bf16" and mode in ("none", "ddp"):
        raise UsageError(f"parallel.param_dtype {parallel.param_dtype} is for weights that are gathered; use parallel.mode fsdp")
    if config.optim.state == "8bit" and mode in ("fsdp", "hsdp"):
        raise UsageError(
            f"optim.state 8bit is for parallel.mode ddp or one process: its blocks of 256 numbers do not divide over ranks under "
            f"{mode}; use optim.state bf16"
        )
    if mode == "hsdp" and world > 1 and world % (shard or on_host):
        fitting = [d for d in range(1, world + 1) if world % d == 0]
        raise UsageError(
            f"{world} ranks do not make a mesh of shards over {shard or on_host} ranks; "
            f"use a parallel.shard_size of {', '.join(map(str, fitting))}"
        )


def layouts(config: Config, world: int, on_host: int, card: Card) -> list[Layout]:
    """The layouts that the settings allow, simplest first."""
    wanted = config.parallel
    if world == 1:
        return [Layout("none", 1, 1)]
    auto = "bf16" if card.element == 2 and not card.peers else "fp32"
    gathers, sums = (auto if asked == "auto" else asked for asked in (wanted.param_dtype, wanted.reduce_dtype))
    found = [Layout("ddp", world, 1, sums=sums)] if wanted.mode in ("auto", "ddp") else []
    keeps = {"auto": (True, False), "never": (True,), "always": (False,)}[wanted.reshard_after_forward]
    if wanted.mode in ("auto", "fsdp") and config.optim.state != "8bit":
        found += [Layout("fsdp", world, world, keep, gathers=gathers, sums=sums) for keep in keeps]
    if wanted.mode == "hsdp":
        found += [Layout("hsdp", world, wanted.shard_size or on_host, keep, gathers=gathers, sums=sums) for keep in keeps]
    return found


def choose(config: Config, sizes: Sizes, world: int, on_host: int, card: Card, micro_batch: int, passes: int) -> Layout:
    """The first layout that fits. If none does, the smallest, if its mode was asked for or one process runs; `reason` says so.

    Raises UsageError with the largest micro-batch that fits, if mode is auto and nothing fits several ranks.
    """
    found = layouts(config, world, on_host, card)
    needs = [sum(card_memory(config, sizes, layout, card, micro_batch, passes).values()) for layout in found]
    have = f"{card.memory / GIB:.1f} GiB"
    for layout, need in zip(found, needs, strict=True):
        if need <= card.memory:
            why = f"{need / GIB:.1f} of {have} a card"
            if layout is not found[0]:
                why += f"; {found[0].name} needs {needs[0] / GIB:.1f}"
            return replace(layout, reason=why)
    least = min(range(len(found)), key=needs.__getitem__)
    layout, need = found[least], needs[least]
    most = largest_micro_batch(config, sizes, layout, card, passes)
    each = micro_batch * passes
    advice = [f"--train.micro_batch {max(d for d in range(1, most + 1) if each % d == 0)}"] if most else []
    if not config.parallel.activation_checkpointing:
        advice.append("--parallel.activation_checkpointing 1")
    if config.optim.state == "fp32" and config.optim.name == "adamw":
        advice.append("--optim.state bf16")
    sentence = (
        f"{layout.name} needs about {need / GIB:.1f} of {have} a card with micro-batches of {micro_batch}; "
        f"{f'at most {most} fit' if most else 'not even one sequence fits'}: try {', '.join([*advice, 'more cards'])}"
    )
    if world > 1 and config.parallel.mode == "auto":
        raise UsageError(f"this run does not fit: {sentence}; --parallel.mode {layout.mode} starts it anyway")
    return replace(layout, reason=sentence)


def card_memory(config: Config, sizes: Sizes, layout: Layout, card: Card, micro_batch: int, passes: int = 1) -> dict[str, int]:
    """Bytes one card holds at once, by use. passes: micro-batches of a step; with several, gradients wait unsharded."""
    own = -(-sizes.total // layout.shard)
    blocks, rest, small = sizes.blocks, sizes.total - sizes.blocks, card.element
    gathered = BYTES[layout.gathers]
    rows, width = micro_batch * config.model.length, config.model.dim
    streams = 2 if config.model.block else 1  # noised and clean
    parts = {
        "parameters": 4 * own,
        "gradients": 4 * own,
        "optimizer": round((1 if config.optim.name == "muon" else 2) * MOMENT_BYTES[config.optim.state] * own),
        "average": 4 * own,
        "activations": activation_bytes(config.model, streams * rows, small, config.parallel.activation_checkpointing),
        "head": default_budget(torch.device(card.kind)) + 4 * sizes.vocabulary * width + rows // 2 * width * small,
    }
    if small == 2:
        parts["copies in bf16"] = 2 * (rest + (blocks if gathered == 4 else 0))
    if layout.shard > 1:
        some = min(blocks, BLOCKS_IN_FLIGHT * (blocks // sizes.layers))
        parts["gathered parameters"] = 4 * rest + gathered * (blocks if layout.keep_gathered else some)
        parts["unsharded gradients"] = BYTES[layout.sums] * (rest + (blocks if passes > 1 else some))
    if layout.world > 1:
        parts["communication"] = NCCL_BYTES + 2 * BUCKET_BYTES
    return parts | {"reserved": RESERVED_BYTES}


def activation_bytes(model: ModelConfig, rows: int, element: int, checkpoint: int = 0) -> int:
    """Bytes that the forward pass over `rows` tokens keeps for the backward pass. element: size of a number in products.

    A row of a block keeps, in units of the width: two residual sums (fp32), two norms' outputs, q, k, v before and after
    rotation, attention's output, two branches, and the MLP's hidden values before and after its activation. With checkpointing
    every n-th block keeps its input only (a residual sum and a norm's output), and one such block is whole while it runs again.
    """
    width, recomputed = model.dim, model.layers // checkpoint if checkpoint else 0
    per_row = 2 * 4 * width + (2 + 6 + 1 + 2 + 2 * model.mlp_ratio) * element * width
    kept = model.layers - recomputed + (1 if recomputed else 0)
    return rows * (per_row * kept + (4 + element) * width * recomputed + 2 * element * width)


def bytes_sent(config: Config, sizes: Sizes, layout: Layout, card: Card, passes: int) -> dict[str, float]:
    """Bytes a card sends in a step, by collective, in rings: (n - 1) / n of the data for a gather or a scatter, twice for a sum.

    If parameters are sharded, those outside blocks (embedding, head, modulation) are gathered in fp32, once a step, and so are
    blocks if their weights are kept. If weights are freed, blocks are gathered before every forward and every backward pass.
    Muon sends pieces of its updates to the ranks that make them orthogonal, and back.
    """
    sent: dict[str, float] = {}
    reduced = BYTES[layout.sums]
    if layout.shard > 1:
        part = (layout.shard - 1) / layout.shard
        blocks = BYTES[layout.gathers] * sizes.blocks * (1 if layout.keep_gathered else 2 * passes)
        sent["all-gather"] = part * (4 * (sizes.total - sizes.blocks) + blocks)
        sent["reduce-scatter"] = part * reduced * sizes.total
        if config.optim.name == "muon":
            product = 2 if multiplies_bf16(torch.device(card.kind)) else 4
            sent["all-to-all"] = 2 * part * product * sizes.blocks / layout.shard
    copies = layout.world // layout.shard
    if copies > 1:
        sent["all-reduce"] = 2 * (copies - 1) / copies * reduced * sizes.total / layout.shard
    return sent


def largest_micro_batch(config: Config, sizes: Sizes, layout: Layout, card: Card, passes: int = 1) -> int:
    """The most sequences of a pass that fit into memory; 0 if not even one does."""

    def fits(batch: int) -> bool:
        return sum(card_memory(config, sizes, layout, card, batch, passes).values()) <= card.memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe_fit(config: Config, sizes: Sizes, layout: Layout, card: Card, micro_batch: int, passes: int) -> list[str]:
    """Lines for --dry_run: what a card holds and sends, and what each memory option would change."""
    held = card_memory(config, sizes, layout, card, micro_batch, passes)
    total, most = sum(held.values()), largest_micro_batch(config, sizes, layout, card, passes)
    fits = "fits" if total <= card.memory else "DOES NOT FIT"
    auto = ", chosen because train.micro_batch is 0" if config.train.micro_batch == 0 else ""
    sent = bytes_sent(config, sizes, layout, card, passes)
    lines = [
        f"memory       about {total / GIB:.2f} of {card.memory / GIB:.2f} GiB a card (estimate): {fits}",
        *(f"             {name:<20}{size / GIB:>7.2f} GiB" for name, size in sorted(held.items(), key=lambda item: -item[1])),
        f"micro-batch  {micro_batch} a card{auto}; at most {most} fit",
    ]
    if sent:
        each = "  ".join(f"{name} {size / 1e9:.2f}" for name, size in sent.items())
        lines.append(f"wire         {sum(sent.values()) / 1e9:.2f} GB sent by a card in a step: {each}; {layout.wire}")
    lines += ["", f"{'what one option would change':<42}{'GiB a card':>11}"]
    for name, changed, other in options(config, layout):
        size = sum(card_memory(changed, sizes, other, card, micro_batch, passes).values())
        if size < total:
            lines.append(f"{name:<42}{size / GIB:>11.2f}{'' if size <= card.memory else '  does not fit'}")
    return lines


def options(config: Config, layout: Layout) -> list[tuple[str, Config, Layout]]:
    """Settings that save memory and cost time or precision, one at a time: the option as typed, and what it makes of both."""

    def changed(part: str, **values: Any) -> Config:
        return replace(config, **{part: replace(getattr(config, part), **values)})

    every = [n for n in (1, 2, 4) if n <= config.model.layers]
    found = [(f"parallel.activation_checkpointing {n}", changed("parallel", activation_checkpointing=n), layout) for n in every]
    found.append(("parallel.param_dtype bf16", config, replace(layout, gathers="bf16")))
    found.append(("parallel.reduce_dtype bf16", config, replace(layout, sums="bf16")))
    if config.optim.name == "adamw":
        found.append(("optim.state bf16", changed("optim", state="bf16"), layout))
        if layout.shard == 1:  # 8-bit blocks do not divide over ranks
            found.append(("optim.state 8bit", changed("optim", state="8bit"), layout))
    return found
