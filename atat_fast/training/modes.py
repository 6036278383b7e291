"""Which way a run is spread over its ranks, and which settings and numbers of ranks go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atat_fast.config import Config, ParallelConfig
from atat_fast.distributed.ranks import Launch
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, short
from atat_fast.hardware.devices import facts_of
from atat_fast.training.parallel_plan import choose_mode


@dataclass(frozen=True)
class Choice:
    """How a run is spread: the mode, the ranks that share one copy of the model, and why."""

    mode: str
    shard_size: int
    reason: str
    keep_gathered: bool = False

    def describe(self, ranks: int) -> str:
        """'fsdp over 4 ranks (reason)'."""
        if self.mode == "none":
            return f"one process ({self.reason})"
        copies = f", {ranks // self.shard_size} copies in shards of {self.shard_size}" if self.mode == "hsdp" else ""
        return f"{self.mode} over {ranks} ranks{copies} ({self.reason})"


def check_parallel(config: ParallelConfig, launch: Launch) -> None:
    """Raise UsageError for settings no run can have, or that do not fit the ranks that were started."""
    size, shard = launch.size, config.shard_size
    if not config.timeout > 0:
        raise UsageError(f"parallel.timeout must be above 0 seconds, got {config.timeout}")
    if config.activation_checkpointing < 0 or shard < 0 or config.world_size < 0:
        raise UsageError("parallel.activation_checkpointing, parallel.shard_size and parallel.world_size must be at least 0")
    if config.mode == "none" and size > 1:
        raise UsageError(
            f"parallel.mode none is one process, and {size} were started; use --nproc-per-node=1, or another parallel.mode"
        )
    if shard and config.mode != "hsdp":
        raise UsageError(f"parallel.shard_size {shard} is for parallel.mode hsdp, and this is {config.mode}")
    if config.param_dtype != "fp32" and config.mode in ("none", "ddp"):
        raise UsageError(f"parallel.param_dtype {config.param_dtype} is for weights that are gathered; use parallel.mode fsdp")
    if config.mode == "hsdp" and size > 1:
        shard = shard or launch.local_size
        if size % shard:
            fitting = [d for d in range(1, size + 1) if size % d == 0]
            raise UsageError(
                f"{size} ranks do not make a mesh of shards over {shard} ranks; "
                f"use a parallel.shard_size of {', '.join(map(str, fitting))}"
            )


def check_precision(choice: Choice, config: ParallelConfig, compute: Compute) -> None:
    """Raise UsageError for dtypes that the chosen mode or the device cannot have."""
    if config.param_dtype == "bf16" and compute.dtype is not torch.bfloat16:
        raise UsageError(
            f"parallel.param_dtype bf16 gathers weights for bf16 products, and this run computes in {short(compute.dtype)}; "
            "use --train.dtype bf16"
        )
    if config.reduce_dtype == "bf16" and choice.mode == "ddp" and compute.device.type == "cpu":
        raise UsageError("parallel.reduce_dtype bf16 under ddp needs cards; use parallel.mode fsdp, or reduce_dtype fp32")


def choose_for(config: Config, launch: Launch, vocab_size: int, compute: Compute) -> Choice:
    """The way of a run on the ranks that were started, as `parallel_plan` decides it for the device they run on."""
    device = facts_of(compute, launch.local_size)
    decision = choose_mode(config, vocab_size, launch.size, device, cards_per_host=launch.local_size)
    return Choice(decision.mode, decision.shard_size, decision.reason, not decision.reshard_after_forward)
