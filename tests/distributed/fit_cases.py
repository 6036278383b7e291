"""What two ranks really hold and send in a step, beside what the plan says; torchrun runs this file: fit_cases.py FILE."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from atat_fast.config import Config, ModelConfig, ParallelConfig
from atat_fast.distributed.fit import Layout
from atat_fast.distributed.ranks import Ranks
from atat_fast.distributed.tensors import local
from atat_fast.distributed.wrap import Parallel
from atat_fast.models import DiT
from atat_fast.training.optimizers import Average, Optimizers

VOCABULARY, PASSES, MICRO = 67, 3, 2
CASES = [("ddp", True), ("fsdp", True), ("fsdp", False)]
sent: dict[str, float] = {}


def count(name, size):
    sent[name] = sent.get(name, 0) + size * (dist.get_world_size() - 1) / dist.get_world_size()


def counted(name, call, place):
    """`call`, noting the larger of its first two tensors: what is gathered (0), or what is scattered (1)."""

    def wrapped(*tensors, **more):
        tensors = [*tensors, *(more.pop(k) for k in ("output", "input", "output_tensor", "input_tensor") if k in more)]
        count(name, tensors[place].nbytes)
        return call(*tensors, **more)

    return wrapped


CALLS = {
    "all-gather": (("all_gather_into_tensor", "all_gather_single"), 0),
    "reduce-scatter": (("reduce_scatter_tensor", "reduce_scatter_single"), 1),
}
"""FSDP's collectives, as versions of PyTorch name them."""


def counted_sum(group, bucket):
    count("all-reduce", 2 * bucket.buffer().nbytes)
    return allreduce_hook(group, bucket)


def step(mode, gathered):
    torch.manual_seed(0)
    config = Config(model=ModelConfig(dim=32, layers=4, heads=2, length=16, dropout=0.0))
    model = DiT(VOCABULARY, VOCABULARY - 1, **vars(config.model))
    layout = Layout(mode, 2, 1 if mode == "ddp" else 2, gathered)
    parallel = Parallel(model, None, layout, ParallelConfig(), 2, "cpu")
    if mode == "ddp":
        parallel._call.register_comm_hook(None, counted_sum)
    optimizers, average = Optimizers(model, config.optim), Average(model, 0.9)
    tokens, rows = torch.randint(0, VOCABULARY - 1, (MICRO, 16)), torch.arange(0, 16 * MICRO, 2)
    sent.clear()
    for i in range(PASSES):
        with parallel.accumulating(last=i + 1 == PASSES):
            loss, _ = parallel.inside(lambda: model(tokens, rows, tokens.flatten()[rows], torch.ones(len(rows))))
            parallel.backward(loss)
    size = lambda tensors: sum(local(t).nbytes for t in tensors)  # noqa: E731
    held = {"parameters": size(model.parameters()), "gradients": size(p.grad for p in model.parameters() if p.grad is not None)}
    optimizers.step(1e-3)
    held["optimizer"] = size(t for name, t in optimizers.state().items() if not name.endswith("/step"))
    held["average"] = size(average.values.values())
    return {"mode": mode, "gathered": gathered, "held": held, "sent": dict(sent)}


if __name__ == "__main__":
    ranks = Ranks.start("cpu", 60)
    for kind, (names, place) in CALLS.items():
        for name in names:
            if hasattr(dist, name):
                setattr(dist, name, counted(kind, getattr(dist, name), place))
    found = [step(*case) for case in CASES]
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
    ranks.leave()
