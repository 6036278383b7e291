"""How an op becomes `torch.ops.atat_fast.*`, which backends it has, which of them runs, and what it is said to cost.

An op states its backends once, with `backends(op, torch=..., cpp=...)`. Its front door asks `choose_backend` for a name, which
is a constant of a compiled graph, and passes it on as the last argument of the schema, `str backend`; `dispatch(op)` is the
implementation that looks the name up. `python -m atat_fast.ops` prints what `explain` says of every op.

Ops are declared with `Library.define` and `Library.impl`, which add about 1.5 microseconds a call; the `custom_op`
decorator adds about 7, more than some of these kernels take on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from atat_fast.errors import nearest
from atat_fast.ops import library as compiled

library = torch.library.Library("atat_fast", "FRAGMENT")

BACKENDS = ("cuda", "triton", "cpp", "torch")
"""Every backend's name: compiled CUDA kernels, Triton kernels, the compiled CPU loop, PyTorch (the specification)."""

PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch", "triton")}
"""Fastest first, by the kind of device the tensors are on. Triton comes last on a CPU, where it runs in an interpreter."""


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
    plain: Callable[..., Any] | None = None,
) -> Any:
    """Declare `atat_fast::<schema>` with one implementation for every device, its shape rule and its gradient.

    plain: the op as a composition of PyTorch's own, which PyTorch differentiates in every mode and order; it takes the op's
    arguments and is what runs while `transformed`. The first derivatives of an op are its `backward`; where they may be
    differentiated again (`again`), `backward` makes them of plain PyTorch too.

    Without `backward` the op gets a gradient that refuses in a sentence: it is itself a backward, which is called where nobody
    differentiates again. Returns a function that calls the op, or in eager mode does what the op would do, sooner.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atat_fast::{name}", fake, lib=library)
    record = None if backward is None or setup is None else _function(name, implementation, backward, setup)
    if backward is None:
        backward = _refuse(name.removesuffix("_backward"))
    torch.library.register_autograd(f"atat_fast::{name}", backward, setup_context=setup, lib=library)
    return _shortcut(getattr(torch.ops.atat_fast, name).default, implementation, record, plain)


def _function(name: str, implementation: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None]) -> Any:
    """What `register_autograd` makes of these, as a plain autograd.Function."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = implementation(*arguments)
        setup(ctx, arguments, outputs)
        return outputs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _shortcut(op: Any, implementation: Callable[..., Any], record: Any, plain: Callable[..., Any] | None) -> Callable[..., Any]:
    """`op` as a function that goes past the dispatcher where nobody stands between.

    torch.library's autograd takes 50 to 100 microseconds a recorded call, an autograd.Function about 10. Whoever compiles,
    exports, traces or looks on (a dispatch mode, a tensor subclass, the meta device) gets the op itself, as does what is recorded
    without a `record`: that is a backward, which refuses.
    """

    def call(*arguments: Any) -> Any:
        if plain is not None and transformed():
            return plain(*arguments)
        if torch.compiler.is_compiling() or intercepted():
            return op(*arguments)
        recorded = False
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if type(argument) not in _PLAIN or argument.is_meta:
                    return op(*arguments)
                recorded = recorded or argument.requires_grad
        if not (recorded and torch.is_grad_enabled()):
            return implementation(*arguments)
        return op(*arguments) if record is None else record.apply(*arguments)

    return call


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether forward-mode differentiation (dual numbers) or a functorch transform is on: ops are plain PyTorch then.

    Our kernels know neither: a tangent would be lost in them without a word. An open dual level is enough, whoever is dual in it.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def intercepted() -> bool:
    """Whether a dispatch mode (fake tensors, proxies, selective checkpoints) or a functorch transform is on."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def readable(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at here, and nothing waits for a device: no compiler, no fake tensors, no transform."""
    plain = tensor.device.type == "cpu" and type(tensor) in _PLAIN
    return plain and not (torch.compiler.is_compiling() or intercepted() or transformed())


def again() -> bool:
    """Asked by a backward: whether what it returns may be differentiated again (create_graph, forward mode, functorch), or is
    for many upstream gradients at once (torch.autograd's is_grads_batched): then it is made of PyTorch's own steps.
    """
    return torch.is_grad_enabled() or transformed() or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def pull(plain: Callable[..., Any], inputs: tuple[Any, ...], upstream: Any) -> tuple[Any, ...]:
    """Gradients of plain(*inputs) for `upstream`, themselves differentiable; None for what is no tensor of floating point."""
    places = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.is_floating_point()]

    def of(*values: torch.Tensor) -> Any:
        given = list(inputs)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        return plain(*given)

    back = torch.func.vjp(of, *(inputs[i] for i in places))[1]
    found: list[Any] = [None] * len(inputs)
    for i, gradient in zip(places, back(upstream), strict=True):
        found[i] = gradient
    return tuple(found)


def register_composite(schema: str, implementation: Callable[..., Any]) -> Any:
    """Declare an op that is a composition of others, seen through by autograd and torch.compile. Returns the op."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeImplicitAutograd")
    return getattr(torch.ops.atat_fast, name).default


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}_backward cannot be differentiated; call {name}, whose gradient can (create_graph=True)")

    return backward


_table: dict[str, dict[str, Callable[..., Any]]] = {}


def backends(op: str, **implementations: Callable[..., Any]) -> None:
    """State what runs `op` on each backend it has. Implementations of one op take the same arguments."""
    unknown = set(implementations) - set(BACKENDS)
    assert not unknown and "torch" in implementations, f"{op} needs its specification as `torch`, and knows no {unknown}"
    _table[op] = implementations


def dispatch(op: str) -> Callable[..., Any]:
    """The implementation of a schema whose last argument is `str backend`.

    Triton launches on the current device, so for it the first tensor's device is made that. csrc's launches guard themselves.
    """

    def run(*arguments: Any) -> Any:
        *given, backend = arguments
        if backend != "triton":
            return _table[op][backend](*given)
        with on_device(next(a for a in given if isinstance(a, torch.Tensor))):
            return _table[op][backend](*given)

    return run


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device` here, or None where it can. The answer holds for every op that has it."""
    if backend == "cuda":
        if device.type != "cuda":
            return "it runs on CUDA tensors"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return compiled.cuda_problem(torch.cuda.get_device_capability(device))
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on CPU tensors it runs in Triton's interpreter only, with TRITON_INTERPRET=1"
    if backend == "cpp":
        if device.type != "cpu":
            return "it runs on CPU tensors"
        return compiled.problem()
    return None


def explain(op: str, device: torch.device) -> dict[str, str | None]:
    """For each backend of `op`, fastest on this device first: why it cannot run, or None where it can."""
    preferred = PREFERENCE.get(device.type, ("torch",))
    names = [*preferred, *(name for name in BACKENDS if name not in preferred)]
    return {name: missing(name, device) for name in names if name in _table[op]}


def ops() -> tuple[str, ...]:
    """Every op that has stated its backends; a backward runs where its forward does."""
    return tuple(name for name in _table if not name.endswith("_backward"))


@torch.compiler.assume_constant_result
def choose_backend(op: str, device: torch.device, asked: str | None = None, without: tuple[tuple[str, str], ...] = ()) -> str:
    """The backend `op` uses on `device`: `asked`, else $ATAT_FAST_BACKEND where it can run, else the fastest that can.

    `without` names backends that cannot take these shapes, each with its reason. A compiled graph keeps its first answer.
    Raises ValueError where `asked` cannot run: a backend asked for by name is never replaced by another.
    """
    return _choose(op, device, asked, without, os.environ.get("ATAT_FAST_BACKEND", "") if asked is None else "")


@functools.cache
def _choose(op: str, device: torch.device, asked: str | None, without: tuple[tuple[str, str], ...], wanted: str) -> str:
    reasons = explain(op, device) | dict(without)
    ready = [name for name, reason in reasons.items() if reason is None]
    if asked is None:
        if wanted and wanted not in BACKENDS:
            raise ValueError(f"ATAT_FAST_BACKEND is {wanted!r}{nearest(wanted, BACKENDS)}; backends are {', '.join(BACKENDS)}")
        return wanted if wanted in ready else ready[0]
    if asked not in reasons:
        raise ValueError(f"{op} has no backend {asked!r}{nearest(asked, reasons)}; it has {', '.join(reasons)}")
    if reasons[asked] is not None:
        raise ValueError(f"{op} cannot use backend {asked!r} here: {reasons[asked]}; what can run is {', '.join(ready)}")
    return asked


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes `tensor`'s GPU the current one, for Triton launches where the current device is. Nothing to do is the usual case."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def autocast_is_on(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for this tensor's device; torch knows none for the meta device and raises."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of `tensor` would run in: autocast's where it is on for this device, else the tensor's own."""
    if autocast_is_on(tensor) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within, products run in the dtype of what they are given."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else _HERE


def as_ids(name: str, ids: torch.Tensor) -> torch.Tensor:
    """Integers of any width as int64. Raises ValueError for others."""
    if ids.dtype is torch.bool:
        raise ValueError(f"{name} is a mask of bools; pass {name}.nonzero().flatten(), numbers of rows")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} is {ids.dtype}; pass integers")
    return ids.long()


def scalar(value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` as a 0-d int64 tensor on `like`'s device; a tensor is passed on, so that a captured graph reads it anew."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=like.device)
