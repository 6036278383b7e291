"""The plan of many cards: memory, traffic and time as functions of settings, what `auto` decides, and what --dry_run prints."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.config import Config, ImportanceConfig, ModelConfig, load_preset
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.hardware.devices import TABLE, facts_of, named, of_name
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.train import main
from atat_fast.training.parallel_cost import (
    GIB,
    Layout,
    Sizes,
    bytes_sent,
    card_memory,
    estimate,
    exposed_seconds,
    largest_micro_batch,
)
from atat_fast.training.parallel_plan import choose_mode, describe_parallel, layouts, split
from atat_fast.training.plan import estimate_memory
from atat_fast.training.step_time import muon_flops, optimizer_part

VOCABULARY = 50_258
FOUR = TABLE["rtx4090"]


def preset(name, *, batch=0, micro=None, **parallel):
    config = load_preset(name)
    config.train.global_batch = batch or config.train.global_batch
    if micro is not None:
        config.train.micro_batch = micro
    config.parallel = replace(config.parallel, **parallel)
    return config


@functools.cache
def sizes_of(name):
    return Sizes.of(load_preset(name), VOCABULARY)


def choice(name, cards, device=FOUR, **options):
    return choose_mode(preset(name, **options), VOCABULARY, cards, device, sizes=sizes_of(name))


@pytest.mark.parametrize(
    ("name", "cards", "device", "options", "mode"),
    [
        ("small", 1, "rtx4090", {}, "none"),
        ("small", 6, "rtx4090", {"reduce_dtype": "bf16"}, "ddp"),
        ("medium", 6, "rtx4090", {}, "ddp"),
        ("large", 8, "rtx4090", {}, "fsdp"),
        ("large", 8, "rtx4090", {"param_dtype": "bf16", "reduce_dtype": "bf16"}, "fsdp"),
        ("large", 8, "h100", {}, "ddp"),
        ("large", 8, "h200", {}, "ddp"),
        ("large", 16, "rtx4090", {}, "hsdp"),
        ("large", 64, "rtx4090", {"batch": 2048}, "hsdp"),
        ("small", 6, "rtx4090", {"mode": "fsdp"}, "fsdp"),
        ("small", 6, "rtx4090", {"mode": "hsdp", "shard_size": 3}, "hsdp"),
        ("large", 8, "rtx4090", {"mode": "ddp"}, "ddp"),
    ],
)
def test_what_auto_decides(name, cards, device, options, mode):
    decision = choice(name, cards, TABLE[device], **options)
    assert decision.mode == mode
    assert decision.shard_size == {"none": 1, "ddp": 1, "fsdp": cards, "hsdp": options.get("shard_size") or 8}[mode]
    assert " GiB" in decision.reason and decision.estimate.layout.mode == mode


def test_the_large_preset_fits_eight_cards_of_24_gb():
    """By the parts that are plain arithmetic, too: what is sharded is an eighth of 20 bytes a parameter."""
    decision = choice("large", 8)
    e, total = decision.estimate, Sizes.of(preset("large"), VOCABULARY).total
    assert 1.25e9 < total < 1.35e9
    assert e.fits and e.bytes < 24_564 << 20 and e.device.memory == 24_564 << 20
    own = sum(e.memory[name] for name in ("parameters", "gradients", "optimizer", "average"))
    assert own == pytest.approx(20 * total / 8, rel=1e-6)
    whole = choice("large", 8, mode="ddp").estimate
    assert not whole.fits and whole.memory["optimizer"] == 8 * total


def test_where_nothing_fits_the_reason_says_what_would_help():
    decision = choice("large", 2, batch=64, micro=32)
    assert not decision.estimate.fits and decision.mode == "fsdp" and decision.reshard_after_forward
    for word in ("nothing fits", "activation_checkpointing 1", "micro_batch below 32", "optim.state bf16"):
        assert word in decision.reason
    assert choice("large", 8, batch=64, micro=8, activation_checkpointing=1).estimate.fits


def test_a_decision_depends_on_link_and_memory():
    kept = choice("large", 8, replace(FOUR, memory=80 * GIB), mode="fsdp")
    assert not kept.reshard_after_forward
    assert choice("large", 8, mode="fsdp", reshard_after_forward="always").reshard_after_forward
    slow, fast = (choice("small", 6, replace(FOUR, link_host=rate)).estimate for rate in (1e9, 100e9))
    assert slow.waiting > fast.waiting and slow.seconds - slow.waiting == pytest.approx(fast.seconds - fast.waiting)


@pytest.mark.parametrize(
    ("options", "cards", "message"),
    [
        ({"batch": 25}, 6, "train.global_batch 25 does not divide into 6 ranks; try 24 or 30"),
        ({"batch": 24, "micro": 3}, 6, "does not divide into 6 ranks x micro-batches of 3; try 18 or 36"),
        (
            {"mode": "hsdp", "shard_size": 4, "batch": 24},
            6,
            "cannot split 6 ranks into shards of 4; try parallel.shard_size 2 or 3",
        ),
        ({"mode": "none"}, 6, "parallel.mode none is one process, and 6 ranks"),
        ({}, 0, "at least one rank"),
    ],
)
def test_refuses_in_a_sentence(options, cards, message):
    with pytest.raises(UsageError, match=message):
        choice("small", cards, **options)


def test_8_bit_moments_are_not_sharded():
    config = preset("small", batch=24, mode="fsdp")
    config.optim.state = "8bit"
    with pytest.raises(UsageError, match=r"optim\.state 8bit is for parallel\.mode ddp"):
        choose_mode(config, VOCABULARY, 6, FOUR)
    config.parallel.mode = "auto"
    decision = choose_mode(config, VOCABULARY, 6, FOUR)
    assert decision.mode == "ddp" and decision.others == ()


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 200), cards=st.integers(1, 64), micro=st.integers(0, 9))
def test_a_split_is_the_whole_batch_or_refused(batch, cards, micro):
    config = preset("small", batch=batch, micro=micro)
    try:
        size, passes = split(config, cards)
    except UsageError as error:
        assert batch % (cards * max(1, micro))
        near = [int(n) for n in str(error).split("try ")[1].split(" or ")]
        assert all(split(preset("small", batch=n, micro=micro), cards) for n in near)
        return
    assert cards * size * passes == batch and (size == micro if micro else size <= 32)


SIZES = sizes_of("small")
layout = st.builds(
    lambda mode, shards, copies, gathered, param, reduce, micro, passes, checkpoint, moments: Layout(
        mode, shards * copies, shards, copies, gathered, param, reduce, micro, passes, checkpoint, moments
    ),
    st.just("hsdp"), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 2, 8)), st.booleans(), st.sampled_from((2, 4)),
    st.sampled_from((2, 4)), st.integers(1, 8), st.integers(1, 4), st.integers(0, 4), st.sampled_from(("fp32", "bf16", "8bit")),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(layout=layout, device=st.sampled_from(list(TABLE)))
def test_laws_of_an_estimate(layout, device):
    config, device = load_preset("small"), TABLE[device]
    e = estimate(config, SIZES, layout, device)
    assert e.seconds == pytest.approx(sum(p.seconds for p in e.parts)) and e.bytes == sum(e.memory.values())
    assert all(size >= 0 for size in e.memory.values()) and all(p.seconds >= 0 for p in e.parts)
    assert e.waiting <= e.link_seconds * (1 + 1e-9) and 0 <= e.hidden <= 1 and 0 < e.efficiency <= 1 and 0 < e.mfu < 1
    assert (layout.world == 1) == (not e.wire) == (e.link_seconds == 0)

    def other(**changes):
        return estimate(config, SIZES, replace(layout, **changes), device)

    assert other(micro_batch=layout.micro_batch + 1).bytes > e.bytes
    assert other(reduce_bytes=2).seconds <= e.seconds and other(reduce_bytes=2).bytes <= e.bytes
    assert other(gathered=False).bytes <= other(gathered=True).bytes
    assert other(gathered=False).seconds >= other(gathered=True).seconds
    assert other(checkpoint=1).bytes < other(checkpoint=0).bytes and other(checkpoint=1).seconds > other(checkpoint=0).seconds
    held = [other(moments=m).bytes for m in ("8bit", "bf16", "fp32")]
    assert held == sorted(held)


def test_bytes_on_the_wire_are_those_of_rings():
    sizes = Sizes(total=1000, blocks=800, layers=4, vocabulary=10)
    plain = Layout("ddp", 6, 1, 1, True, 4, 4, 1, 5)
    assert bytes_sent(sizes, plain) == {"all-reduce": pytest.approx(2 * 5 / 6 * 4000)}  # once a step, whatever the passes
    kept = Layout("fsdp", 4, 4, 1, True, 2, 2, 1, 3)
    assert bytes_sent(sizes, kept) == {
        "all-gather": pytest.approx(3 * 3 / 4 * (4 * 200 + 2 * 800)), "reduce-scatter": pytest.approx(3 / 4 * 2000)
    }  # fmt: skip
    again = bytes_sent(sizes, replace(kept, gathered=False))["all-gather"]
    assert again == pytest.approx(3 * 3 / 4 * (4 * 200 + 2 * 2 * 800))
    both = bytes_sent(sizes, Layout("hsdp", 8, 4, 2, True, 4, 4, 1, 1))
    assert both["all-reduce"] == pytest.approx(2 * 1 / 2 * 4 * 1000 / 4)
    assert bytes_sent(sizes, Layout("none", 1, 1, 1, True, 4, 4, 1, 1)) == {}


def test_communication_hides_behind_computing_as_far_as_the_overlap_says():
    sizes, layout = Sizes(10**8, 8 * 10**7, 12, VOCABULARY), Layout("ddp", 6, 1, 1, True, 4, 4, 4, 1)
    alone = exposed_seconds(sizes, layout, FOUR, 0.0, 0.7)
    assert alone == pytest.approx(2 * 5 / 6 * 4e8 / 10e9, rel=0.05)  # 10 GB/s through host memory
    assert exposed_seconds(sizes, layout, FOUR, 0.03, 0.7) == pytest.approx(alone - 0.7 * 0.02)
    assert exposed_seconds(sizes, layout, FOUR, 10.0, 0.7) == 0
    across = replace(layout, world=16, hosts=2)
    slow = replace(FOUR, network=3e8)
    assert exposed_seconds(sizes, across, slow, 0.0, 0.7) > 5 * exposed_seconds(sizes, across, FOUR, 0.0, 0.7)


def test_hosts_are_as_few_as_hold_the_cards():
    config = preset("large", batch=192)
    hosts = lambda cards, **options: {item.hosts for item in layouts(config, cards, FOUR, **options)}  # noqa: E731
    assert hosts(8) == {1} and hosts(16) == {2} and hosts(12) == {2} and hosts(6, cards_per_host=3) == {2}


def test_moments_take_what_the_optimizer_really_keeps():
    """bf16 and fp32 state by their own tensors; 8-bit ones are compared where torchao is (test_low_precision.py)."""
    from atat_fast.config import OptimConfig
    from atat_fast.training.optimizers import Optimizers

    model = DiT(11, 10, dim=16, layers=2, heads=2, length=12, conditioning_dim=8, dropout=0.0)
    total = sum(p.numel() for p in model.parameters())
    config = Config(model=model.config)
    for state in ("fp32", "bf16"):
        optimizers = Optimizers(model, OptimConfig(state=state))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizers.step(1e-3)
        kept = sum(t.numel() * t.element_size() for name, t in optimizers.state().items() if not name.endswith("/step"))
        sizes = Sizes(total, total // 2, 2, 11)
        plan = card_memory(config, sizes, Layout("none", 1, 1, 1, True, 4, 4, 1, 1, moments=state), FOUR)
        assert kept == plan["optimizer"]


def test_the_optimizers_work_is_counted():
    assert optimizer_part(1000, FOUR).bytes == 52_000
    assert optimizer_part(1000, FOUR, moment_bytes=4).bytes == 44_000
    one = muon_flops(ModelConfig(dim=8, layers=1, heads=1))
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32)]
    by_hand = sum(5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n) for m, n in (sorted(s) for s in shapes))
    assert one == by_hand and muon_flops(ModelConfig(dim=8, layers=3, heads=1)) == 3 * one
    config = preset("small", batch=24)
    adamw = choose_mode(config, VOCABULARY, 6, FOUR).estimate.seconds
    config.optim.name = "muon"
    assert choose_mode(config, VOCABULARY, 6, FOUR).estimate.seconds > adamw


def kept_by_autograd(config: ModelConfig, batch: int, recompute: int) -> int:
    """Bytes of every storage that a forward pass leaves for its backward pass, parameters not counted."""
    model = DiT(67, 66, **vars(config))
    for i, block in enumerate(model.blocks):
        block.recompute = recompute > 0 and (i + 1) % recompute == 0
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {b.untyped_storage().data_ptr() for b in model.buffers()}
    seen: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    tokens, rows = torch.randint(0, 66, (batch, config.length)), torch.arange(0, batch * config.length, 2)
    randomness = Randomness(1, 0, torch.arange(batch))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = model.features(tokens, None, randomness, rows=rows)
    assert features.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_activations_are_what_autograd_keeps(recompute):
    """fp32 on a CPU, whose attention keeps what a GPU's does. The estimate is above, and not far above."""
    config, batch = ModelConfig(dim=64, layers=6, heads=2, length=64, dropout=0.1), 4
    kept = kept_by_autograd(config, batch, recompute)
    compute = Compute(torch.device("cpu"), torch.float32, compile=False)
    plan, whole = (
        estimate_memory(Config(model=config), 0, 67, batch, compute, recomputed=n).activations
        for n in (config.layers // recompute if recompute else 0, 0)
    )
    one = whole / config.layers if recompute else 0  # the plan also counts the block that is being computed again
    assert kept <= plan <= 1.35 * kept + one


def test_the_largest_micro_batch_is_the_last_that_fits():
    config = preset("large")
    e = choose_mode(config, VOCABULARY, 8, FOUR).estimate
    most = largest_micro_batch(config, sizes_of("large"), e.layout, FOUR)
    assert most >= 4
    for micro, fits in ((most, True), (most + 1, False)):
        memory = card_memory(config, sizes_of("large"), replace(e.layout, micro_batch=micro), FOUR)
        assert (sum(memory.values()) <= FOUR.memory) == fits


def test_the_estimator_is_part_of_the_plan():
    config = preset("small", batch=24)
    without = choose_mode(config, VOCABULARY, 6, FOUR)
    config.importance = ImportanceConfig(source="learned")
    config.diffusion.weighting = "importance"
    both = choose_mode(config, VOCABULARY, 6, FOUR)
    extra = both.estimate.memory["parameters"] - without.estimate.memory["parameters"]
    assert extra == 4 * 1_906_177 and both.estimate.seconds > without.estimate.seconds


def test_the_lines_say_what_each_option_buys():
    lines = "\n".join(describe_parallel(preset("large"), VOCABULARY, 8, FOUR))
    for words in (
        "8 x RTX 4090, 24.0 GiB each", "not measured", "no peer-to-peer", ": fits", "as train.micro_batch says", "at most",
        "all-gather", "reduce-scatter", "tokens/s", "assumed",
        "parallel.activation_checkpointing 1", "parallel.param_dtype bf16", "parallel.reduce_dtype bf16", "optim.state bf16",
        "train.micro_batch 2", "parallel.mode ddp", "does not fit",
    ):  # fmt: skip
        assert words in lines, words
    two = "\n".join(describe_parallel(preset("small", batch=24), VOCABULARY, 6, FOUR, cards_per_host=3))
    assert "between 2 hosts" in two and "chosen because train.micro_batch is 0" in two


def test_devices_are_found_by_name_and_by_the_driver_s_name():
    assert named("rtx4090") is FOUR and of_name("NVIDIA GeForce RTX 4090") is FOUR and of_name("NVIDIA H100 PCIe") is None
    with pytest.raises(UsageError, match="did you mean rtx4090"):
        named("rtx409")
    cpu = facts_of(Compute(torch.device("cpu"), torch.float32, compile=False), ranks_on_host=2)
    assert cpu.key == "cpu" and cpu.element == 4 and "not known" in cpu.source and cpu.memory > 1 << 28
    decision = choose_mode(preset("demo"), 300, 2, cpu)
    assert decision.mode == "ddp" and decision.estimate.fits


@pytest.mark.slow
def test_two_ranks_hold_and_send_what_the_plan_says(tmp_path):
    """A step of three passes under ddp and fsdp over gloo: bytes of every kind, and bytes through every collective."""
    cases = Path(__file__).with_name("plan_cases.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(cases),
        str(tmp_path / "f"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "f").read_text())
    config = Config(model=ModelConfig(dim=32, layers=4, heads=2, length=16, dropout=0.0))
    sizes = Sizes.of(config, 67)
    for case in found:
        shard = 1 if case["mode"] == "ddp" else 2
        layout = Layout(case["mode"], 2, shard, 1, case["gathered"], 4, 4, 2, 3)
        plan = card_memory(config, sizes, layout, replace(FOUR, element=4))
        for name, held in case["held"].items():  # rows that do not divide over ranks make a difference
            assert plan[name] == pytest.approx(held, rel=0.02), (case["mode"], name)
        assert case["sent"] == pytest.approx(bytes_sent(sizes, layout), rel=0.02), case["mode"]
    assert [case["mode"] for case in found] == ["ddp", "fsdp", "fsdp"]


def door(*arguments, cwd):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "atat_fast.train", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_dry_run_of_ranks_that_were_started_is_theirs_and_printed_once(monkeypatch, capsys):
    facts = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    arguments = ["--preset", "demo", "--dry_run", "--parallel.device", "rtx4090"]
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert ("4 ranks x 1 passes x 4" in printed and "between 2 hosts" in printed) == (rank == "0") == bool(printed)
    monkeypatch.setenv("RANK", "0")
    assert main([*arguments, "--parallel.world_size", "8"]) == 0  # asked for by number, wherever it is asked
    printed = capsys.readouterr().out
    assert "8 ranks x 1 passes x 2" in printed and "hosts" not in printed.split("assumed")[0]


@pytest.mark.slow
def test_the_dry_run_of_many_cards_prints_a_plan_and_touches_nothing(tmp_path):
    done = door("--preset", "large", "--dry_run", "--parallel.world_size", 8, "--parallel.device", "rtx4090", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mode         fsdp" in done.stdout and "GiB: fits" in done.stdout and list(tmp_path.iterdir()) == []
    done = door("--preset", "large", "--dry_run", "--parallel.world_size", 7, "--parallel.device", "rtx4090", cwd=tmp_path)
    assert done.returncode == 2 and "does not divide into 7 ranks" in done.stderr and done.stderr.count("\n") == 1
    done = door("--preset", "large", "--dry_run", "--parallel.device", "rtx4091", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean rtx4090" in done.stderr
