"""What both checks share: a model run as it is and changed, on its own parameters, without dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def stand_ins(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Small random numbers for parameters that are all zero, so that the check sees what they do."""
    return {
        name: (0.1 * torch.randn(p.shape, generator=generator)).to(p)
        for name, p in network.named_parameters()
        if not p.is_meta and p.is_floating_point() and not bool(p.detach().any())
    }


def allowed_error(dtype: torch.dtype) -> float:
    """Largest difference between both, relative to their size; another network is off by all of it."""
    return 0.01 if dtype in (torch.float32, torch.float64) else 0.1


def first_line(error: Exception) -> str:
    """The first line of an error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module inside; each one's own mode is restored after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
