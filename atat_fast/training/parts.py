"""The parts of a run on one rank: made once from its settings, and passed to what needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atat_fast.config import Config, to_dict
from atat_fast.data import Dataset, SequenceLoader, Tokenizer, prepare
from atat_fast.diffusion.process import Process
from atat_fast.diffusion.processes import process_named
from atat_fast.distributed.fit import Layout
from atat_fast.distributed.ranks import Ranks
from atat_fast.distributed.tensors import load_parts
from atat_fast.distributed.wrap import Parallel, recompute_blocks
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute, resolve
from atat_fast.hardware.devices import grow_segments
from atat_fast.models.dit import DiT
from atat_fast.models.hub import Saved
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.ops.attention import choose_attention
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.runs.loaded import open_any
from atat_fast.runs.trackers import require
from atat_fast.training.begin import begin_from, check_tokenizer, same_tokenizer
from atat_fast.training.graphs import Graphs, wanted
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Average, Optimizers
from atat_fast.training.plan import Batches, check, choose_layout

OF_THE_TEXT = ("corpus", "valid", "valid_fraction", "text_column", "prompt_column", "max_documents")
"""Settings that say which text is read."""


@dataclass
class Parts:
    """The parts of a run. notes: sentences to print when it starts."""

    config: Config
    ranks: Ranks
    plan: Batches
    compute: Compute
    data: Dataset
    loader: SequenceLoader
    model: DiT
    estimator: ImportanceEstimator | None
    process: Process
    layout: Layout
    objective: Objective
    parallel: Parallel
    graphs: Graphs | None
    optimizers: Optimizers
    average: Average
    notes: list[str]
    parameters: dict[str, int]

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.data.tokenizer

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in a step."""
        return self.plan.global_batch * self.config.model.length


def check_start(config: Config, ranks: Ranks) -> tuple[Batches, Compute]:
    """Check the settings before a folder is made. Raises UsageError on all ranks."""
    with ranks.agree():
        require(config.run)
        plan = check(config, ranks.size, ranks.launch.local_size)
        compute = resolve(config.train)
        choose_attention(compute.device, compute.dtype, config.model.dim // config.model.heads, config.model.document_mask)
    shared = {name: value for name, value in run_folder.flat(to_dict(config)).items() if name not in run_folder.OF_A_HOST}
    ranks.require_same("settings", shared)
    return plan, compute


def build_parts(
    config: Config, ranks: Ranks, plan: Batches, compute: Compute, saved: checkpoint.Checkpoint | None, *, progress: bool
) -> Parts:
    """The parts of a run, new or (with `saved`) to be filled from a checkpoint. progress: show it while preparing data.

    All ranks call it. Raises UsageError on all of them.
    """
    grow_segments(compute.device)
    origin: Saved | None = None
    with ranks.agree():
        if saved is None and config.train.init_from is not None:
            origin = open_any(config.train.init_from)
        data = open_data(config, saved, origin, progress and ranks.first)
        copies = 2 if config.diffusion.mirror else 1
        loader = SequenceLoader(data.train, config.model.length, config.train.seed, copies=copies)
        data.valid.require_sequences(config.model.length)
    hashes = data.hashes()
    ranks.require_same("data", {f"{split} tokens of hash": value for split, value in hashes.items()})
    if saved is not None and saved.manifest["data"] != hashes:
        raise UsageError(f"the tokens of {config.data.corpus} are not those {run_of(saved)} was started with; start a new run")

    tokenizer, counts = data.tokenizer, lambda: torch.from_numpy(data.train.token_counts())
    with torch.device("meta"):  # memory is taken when it is sharded
        model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **vars(config.model))
    estimator = ImportanceEstimator.of(config, counts() if config.importance.source in ("frequency", "full") else None)
    if estimator is not None:
        estimator = estimator.to(compute.device)
    kind = process_named(config.diffusion.schedule)
    process = (kind.of(config.diffusion, counts) if saved is None else checkpoint.load_process(saved)).to(compute.device)
    notes = [*ranks.notes]
    parameters = parameter_counts(model, estimator)
    with ranks.agree():
        layout = ranks.share(choose_layout(config, ranks.launch, model.vocab_size, compute))
        graphed = wanted(config, compute, layout.mode)
    recompute_blocks(model, config.parallel.activation_checkpointing)
    objective = Objective(
        model,
        config,
        compute,
        seed=config.train.seed,
        total=plan.global_batch,
        estimator=estimator,
        process=process,
        by_block=ranks.size > 1 or config.parallel.activation_checkpointing > 0,
    )

    def fill() -> None:
        if saved is not None:  # every parameter comes from the checkpoint
            return
        torch.manual_seed(config.train.seed)
        load_parts(dict(model.named_parameters()), model.initial_values())
        network = None if estimator is None else estimator.network
        if network is not None:  # after the model, whose weights are the same without it
            load_parts(dict(network.named_parameters()), network.initial_values())
        if origin is not None:
            with ranks.agree():
                notes.append(begin_from(origin, model, estimator))

    parallel = Parallel(model, estimator, layout, ranks.size, compute.device.type, fill)
    return Parts(
        config,
        ranks,
        plan,
        compute,
        data,
        loader,
        model,
        estimator,
        process,
        layout,
        objective,
        parallel,
        Graphs(objective) if graphed else None,
        Optimizers(objective.named_parameters(), config.optim),
        Average(objective.named_parameters(), config.optim.ema),
        notes,
        parameters,
    )


def open_data(config: Config, saved: checkpoint.Checkpoint | None, origin: Saved | None, progress: bool) -> Dataset:
    """The run's tokens. A resumed run finds the tokens it began with, even if the text is gone or has moved."""
    data = config.data
    if saved is None:
        if origin is not None:
            check_tokenizer(origin, data.tokenizer)
        return prepare(data, progress=progress, tokenizer=None if origin is None else origin.tokenizer)
    tokenizer, before = saved.tokenizer(), saved.config.data
    if data.tokenizer != before.tokenizer and not same_tokenizer(tokenizer, data.tokenizer):
        raise UsageError(
            f"{run_of(saved)} was started with data.tokenizer {before.tokenizer}, and {data.tokenizer} is another; resume it "
            "with its own or start a new run"
        )
    moved = any(getattr(data, name) != getattr(before, name) for name in OF_THE_TEXT)
    return prepare(data, progress=progress, tokenizer=tokenizer, hashes=None if moved else saved.manifest["data"])


def parameter_counts(model: DiT, estimator: ImportanceEstimator | None) -> dict[str, int]:
    """Parameters by part, and their total."""
    counts: dict[str, Any] = model.parameter_counts()
    if estimator is None:
        return counts
    total, extra = counts.pop("total"), estimator.parameter_count()
    return counts | {"importance": extra, "total": total + extra}


def run_of(saved: checkpoint.Checkpoint) -> Path:
    """The run folder of a checkpoint."""
    return saved.path.parents[1]
