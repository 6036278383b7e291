"""A run's plan: batch arithmetic, parameters by part, and an estimate of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atat_fast.config import Config
from atat_fast.diffusion.adaptive import bias, check_importance
from atat_fast.diffusion.counts import check_counts, expected_share
from atat_fast.diffusion.curriculum import Curriculum, check_curriculum, highest_level
from atat_fast.diffusion.gaps import check_blind
from atat_fast.diffusion.processes import check_process, process_named
from atat_fast.diffusion.prompts import check_prompts
from atat_fast.distributed.fit import Card, Layout, Sizes, check_parallel, choose, describe_fit
from atat_fast.distributed.ranks import Launch
from atat_fast.errors import UsageError, check_seed
from atat_fast.hardware.compute import Compute, short
from atat_fast.hardware.devices import Device, lacks_peer_access, memory_of
from atat_fast.models.dit import DiT, check_model, step_cost
from atat_fast.models.importance import ImportanceEstimator, importance_cost
from atat_fast.sampling.categorical import Cut
from atat_fast.sampling.samplers import check_steps
from atat_fast.training.optimizers import check_optim

LARGEST_MICRO_BATCH = 32


@dataclass(frozen=True)
class Batches:
    """How a global batch is made: on each of `ranks`, `accumulation` forward passes of `micro_batch` sequences."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int = 1

    def slots(self, rank: int) -> list[int]:
        """The first slot of each of a rank's micro-batches. A rank's slots are contiguous."""
        first = rank * self.micro_batch * self.accumulation
        return [first + i * self.micro_batch for i in range(self.accumulation)]


def batches(config: Config, ranks: int = 1) -> Batches:
    """Micro-batch and accumulation for train.global_batch. Raises UsageError if it does not divide."""
    total, micro = config.train.global_batch, config.train.micro_batch
    if total < 1 or micro < 0:
        raise UsageError(f"train.global_batch must be at least 1 and train.micro_batch at least 0, got {total} and {micro}")
    if micro == 0 and total % ranks == 0:
        micro = max(d for d in range(1, min(total // ranks, LARGEST_MICRO_BATCH) + 1) if total // ranks % d == 0)
    whole = ranks * max(1, micro)
    if total % whole:
        near = sorted({max(1, total // whole) * whole, -(-total // whole) * whole})
        parts = [f"{ranks} ranks"] * (ranks > 1) + [f"micro-batches of {micro}"] * (micro > 0)
        raise UsageError(
            f"train.global_batch {total} does not divide into {' x '.join(parts)}; try {' or '.join(str(n) for n in near)}"
        )
    return Batches(total, micro, total // whole, ranks)


def check(config: Config, ranks: int = 1, on_host: int = 1) -> Batches:
    """The batch plan. Raises UsageError for settings that no run on so many ranks can have. on_host: ranks of a host."""
    check_parallel(config, ranks, on_host)
    check_model(config.model)
    check_optim(config.optim)
    for name in ("max_steps", "log_every"):
        if getattr(config.train, name) < 1:
            raise UsageError(f"train.{name} must be at least 1, got {getattr(config.train, name)}")
    for seed in ("train", "eval"):
        check_seed(f"{seed}.seed", getattr(config, seed).seed)
    if config.eval.every < 1 or config.eval.draws < 1 or config.eval.batch < 1 or config.eval.sequences < 0:
        raise UsageError("eval.every, eval.draws and eval.batch must be at least 1, and eval.sequences at least 0")
    if config.train.checkpoint_every < 0 or config.train.keep < 1 or config.sample.num_samples < 0:
        raise UsageError("train.checkpoint_every and sample.num_samples must be at least 0, and train.keep at least 1")
    check_steps("sample.steps", config.sample.steps)
    Cut(config.sample.temperature).check()
    if not 0 < config.diffusion.sigma_min < config.diffusion.sigma_max:
        raise UsageError(
            f"diffusion.sigma_min {config.diffusion.sigma_min} must be above 0 and below sigma_max {config.diffusion.sigma_max}"
        )
    check_curriculum(
        config.curriculum, max_steps=config.train.max_steps, eval_every=config.eval.every, log_every=config.train.log_every
    )
    check_importance(config.importance, config.diffusion, config.curriculum)
    check_process(config.diffusion, config.importance)
    check_blind(config.diffusion, highest_level(config.curriculum))
    check_prompts(config)
    check_blocks(config)
    plan = batches(config, ranks)
    check_counts(config.diffusion, config.model.block or config.model.length, plan.global_batch)
    return plan


def check_blocks(config: Config) -> None:
    """Raise UsageError for settings that do not go with model.block."""
    block, diffusion = config.model.block, config.diffusion
    if not block:
        return
    for name, value, needed in (
        ("diffusion.counts", diffusion.counts, ("uniform", "bell")),
        ("diffusion.mirror", str(diffusion.mirror).lower(), ("false",)),
    ):
        if value not in needed:
            raise UsageError(f"{name} {value} is not made for blocks (model.block {block}); set {name} {' or '.join(needed)}")


def empty_model(config: Config, vocab_size: int, mask_id: int) -> DiT:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return DiT(vocab_size, mask_id, **vars(config.model))


def empty_estimator(config: Config, vocab_size: int) -> ImportanceEstimator | None:
    """The importance estimator on the meta device, or None."""
    return ImportanceEstimator.of(config, torch.zeros(vocab_size))


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """Parameters of a run's model and of its importance estimator, if any."""
    counts = empty_model(config, vocab_size, vocab_size - 1).parameter_counts()
    estimator = empty_estimator(config, vocab_size)
    extra = 0 if estimator is None else estimator.parameter_count()
    return Sizes(counts["total"] + extra, counts["blocks"], config.model.layers, vocab_size)


def card_of(compute: Compute, ranks_on_host: int = 1) -> Card:
    """The run's device, for memory arithmetic."""
    peers = compute.device.type == "cpu" or not lacks_peer_access(torch.cuda.get_device_name(compute.device))
    return Card(memory_of(compute.device, ranks_on_host), compute.device.type, compute.dtype.itemsize, peers)


def choose_layout(config: Config, launch: Launch, vocab_size: int, compute: Compute, device: Device | None = None) -> Layout:
    """How a run is shared over the started ranks. device: plan for such cards rather than this machine's.

    Raises UsageError for dtypes that the layout or the device cannot have, and if parallel.mode auto finds nothing that fits.
    """
    plan = batches(config, launch.size)
    card = card_of(compute, launch.local_size) if device is None else Card(device.memory, "cuda", 2, device.p2p)
    sizes = sizes_of(config, vocab_size)
    layout = choose(config, sizes, launch.size, launch.local_size, card, plan.micro_batch, plan.accumulation)
    if device is not None:
        return layout
    if config.parallel.param_dtype == "bf16" and compute.dtype is not torch.bfloat16:
        raise UsageError(
            f"parallel.param_dtype bf16 gathers weights for bf16 products, and this run computes in {short(compute.dtype)}; "
            "use --train.dtype bf16"
        )
    return layout


def describe(
    config: Config, vocab_size: int, mask_id: int, compute: Compute, launch: Launch, device: Device | None = None
) -> list[str]:
    """The plan as lines: parameters by part, tokens and work of a step, memory of each rank. device: cards to plan for."""
    plan, model = check(config, launch.size), empty_model(config, vocab_size, mask_id)
    counts = model.parameter_counts()
    m, length = config.model, config.model.length
    head = "tied to the embedding" if m.tie_embeddings else "untied"
    tokens = plan.global_batch * length
    share = expected_share(config.diffusion, config.model.block or length)
    cost = step_cost(m, vocab_size, plan.global_batch, round(tokens * share))
    scoring = importance_cost(config.importance, m, plan.global_batch).flops
    estimator = empty_estimator(config, vocab_size)
    scored = 0 if estimator is None else estimator.parameter_count()
    layout = choose_layout(config, launch, vocab_size, compute, device)
    card = card_of(compute, launch.local_size) if device is None else Card(device.memory, "cuda", 2, device.p2p)
    sizes = f"{m.layers} layers, width {m.dim}, {m.heads} heads, length {length}" + (
        f" in blocks of {m.block}" if m.block else ""
    )
    parts = "  ".join(f"{name} {counts[name]:,}" for name in ("embedding", "blocks", "conditioning", "head"))
    passes = f"{launch.size} ranks x {plan.accumulation} passes x {plan.micro_batch}"
    computed = f"{launch.size} x {device.name}, bf16" if device is not None else compute.describe()
    fit = describe_fit(config, sizes_of(config, vocab_size), layout, card, plan.micro_batch, plan.accumulation)
    return [
        f"model        {sizes}, vocabulary {vocab_size:,}, head {head}",
        f"parameters   {counts['total']:,}" + (f" and {scored:,} of the importance estimator" if scored else ""),
        f"             {parts}",
        *describe_prompts(config),
        *describe_schedule(config),
        *describe_atat(config, scored, scoring / (cost.flops + scoring)),
        f"batch        {plan.global_batch} sequences = {tokens:,} tokens a step ({passes})",
        f"run          {config.train.max_steps:,} steps = {config.train.max_steps * tokens:,} tokens",
        f"work         {(cost.flops + scoring) / 1e12:,.2f} TFLOP a step ({share:.0%} of the rows through the head)",
        f"compute      {computed}",
        f"mode         {layout.name}: {layout.reason}",
        *fit,
    ]


def describe_prompts(config: Config) -> list[str]:
    """A line about rows of prompts and responses, if there are any."""
    column = config.data.prompt_column
    return [] if column is None else [f"rows         column {column!r} is seen, and is neither hidden nor counted"]


def describe_schedule(config: Config) -> list[str]:
    """A line about the masking process, unless it is the plain one."""
    said = process_named(config.diffusion.schedule).describe(config.diffusion)
    return [f"schedule     {said}"] if said else []


def describe_blind(config: Config) -> list[str]:
    """Lines with the parts of ATAT that see masks only, or one that says that there are none."""
    spread, power = config.diffusion.spread, config.diffusion.gap_power
    lines = []
    if spread:
        lines.append(
            f"masking    on   {abs(spread):g} of the sequences hide {'evenly spread tokens' if spread > 0 else 'one span'}"
        )
    if power:
        lines.append(f"loss       on   tokens weigh (expected loss of their gap)^{-power:g}")
    if spread and config.curriculum.kind != "none":
        lines.append(f"curriculum on   {Curriculum(config.curriculum).describe()}")
    if not lines:
        return ["atat         off (importance.source none: uniform masks and weights)"]
    return [f"{'atat' if i == 0 else '':<13}{line}" for i, line in enumerate(lines)]


def describe_atat(config: Config, parameters: int, work: float) -> list[str]:
    """Lines with the setting of each part of ATAT. work: the estimator's share of a step's operations."""
    importance, curriculum = config.importance, config.curriculum
    if importance.source == "none":
        return describe_blind(config)
    seen = f"what stays visible, rho {importance.rho:g}" if importance.sees == "visible" else "the clean text"
    made = {
        "learned": f"learned from {seen}",
        "frequency": "frequency of the token",
        "full": f"0.7 learned from {seen}, 0.3 frequency",
    }
    weights = {
        "importance": f"on   importance: exp(focus * score) with focus {importance.focus:g} at level 1"
        + (", differentiable" if importance.differentiable_weights else ""),
        "order": "on   order: the chance of being revealed next",
    }
    weighted = weights.get(config.diffusion.weighting, f"off  {config.diffusion.weighting}: importance is not asked")
    masked = f"on   {config.diffusion.masking} counts, odds exp(-tilt * score) with tilt {importance.tilt:g} at level 1"
    lines = [
        ("estimator", f"on   {parameters:,} parameters, {work:.1%} of a step's work; scores: {made[importance.source]}"),
        ("masking", masked if importance.tilt else "off  tilt 0: masks are uniform"),
        ("loss", weighted),
        ("curriculum", ("off  " if curriculum.kind == "none" else "on   ") + Curriculum(curriculum).describe()),
    ]
    tail = bias(importance)
    return [
        *(f"{'atat' if i == 0 else '':<13}{name:<11}{what}" for i, (name, what) in enumerate(lines)),
        *([f"             note: {tail}"] if tail else []),
    ]
