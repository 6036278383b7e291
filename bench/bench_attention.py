"""attention beside direct calls of its implementations: scaled_dot_product_attention on strided views, flash-attn packed.

    pytest bench/bench_attention.py          a table, and bench/results/<device>/attention.json

Every implementation that runs here, forward and training (forward and backward), with and without document boundaries, each
checked against the specification first. `over_direct` is the median over rounds of the op's time over that of a direct call just
before it. The target is at most 1.03.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))  # bench/ is a folder of scripts, not a package

from op_table import OpTable, op_table

from atat_fast.config import TrainConfig
from atat_fast.hardware.compute import resolve
from atat_fast.ops import Documents, attention, attention_cost, attention_reference, document_layout, explain_attention
from atat_fast.ops.attention import MODULES

COMPUTE = resolve(TrainConfig())
DEVICE = COMPUTE.device
GPU = DEVICE.type == "cuda"
SHAPES = ((8, 1024, 12, 64), (32, 1024, 12, 64), (8, 1024, 16, 128)) if GPU else ((8, 256, 4, 64), (16, 128, 4, 32))
ROUNDS = 200 if GPU else 41
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa_math": SDPBackend.MATH,
}  # fmt: skip


def ready(documents: bool) -> list[str]:
    """Implementations that run here, in the op's order, fastest first."""
    device = torch.device("cuda", torch.cuda.current_device()) if GPU else DEVICE
    return [name for name, why in explain_attention(device, COMPUTE.dtype, 64, documents=documents).items() if why is None]


class Case:
    """One packed projection with two documents a sequence."""

    def __init__(self, shape: tuple[int, ...], documents: bool) -> None:
        torch.manual_seed(0)
        batch, length, heads, size = shape
        self.qkv = torch.randn(batch, length, 3, heads, size, device=DEVICE).to(COMPUTE.dtype).requires_grad_()
        self.ids = (torch.arange(length, device=DEVICE) >= length // 3).to(torch.int32).expand(batch, -1) if documents else None
        self.upstream = torch.randn(batch, length, heads * size, device=DEVICE).to(COMPUTE.dtype)

    def direct(self, name: str) -> Callable[[], torch.Tensor]:
        """A direct call of the implementation."""
        batch, length, _, heads, size = self.qkv.shape
        layout = None if self.ids is None else document_layout(Documents(self.ids, 2 * batch), name)
        if name in MODULES:
            package = importlib.import_module(MODULES[name])
            if layout is None:
                return lambda: package.flash_attn_qkvpacked_func(self.qkv).reshape(batch, length, heads * size)
            q, k, v = self.qkv.flatten(0, 1).unbind(1)
            return lambda: package.flash_attn_varlen_func(q, k, v, layout, layout, length, length).view(batch, length, -1)

        def call() -> torch.Tensor:
            q, k, v = (part.transpose(1, 2) for part in self.qkv.unbind(2))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=layout).transpose(1, 2).flatten(2)

        if name in ("sdpa_flash", "products") and not GPU:  # on a CPU: PyTorch's own choice, with which products compare
            return call

        def forced() -> torch.Tensor:
            with sdpa_kernel(KERNELS[name]):
                return call()

        return forced

    def ours(self, name: str) -> Callable[[], torch.Tensor]:
        """The op. It makes the document layout in each call; the direct call is given one, as a model's layers are."""
        most = None if self.ids is None else 2 * self.qkv.shape[0]
        return lambda: attention(self.qkv, document_ids=self.ids, most_documents=most, implementation=name)

    def timed(self, forward: Callable[[], torch.Tensor], kind: str) -> Callable[[], None]:
        """Forward alone without gradients, or forward and backward."""
        step = forward if kind == "forward" else lambda: torch.autograd.grad(forward(), self.qkv, self.upstream)

        def call() -> None:
            with torch.set_grad_enabled(kind == "train"):
                step()
            if GPU:
                torch.cuda.synchronize(DEVICE)

        return call


table = op_table("attention", COMPUTE, ROUNDS, peers={})


def cases() -> Iterator[Any]:
    """Every implementation that runs, by shape, documents and kind."""
    for shape in SHAPES:
        for documents in (False, True):
            for name in ready(documents):
                for kind in ("forward", "train"):
                    label = f"{'x'.join(map(str, shape))}-{'documents' if documents else 'whole'}-{name}-{kind}"
                    yield pytest.param(shape, documents, name, kind, id=label)


@pytest.mark.parametrize(("shape", "documents", "name", "kind"), list(cases()))
def test_attention(benchmark: Any, table: OpTable, shape: tuple[int, ...], documents: bool, name: str, kind: str) -> None:
    case = Case(shape, documents)
    direct, ours = case.direct(name), case.ours(name)
    with torch.no_grad():
        ids = None if case.ids is None else case.ids[:1]
        exact, plain = (attention_reference(case.qkv[:1].to(t), ids).double() for t in (torch.float64, COMPUTE.dtype))
        limit = 1.5 * float((plain - exact).norm()) + 1e-6 * float(exact.norm())
        assert all(float((run()[:1].double() - exact).norm()) <= limit for run in (direct, ours))
    direct_call, spent = case.timed(direct, kind), []

    def before() -> None:  # in turn with the timed call, so that a busy machine slows down both
        begin = time.perf_counter()
        direct_call()
        spent.append(time.perf_counter() - begin)

    batch, length, heads, size = shape
    cost = attention_cost(batch, length, heads * size)
    if kind == "train":
        cost = cost + attention_cost(batch, length, heads * size, backward=True)
    row = table.time(
        benchmark,
        case.timed(ours, kind),
        warmup=3,
        setup=before,
        shape=shape,
        documents=documents,
        kind=kind,
        name=name,
        flops=cost.flops,
    )
    ratios = [op / peer for op, peer in zip(benchmark.stats.stats.data, spent[-ROUNDS:], strict=True)]
    row["direct_us"] = round(statistics.median(spent[-ROUNDS:]) * 1e6, 1)
    row["over_direct"] = round(statistics.median(ratios), 3)
