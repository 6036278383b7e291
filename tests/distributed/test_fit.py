"""Memory of a card as a function of settings, what `auto` decides from it, and what --dry_run prints."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.config import Config, ImportanceConfig, ModelConfig, OptimConfig, load_preset
from atat_fast.distributed.fit import (
    GIB,
    Card,
    Layout,
    Sizes,
    activation_bytes,
    bytes_sent,
    card_memory,
    choose,
    largest_micro_batch,
    layouts,
)
from atat_fast.distributed.ranks import Launch
from atat_fast.errors import UsageError
from atat_fast.hardware.compute import Compute
from atat_fast.hardware.devices import TABLE, lacks_peer_access, memory_of, named, of_name
from atat_fast.models import DiT
from atat_fast.models.dit import Randomness
from atat_fast.train import main
from atat_fast.training.plan import batches, check, choose_layout, sizes_of

VOCABULARY = 50_258
CPU = Compute(torch.device("cpu"), torch.float32, compile=False)


def preset(name, *, batch=0, micro=None, state="fp32", **parallel):
    config = load_preset(name)
    config.train.global_batch = batch or config.train.global_batch
    config.train.micro_batch = config.train.micro_batch if micro is None else micro
    config.optim.state = state
    config.parallel = replace(config.parallel, **parallel)
    return config


@functools.cache
def known(name):
    return sizes_of(load_preset(name), VOCABULARY)


def card(device="rtx4090"):
    return Card(TABLE[device].memory, "cuda", 2, TABLE[device].p2p)


def chosen(name, ranks, device="rtx4090", *, on_host=8, **options):
    config = preset(name, **options)
    plan = check(config, ranks, min(ranks, on_host))
    return choose(config, known(name), ranks, min(ranks, on_host), card(device), plan.micro_batch, plan.accumulation)


FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


@pytest.mark.parametrize(
    ("name", "ranks", "device", "options", "layout"),
    [
        ("small", 1, "rtx4090", {}, "none"),
        ("small", 6, "rtx4090", {}, "ddp"),
        ("medium", 6, "rtx4090", {}, "ddp"),
        ("large", 8, "rtx4090", FP32, "fsdp, weights freed"),
        ("large", 8, "rtx4090", FP32 | {"mode": "fsdp", "reshard_after_forward": "never"}, "fsdp, weights kept"),
        ("large", 8, "rtx4090", {}, "fsdp, weights kept"),
        ("large", 8, "rtx4090", {"mode": "ddp"}, "ddp"),  # asked for, so it is taken although it does not fit
        ("large", 16, "rtx4090", {}, "fsdp, weights kept"),
        ("large", 16, "rtx4090", FP32 | {"mode": "hsdp"}, "hsdp over 8, weights freed"),
        ("large", 8, "h100", {}, "ddp"),
        ("small", 6, "rtx4090", {"mode": "fsdp"}, "fsdp, weights kept"),
        ("small", 6, "rtx4090", {"mode": "fsdp", "reshard_after_forward": "always"}, "fsdp, weights freed"),
        ("small", 6, "rtx4090", {"mode": "hsdp", "shard_size": 3}, "hsdp over 3, weights kept"),
    ],
)
def test_ddp_if_it_fits_else_fsdp(name, ranks, device, options, layout):
    found = chosen(name, ranks, device, **options)
    assert found.name == layout and " GiB" in found.reason and found.describe().startswith(("one process", found.mode))


@pytest.mark.parametrize(
    ("device", "element", "options", "wire"),
    [
        ("rtx4090", 2, {}, "sums in bf16, gathers in bf16"),  # no card reads another's memory
        ("rtx4090", 4, {}, "sums in fp32, gathers in fp32"),  # products are fp32
        ("h100", 2, {}, "sums in fp32, gathers in fp32"),
        ("h100", 2, {"reduce_dtype": "bf16"}, "sums in bf16, gathers in fp32"),
        ("rtx4090", 2, {"param_dtype": "fp32"}, "sums in bf16, gathers in fp32"),
    ],
)
def test_sums_and_gathers_are_bf16_where_products_are_and_the_link_is_slow(device, element, options, wire):
    config, place = preset("small", mode="fsdp", **options), replace(card(device), element=element)
    (layout, freed) = layouts(config, 6, 6, place)
    assert layout.wire == freed.wire == wire and layout.describe().endswith(wire)
    (ddp,) = layouts(replace(config, parallel=replace(config.parallel, mode="ddp")), 6, 6, place)
    assert ddp.wire == wire.split(",")[0] and ddp.gathers == "fp32"


def test_auto_refuses_what_does_not_fit_and_says_what_would():
    with pytest.raises(UsageError) as refused:
        chosen("large", 2, batch=64, micro=32)
    sentence = str(refused.value)
    for words in (
        "does not fit: fsdp, weights freed needs about",
        "at most",
        "--parallel.activation_checkpointing 1",
        "--optim.state bf16",
        "--parallel.mode fsdp starts it anyway",
    ):
        assert words in sentence
    with pytest.raises(UsageError, match=r"at most 6 fit: try --train\.micro_batch 4"):
        chosen("large", 8, batch=64, micro=8, **FP32)
    assert chosen("large", 8, batch=64, micro=8, activation_checkpointing=1).name == "fsdp, weights kept"
    assert "not even one sequence fits" in chosen("large", 1, batch=8, micro=8).reason  # one process starts, and says so


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"batch": 25}, 6, "train.global_batch 25 does not divide into 6 ranks; try 24 or 30"),
        ({"batch": 24, "micro": 3}, 6, "does not divide into 6 ranks x micro-batches of 3; try 18 or 36"),
        ({"mode": "hsdp", "shard_size": 4}, 6, "6 ranks do not make a mesh of shards over 4 ranks; .* 1, 2, 3, 6"),
        ({"mode": "none"}, 2, "parallel.mode none is one process, and 2 were started; use --nproc-per-node=1"),
        ({"mode": "ddp", "shard_size": 2}, 4, "parallel.shard_size 2 is for parallel.mode hsdp"),
        ({"mode": "ddp", "param_dtype": "bf16"}, 2, "parallel.param_dtype bf16 is for weights that are gathered"),
        ({"timeout": 0.0}, 1, "parallel.timeout must be above 0"),
        ({"activation_checkpointing": -1}, 1, "must be at least 0"),
        ({"mode": "fsdp", "state": "8bit"}, 6, r"optim\.state 8bit is for parallel\.mode ddp"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(options, ranks, message):
    with pytest.raises(UsageError, match=message):
        chosen("small", ranks, **options)


def test_gathers_in_bf16_for_products_in_fp32_are_refused():
    with pytest.raises(UsageError, match=r"this run computes in fp32; use --train\.dtype bf16"):
        choose_layout(preset("demo", mode="fsdp", param_dtype="bf16"), Launch(size=2, local_size=2), 300, CPU)
    assert choose_layout(preset("demo"), Launch(size=2, local_size=2), 300, CPU).mode == "ddp"


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 200), ranks=st.integers(1, 64), micro=st.integers(0, 9))
def test_a_global_batch_is_split_whole_or_refused_with_the_nearest_that_can_be(batch, ranks, micro):
    try:
        plan = batches(preset("small", batch=batch, micro=micro), ranks)
    except UsageError as error:
        assert batch % (ranks * max(1, micro))
        for near in str(error).split("try ")[1].split(" or "):
            assert batches(preset("small", batch=int(near), micro=micro), ranks)
        return
    size = plan.micro_batch
    assert ranks * size * plan.accumulation == batch and (size == micro if micro else size <= 32)
    assert sorted(slot for rank in range(ranks) for slot in plan.slots(rank)) == list(range(0, batch, size))


layout = st.builds(
    lambda shard, copies, keep: Layout("hsdp", shard * copies, shard, keep),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((1, 2, 8)),
    st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(layout=layout, micro=st.integers(1, 8), passes=st.integers(1, 4), every=st.integers(0, 4))
def test_memory_grows_with_what_is_kept_and_falls_with_every_option(layout, micro, passes, every):
    sizes = known("small")

    def held(layout=layout, micro=micro, passes=passes, **options):
        options = {"activation_checkpointing": every} | options
        return card_memory(preset("small", **options), sizes, layout, card(), micro, passes)

    base = sum(held().values())
    assert all(size >= 0 for size in held().values())
    assert sum(held(micro=micro + 1).values()) > base and sum(held(passes=passes + 1).values()) >= base
    assert sum(held(layout=replace(layout, sums="bf16")).values()) <= base
    kept, freed = (sum(held(layout=replace(layout, keep_gathered=keep)).values()) for keep in (True, False))
    assert freed <= kept
    assert sum(held(activation_checkpointing=1).values()) < sum(held(activation_checkpointing=0).values())
    moments = [held(state=state)["optimizer"] for state in ("8bit", "bf16", "fp32")]
    assert moments == sorted(set(moments))


def test_weights_gradients_moments_and_average_are_20_bytes_a_parameter_over_the_ranks():
    sizes = known("large")
    assert 1.25e9 < sizes.total < 1.35e9
    with_estimator = replace(preset("small"), importance=ImportanceConfig(source="learned"))
    assert sizes_of(with_estimator, VOCABULARY).total - known("small").total == 1_906_177
    for shard in (1, 8):
        held = card_memory(preset("large"), sizes, Layout("hsdp", 8, shard), card(), 4)
        own = sum(held[name] for name in ("parameters", "gradients", "optimizer", "average"))
        assert own == pytest.approx(20 * sizes.total / shard, rel=1e-6)


def test_the_largest_micro_batch_is_the_last_that_fits():
    config, sizes, layout = preset("large"), known("large"), Layout("fsdp", 8, 8, keep_gathered=False)
    most = largest_micro_batch(config, sizes, layout, card())
    needs = [sum(card_memory(config, sizes, layout, card(), micro).values()) for micro in (most, most + 1)]
    assert most >= 4 and needs[0] <= card().memory < needs[1]
    assert largest_micro_batch(config, sizes, Layout("none", 1, 1), card()) == 0


def test_bytes_sent_are_those_of_rings():
    small = Layout("fsdp", 4, 4, gathers="bf16", sums="bf16")

    def sent(layout, passes, name="small"):
        return bytes_sent(preset(name), Sizes(1000, 800, 4, 10), layout, card(), passes)

    assert sent(Layout("ddp", 6, 1), 5) == {"all-reduce": pytest.approx(2 * 5 / 6 * 4000)}  # once a step
    kept = sent(small, 3)
    assert kept == {"all-gather": pytest.approx(3 / 4 * (800 + 1600)), "reduce-scatter": pytest.approx(3 / 4 * 2000)}
    freed = sent(replace(small, keep_gathered=False), 3)
    assert freed["all-gather"] == pytest.approx(3 / 4 * (800 + 3 * 3200))
    assert sent(Layout("hsdp", 8, 4), 1)["all-reduce"] == pytest.approx(2 * 1 / 2 * 4 * 1000 / 4)
    assert sent(Layout("none", 1, 1), 1) == {}
    assert sent(small, 1, "demo")["all-to-all"] == pytest.approx(2 * 3 / 4 * 2 * 800 / 4)  # Muon's updates, there and back


def kept_by_autograd(config: ModelConfig, batch: int, every: int) -> int:
    """Bytes of every storage that a forward pass leaves for its backward pass, without parameters and buffers."""
    model = DiT(67, 66, **vars(config))
    for i, block in enumerate(model.blocks):
        block.recompute = every > 0 and (i + 1) % every == 0
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    tokens, rows = torch.randint(0, 66, (batch, config.length)), torch.arange(0, batch * config.length, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = model.features(tokens, None, Randomness(1, 0, torch.arange(batch)), rows=rows)
    assert features.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("every", [0, 1, 2])
def test_activations_are_what_autograd_keeps(every):
    """In fp32 on a CPU, whose attention keeps what a GPU's does. The estimate is above, and not far above."""
    config, batch = ModelConfig(dim=64, layers=6, heads=2, length=64, dropout=0.1), 4
    kept = kept_by_autograd(config, batch, every)
    estimate, whole = (activation_bytes(config, batch * config.length, 4, n) for n in (every, 0))
    one = whole / config.layers if every else 0  # the estimate also counts the block that is being computed again
    assert kept <= estimate <= 1.35 * kept + one


def test_devices_are_found_by_key_and_by_the_name_that_drivers_give():
    assert named("rtx4090") is of_name("NVIDIA GeForce RTX 4090") is TABLE["rtx4090"] and of_name("NVIDIA H100 PCIe") is None
    with pytest.raises(UsageError, match="did you mean rtx4090"):
        named("rtx409")
    assert lacks_peer_access("NVIDIA GeForce RTX 4090 D") and not lacks_peer_access("NVIDIA RTX 4000 Ada Generation")
    assert memory_of(torch.device("cpu"), 2) == memory_of(torch.device("cpu")) // 2 > GIB // 4
    modes = [[layout.mode for layout in layouts(preset("small", state=state), 6, 6, card())] for state in ("fp32", "8bit")]
    assert modes == [["ddp", "fsdp", "fsdp"], ["ddp"]]  # blocks of 8-bit moments are not sharded


@pytest.mark.slow
def test_two_ranks_hold_and_send_what_the_formulas_say(tmp_path, forked):
    """A step of three passes under ddp and fsdp over gloo: bytes of every kind, and bytes through every collective."""
    done = forked(2, "held_and_sent", tmp_path / "f")
    assert done.returncode == 0, done.stderr[-3000:]
    config = Config(model=ModelConfig(dim=32, layers=4, heads=2, length=16, dropout=0.0), optim=OptimConfig(name="muon"))
    sizes, found, place = sizes_of(config, 67), json.loads((tmp_path / "f").read_text()), Card(24 * GIB, "cpu", 4)
    for case in found:
        layout = Layout(**case["layout"])
        held = card_memory(config, sizes, layout, place, 2, 3)
        for name in ("parameters", "gradients", "average"):  # rows that do not divide over ranks make a difference
            assert held[name] == pytest.approx(case["held"][name], rel=0.02), (layout, name)
        assert case["sent"] == pytest.approx(bytes_sent(config, sizes, layout, place, 3), rel=0.02), layout
        assert case["same"], "gathering once a step changes no bit of a gradient"
    assert [case["layout"]["mode"] for case in found] == ["ddp", "ddp", "fsdp", "fsdp", "fsdp"]


def test_the_dry_run_prints_the_plan_of_the_ranks_once_and_touches_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    large = ["--preset", "large", "--dry_run", "--parallel.device", "rtx4090"]
    assert main([*large, "--parallel.world_size", "8"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "mode         fsdp, weights kept",
        "; sums in bf16, gathers in bf16",
        "8 ranks x 8 passes x 4",
        "GiB a card (estimate): fits",
        "at most 6 fit",
        "all-gather",
        "reduce-scatter",
        "parallel.activation_checkpointing 1",
        "optim.state bf16",
    ):
        assert words in printed
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="does not divide into 7 ranks"):
        main([*large, "--parallel.world_size", "7"])
    facts = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        assert main(["--preset", "demo", "--dry_run", "--parallel.device", "rtx4090"]) == 0
        printed = capsys.readouterr().out
        assert ("4 ranks x 1 passes x 4" in printed) == (rank == "0") == bool(printed)
