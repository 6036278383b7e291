"""One optimizer step, read top to bottom: hide, forward, backward, clip, step, average."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from atat_fast.diffusion.prompts import frozen_of
from atat_fast.distributed.watch import Watch
from atat_fast.hardware.monitor import Stopwatch
from atat_fast.ops.attention import Documents, documents_of
from atat_fast.training.optimizers import learning_rate
from atat_fast.training.parts import Parts
from atat_fast.training.run_state import RunState


def train_step(parts: Parts, state: RunState, watch: Watch, stopwatch: Stopwatch) -> None:
    """Take one optimizer step, without waiting for the device. Raises BadScores, on a CPU.

    watch: is told what this rank is doing.   stopwatch: measures this rank's own time, without waiting for other ranks.
    """
    config, objective, parallel = parts.config, parts.objective, parts.parallel
    step, progress = state.step, state.progress(config)

    def forward(slot: int, tokens: Tensor, ids: Tensor, documents: Documents | None) -> tuple[Tensor, dict[str, Tensor]]:
        prompts = read_prompts(parts, step, slot)
        batch = objective.hide(tokens, ids, first=slot, step=step, progress=progress, documents=documents, **prompts)
        if parts.graphs is not None:  # forward and backward in one launch
            return parts.graphs(batch, tokens, ids, step), {}
        return objective.loss_of(batch, ids, step=step, progress=progress)

    slots = parts.plan.slots(parts.ranks.rank)
    for slot in slots:
        watch.mark(step, "reading a batch")
        batch = read_batch(parts, step, slot)
        watch.mark(step, "in the forward and backward pass")
        with parallel.accumulating(last=slot == slots[-1]):
            with stopwatch.own():
                loss, measured = parallel.inside(partial(forward, slot, *batch))  # where FSDP has gathered the weights
            if parts.graphs is None:
                parallel.backward(loss)
        state.window.add("loss", measured.pop("diffusion", loss))
        for name, part in measured.items():
            state.window.add(name, part)
    objective.end_step(step, parts.ranks.size)
    watch.mark(step, "moving the weights")
    norm = parallel.clip(objective.parameters(), config.optim.clip)
    parts.optimizers.step(learning_rate(config.optim, step, config.train.max_steps))
    parts.average.update(step)
    state.step += 1
    state.window.step(state.step, norm.detach())


def read_prompts(parts: Parts, step: int, slot: int) -> dict[str, Tensor]:
    """What `Objective.hide` needs of rows of prompts and responses; {} for plain text.

    frozen [B, L] bool on the device: prompts and padding of the micro-batch. lengths [global batch]: tokens of the responses.
    """
    plan, first = parts.plan, step * parts.plan.global_batch
    extents = parts.loader.extents(first, plan.global_batch)
    if extents is None:
        return {}
    frozen, device = frozen_of(extents[slot : slot + plan.micro_batch], parts.config.model.length), parts.compute.device
    if device.type != "cpu":
        frozen = frozen.pin_memory().to(device, non_blocking=True)
    return {"frozen": frozen, "lengths": extents[:, 1] - extents[:, 0]}


def read_batch(parts: Parts, step: int, slot: int) -> tuple[Tensor, Tensor, Documents | None]:
    """Tokens [B, L], sample ids [B] and documents of the micro-batch at a slot of the global batch, on the device."""
    device = parts.compute.device
    tokens, ids = parts.loader.batch(step * parts.plan.global_batch + slot, parts.plan.micro_batch)
    documents = documents_of(tokens, parts.tokenizer.eos_id).to(device) if parts.config.model.document_mask else None
    if device.type != "cpu":
        tokens, ids = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (tokens, ids))
    return tokens, ids, documents
