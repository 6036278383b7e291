"""Which ranks, batches and modes go together, said before anything starts."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import Config, ParallelConfig, load_preset
from atat_fast.distributed.ranks import Launch
from atat_fast.distributed.watch import State, verdict
from atat_fast.distributed.wrap import recompute_blocks
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.hardware.devices import TABLE
from atat_fast.models import DiT
from atat_fast.training import modes
from atat_fast.training.modes import Choice, check_parallel, check_precision, choose_for
from atat_fast.training.plan import batches

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_the_launcher_says_who_this_is():
    at = Launch.of(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (at.rank, at.size, at.local_rank, at.local_size, at.restarts) == (3, 4, 1, 2, 2)
    assert Launch.of({}).size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 4, but RANK is not set, so the ranks cannot find each other; start them with torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "4"}, "RANK is 4, outside the 4 ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
    ],
)
def test_a_missing_meeting_point_is_a_sentence(change, message):
    with pytest.raises(UsageError, match=message):
        Launch.of(TORCHRUN | change)


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"mode": "none"}, 2, "parallel.mode none is one process, and 2 were started; use --nproc-per-node=1"),
        ({"mode": "hsdp", "shard_size": 3}, 4, "4 ranks do not make a mesh of shards over 3 ranks; .* 1, 2, 4"),
        ({"mode": "ddp", "shard_size": 2}, 4, "parallel.shard_size 2 is for parallel.mode hsdp"),
        ({"mode": "ddp", "param_dtype": "bf16"}, 2, "parallel.param_dtype bf16 is for weights that are gathered"),
        ({"timeout": 0.0}, 1, "parallel.timeout must be above 0"),
        ({"activation_checkpointing": -1}, 1, "must be at least 0"),
    ],
)
def test_settings_that_do_not_fit_the_ranks(settings, ranks, message):
    with pytest.raises(UsageError, match=message):
        check_parallel(ParallelConfig(**settings), Launch(size=ranks, local_size=ranks))


def test_a_global_batch_over_ranks():
    config = Config()
    config.train.global_batch = 24
    for ranks, micro, accumulation in ((1, 24, 1), (2, 12, 1), (6, 4, 1), (24, 1, 1)):
        plan = batches(config, ranks)
        assert (plan.micro_batch, plan.accumulation) == (micro, accumulation)
        assert sorted(s for rank in range(ranks) for s in plan.slots(rank)) == list(range(0, 24, micro))
    config.train.micro_batch = 2
    plan = batches(config, 3)
    assert plan.accumulation == 4 and plan.slots(1) == [8, 10, 12, 14]
    with pytest.raises(UsageError, match="global_batch 24 does not divide into 5 ranks x micro-batches of 2; try 20 or 30"):
        batches(config, 5)
    config.train.micro_batch = 0
    with pytest.raises(UsageError, match="global_batch 24 does not divide into 5 ranks; try 20 or 25"):
        batches(config, 5)


def test_auto_goes_by_the_plan_of_the_device_it_runs_on(monkeypatch):
    """tests/training/test_parallel_plan.py has what is decided when; here, that a run gets it."""
    at, cpu = Launch(size=4, local_size=2), Compute(torch.device("cpu"), torch.float32, False)
    assert choose_for(load_preset("demo"), Launch(), 300, cpu).mode == "none"
    small = choose_for(load_preset("demo"), at, 300, cpu)
    assert (small.mode, small.shard_size) == ("ddp", 1) and "GiB" in small.describe(4)
    monkeypatch.setattr(modes, "facts_of", lambda compute, ranks: TABLE["rtx4090"])
    large = choose_for(load_preset("large"), Launch(size=8, local_size=8), 50_258, cpu)
    assert (large.mode, large.shard_size, large.keep_gathered) == ("fsdp", 8, False) and "ddp needs" in large.reason
    config = load_preset("large")
    config.parallel = ParallelConfig(mode="hsdp", reshard_after_forward="never")
    chosen = choose_for(config, at, 50_258, cpu)
    assert chosen.keep_gathered and chosen.describe(4).startswith("hsdp over 4 ranks, 2 copies in shards of 2")
    one_host = choose_for(config, Launch(size=2, local_size=2), 50_258, cpu)
    assert (one_host.mode, one_host.shard_size) == ("hsdp", 2)


def test_precisions_that_cannot_be():
    compute = Compute(torch.device("cpu"), torch.float32, False)
    fsdp, ddp = Choice("fsdp", 2, "asked for"), Choice("ddp", 1, "asked for")
    with pytest.raises(UsageError, match=r"this run computes in fp32; use --train.dtype bf16"):
        check_precision(fsdp, ParallelConfig(param_dtype="bf16"), compute)
    with pytest.raises(UsageError, match="reduce_dtype bf16 under ddp needs cards"):
        check_precision(ddp, ParallelConfig(reduce_dtype="bf16"), compute)


def test_every_nth_block_is_computed_again_and_gradients_stay():
    grads = []
    for every in (0, 1, 2):
        torch.manual_seed(0)
        model = DiT(11, 10, dim=16, layers=4, heads=2, length=12, dropout=0.0)
        recompute_blocks(model, every)
        runs = []
        for block in model.blocks:
            block.run = lambda *a, runs=runs, run=block.run: runs.append(1) or run(*a)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        model(torch.arange(24).view(2, 12) % 11, torch.arange(0, 24, 2), torch.arange(12) % 10, torch.ones(12))[0].backward()
        assert len(runs) == 4 + {0: 0, 1: 4, 2: 2}[every]
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def test_what_the_watch_says():
    ahead, behind = State(9, 3, "evaluating", False), State(8, 3, "reading a batch", False)
    text = verdict([ahead, behind, ahead], [1], [], 30.0)
    assert text.startswith("rank 1 has not moved for 30 seconds (parallel.timeout): last seen reading a batch, step 4,")
    assert verdict([ahead, behind, behind], [1, 2], [1, 2], 5.0).startswith("ranks 1, 2 have said nothing for 5 seconds")
    assert "look at the network" in verdict([ahead, ahead], [0, 1], [], 5.0)
