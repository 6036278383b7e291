"""Which way to share a run over cards, and what that costs: decided from parameters, memory, card count and link alone.

`choose_mode` is a pure function of settings and facts, so a plan can be made for cards that nobody has (`--dry_run
--parallel.world_size 8 --parallel.device rtx4090`), and a run and its plan decide alike. The rule:

- what a card cannot hold is out; where nothing fits, the layout that holds least is taken, and the reason says what is missing;
- ddp is taken where it fits and no sharded layout is estimated to take less than three quarters of its time: it is the plainest,
  and how much communication hides behind computing is the roughest of all estimates;
- otherwise the fastest of those that fit; hsdp is looked at only where there are several hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from atat_fast.config import Config
from atat_fast.errors import UsageError
from atat_fast.hardware.devices import Device
from atat_fast.training.parallel_cost import GIB, Estimate, Layout, Sizes, estimate, largest_micro_batch
from atat_fast.training.plan import batches

FASTER = 0.75
"""Share of ddp's step that a sharded layout must stay below to be taken instead."""
LABEL = "estimated from cost models and data sheets, not measured"
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Decision:
    """A way to share a run, and why.

    mode: none (one rank), ddp, fsdp or hsdp.   shard_size: ranks that hold one copy between them (1 under ddp).
    reshard_after_forward: whether blocks are let go between forward and backward.   others: what else was looked at.
    """

    mode: str
    shard_size: int
    reshard_after_forward: bool
    reason: str
    estimate: Estimate
    others: tuple[Estimate, ...]


def choose_mode(
    config: Config, vocab_size: int, world_size: int, device: Device, *, cards_per_host: int = 0, sizes: Sizes | None = None
) -> Decision:
    """The layout for `world_size` cards like `device`. What parallel.* settles is kept, `auto`s are decided.

    cards_per_host: cards of one machine; 0 takes as many as such a machine usually has. sizes: the model's, if they are known.
    Raises UsageError where the batch does not divide or no mesh of that shape exists.
    """
    sizes = sizes or Sizes.of(config, vocab_size)
    found = [estimate(config, sizes, layout, device) for layout in layouts(config, world_size, device, cards_per_host)]
    fitting = [e for e in found if e.fits]
    plain = next((e for e in fitting if e.layout.shard == 1), None)
    best = min(fitting, key=lambda e: e.seconds) if fitting else min(found, key=lambda e: e.bytes)
    if plain is not None and best.seconds > FASTER * plain.seconds:
        best = plain
    chosen = best.layout
    return Decision(
        chosen.mode, chosen.shard, not chosen.gathered, _reason(config, best, found, bool(fitting)), best,
        tuple(e for e in found if e is not best),
    )  # fmt: skip


def layouts(config: Config, world_size: int, device: Device, cards_per_host: int = 0) -> Iterator[Layout]:
    """Every layout that the settings leave open. Raises UsageError for a mesh that cannot be."""
    wanted, plan = config.parallel, split(config, world_size)
    hosts, cards = _hosts(world_size, cards_per_host or device.cards)
    shared: dict[str, Any] = {
        "world": world_size, "hosts": hosts, "micro_batch": plan[0], "accumulation": plan[1],
        "checkpoint": wanted.activation_checkpointing, "moments": config.optim.state,
    }  # fmt: skip
    reduce = BYTES[wanted.reduce_dtype]
    if world_size == 1:
        yield Layout(mode="none", shard=1, gathered=True, param_bytes=4, reduce_bytes=4, **shared)
        return
    if wanted.mode == "none":
        raise UsageError(f"parallel.mode none is one process, and {world_size} ranks are asked for; use auto, ddp, fsdp or hsdp")
    if wanted.mode in ("auto", "ddp"):
        yield Layout(mode="ddp", shard=1, gathered=True, param_bytes=4, reduce_bytes=reduce, **shared)
    keeps = {"auto": (True, False), "never": (True,), "always": (False,)}[wanted.reshard_after_forward]
    shards = []
    if wanted.mode in ("auto", "fsdp"):
        shards.append(("fsdp", world_size))
    if wanted.mode == "hsdp" or (wanted.mode == "auto" and hosts > 1):
        size = wanted.shard_size or cards
        if world_size % size or (wanted.mode == "auto" and size == world_size):
            if wanted.mode == "hsdp":
                near = [n for n in range(2, world_size) if world_size % n == 0]
                fix = f"try parallel.shard_size {' or '.join(map(str, near))}" if near else "use parallel.mode fsdp"
                raise UsageError(f"parallel.mode hsdp cannot split {world_size} ranks into shards of {size}; {fix}")
        else:
            shards.append(("hsdp", size))
    if config.optim.state == "8bit":
        if wanted.mode in ("fsdp", "hsdp"):
            raise UsageError(
                f"optim.state 8bit is for parallel.mode ddp or one process: its blocks of 256 numbers do not divide over ranks "
                f"under {wanted.mode}; use optim.state bf16"
            )
        shards = []
    for mode, size in shards:
        for gathered in keeps:
            yield Layout(
                mode=mode, shard=size, gathered=gathered, param_bytes=BYTES[wanted.param_dtype], reduce_bytes=reduce, **shared
            )


def split(config: Config, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of every rank. Raises UsageError where the global batch does not divide."""
    if world_size < 1:
        raise UsageError(f"a run needs at least one rank, got parallel.world_size {world_size}")
    plan = batches(config, world_size)
    return plan.micro_batch, plan.accumulation


def _hosts(world_size: int, cards: int) -> tuple[int, int]:
    """(hosts, cards of each): as few hosts as hold them, all alike."""
    hosts = next(n for n in range(1, world_size + 1) if world_size % n == 0 and world_size // n <= cards)
    return hosts, world_size // hosts


def name_of(layout: Layout) -> str:
    """'fsdp, weights kept' for a layout."""
    if layout.shard == 1:
        return layout.mode
    over = f" over {layout.shard}" if layout.mode == "hsdp" else ""
    return f"{layout.mode}{over}, weights {'kept' if layout.gathered else 'let go'}"


def _reason(config: Config, best: Estimate, found: list[Estimate], fits: bool) -> str:
    have = best.device.memory / GIB
    if not fits:
        return (
            f"nothing fits: even {name_of(best.layout)} needs {best.bytes / GIB:.1f} of {have:.1f} GiB; {_advice(config, best)}"
        )
    if len(found) == 1:
        asked = "one rank has nothing to share" if best.layout.mode == "none" else "as parallel.* asks"
        return f"{asked}; {best.bytes / GIB:.1f} of {have:.1f} GiB"
    others = []
    for e in found:
        if e is best:
            continue
        gap = f"needs {e.bytes / GIB:.1f} GiB" if not e.fits else f"{e.seconds / best.seconds:.2f}x its time"
        others.append(f"{name_of(e.layout)} {gap}")
    first = "the plainest, and nothing is much faster" if best.layout.shard == 1 else "fastest of what fits"
    if config.parallel.mode != "auto":
        first = f"as parallel.mode says; {first}"
    return f"{first}: {best.bytes / GIB:.1f} of {have:.1f} GiB; {', '.join(others)}"


def _advice(config: Config, best: Estimate) -> str:
    """What would make it fit, the mildest first."""
    options = []
    if not config.parallel.activation_checkpointing:
        options.append("--parallel.activation_checkpointing 1")
    if best.layout.micro_batch > 1:
        options.append(f"a --train.micro_batch below {best.layout.micro_batch}")
    if config.optim.state == "fp32" and config.optim.name == "adamw":
        options.append("--optim.state bf16")
    options.append("more cards")
    return "try " + ", ".join(options)


def variants(config: Config, micro: int) -> Iterator[tuple[str, Config]]:
    """Settings that trade memory for time or rounding, one at a time, each with the words that ask for it.

    micro: the micro-batch that is planned with.
    """
    parallel, optim, train = config.parallel, config.optim, config.train

    def shared(**changes: Any) -> Config:
        return replace(config, parallel=replace(parallel, **changes))

    for every in (1, 2, 4):
        if every != parallel.activation_checkpointing and every <= config.model.layers:
            yield f"parallel.activation_checkpointing {every}", shared(activation_checkpointing=every)
    for name in ("param_dtype", "reduce_dtype"):
        if getattr(parallel, name) == "fp32":
            yield f"parallel.{name} bf16", shared(**{name: "bf16"})
    for state in ("bf16", "8bit"):
        if state != optim.state and optim.name == "adamw":
            yield f"optim.state {state}", replace(config, optim=replace(optim, state=state))
    for smaller in (micro // 2, micro // 4):
        if smaller and train.global_batch % smaller == 0:
            yield f"train.micro_batch {smaller}", replace(config, train=replace(train, micro_batch=smaller))
    for mode in ("ddp", "fsdp", "hsdp"):
        if mode != parallel.mode:
            yield f"parallel.mode {mode}", shared(mode=mode)


def describe_parallel(config: Config, vocab_size: int, world_size: int, device: Device, *, cards_per_host: int = 0) -> list[str]:
    """The plan in lines: who holds what, what goes over the wire, how long a step takes, and what each option would change."""
    sizes = Sizes.of(config, vocab_size)
    decision = choose_mode(config, vocab_size, world_size, device, cards_per_host=cards_per_host, sizes=sizes)
    e, layout = decision.estimate, decision.estimate.layout
    link = "one card" if world_size == 1 else f"{device.between / 1e9:g} GB/s between cards ({_way(device)})"
    if layout.hosts > 1:
        link += f", {device.network / 1e9:g} GB/s between {layout.hosts} hosts"
    fits = "fits" if e.fits else "DOES NOT FIT"
    held = sorted(((size, name) for name, size in e.memory.items() if size), reverse=True)
    largest = largest_micro_batch(config, sizes, layout, device)
    tokens = config.train.global_batch * config.model.length
    sent = "  ".join(f"{name} {size / 1e9:.2f}" for name, size in e.wire.items()) or "nothing"
    lines = [
        f"cards        {world_size} x {device.name}, {device.memory / GIB:.1f} GiB each, {link}; {LABEL}",
        f"mode         {name_of(layout)}: {decision.reason}",
        f"batch        {config.train.global_batch} sequences = {tokens:,} tokens a step: "
        f"{world_size} ranks x {layout.accumulation} passes x {layout.micro_batch}",
        f"micro-batch  {layout.micro_batch} a card"
        + (", chosen because train.micro_batch is 0" if config.train.micro_batch == 0 else ", as train.micro_batch says")
        + f"; at most {largest} fit",
        f"a card       {e.bytes / GIB:.2f} of {device.memory / GIB:.2f} GiB: {fits}",
        *(f"             {name:<20}{size / GIB:>7.2f} GiB" for size, name in held),
        f"wire         {sum(e.wire.values()) / 1e9:.2f} GB sent by a card in a step: {sent}",
        f"step         {e.seconds:.3f} s, {e.waiting:.3f} s of it waiting for other cards",
        f"speed        {e.tokens_per_second:,.0f} tokens/s, {e.mfu:.1%} of the data sheets' rate; "
        f"{config.train.max_steps:,} steps in {_hours(config.train.max_steps * e.seconds)}",
        f"assumed      rates: {device.shares.source.removeprefix('assumed; ')}; link: {device.link_source}",
    ]
    if layout.hosts > 1:
        lines.append(f"             network: {device.network_source}")
    found = options(config, sizes, world_size, device, e, cards_per_host)
    head = f"{'what one change would do':<42}{'GiB a card':>11}{'s a step':>10}{'tokens/s':>11}  mode"
    return [*lines, "", head, _row("as it is", e), *(_row(name, other) for name, other in found)]


def options(
    config: Config, sizes: Sizes, world_size: int, device: Device, now: Estimate, cards_per_host: int = 0
) -> Iterator[tuple[str, Estimate]]:
    """What each option would change: its words, and the estimate of the mode that would then be taken."""
    for name, changed in [*variants(config, now.layout.micro_batch), *_together(config, sizes, now, device)]:
        try:
            other = choose_mode(changed, sizes.vocabulary, world_size, device, cards_per_host=cards_per_host, sizes=sizes)
        except UsageError:
            continue  # a mesh that cannot be, a batch that does not divide: no option here
        if other.estimate.memory != now.memory or other.estimate.parts != now.parts:
            yield name, other.estimate


def _row(name: str, e: Estimate) -> str:
    fits = "" if e.fits else ", does not fit"
    return f"{name:<42}{e.bytes / GIB:>11.2f}{e.seconds:>10.3f}{e.tokens_per_second:>11,.0f}  {name_of(e.layout)}{fits}"


def _together(config: Config, sizes: Sizes, now: Estimate, device: Device) -> Iterator[tuple[str, Config]]:
    """What memory options are for under sharding: fewer, larger passes, for every pass gathers all blocks anew."""
    if now.layout.shard == 1:
        return
    parallel = replace(config.parallel, activation_checkpointing=1, param_dtype="bf16", reduce_dtype="bf16")
    changed = replace(config, parallel=parallel)
    layout = replace(now.layout, checkpoint=1, param_bytes=2, reduce_bytes=2, gathered=False)
    most = largest_micro_batch(changed, sizes, layout, device)
    each = config.train.global_batch // now.layout.world
    micro = max((d for d in range(1, min(most, each) + 1) if each % d == 0), default=0)
    if micro > now.layout.micro_batch:
        yield f"checkpointing 1, both bf16, micro_batch {micro}", replace(changed, train=replace(config.train, micro_batch=micro))


def _way(device: Device) -> str:
    return "peer-to-peer" if device.p2p else "through host memory, no peer-to-peer"


def _hours(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
