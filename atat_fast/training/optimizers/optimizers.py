"""AdamW or Muon, their schedule, and the running average that is evaluated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atat_fast.config import OptimConfig
from atat_fast.distributed.tensors import local
from atat_fast.errors import UsageError
from atat_fast.training.optimizers.low_precision import AdamWBf16, adamw_8bit, check_state, joined, parts_of
from atat_fast.training.optimizers.muon import Muon

Trained = nn.Module | Mapping[str, nn.Parameter]
"""A module to train, or its parameters by name."""


def _named(model: Trained) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model)


def check_optim(config: OptimConfig) -> None:
    """Raise UsageError for invalid settings."""
    if not config.lr > 0:
        raise UsageError(f"optim.lr must be above 0, got {config.lr}")
    if not 0 <= config.warmup <= config.decay_from <= 1:
        raise UsageError(f"optim.warmup {config.warmup} and optim.decay_from {config.decay_from} must be ordered within 0 to 1")
    for name in ("beta1", "beta2", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"optim.{name} must be in [0, 1), got {getattr(config, name)}")
    check_state(config.state, config.name)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Rate of step 0 .. max_steps - 1: linear warm-up, flat, then a cosine that reaches final_lr at the last step."""
    warmup = round(config.warmup * max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    start = round(config.decay_from * max_steps)
    if step < start:
        return config.lr
    progress = (step + 1 - start) / max(1, max_steps - start)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """One or two torch optimizers that step as one. State is saved by parameter name.

    adamw: fused, weight decay on matrices only; it may keep its moments in bf16 or 8 bits (`low_precision.py`). muon: `muon.py`
    for the matrices inside the blocks, its updates scaled to AdamW's root-mean-square so that one learning rate serves both, and
    AdamW for the rest.
    """

    def __init__(self, model: Trained, config: OptimConfig) -> None:
        check_state(config.state, config.name)
        self.names: dict[Tensor, str] = {p: name for name, p in _named(model).items()}
        named = [(name, p) for p, name in self.names.items() if p.requires_grad]
        blocks = [p for name, p in named if config.name == "muon" and _inner_matrix(name, p)]
        inside = set(blocks)
        rest = [p for _, p in named if p not in inside]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [_adamw(groups, config)]
        if blocks:
            self.parts.append(Muon(blocks, lr=config.lr, weight_decay=config.weight_decay))

    def step(self, lr: float) -> None:
        """Update every parameter and drop the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao compiles its step with a tensor lr
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as '<parameter>/<kind>'."""
        return {
            f"{self.names[p]}/{kind}": value
            for part in self.parts
            for p, kinds in part.state.items()
            for kind, value in parts_of(kinds).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        by_name = {name: p for p, name in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in joined(state).items():
            name, kind = key.rsplit("/", 1)
            p = by_name[name]
            owner[p].state[p][kind] = value.to(p.device)  # fused AdamW keeps its step count on the parameter's device too

    def room(self, layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Empty tensors for a saved state of the given shapes and dtypes, sharded like their parameter if they have its shape."""
        by_name = {name: p for p, name in self.names.items()}
        room: dict[str, Tensor] = {}
        for key, kind in layout.items():
            p = by_name.get(key.rsplit("/", 1)[0])
            if p is None:
                raise UsageError(f"the checkpoint's optimizer state {key} belongs to no parameter of this model; start a new run")
            if p.shape == kind.shape:
                room[key] = torch.zeros_like(p, dtype=kind.dtype, requires_grad=False)
            else:
                room[key] = torch.zeros(kind.shape, dtype=kind.dtype, device=p.device)
        return room


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    if config.state == "bf16":
        return AdamWBf16(groups, lr=config.lr, betas=betas)
    if config.state == "8bit":
        return adamw_8bit(groups, lr=config.lr, betas=betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def _inner_matrix(name: str, p: Tensor) -> bool:
    return p.ndim == 2 and name.startswith("blocks.")


class Average:
    """Moving average of a model's parameters, in fp32, sharded as they are.

    Its decay is (1 + step) / (10 + step) until that exceeds `decay`.
    """

    def __init__(self, model: Trained, decay: float) -> None:
        self.parameters = _named(model)
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's parts of each average and parameter. FSDP may move a parameter until its first forward pass."""
        return [(local(self.values[name]), local(p)) for name, p in self.parameters.items()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = zip(*self._pairs(), strict=True)
        torch._foreach_lerp_(list(averages), list(parameters), 1 - decay)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Load saved values."""
        for name, value in values.items():
            self.values[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; after, exactly its earlier values. Storage is not replaced."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, p in self._pairs():
            held = p.clone()
            p.copy_(average)
            average.copy_(held)
