"""Registration of ops as `torch.ops.atat_fast.*`, their backends, the choice among these, and `Cost`.

An op states its backends once, with `backends(op, torch=..., cpp=...)`. Its public function gets a name from `choose_backend`,
a constant in a compiled graph, and passes it as the schema's last argument, `str backend`; `dispatch(op)` is the implementation
that looks the name up. `python -m atat_fast.ops` prints what `explain` returns for every op.

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
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from atat_fast.errors import nearest
from atat_fast.ops import library as compiled

library = torch.library.Library("atat_fast", "FRAGMENT")
Answer = TypeVar("Answer")

BACKENDS = ("cuda", "triton", "cpp", "torch")
"""Every backend's name: compiled CUDA kernels, Triton kernels, the compiled CPU loop, PyTorch (the specification)."""

PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch", "triton")}
"""Backends by the kind of device the tensors are on, fastest first. On a CPU Triton is last: it runs in an interpreter."""


@dataclass(frozen=True)
class Cost:
    """The least that one call must do: floating-point operations, and bytes moved between memory and the chip."""

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

    plain:    the op in PyTorch's own steps, differentiable in every mode and order. It takes the op's arguments and runs while
              `transformed()`.
    backward: the op's first derivatives; if `again()`, it makes them in PyTorch's own steps too. None for an op that is itself
              a backward: its gradient raises a RuntimeError.

    Returns a function that calls the op, or in eager mode does the same faster (`_shortcut`).
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
    """An autograd.Function that does the same as `register_autograd`."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = implementation(*arguments)
        setup(ctx, arguments, outputs)
        return outputs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def _shortcut(op: Any, implementation: Callable[..., Any], record: Any, plain: Callable[..., Any] | None) -> Callable[..., Any]:
    """`op` as a function that skips the dispatcher if nothing needs it.

    torch.library's autograd takes 50 to 100 microseconds a recorded call, an autograd.Function about 10. The op itself runs under
    compile, export, tracing, a dispatch mode, a tensor subclass or the meta device, and for recorded calls without `record`
    (backwards, which raise).
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
    """Whether forward-mode differentiation (dual numbers) or a functorch transform is on: then ops run their plain PyTorch form.

    Our kernels would silently drop a tangent. An open dual level counts, whichever tensors are dual in it.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def intercepted() -> bool:
    """Whether a dispatch mode (fake tensors, proxies, selective checkpoints) or a functorch transform is on."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def readable(tensor: torch.Tensor) -> bool:
    """Whether the values can be read here without waiting for a device: not under a compiler, fake tensors or a transform."""
    plain = tensor.device.type == "cpu" and type(tensor) in _PLAIN
    return plain and not (torch.compiler.is_compiling() or intercepted() or transformed())


def again() -> bool:
    """Whether a backward must use PyTorch's own steps: its result may be differentiated again (create_graph, forward mode,
    functorch), or serves many upstream gradients at once (torch.autograd's is_grads_batched).
    """
    return torch.is_grad_enabled() or transformed() or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def pull(plain: Callable[..., Any], inputs: tuple[Any, ...], upstream: Any) -> tuple[Any, ...]:
    """Differentiable gradients of plain(*inputs) for `upstream`; None for inputs that are not floating-point tensors."""
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
    """Declare an op composed of others, which autograd and torch.compile see. Returns the op."""
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
    """State the implementations of `op` by backend. All of one op take the same arguments."""
    unknown = set(implementations) - set(BACKENDS)
    assert not unknown and "torch" in implementations, f"{op} must have the backend `torch`, and has unknown ones: {unknown}"
    _table[op] = implementations


def dispatch(op: str) -> Callable[..., Any]:
    """The implementation of a schema whose last argument is `str backend`.

    Triton launches on the current device, so the first tensor's device is made current for it. csrc's launches do so themselves.
    """

    def run(*arguments: Any) -> Any:
        *given, backend = arguments
        if backend != "triton":
            return _table[op][backend](*given)
        with on_device(next(a for a in given if isinstance(a, torch.Tensor))):
            return _table[op][backend](*given)

    return run


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device` here, or None if it can; the same for every op that has it."""
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
    """For each backend of `op`, fastest on this device first: why it cannot run, or None if it can."""
    preferred = PREFERENCE.get(device.type, ("torch",))
    names = [*preferred, *(name for name in BACKENDS if name not in preferred)]
    return {name: missing(name, device) for name in names if name in _table[op]}


def ops() -> tuple[str, ...]:
    """Every op with backends, without backwards, which run on their forward's."""
    return tuple(name for name in _table if not name.endswith("_backward"))


def constant_in_graphs(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Let compiled graphs keep the function's first answer: torch.compiler.assume_constant_result, without its import of the
    compiler, which takes longer than everything else here together.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def choose_backend(op: str, device: torch.device, asked: str | None = None, without: tuple[tuple[str, str], ...] = ()) -> str:
    """The backend `op` uses on `device`: `asked`, else $ATAT_FAST_BACKEND if it can run, else the fastest that can.

    without: backends that cannot take these tensors, each with its reason. A compiled graph keeps its first answer.
    Raises ValueError if `asked` cannot run: it is never replaced by another.
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
    """Make `tensor`'s GPU the current one, where Triton launches. Usually it is already."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def autocast_is_on(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for this tensor's device; False for the meta device, for which torch would raise."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of `tensor` would run in: autocast's if it is on for this device, else the tensor's own."""
    if autocast_is_on(tensor) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off: products run in the dtype of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False) if autocast_is_on(tensor) else _HERE


def as_ids(name: str, ids: torch.Tensor) -> torch.Tensor:
    """Integers of any width as int64. Raises ValueError for other dtypes."""
    if ids.dtype is torch.bool:
        raise ValueError(f"{name} is a bool mask; pass row numbers, {name}.nonzero().flatten()")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} is {ids.dtype}; pass integers")
    return ids.long()


def scalar(value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` as a 0-d int64 tensor on `like`'s device. A tensor is returned as is: a captured graph then reads it anew."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=like.device)
