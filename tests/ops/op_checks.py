"""What the tests of ops share: which backends a law is tried on, the comparison with fp64, and guards around memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from atat_fast.ops import registry

CPU = torch.device("cpu")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, as test_interpreted.py sets")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])


def backends(op: str, *more: Any, without: str = "", gpu: bool = True, quick: bool = False) -> Any:
    """Parametrizes `backend` and `device`: what runs `op` on a CPU, `more`, and with `gpu` each of its GPU kernels.

    Triton's interpreter is a backend of the CPU where TRITON_INTERPRET=1, which test_interpreted.py sets, unless `quick`.
    """
    found = list(more)
    for name, reason in registry.explain(op, CPU).items():
        if name in ("cpp", "torch") and name != without:
            skip = [pytest.mark.skip(reason=reason)] if reason else []
            found.append(pytest.param(name, "cpu", id=name, marks=skip))
        elif name == "triton" and INTERPRETED and not quick:
            found.append(pytest.param(name, "cpu", id="triton-interpreted"))
        if name in ("cuda", "triton") and gpu:
            found.append(pytest.param(name, "cuda", id=f"{name}-gpu", marks=on_gpu))
    return pytest.mark.parametrize(("backend", "device"), found)


def interprets(backend: str, device: str) -> bool:
    """Whether this is Triton's interpreter, which takes milliseconds for each program: a few rows are enough for it."""
    return (backend, device) == ("triton", "cpu")


def for_gpu(*values: Any, id: str | None = None, slow: bool = False) -> Any:
    """A parameter that only a GPU takes: too large for a CPU, or not known to it. With `slow` it is one of a grid."""
    return pytest.param(*values, id=f"large-{id or values[0]}", marks=[*on_gpu, *[pytest.mark.slow] * slow])


def same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether all are the same bits; NaN equals NaN."""
    return all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(ours, theirs, strict=True))


def rmse(ours: Tensor, exact: Tensor | None = None) -> float:
    """The root-mean-square of ours, or of its difference from `exact`."""
    wide = ours.detach().double().cpu()
    wide = wide if exact is None else wide - exact.detach().double().cpu()
    return float(wide.norm()) / max(1, wide.numel()) ** 0.5


def leaves(inputs: dict[str, Any], device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the inputs on a device, floats in `dtype` where one is given and wanting gradients; None stays."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.to(device)
        return value.detach().to(device=device, dtype=dtype or value.dtype).clone().requires_grad_()

    return {name: leaf(value) for name, value in inputs.items()}


def differentiable(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}


def gradients(out: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of each input that wants one."""
    return torch.autograd.grad(out, list(differentiable(inputs).values()))


def results(outputs: Any, inputs: dict[str, Any], upstream: Iterable[Tensor | None]) -> dict[Any, Tensor]:
    """Outputs by number, and by name the gradients of the inputs; an output whose upstream is None is not used."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    used = [(o, u.to(o).reshape(o.shape)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    wanted = differentiable(inputs)
    grads = torch.autograd.grad([o for o, _ in used], list(wanted.values()), [u for _, u in used], allow_unused=True)
    found = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)}
    return dict(enumerate(outputs)) | found


def assert_no_worse(
    ours: dict[Any, Tensor],
    plain: dict[Any, Tensor],
    exact: dict[Any, Tensor],
    ratio: float = 1.5,
    floor: float = 6e-7,
    least: float = 0.0,
    limits: dict[Any, float] | None = None,
) -> None:
    """The error of ours is at most `ratio` times PyTorch's own at the same dtype, and fp32's rounding, `floor` of the result.

    least: an error that is always allowed. limits: ratios of results by name.
    """
    for name, want in exact.items():
        assert ours[name].isfinite().all(), name
        error, own = rmse(ours[name], want), rmse(plain[name], want)
        allowed = (limits or {}).get(name, ratio) * own + floor * rmse(want) + least
        assert error <= allowed, f"{name}: an error of {error:.3e}, and PyTorch's own is {own:.3e}"


class Guards:
    """Makes tensors that lie between guards, which `check` finds untouched."""

    WIDTH, VALUE = 64, -77

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: Any, dtype: torch.dtype, offset: int = 0, fill: float | None = None) -> Tensor:
        """A contiguous tensor, `offset` elements behind what a vector may start at; NaN, or the guards' value for integers."""
        return self.strided(shape, None, dtype, offset, fill)

    def strided(self, shape: Any, strides: Any, dtype: torch.dtype, offset: int = 0, fill: float | None = None) -> Tensor:
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if torch.Size(shape).numel() else 0
        whole = torch.full((2 * self.WIDTH + offset + span,), self.VALUE, dtype=dtype)
        mine = torch.zeros(whole.shape, dtype=torch.bool)
        mine.as_strided(shape, strides, self.WIDTH + offset).fill_(True)
        inside = whole.as_strided(shape, strides, self.WIDTH + offset)
        if fill is not None or dtype.is_floating_point:
            inside.fill_(torch.nan if fill is None else fill)
        self.made.append((whole, mine))
        return inside

    def check(self) -> None:
        for whole, mine in self.made:
            assert (whole[~mine] == self.VALUE).all(), "what lies beside a tensor was written"


def bits_of(call: Callable[[], Any], threads: Iterable[int]) -> list[Any]:
    """The call's results with so many threads each."""
    before, found = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found


def compiled_whole(f: Callable[..., Any], compiler: Any = "aot_eager") -> Callable[..., Any]:
    """f as one graph; graphs of a law's other parameters do not count."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=compiler)
