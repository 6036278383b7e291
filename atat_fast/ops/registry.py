"""How an op becomes `torch.ops.atat_fast.*`, how its backend is chosen, and what it is said to cost.

Ops are declared with `Library.define` and `Library.impl`, which add about 1.5 microseconds a call; the `custom_op`
decorator adds about 7, more than some of these kernels take on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from atat_fast.errors import nearest

library = torch.library.Library("atat_fast", "FRAGMENT")

BACKENDS = ("cuda", "triton", "torch")
"""Every backend's name, fastest first. An op lists those it has."""


@dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations, and bytes moved between memory and the chip."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> Any:
    """Declare `atat_fast::<schema>` with one implementation for every device, its shape rule and its gradient.

    Without `backward` the op gets a gradient that refuses in a sentence: it is itself a backward, and differentiating
    through it again is not offered. Returns the op.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atat_fast::{name}", fake, lib=library)
    if backward is None:
        backward = _refuse_second_derivative(name.removesuffix("_backward"))
    torch.library.register_autograd(f"atat_fast::{name}", backward, setup_context=setup, lib=library)
    return getattr(torch.ops.atat_fast, name).default


def register_composite(schema: str, implementation: Callable[..., Any]) -> Any:
    """Declare an op that is a composition of others, seen through by autograd and torch.compile. Returns the op."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeImplicitAutograd")
    return getattr(torch.ops.atat_fast, name).default


def _refuse_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} has no second derivative; call its reference where one is needed")

    return backward


def choose_backend(op: str, available: tuple[str, ...], asked: str | None = None) -> str:
    """The backend `op` uses: `asked`, else $ATAT_FAST_BACKEND where the op has it, else its fastest.

    Raises ValueError where `asked` is a backend the op does not have: a name given by the user is never replaced.
    """
    if asked is None:
        wanted = os.environ.get("ATAT_FAST_BACKEND", "")
        if wanted and wanted not in BACKENDS:
            raise ValueError(f"ATAT_FAST_BACKEND is {wanted!r}{nearest(wanted, BACKENDS)}; backends are {', '.join(BACKENDS)}")
        return wanted if wanted in available else available[0]
    if asked not in available:
        raise ValueError(f"{op} has no backend {asked!r} here{nearest(asked, available)}; it has {', '.join(available)}")
    return asked


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of `tensor` would run in: autocast's where it is on for this device, else the tensor's own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def scalar(value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` as a 0-d int64 tensor on `like`'s device; a tensor is passed on, so that a captured graph reads it anew."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=like.device)
