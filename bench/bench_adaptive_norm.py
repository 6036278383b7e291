"""adaptive_layer_norm and gated_residual_norm beside plain PyTorch and fused layer norms.

    pytest bench/bench_adaptive_norm.py      a table, and bench/results/<device>/adaptive_norm.json

Each way's results and gradients are compared with fp64 before it is timed. Bytes are from the ops' cost models, `*_cost`: the
least that any implementation moves. On a GPU every way is timed twice, on tensors that the last call left in the L2 cache (warm)
and on copies taken in turn that together are twice as large (cold); a device-to-device copy of as many bytes is timed too.
Peers that only normalise (Liger's and apex's layer norm) get the rest of the op in eager PyTorch.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from op_table import OpTable, op_table

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import resolve
from atat_fast.ops import (
    adaptive_layer_norm,
    adaptive_layer_norm_cost,
    adaptive_layer_norm_reference,
    gated_residual_norm,
    gated_residual_norm_cost,
    gated_residual_norm_reference,
    registry,
)

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
WIDTH = 768 if GPU else 256
SHAPES = ((8, 1024), (32, 1024)) if GPU else ((2, 128), (8, 128))
STREAM, BRANCH = torch.float32, torch.bfloat16 if GPU else torch.float32
ROUNDS = 100 if GPU else 30
OPS = {"adaptive_layer_norm": ("x",), "gated_residual_norm": ("residual", "branch", "gate")}
BACKENDS = [name for name, reason in registry.explain("gated_residual_norm", DEVICE).items() if reason is None]

Tensors = dict[str, torch.Tensor]
Way = Callable[..., tuple[torch.Tensor, ...]]


def plain(norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Way:
    """The chain as in MDLM's blocks, with `norm` as its layer norm without bias."""

    def run(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = t["x"] if "x" in t else t["residual"] + t["gate"][:, None] * t["branch"]
        y = norm(x.float(), t["weight"]) * (1 + t["scale"][:, None]) + t["shift"][:, None]
        return (y.to(BRANCH),) if "x" in t else (x, y.to(BRANCH))

    return run


def torch_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight)


def liger_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return function.apply(x, weight, torch.zeros_like(weight), 1e-5)  # type: ignore[no-any-return]


def apex_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    return module.fused_layer_norm_affine(x, weight, torch.zeros_like(weight), x.shape[-1:])  # type: ignore[no-any-return]


def ours(backend: str) -> Way:
    """The op; if the branch's dtype is not the stream's, under autocast to it, as in training."""

    def run(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if "x" in t:
            return (adaptive_layer_norm(**t, backend=backend),)
        return gated_residual_norm(**t, backend=backend)

    return run if BRANCH is STREAM else torch.autocast(DEVICE.type, BRANCH)(run)


def truth(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The specification."""
    return (adaptive_layer_norm_reference(**t),) if "x" in t else gated_residual_norm_reference(**t)


WAYS: dict[str, Callable[[], Way]] = {
    "eager": lambda: plain(torch_norm),
    "eager compiled": lambda: torch.compile(plain(torch_norm), dynamic=False),
    "liger": lambda: plain(liger_norm),
    "apex": lambda: plain(apex_norm),
} | {name: (lambda name=name: ours(name)) for name in BACKENDS}  # type: ignore[misc]
NEEDS = {"liger": "liger_kernel.ops.layer_norm", "apex": "fused_layer_norm_cuda"}
"""Modules that a peer needs, besides a GPU. (The package called apex on PyPI is another project.)"""


class Case:
    """One op at one shape: inputs, upstream gradients, and so many copies of them that no cache holds all."""

    def __init__(self, op: str, batch: int, length: int, cold: bool) -> None:
        torch.manual_seed(0)
        self.op, self.rows = op, batch * length
        dense = {"x": STREAM, "residual": STREAM, "branch": BRANCH}
        shapes = {name: (batch, length, WIDTH) if name in dense else (batch, WIDTH) for name in (*OPS[op], "shift", "scale")}
        first = {name: torch.randn(shape).to(DEVICE, dense.get(name, STREAM)) for name, shape in shapes.items()}
        first["weight"] = torch.randn(WIDTH).to(DEVICE)
        self.upstream = [
            torch.randn(batch, length, WIDTH).to(DEVICE, t) for t in ((STREAM,) * (op != "adaptive_layer_norm") + (BRANCH,))
        ]
        copies = 1
        if cold:
            cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            copies += 2 * cache // sum(t.numel() * t.element_size() for t in first.values())
        self.copies = [{k: t.clone().requires_grad_() for k, t in first.items()} for _ in range(copies)]
        self.turn = itertools.cycle(self.copies)

    def check(self, way: Way) -> None:
        """Raise AssertionError if a result's or gradient's error against fp64 is more than three times plain PyTorch's."""
        found = []
        for run, dtype in ((way, None), (plain(torch_norm), None), (truth, torch.float64)):
            t = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in self.copies[0].items()}
            out = run(**t)
            found.append(
                [
                    *out,
                    *torch.autograd.grad(out, list(t.values()), [u.to(o.dtype) for u, o in zip(self.upstream, out, strict=True)]),
                ]
            )
        for a, b, exact in zip(*found, strict=True):
            error, peer = ((v.detach().double() - exact).pow(2).mean().sqrt() for v in (a, b))
            assert error <= 3 * peer + 1e-6 * exact.detach().pow(2).mean().sqrt()

    def call(self, way: Way, direction: str) -> Callable[[], Any]:
        """Forward, or forward and backward."""
        if direction == "forward":

            def forward() -> Any:
                with torch.no_grad():
                    return way(**next(self.turn))

            return forward

        def both() -> Any:
            t = next(self.turn)
            return torch.autograd.grad(way(**t), list(t.values()), self.upstream)

        return both

    def bytes(self, direction: str) -> int:
        """Bytes to move, from the op's cost model."""
        cost = adaptive_layer_norm_cost if self.op == "adaptive_layer_norm" else gated_residual_norm_cost
        sizes = {"residual_bytes": STREAM.itemsize, "branch_bytes": BRANCH.itemsize}
        total = cost(self.rows, WIDTH, **sizes)
        return (total if direction == "forward" else total + cost(self.rows, WIDTH, backward=True, **sizes)).bytes


KINDS = f"stream {STREAM}, branch {BRANCH}, D = {WIDTH}".replace("torch.", "")
table = op_table(
    "adaptive_norm",
    COMPUTE,
    ROUNDS,
    same=("op", "shape", "direction", "cache"),
    peers={"eager": "eager", "copy": "copy"},
    settings={"tensors": KINDS},
)


@pytest.mark.parametrize("way", ["copy", *WAYS])
@pytest.mark.parametrize("cache", ["warm", "cold"] if GPU else ["warm"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("op", OPS)
def test_adaptive_norm(
    benchmark: Any, table: OpTable, op: str, shape: tuple[int, int], direction: str, cache: str, way: str
) -> None:
    if way in NEEDS:
        if not GPU:
            pytest.skip(f"{way}'s layer norm runs on a GPU")
        pytest.importorskip(NEEDS[way])
    case = Case(op, *shape, cold=cache == "cold")
    moved = case.bytes(direction)
    if way == "copy":  # half the bytes are read, half written
        sources = [torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).random_() for _ in case.copies[:4]]
        target, turn = torch.empty_like(sources[0]), itertools.cycle(sources)
        call: Callable[[], Any] = lambda: target.copy_(next(turn))  # noqa: E731
    else:
        made = WAYS[way]()
        case.check(made)
        call = case.call(made, direction)
    table.time(benchmark, call, op=op, shape=shape, direction=direction, cache=cache, way=way, bytes=moved)
