"""A model over ranks: DDP, FSDP2 or HSDP, applied from outside to a run's plain modules.

A run's modules are in one `Roof`. Computation with them runs inside its forward, where DDP and FSDP have their hooks. Under FSDP
every block is its own group, and so is the head: while its `forward` runs its weight is a whole plain tensor, as the fused loss
needs. The rest (embeddings, last norm, modulation, the estimator) is the roof's group.
Losses are shares of the global batch's mean, so gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from atat_fast.distributed.fit import Layout

T = TypeVar("T")
GRAPHS = 32
"""Most graphs of a block: the first, the second, the last and the others differ, and so do training, evaluation and dtypes."""


class Roof(nn.Module):
    """The modules of a run as one module. Calling it with a function returns the function's result."""

    def __init__(self, model: nn.Module, estimator: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator

    def forward(self, function: Callable[[], T]) -> T:
        """function()"""
        return function()


class Parallel:
    """The modules of a run, spread as a Layout says.

    Make it before optimizers and averages: it replaces parameters by DTensors under FSDP. If the model is on the meta device it
    gets memory on `device`, under FSDP for this rank's part only, and then `fill` gives parameters their values.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: nn.Module | None,
        layout: Layout,
        ranks: int,
        device: str,
        fill: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout, self.ranks = layout, ranks
        self.roof = Roof(model, estimator)
        self.mesh: DeviceMesh | None = None
        self._call: Any = self.roof
        self._kept: list[Any] = []
        if layout.mode in ("fsdp", "hsdp"):
            self._shard(model, device)
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device=device)
        fill()
        if layout.mode == "ddp":
            torch._dynamo.config.optimize_ddp = False  # it cuts compiled blocks in two, to start sums a little earlier
            with warnings.catch_warnings():  # torch 2.13 renamed an argument; 2.11 has the old name only
                warnings.simplefilter("ignore", FutureWarning)
                self._call = DistributedDataParallel(self.roof, broadcast_buffers=False, gradient_as_bucket_view=True)
            if layout.sums == "bf16":
                self._call.register_comm_hook(None, lambda _, bucket: sum_in_bf16(bucket))  # DDP rejects a hook's types

    def _shard(self, model: Any, device: str) -> None:
        layout = self.layout
        # The warning does not apply: a block's branch is a view of a product, and nothing writes to it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        if layout.mode == "hsdp":
            copies = self.ranks // layout.shard
            mesh = init_device_mesh(device, (copies, layout.shard), mesh_dim_names=("copies", "shards"))
        else:
            mesh = init_device_mesh(device, (self.ranks,), mesh_dim_names=("shards",))
        self.mesh = mesh
        reduce = torch.bfloat16 if layout.sums == "bf16" else torch.float32
        whole = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        inner = whole
        if layout.gathers == "bf16":
            inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=inner, reshard_after_forward=not layout.keep_gathered)
        rest = [] if model.config.tie_embeddings else [model.head]  # if tied, the one parameter is the roof's
        for module in [*rest, self.roof]:
            fully_shard(module, mesh=mesh, mp_policy=whole, reshard_after_forward=False)  # the head's gradient is made in forward
        self._kept = [*rest, self.roof, *(model.blocks if layout.keep_gathered else [])]

    @property
    def sharded(self) -> bool:
        """Whether parameters are DTensors."""
        return self.mesh is not None

    def inside(self, function: Callable[[], T]) -> T:
        """function(), in which parameters are whole inside of modules while they are called."""
        return cast(T, self._call(function))

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients. The factor turns DDP's and FSDP's average over ranks into a sum."""
        averaged = self.ranks > 1 and not (self.layout.mode == "ddp" and self.layout.sums == "bf16")
        (loss * self.ranks if averaged else loss).backward()

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around one forward and backward pass: sum gradients over ranks only if it is the last of a step."""
        if self.sharded:
            roof = cast(FSDPModule, self.roof)
            roof.set_requires_gradient_sync(last)
            roof.set_is_last_backward(last)
            # What memory allows to keep gathered stays so until the last pass: one gather a step, not one a pass.
            for module in self._kept:
                module.set_reshard_after_backward(last, recurse=False)
            yield
        elif self.layout.mode == "ddp" and not last:
            with self._call.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """On exit, free the weights that FSDP gathered, so later reads see the shards."""
        try:
            yield
        finally:
            for module in self.roof.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Scale gradients down to a global norm of `most`. Returns the norm before, a plain 0-d tensor."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, most or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sum_in_bf16(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's communication of a bucket of gradients: their sum over ranks, rounded to bf16 on the way."""
    small = bucket.buffer().to(torch.bfloat16)
    work: Any = dist.all_reduce(small, async_op=True)
    return cast("torch.futures.Future[Tensor]", work.get_future().then(lambda _: bucket.buffer().copy_(small)))


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile block by block. So hooks of DDP and FSDP run between graphs, a block's gradients are ready before the next
    one's, and recomputation is a graph too. Blocks share their graphs, however many there are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in cast("list[Any]", model.blocks):
        block.run = torch.compile(block.run, backend=backend)


def recompute_blocks(model: nn.Module, every: int) -> None:
    """Compute every `every`-th block again in the backward pass; 0 for none."""
    for i, block in enumerate(cast("list[Any]", model.blocks)):
        block.recompute = every > 0 and (i + 1) % every == 0
