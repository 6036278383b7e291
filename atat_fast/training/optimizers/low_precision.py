"""AdamW with moments in fewer bits: bf16 in plain PyTorch, 8 bits through torchao. Weights stay fp32.

A second moment changes by a thousandth a step (beta2 = 0.999), less than bf16 resolves, so rounding to nearest would never change
it. bf16 moments are rounded stochastically instead: up with a probability equal to the part cut off, so that they are right on
average. The random bits are Philox's, a function of (seed, step, parameter, element), and the same after a resume.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from atat_fast.distributed.tensors import local
from atat_fast.errors import UsageError
from atat_fast.ops.philox import STREAM_MOMENTS, random_words

LOW_BITS = 0xFFFF
INSTALL = "pip install torchao"


def check_state(state: str, name: str) -> None:
    """Raise UsageError for an `optim.state` that needs adamw or torchao and lacks it."""
    if state == "fp32":
        return
    if name != "adamw":
        raise UsageError(f"optim.state {state} is for optim.name adamw; {name} keeps one moment, in fp32")
    if state == "8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            f"optim.state 8bit needs the package torchao, which is not installed: {INSTALL}, or use optim.state bf16"
        )


def adamw_8bit(groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torchao's AdamW. Moments are blocks of 256 8-bit codes with one scale; small or odd tensors keep fp32 moments."""
    made: torch.optim.Optimizer = importlib.import_module("torchao.optim").AdamW8bit(list(groups), lr=lr, betas=betas)
    return made


CODES, SCALE = ".codes", ".scale"
"""Endings of the names of an 8-bit moment's two parts in a checkpoint."""
SIGNED = "exp_avg"


def parts_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state as plain tensors: an 8-bit moment is its codes (uint8) and its scales (fp32)."""
    parts: dict[str, Tensor] = {}
    for kind, value in state.items():
        if hasattr(value, "codes"):
            parts[kind + CODES], parts[kind + SCALE] = value.codes, value.scale
        elif isinstance(value, Tensor):
            parts[kind] = value
    return parts


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """'<parameter>/<kind>' to tensors: undoes `parts_of`. 8-bit moments need torchao."""
    whole = {name: value for name, value in state.items() if not name.endswith((CODES, SCALE))}
    names = [name.removesuffix(CODES) for name in state if name.endswith(CODES)]
    if names:
        kind: Any = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
        for name in names:
            codes, scale = state[name + CODES], state[name + SCALE]
            empty = kind.zeros(
                codes.shape, name.endswith(f"/{SIGNED}"), codes.numel() // scale.numel(), codes.device, torch.float32
            )
            whole[name] = kind(codes, scale, empty.qmap, empty.signed, empty.dtype)
    return whole


def first_element(p: Tensor) -> int:
    """Index in the whole tensor of the first element of this rank's part. FSDP shards rows."""
    if not isinstance(p, DTensor):
        return 0
    rows, first = p.shape[0] if p.dim() else 1, 0
    for dimension, placement in enumerate(p.placements):
        if isinstance(placement, Shard) and placement.dim == 0:
            each = -(-rows // p.device_mesh.size(dimension))
            first = min(rows, each * p.device_mesh.get_local_rank(dimension))
    return first * (p.numel() // max(1, rows))


def round_by_chance(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 x to bf16, rounded up with a probability equal to the part cut off. NaN and inf stay.

    bits: int32 in 0 .. 2^16 - 1, uniform, of x's shape. Added below bf16's last bit, they carry into it that often.
    """
    raised = (x.view(torch.int32) + bits) & ~LOW_BITS
    return torch.where(x.isfinite(), raised.view(torch.float32), x).to(torch.bfloat16)


def chance(count: int, first: Tensor, seed: Tensor, step: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two sets of `count` 16-bit numbers (int32) for elements first, first + 1, ...: four elements share one counter."""
    element = torch.arange(count, device=seed.device) + first
    words = torch.stack(random_words(element // 4, seed, step, stream), dim=-1)
    word = words.gather(-1, (element % 4)[:, None]).squeeze(-1)
    return (word & LOW_BITS).to(torch.int32), (word >> 16).to(torch.int32)


def update(
    p: Tensor,
    grad: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    facts: Tensor,
    place: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    stream: int,
) -> None:
    """One AdamW step of flat tensors, in place. facts: fp64 (learning rate, step); place: int64 (first element, seed)."""
    lr, step = facts[0], facts[1]
    beta1, beta2 = betas
    grad = grad.float()
    m = torch.lerp(first_moment.float(), grad, 1 - beta1)
    v = torch.lerp(second_moment.float(), grad * grad, 1 - beta2)
    correct1, correct2 = (1 - beta1**step).float(), (1 - beta2**step).float()
    rate = lr.float()
    p.mul_(1 - rate * decay).sub_(rate * (m / correct1) / ((v / correct2).sqrt() + eps))
    low, high = chance(p.numel(), place[0], place[1], step.long(), stream)
    first_moment.copy_(round_by_chance(m, low))
    second_moment.copy_(round_by_chance(v, high))


@functools.cache
def _compiled() -> Callable[..., None]:
    """`update` as one kernel, for GPUs. Eager, its random numbers alone would take some fifty passes over memory."""
    return torch.compile(update, dynamic=True)


class AdamWBf16(torch.optim.Optimizer):
    """torch.optim.AdamW with stochastically rounded bf16 moments. seed: of the rounding."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self._places: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. The host's numbers go to the device once a step."""
        number, facts = 0, {}
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state, own = self._state(p), local(p)
                state["step"] += 1
                if own.numel() == 0:
                    continue
                now = (float(group["lr"]), float(state["step"]), own.device)
                if now not in facts:
                    facts[now] = torch.tensor(now[:2], dtype=torch.float64).to(own.device, non_blocking=True)
                run = _compiled() if own.device.type == "cuda" else update
                flat = [local(t).view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                run(
                    flat[0],
                    flat[1],
                    flat[2],
                    flat[3],
                    facts[now],
                    self._places[p],
                    group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    STREAM_MOMENTS + (number << 8),
                )

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made if missing. Its step is counted on the host."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
        elif state["step"].device.type != "cpu" or state["exp_avg"].dtype is not torch.bfloat16:  # loaded from a checkpoint
            state["step"] = state["step"].cpu()
            state["exp_avg"], state["exp_avg_sq"] = (state[name].to(torch.bfloat16) for name in ("exp_avg", "exp_avg_sq"))
        if p not in self._places:
            self._places[p] = torch.tensor([first_element(p), self.seed]).to(local(p).device)
        return state
