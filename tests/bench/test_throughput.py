"""bench/throughput.py and what it is made of: variants, parts, profiles, power, samplers, tables and pictures, all small."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atat_fast.config import Config, ModelConfig
from atat_fast.hardware.compute import Compute
from atat_fast.training.graphs import Graphs

ROOT = Path(__file__).resolve().parents[2]
CPU = Compute(torch.device("cpu"), torch.float32, compile=False)
VOCABULARY = 40


def batch(first, count):
    """Sequences as a function of their number, and these numbers."""
    ids = torch.arange(first, first + count)
    return (ids[:, None] * 7 + torch.arange(16)) % (VOCABULARY - 1), ids


TOKENS = batch(0, 4)[0]


@pytest.fixture
def setting(load):
    config = Config(model=ModelConfig(dim=16, layers=2, heads=2, length=16, dropout=0.0))
    return load("variants").Setting(config, VOCABULARY, 4, CPU, SimpleNamespace(batch=batch))


@pytest.fixture
def variant(load, setting):
    return lambda name: load("variants").Variant(name, setting)


def test_every_variant_learns_the_same_data(load, variant):
    for name in load("variants").VARIANTS:
        if name != "mdlm+compile":
            one = variant(name)
            one.timed(3)
            assert one.count == 3 and torch.isfinite(torch.stack(one.losses)).all()
            assert all(p.grad is None for p in one.losses_of.parameters())


def test_adaptive_variant_has_every_part_on(variant):
    one = variant("atat_fast+atat")
    objective = one.losses_of.objective
    assert objective.estimator is not None and objective.curriculum.at(0.9).level != 0
    assert objective.config.importance.tilt != 0 and objective.config.diffusion.weighting == "importance"
    before = [p.detach().clone() for p in objective.estimator.parameters()]
    one.timed(2)
    assert any(not torch.equal(a, b) for a, b in zip(before, objective.estimator.parameters(), strict=True))


def test_other_variants_have_their_own_parts_on(variant):
    spread, hidden = (variant(f"atat_fast+{name}").losses_of.objective for name in ("spread", "hidden"))
    assert spread.config.diffusion.spread == 1 and spread.estimator is None
    assert hidden.config.importance.reads == "hidden" and hidden.config.diffusion.weighting == "ce"
    assert hidden.estimator is not None and hidden.estimator.parameter_count() < 100


def test_a_pass_as_a_graph_is_the_same_pass(variant):
    """What a GPU does; here nothing can be captured, so the first passes run as they are."""

    def refuse(call):
        raise RuntimeError("no stream is captured here")

    plain, graphed = (variant("atat_fast") for _ in range(2))
    graphed.graphs = Graphs(graphed.losses_of.objective, refuse)
    plain.timed(3)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        graphed.timed(3)
    assert torch.equal(torch.stack(plain.losses), torch.stack(graphed.losses))


def test_the_form_that_compiles_is_the_same_loss(variant):
    plain = variant("mdlm").model
    noisy, weight = plain.masks(TOKENS)
    values = [loss(TOKENS, noisy, weight) for loss in (plain.loss, plain.fusible_loss)]
    results = [(value, *torch.autograd.grad(value, list(plain.parameters()))) for value in values]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_variants_agree_and_a_wrong_one_does_not(load, variant):
    plain, ours, check_agreement = variant("mdlm"), variant("atat_fast"), load("variants").check_agreement
    assert check_agreement(plain, ours, TOKENS) < 1e-3
    with torch.no_grad():
        ours.model.head.bias[3] += 1.0
    with pytest.raises(RuntimeError, match="the variants disagree"):
        check_agreement(plain, ours, TOKENS)


def test_parts_add_up_to_the_step(load, variant):
    one = variant("atat_fast")
    one.timed(1)
    parts, step = one.parts(5)
    assert list(parts) == list(load("variants").PARTS) and min(parts.values()) > 0
    assert sum(parts.values()) <= 1.001 * step  # they are parts of it; how much lies between them is the machine's
    assert not one.clock.on
    assert one.parts(1)[0].keys() == parts.keys()


def test_profile_adds_up_and_knows_its_groups(load, variant, tmp_path, monkeypatch):
    profiling, devices = load("profiling"), load("devices")
    for name in ("mdlm", "atat_fast"):
        one = variant(name)
        one.timed(1)
        kept = profiling.profile(one, tmp_path / "out" / "a.trace.json.gz", devices.TABLE["h100"])
        groups = kept["groups"]
        assert sum(g["seconds"] for g in groups.values()) == pytest.approx(kept["step_seconds"], rel=0.1)
        assert {"head products", "block products", "attention", "norm chains", "optimizer", "average", "clip"} <= set(groups)
        assert groups["head products"]["flops"] > 0 and 0 < groups["optimizer"]["share_of_roofline"] < 1
        assert (tmp_path / "out" / kept["trace"]).read_bytes()[:2] == b"\x1f\x8b"
        lines = "\n".join(profiling.op_table(name, kept))
        assert "sum" in lines and "head products" in lines
    assert not list((tmp_path / "out").glob("*.json"))
    monkeypatch.setattr(profiling, "LARGEST_TRACE", 10)  # a trace that is too large is not kept
    kept = profiling.profile(variant("mdlm"), tmp_path / "a.trace.json.gz", None, steps=1)
    assert kept["trace"] is None and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "not kept" in "\n".join(profiling.op_table("mdlm", kept))


def test_costs_count_what_the_model_s_own_cost_counts(load, variant, setting):
    """All rows: products, attention and head together are step_cost, but for attention's backward, which runs five products."""
    from atat_fast.models.dit import step_cost
    from atat_fast.ops import attention_cost

    known = load("profiling").costs(variant("mdlm"))
    c, rows = setting.config.model, setting.batch * setting.config.model.length
    extra = c.layers * (
        sum(attention_cost(setting.batch, c.length, c.dim, backward=b).flops for b in (False, True))
        - 3 * attention_cost(setting.batch, c.length, c.dim).flops
    )
    total = sum(known[name].flops for name in ("block products", "attention", "head products"))
    assert total == step_cost(c, VOCABULARY, setting.batch, rows).flops + extra


def test_an_energy_meter_gives_joules_where_a_driver_does(load, monkeypatch):
    """The driver counts millijoules of a card that draws 250 W."""
    power, counted = load("power"), iter(range(1_000_000, 2_000_000, 250))
    assert power.EnergyMeter(torch.device("cpu")).joules() is None
    calls = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": {"GPU-1234": "handle"}.__getitem__}
    calls["nvmlDeviceGetTotalEnergyConsumption"] = lambda handle: next(counted)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**calls))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    meter = power.EnergyMeter(torch.device("cuda", 0))
    before, after = meter.joules(), meter.joules()
    assert after - before == pytest.approx(0.25)
    assert power.figures(500.0, 2.0, 1e6) == {"watts": 250.0, "joules_per_million_tokens": 500.0}
    assert power.figures(None, 2.0, 1e6) == {}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    assert power.EnergyMeter(torch.device("cuda", 0)).joules() is None


def test_samplers_are_checked_and_timed(load, variant):
    sampling, model = load("bench_sampling"), variant("atat_fast").model
    record = sampling.time_samplers(model, CPU, batch=2, steps=4, budget=20, ways=("ddpm_cache", "confidence"))
    assert record["denoising_steps"] == 4 and set(record["results"]) == {sampling.PLAIN, "ddpm_cache", "confidence"}
    assert model.training and record["results"][sampling.PLAIN]["ratio"] == 1.0
    assert "ddpm_cache" in "\n".join(sampling.table(record)) and "extrapolated" not in "\n".join(sampling.table(record))
    short = sampling.time_samplers(model, CPU, batch=1, steps=64, budget=1e-6)
    assert short["results"][sampling.PLAIN]["timed_steps"] == 1
    assert "extrapolated from 1 steps" in "\n".join(sampling.table(short))
    alone = {**short, "results": {"ddpm_cache": {**short["results"]["ddpm_cache"], "ratio": None}}}
    assert "not run" in "\n".join(sampling.table(alone))


def test_the_plain_loop_is_not_the_samplers_under_another_name(load, variant):
    """It fills every mask, keeps what is given, and stops after the steps asked for."""
    sampling, model = load("bench_sampling"), variant("atat_fast").model
    plain = sampling.plain_model(model)
    tokens = torch.full((2, 8), model.mask_id)
    tokens[0, 3] = 1
    out = sampling.plain_sample(plain, tokens, 5)
    assert (out != model.mask_id).all() and out[0, 3] == 1
    assert (sampling.plain_sample(plain, tokens, 50, 1) == model.mask_id).any()


def row(rate, **more):
    found = {"tokens_per_second": rate, "low": 0.9 * rate, "high": 1.1 * rate, "step_memory_bytes": 5 << 20}
    return found | {"mean_loss": 3.25, "ratio": rate / 100} | more


FACTS = {"device": "NVIDIA H100", "dtype": "bf16", "torch": "2.13", "commit": "abc"}
SETTINGS = {"preset": "small", "vocabulary": 50_258, "micro_batch": 8, "length": 1024, "rounds": 5, "steps": 1}
OLD = {"benchmark": "throughput", "settings": SETTINGS, "environment": FACTS}
OLD |= {"results": {"mdlm": row(100.0), "atat_fast": row(400.0)}}


def new_record():
    parts = dict.fromkeys(("data", "masking", "forward", "backward", "clip", "optimizer", "average"), 0.01)
    group = {"seconds": 0.02, "flops": 10**12, "bytes": 10**9, "share_of_roofline": 0.5}
    more = {
        "parts": parts, "step_seconds": 0.071, "ratio_compiled": None, "watts": 300.0, "joules_per_million_tokens": 750.0,
        "mfu_all_rows": 0.4, "mfu_hidden_rows": 0.3, "peak_memory_bytes": None,
    }  # fmt: skip
    return OLD | {
        "results": {"mdlm": row(100.0, **more), "atat_fast": row(400.0, **more)}, "missing": {"mdlm+compile": "no time left"},
        "largest_micro_batch": {"mdlm": {"micro_batch": 16, "full": True}, "atat_fast": None},
        "profile": {"atat_fast": {"step_seconds": 0.02, "unwatched_step_seconds": 0.02, "trace": None, "device": "H100",
                                  "groups": {"head products": group}}},
        "sampling": {"batch": 2, "length": 16, "denoising_steps": 8, "results": {"plain MDLM loop": row(1.0) | {"step_ms": 2.0,
        "timed_steps": 3}}},
    }  # fmt: skip


def test_tables_and_pictures_of_old_and_new_files(load, tmp_path):
    report_tables, throughput, pictures = load("report_tables"), load("throughput"), load("report_pictures")
    assert report_tables.throughput(tmp_path) == ""
    assert pictures.latest_throughput_png(tmp_path) is None and pictures.roofline_png(tmp_path) is None
    for folder, record in (("a", OLD), ("b", new_record())):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "throughput-small-50258.json").write_text(json.dumps(record))
    assert report_tables.throughput(tmp_path).count("4.00x") == 2
    details = report_tables.throughput_details(tmp_path)
    assert "no time left" in details and "| 16 |" in details and "750" in details
    assert "70.0 | 71.0" in report_tables.step_parts(tmp_path)
    assert "| 1,000.0 | 1,000.0 | 50% |" in report_tables.profile(tmp_path)
    case = new_record()["sampling"]
    record = {"settings": {"preset": "tiny", "vocabulary": 99}, "results": [case, case | {"batch": 3}], "environment": FACTS}
    (tmp_path / "b" / "sampling.json").write_text(json.dumps(record))
    table = report_tables.sampling(tmp_path)
    assert "small, V=50,258, 2 x 16 in 8 steps" in table and "plain MDLM loop, extrapolated from 3 steps" in table
    assert "tiny, V=99, 2 x 16 in 8 steps" in table and "tiny, V=99, 3 x 16" in table
    lines = throughput.table(new_record())
    assert any(line.startswith("mdlm+compile") and "no time left" in line for line in lines)
    assert "largest micro-batch: mdlm 16, atat_fast unknown" in lines
    for table in report_tables.DOCUMENT.values():
        assert len({line.count("|") for line in table(tmp_path).splitlines()}) <= 1, "a row has another number of cells"
    (tmp_path / "a" / "throughput-small-50258.json").unlink()
    for picture in (pictures.roofline_png(tmp_path), pictures.latest_throughput_png(tmp_path), pictures.throughput_png(OLD)):
        assert picture.startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_share_a_global_batch(tmp_path, python):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    small = ("--vocabulary", 4200, "--length", 16, "--micro_batch", 2, "--rounds", 2, "--seconds", 0, "--dtype", "fp32")
    names = ("--variants", "mdlm", "atat_fast", "atat_fast+atat")
    done = python(*launcher, ROOT / "bench" / "throughput.py", *small, *names, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == 1 and "2 ranks" in done.stdout
    record = json.loads((tmp_path / "out" / "throughput-tiny-4200-2-2-ranks.json").read_text())
    assert record["settings"]["ranks"] == 2 and set(record["results"]) == {"mdlm", "atat_fast", "atat_fast+atat"}
