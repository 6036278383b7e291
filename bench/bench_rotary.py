"""rotary beside the usual code, rotate-half with a concatenation, the same compiled, and flash-attn's kernel.

    pytest bench/bench_rotary.py             a table, and bench/results/<device>/rotary.json
    pytest bench/bench_rotary.py -k norm     only the kinds with QK-norm; -k "not norm" the others

Queries and keys of a packed projection, in place and into a new tensor; `train` is the new tensor and its backward. With
`norm-` queries and keys are scaled to unit root-mean-square first: by the op in its one pass, in the usual code by F.rms_norm.
A result is compared with the specification before it is timed. Bytes are from the op's cost model, `rotary_cost`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from op_table import OpTable, op_table

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import resolve
from atat_fast.ops import registry, rotary, rotary_cost, rotary_reference, rotary_table

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
SHAPES = ((8, 1024, 12, 64), (32, 1024, 12, 64)) if GPU else ((8, 256, 4, 64),)
ROUNDS = 200 if GPU else 30
NORM = "norm-"
KINDS = ("inplace", "new", "train", NORM + "inplace", NORM + "new", NORM + "train")
BACKENDS = [name for name, reason in registry.explain("rotary", DEVICE).items() if reason is None]
PEERS = ["eager", "compiled"] + (["flash-attn"] if GPU and importlib.util.find_spec("flash_attn") else [])
EPS = torch.finfo(torch.float32).eps
"""The default eps of F.rms_norm and rotary for dtypes narrower than fp64."""


def eager(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: bool = False) -> torch.Tensor:
    """The usual code, tables in the data's dtype: x cos + rotate_half(x) sin, then a concatenation with the values."""
    turned, values = qkv.split((2, 1), dim=2)
    if norm:
        turned = F.rms_norm(turned, turned.shape[-1:])
    a, b = turned.chunk(2, dim=-1)
    c, s = (torch.cat((t, t), dim=-1).to(qkv.dtype)[:, None, None] for t in (cos, sin))
    return torch.cat((turned * c + torch.cat((-b, a), dim=-1) * s, values), dim=2)


COMPILED = torch.compile(eager, dynamic=False)


class Case:
    """One packed projection, and every way to turn it."""

    def __init__(self, batch: int, length: int, heads: int, size: int) -> None:
        torch.manual_seed(0)
        self.qkv = torch.randn(batch, length, 3, heads, size, device=DEVICE).to(COMPUTE.dtype)
        self.cos, self.sin = rotary_table(length, size, device=DEVICE)
        self.upstream = torch.randn_like(self.qkv)

    def way(self, name: str, inplace: bool, norm: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function of one way."""
        if name in ("eager", "compiled"):
            written = COMPILED if name == "compiled" else eager
            return lambda qkv: written(qkv, self.cos, self.sin, norm)
        if name == "flash-attn":
            from flash_attn.layers.rotary import apply_rotary_emb_qkv_

            cos, sin = self.cos.to(COMPUTE.dtype), self.sin.to(COMPUTE.dtype)
            return lambda qkv: apply_rotary_emb_qkv_(qkv, cos, sin)
        return lambda qkv: rotary(qkv, self.cos, self.sin, norm=norm, inplace=inplace, backend=name)

    def results(self, run: Callable[..., torch.Tensor], qkv: torch.Tensor, *tables: torch.Tensor) -> list[torch.Tensor]:
        """The turned tensor, and the gradient of a qkv that is not a leaf."""
        leaf = qkv.clone().requires_grad_()
        out = run(leaf * 1, *tables)
        return [out.detach(), torch.autograd.grad(out, leaf, self.upstream.to(out.dtype))[0]]

    def call(self, name: str, kind: str) -> Callable[[], object]:
        """The function to time, its result checked."""
        inplace, train, norm = kind.endswith("inplace"), kind.endswith("train"), kind.startswith(NORM)
        run = self.way(name, inplace, norm)
        specification = partial(rotary_reference, norm=norm, eps=EPS if norm else None)
        want = self.results(specification, self.qkv.double(), self.cos.double(), self.sin.double())
        plain = self.results(partial(eager, norm=norm), self.qkv, self.cos, self.sin)
        if train:
            got = self.results(run, self.qkv)
        else:
            with torch.no_grad():
                got = [run(self.qkv.clone())]
        for ours, peer, exact in zip(got, plain, want, strict=False):
            allowed = 2 * float((peer.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
            assert float((ours.double() - exact).abs().max()) <= allowed
        if train:
            leaf = self.qkv.clone().requires_grad_()
            return lambda: torch.autograd.grad(run(leaf), leaf, self.upstream)
        work = self.qkv.clone()

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run(work)

        return call


table = op_table("rotary", COMPUTE, ROUNDS, same=("shape", "kind"))


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in KINDS for way in (*PEERS, *BACKENDS) if not (kind.startswith(NORM) and way == "flash-attn")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rotary(benchmark: Any, table: OpTable, shape: tuple[int, ...], kind: str, way: str) -> None:
    call = Case(*shape).call(way, kind)
    batch, length, heads, size = shape
    cost_of = partial(
        rotary_cost,
        batch * length,
        heads,
        size,
        element_size=COMPUTE.dtype.itemsize,
        inplace=kind.endswith("inplace"),
        norm=kind.startswith(NORM),
    )
    moved = cost_of().bytes + (cost_of(backward=True).bytes if kind.endswith("train") else 0)
    table.time(benchmark, call, shape=shape, kind=kind, way=way, bytes=moved)
