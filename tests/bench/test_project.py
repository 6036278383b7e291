"""bench/project.py and bench/devices.py: the laws a projection obeys, its label, and its command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.config import load_preset
from atat_fast.errors import UsageError
from atat_fast.models.dit import step_cost

VOCABULARY = 50_258
DEVICES = ("rtx4090", "rtx5090", "l40s", "h100", "h200")


@pytest.fixture(scope="session")
def project(load):
    """project(device, preset, length=..., **options)."""
    module, devices = load("project"), load("devices")

    def project(device="rtx4090", preset="small", *, length=0, **options):
        config = load_preset(preset)
        config.model.length = length or config.model.length
        return module.project(devices.TABLE[device], config, **({"vocabulary": VOCABULARY} | options))

    return project


@pytest.mark.parametrize("p2p", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_more_cards_cost_communication_and_nothing_else(project, device, p2p):
    one = project(device, micro_batch=8, p2p=p2p)
    before = one.tokens_per_second
    for gpus in range(2, 9):
        many = project(device, micro_batch=8, gpus=gpus, p2p=p2p)
        (wait,) = (part.seconds for part in many.parts if part.name == "all-reduce")
        assert wait >= 0 and many.seconds - wait == pytest.approx(one.seconds)
        assert many.tokens_per_second <= gpus * one.tokens_per_second * (1 + 1e-9)
        if gpus > 2:  # one card has nothing to wait for; from two on, the next is never lost
            assert many.tokens_per_second >= before
        before = many.tokens_per_second


def test_a_direct_link_and_more_passes_hide_communication(project):
    def share(p2p=False, accumulation=1):
        p = project(micro_batch=8, gpus=6, p2p=p2p, accumulation=accumulation)
        return sum(part.seconds for part in p.parts if part.name == "all-reduce") / p.seconds

    assert share() > share(p2p=True) > 0 and share() > share(accumulation=4) > share(accumulation=16) > 0


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 24), gpus=st.integers(1, 8), accumulation=st.integers(1, 8))
def test_bytes_and_seconds_add_up(project, batch, gpus, accumulation):
    p = project(micro_batch=batch, gpus=gpus, accumulation=accumulation)
    once = project(micro_batch=batch)
    parts, single = ({part.name: part for part in x.parts} for x in (p, once))
    assert 0 < p.seconds == pytest.approx(sum(part.seconds for part in p.parts))
    for name in ("products", "attention", "head", "norm chains", "elementwise"):
        for field in ("flops", "bytes", "seconds"):
            assert getattr(parts[name], field) == pytest.approx(accumulation * getattr(single[name], field))
    assert parts["optimizer"] == single["optimizer"] and parts["optimizer"].bytes == 52 * p.parameters
    sent = parts["all-reduce"].bytes if gpus > 1 else 0.0
    assert sent == pytest.approx(2 * (gpus - 1) / gpus * 4 * p.parameters)


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_micro_batch_is_the_last_that_fits_for_memory_grows_with_batch_and_length(project, device):
    larger = ((1, 512), (2, 512), (2, 513), (16, 513))
    sizes = [sum(project(device, micro_batch=b, length=n).memory.values()) for b, n in larger]
    assert sizes == sorted(set(sizes))
    p = project(device)
    assert p.largest_micro_batch >= p.micro_batch == min(32, p.largest_micro_batch)
    full = project(device, micro_batch=p.largest_micro_batch)
    assert sum(full.memory.values()) <= full.device.memory
    with pytest.raises(UsageError, match=f"the largest that does is {p.largest_micro_batch}"):
        project(device, micro_batch=p.largest_micro_batch + 1)


@pytest.mark.parametrize("preset", ["tiny", "small", "medium"])
def test_work_is_the_cost_models(project, preset):
    """Utilisation counts what the trainer counts, and no part is faster than the device's peak."""
    config, p = load_preset(preset).model, project("h200", preset, micro_batch=4)
    rows = 4 * config.length
    assert p.flops_hidden == step_cost(config, VOCABULARY, 4, rows // 2).flops
    assert p.flops_all == step_cost(config, VOCABULARY, 4, rows).flops > p.flops_hidden
    flops = {part.name: part.flops for part in p.parts}
    forward_of_attention = flops["attention"] * 2 / 7
    assert flops["products"] + flops["head"] + 3 * forward_of_attention == pytest.approx(p.flops_hidden)
    assert 0 < p.mfu(p.flops_hidden) < p.mfu(p.flops_all) < 1
    for part in p.parts:
        assert part.flops / p.device.flops <= part.seconds and part.bytes / p.device.bandwidth <= part.seconds


def test_the_norm_of_queries_and_keys_costs_what_its_backward_reads(load):
    """The turned queries and keys once more, and four bytes a query and key: nothing in the forward pass."""
    device, config = load("devices").TABLE["rtx4090"], load_preset("small").model
    plain, normed = (
        {part.name: part for part in load("project").pass_parts(replace(config, qk_norm=norm), VOCABULARY, 4, 10**8, device)}
        for norm in (False, True)
    )
    rows = 4 * config.length
    more = config.layers * rows * (2 * config.dim * device.element + 2 * config.heads * 4)
    assert normed["elementwise"].bytes - plain["elementwise"].bytes == more
    assert {name for name in plain if plain[name] != normed[name]} == {"elementwise"}


def test_six_cards_do_the_run_in_time_or_the_verdict_says_what_is_in_the_way(load):
    """After a change of a cost model or of the table of devices: python bench/project.py --six, then bench/report.py."""
    module = load("project")
    rows = module.six_cards()
    for row in rows:
        assert row["minutes"] == pytest.approx(1_228_800_000 / row["tokens_per_second"] / 60)
    inside = [row["what"] for row in rows if row["minutes"] <= 45]
    assert module.six_verdict(rows).split("within 45: ")[1].split("; ") == inside and rows[0]["minutes"] > 45
    assert "the best takes" in module.six_verdict([row | {"minutes": 50} for row in rows])
    recorded = json.loads(module.SIX_FILE.read_text())
    assert recorded["projection"] is True and recorded["six"] == json.loads(json.dumps(rows))


def test_what_cannot_be_is_refused_in_a_sentence(project):
    for options, message in (
        ({"gpus": 9}, "--gpus must be 1 to 8"),
        ({"gpus": 0}, "--gpus must be 1 to 8"),
        ({"micro_batch": -1}, "--micro_batch must be at least 0"),
        ({"accumulation": 0}, "--accumulation"),
        ({"vocabulary": 1}, "--vocabulary at least 2"),
        ({"length": -1}, "--length at least 1"),
        ({"preset": "large", "device": "rtx4090", "vocabulary": 4_000_000}, "not even one sequence"),
    ):
        with pytest.raises(UsageError, match=message):
            project(**options)


def test_every_fact_has_a_source_and_a_faster_device_is_faster(load, project):
    rates = {device: project(device, micro_batch=8).tokens_per_second for device in DEVICES}
    assert rates["rtx4090"] < rates["rtx5090"] and rates["rtx4090"] < rates["h100"] < rates["h200"]
    for device in load("devices").TABLE.values():
        assert "data sheet" in device.source and device.link_source and "assumed" in device.shares.source
        assert device.link >= device.link_host > 0
        for name in ("gemm", "attention", "bandwidth", "overlap"):
            assert 0 < getattr(device.shares, name) <= 1


def record(device="NVIDIA GeForce RTX 4090", rate=100_000.0):
    settings = {"preset": "small", "vocabulary": VOCABULARY, "length": 1024, "micro_batch": 8}
    results, facts = {"atat_fast": {"tokens_per_second": rate}}, {"device": device}
    return json.dumps({"benchmark": "throughput", "settings": settings, "results": results, "environment": facts})


def test_the_error_is_that_against_what_was_measured(load, project, tmp_path):
    module = load("project")
    assert [line.split(":")[0] for line in module.verdict([])] == ["error    on CPUs unknown", "error    on GPUs unknown"]
    expected = project(micro_batch=8).tokens_per_second
    others = {"b": record("NVIDIA GTX 1080"), "c": "{", "d": '{"results": [1]}', "e": record("NVIDIA H100 PCIe")}
    for folder, text in ({"a": record(rate=expected / 1.25)} | others).items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "throughput-small.json").write_text(text)
    (row,) = module.checked(tmp_path)
    assert row["file"] == "a/throughput-small.json" and row["error_percent"] == pytest.approx(25)
    line, cpus = module.verdict([row])
    assert "CPUs unknown" in cpus
    assert "measured" in line and "+25 %" in line


def test_a_cpu_is_known_by_what_was_measured_on_it(load, tmp_path):
    devices = load("devices")
    with pytest.raises(UsageError, match=r"bench/ceilings\.py` measures"):
        devices.named("cpu", tmp_path)
    with pytest.raises(UsageError, match="did you mean rtx4090"):
        devices.named("rtx409", tmp_path)
    (tmp_path / "cpu").mkdir()
    rows = [{"kind": "product", "rate": 1e11}, {"kind": "product", "rate": 2e11}, {"kind": "copy", "rate": 3e10}]
    facts = {"device": "CPU (X)", "dtype": "fp32", "cpu_threads": 2}
    text = json.dumps({"benchmark": "ceilings", "results": rows, "memory_bytes": 8 << 30, "environment": facts})
    (tmp_path / "cpu" / "ceilings.json").write_text(text)
    device = devices.named("cpu", tmp_path)
    assert (device.flops, device.bandwidth, device.memory, device.element) == (2e11, 3e10, 8 << 30, 4)
    assert devices.find(facts, tmp_path) == device
    assert devices.find(facts | {"device": "CPU (Y)"}, tmp_path) is devices.find(facts | {"cpu_threads": 1}, tmp_path) is None
    p = load("project").project(device, load_preset("tiny"), vocabulary=30_522, micro_batch=8)
    assert p.tokens_per_second > 0 and all(part.name != "all-reduce" for part in p.parts)
    with pytest.raises(UsageError, match="is one process"):
        load("project").project(device, load_preset("tiny"), vocabulary=30_522, gpus=2)


def test_the_command_prints_and_writes_a_projection_that_says_it_is_one(load, tmp_path, capsys):
    out = tmp_path / "new" / "p.json"
    options = "--device rtx4090 --gpus 6 --preset small --micro_batch 4 --no-p2p --out"
    assert load("project").main([*options.split(), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PROJECTION, not a measurement: 6 x RTX 4090, no peer-to-peer")
    for word in ("products", "attention", "head", "norm chains", "optimizer", "all-reduce", "assumed", "MFU", "largest", "error"):
        assert f"\n{word}" in said
    written = json.loads(out.read_text())
    assert written["projection"] is True and written["label"] in said and written["benchmark"] == "projection"
    step = written["results"]["step"]
    assert step["seconds"] == pytest.approx(sum(part["seconds"] for part in written["results"]["parts"]))
    assert step["memory_bytes"] == sum(written["results"]["memory"].values())
    assert 6 * 4 * 1024 / step["seconds"] == pytest.approx(step["tokens_per_second"])

    assert load("project").main(["--device", "rtx4091"]) == 2
    captured = capsys.readouterr()
    assert "did you mean rtx4090" in captured.err and captured.err.count("\n") == 1 and captured.out == ""
