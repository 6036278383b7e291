"""The compare command: equal budgets, paired differences, a folder that goes on, and one sentence for bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import yaml

from atat_fast import compare
from atat_fast.comparison.mask_variance import WAYS, mask_errors
from atat_fast.comparison.paired import mean_over_seeds, share_to_match
from atat_fast.comparison.recipes import FROM_PRESETS, RECIPES, WHAT, with_recipe
from atat_fast.comparison.run import Budget
from atat_fast.config import load_preset
from atat_fast.diffusion.bound import evaluation_strata
from atat_fast.errors import UsageError
from atat_fast.training.trainer import Trainer


@pytest.fixture
def tiny(corpus, arguments, tmp_path):
    """Arguments of a comparison of 16 steps of 32 tokens, under tmp_path."""
    settings = {
        "data.corpus": corpus, "data.tokenizer": "bytes", "data.cache_dir": corpus.parent / "cache", "data.valid_fraction": 0.2,
        "model.dim": 16, "model.layers": 1, "model.heads": 2, "model.length": 8, "train.global_batch": 4, "eval.sequences": 24,
        "optim.name": "adamw", "train.dtype": "fp32", "budget": "tokens=512", "points": 2, "out": tmp_path / "out",
    }  # fmt: skip
    return arguments(settings)


def found(folder):
    return json.loads((folder / "compare.json").read_text())


def test_two_recipes_and_two_seeds_in_a_process_of_its_own(tiny, tmp_path, python, capsys):
    """A folder with a table, curves, every seed's numbers and paired differences; the same command again runs nothing."""
    command = [*tiny, "--recipes", "uniform,mdlm", "--seeds", "2"]
    done = python("-m", "atat_fast.compare", *command)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    page, table = found(out), (out / "table.txt").read_text()
    assert table in done.stdout and "below uniform" in table and (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row["recipe"] for row in page["results"]] == ["uniform", "mdlm"]
    assert [(run["recipe"], run["seed"]) for run in page["runs"]] == [("uniform", 1), ("uniform", 2), ("mdlm", 1), ("mdlm", 2)]
    order = [line.split(":")[1].split(",")[0].strip() for line in done.stdout.splitlines() if line.startswith("run ")]
    assert order == ["uniform", "mdlm", "uniform", "mdlm"]  # a machine that slows down slows both
    for run in page["runs"]:
        assert (run["steps"], run["tokens"]) == (16, 512) and run["seconds"] > 0 and len(run["curve"]) >= 2
        own = np.load(out / "runs" / f"{run['recipe']}-seed{run['seed']}" / "values.npy")
        assert float(own.mean()) == pytest.approx(run["nll"]) and len(own) == run["sequences"] == 24
        assert run["curve"][-1]["nll"] == run["nll"] and run["curve"][-1]["tokens"] == 512
    (d,) = page["differences"]
    nll = {(run["recipe"], run["seed"]): run["nll"] for run in page["runs"]}
    assert d["by_seed"] == pytest.approx([nll["uniform", s] - nll["mdlm", s] for s in (1, 2)])
    assert d["difference"] == pytest.approx(sum(d["by_seed"]) / 2)
    assert d["se"] == pytest.approx(math.hypot(d["se_data"], d["se_seeds"]))
    assert yaml.safe_load((out / "recipes" / "mdlm.yaml").read_text())["diffusion"]["masking"] == "bernoulli"

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert compare.main(command) == 0 and table in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before and found(out) == page


def test_the_same_recipe_twice_differs_by_nothing_and_a_folder_grows(tiny, tmp_path):
    same = tmp_path / "same.yaml"
    same.write_text("diffusion: {pairing: antithetic}\n")
    assert compare.main([*tiny, "--recipes", f"preset,{same}", "--seeds", "1"]) == 0
    page = found(tmp_path / "out")
    (d,) = page["differences"]
    assert (d["difference"], d["se"], d["se_seeds"], d["better"]) == (0, 0, None, 0)
    kept = (tmp_path / "out" / "runs" / "preset-seed1" / "result.json").stat().st_mtime_ns
    assert compare.main([*tiny, "--recipes", f"preset,{same},elbo", "--seeds", "2"]) == 0
    assert (tmp_path / "out" / "runs" / "preset-seed1" / "result.json").stat().st_mtime_ns == kept
    page = found(tmp_path / "out")
    assert len(page["runs"]) == 6 and len(page["differences"]) == 3
    by_pair = {(d["of"], d["minus"]): d for d in page["differences"]}
    assert by_pair["preset", "same"]["difference"] == 0 and by_pair["preset", "elbo"]["difference"] != 0
    with pytest.raises(UsageError, match=r"other settings \(settings.model.dim was 16, is 32\); choose another --out"):
        compare.main([*tiny, "--recipes", "preset", "--seeds", "1", "--model.dim", "32"])
    same.write_text("diffusion: {pairing: independent}\n")
    with pytest.raises(UsageError, match=r"recipe same, diffusion\.pairing was antithetic, is independent"):
        compare.main([*tiny, "--recipes", f"preset,{same}", "--seeds", "1"])


def test_a_run_that_was_stopped_goes_on_to_the_same_end(tiny, tmp_path, monkeypatch, capsys):
    assert compare.main([*tiny, "--recipes", "uniform", "--seeds", "1"]) == 0
    step = Trainer._train_step

    def stop(self):
        step(self)
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_train_step", stop)
    arguments = [*tiny, "--recipes", "uniform", "--seeds", "1", "--out", str(tmp_path / "cut")]
    assert compare.main(arguments) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "cut" / "compare.json").exists()
    monkeypatch.undo()
    assert compare.main(arguments) == 0
    whole, cut = (found(tmp_path / name)["runs"][0] for name in ("out", "cut"))
    assert cut["nll"] == whole["nll"] and [p["nll"] for p in cut["curve"]] == [p["nll"] for p in whole["curve"]]


def test_minutes_become_steps_by_each_recipes_own_time(tiny, tmp_path, capsys):
    arguments = [*tiny, "--recipes", "uniform,mdlm", "--seeds", "1", "--budget", "minutes=0.002"]
    assert compare.main(arguments) == 0
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())["steps"]
    for steps in kept.values():
        assert steps["steps"] == max(1, round(0.12 / steps["seconds_a_step"]))
    assert "s a step (lower quartile of" in capsys.readouterr().out and not (tmp_path / "out" / "calibration").exists()
    assert compare.main(arguments) == 0  # what was measured then still holds
    assert "s a step" not in capsys.readouterr().out
    assert [row["steps"] for row in found(tmp_path / "out")["results"]] == [s["steps"] for s in kept.values()]


def test_a_run_that_diverges_is_said_to(tiny, tmp_path):
    wild = tmp_path / "wild.yaml"
    wild.write_text("optim: {lr: 1e30, clip: 0.0, warmup: 0.0}\n")
    assert compare.main([*tiny, "--recipes", f"uniform,{wild}", "--seeds", "1"]) == 1
    page = found(tmp_path / "out")
    assert page["differences"] == [] and page["results"][0]["nll"] > 0 and page["results"][1]["diverged"] == 1
    assert "diverged in 1" in (tmp_path / "out" / "table.txt").read_text()


def test_importance_is_a_recipe_like_others(tiny, tmp_path):
    assert compare.main([*tiny, "--recipes", "elbo,atat", "--seeds", "1"]) == 0
    kept = tmp_path / "out" / "recipes"
    plain, chosen = (yaml.safe_load((kept / f"{name}.yaml").read_text()) for name in ("elbo", "atat"))
    assert plain["importance"]["source"] == "none" and plain["curriculum"]["kind"] == "none"
    assert chosen["importance"]["source"] == "learned" and chosen["curriculum"]["kind"] == "linear"
    assert found(tmp_path / "out")["differences"][0]["difference"] != 0


def test_several_processes_are_refused(tiny, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "compares on one process, and 2 were started" in refused(compare.main, *tiny)


def test_masks_are_compared_on_a_trained_model(tiny, tmp_path, capsys):
    assert compare.main([*tiny, "--recipes", "uniform", "--seeds", "1", "--masks", "3", "--eval.batch", "8"]) == 0
    rows = {row["masks"]: row for row in found(tmp_path / "out")["masks"]}
    assert set(rows) == set(WAYS) and rows["mdlm"]["of_mdlm"] == rows["independent"]["of_independent"] == 1
    assert all(row["se"] > 0 for row in rows.values())
    capsys.readouterr()
    same = ["--eval.sequences", "24", "--eval.batch", "8", "--train.dtype", "fp32"]
    run = tmp_path / "out" / "runs" / "uniform-seed1"
    assert compare.main(["--masks_of", str(run), "--masks", "3", *same]) == 0
    printed = capsys.readouterr().out
    assert f"{rows['evaluation']['se']:.4f}" in printed and "over mdlm's" in printed


BAD = [
    (["--recipes", "unifrom"], "there is no recipe 'unifrom' (did you mean uniform?)"),
    (["--recipes", ""], "name at least one recipe"),
    (["--recipes", "uniform,uniform"], "recipe 'uniform' is named twice"),
    (["--recipes", "nowhere.yaml"], "recipe nowhere.yaml cannot be read"),
    (["--recipes", "broken.yaml"], "is not YAML"),
    (["--recipes", "text.yaml"], "must hold groups of settings"),
    (["--recipes", "shared.yaml"], "sets data.tokenizer, which all recipes share"),
    (["--recipes", "budget.yaml"], "sets train.max_steps, which all recipes share"),
    (["--recipes", "choice.yaml"], "diffusion.counts must be one of uniform, bell, learned, got 'bel'"),
    (["--recipes", "unknown.yaml"], "there is no setting diffusion.count (did you mean counts?)"),
    (["--recipes", "number.yaml"], "optim.lr must be float, got 'fast'"),
    (["--recipes", "sense.yaml"], "recipe sense: diffusion.counts_centre must be a share"),
    (["--seeds", "0"], "seeds and points must be at least 1"),
    (["--budget", "hours=1"], "budget 'hours=1' is not understood; give tokens=2M or minutes=1.5"),
    (["--budget", "minutes=0"], "is not understood"),
    (["--budget", "tokens=10"], "less than one step of recipe uniform, 32 tokens"),
    (["--masks", "1"], "at least 2 draws"),
    (["--out", "full"], "exists and holds no comparison"),
    (["--masks_of", "nothing"], "there is no run folder nothing"),
    (["--sedes", "2"], "there is no setting --sedes (did you mean --seeds?)"),
]
FILES = {
    "broken.yaml": "a: [", "text.yaml": "hello", "shared.yaml": "data: {tokenizer: gpt2}", "budget.yaml": "train: {max_steps: 5}",
    "choice.yaml": "diffusion: {counts: bel}", "unknown.yaml": "diffusion: {count: 3}", "number.yaml": "optim: {lr: fast}",
    "sense.yaml": "diffusion: {counts: bell, counts_centre: 3}",
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_sentence(options, message, tiny, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert message in refused(compare.main, *tiny, "--recipes", "uniform", *options)
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine").read_text() == "kept"


def test_recipes_lie_over_the_preset_and_leave_its_sizes():
    base = load_preset("tiny")
    assert with_recipe(base, "preset") == base
    mdlm, uniform = with_recipe(base, "mdlm"), with_recipe(base, "uniform")
    assert (mdlm.diffusion.masking, mdlm.diffusion.pairing) == ("bernoulli", "stratified")
    assert (uniform.diffusion.masking, uniform.diffusion.weighting) == ("exact", base.diffusion.weighting)
    assert with_recipe(load_preset("demo"), "uniform").diffusion.weighting == "ce"
    fast = with_recipe(base, "fast")
    assert (fast.model.dim, fast.model.length) == (base.model.dim, base.model.length)
    demo = load_preset("demo")
    assert (fast.data, fast.train, fast.diffusion, fast.optim) == (base.data, base.train, demo.diffusion, demo.optim)
    assert with_recipe(load_preset("plain"), "fast") == dataclasses.replace(demo, preset="plain")
    even = dataclasses.replace(demo, diffusion=dataclasses.replace(demo.diffusion, spread=1.0))
    assert with_recipe(even, "fast") == with_recipe(demo, "fast") and with_recipe(even, "uniform").diffusion.spread == 0
    assert set(WHAT) == {*RECIPES, *FROM_PRESETS}


def test_budgets():
    known = {"tokens=2M": 2e6, "tokens=500k": 5e5, "tokens=1e6": 1e6, "minutes=1.5": 1.5}
    assert all(Budget.parse(text) == Budget(text.split("=")[0], amount) for text, amount in known.items())


def test_differences_know_their_error():
    """Two models whose values share sequences and masks: over many worlds the claimed error is the real one, and far below the
    error of either mean.
    """
    n, seeds, errors, claimed, alone = 60, 4, [], [], []
    strata = evaluation_strata(n, 1, seed=5)
    for world in range(200):
        generator = torch.Generator().manual_seed(world)
        shared = torch.randn(n, generator=generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(2, seeds, n, generator=generator, dtype=torch.float64)
        luck = 0.05 * torch.randn(2, seeds, 1, generator=generator, dtype=torch.float64)
        a, b = (3.0 + i * 0.5 + shared + noise[i] + luck[i] for i in range(2))
        d = mean_over_seeds(b - a, strata)
        errors.append(d.mean - 0.5)
        claimed.append(d.se)
        alone.append(mean_over_seeds(a, strata).se)
    real = float(torch.tensor(errors).std())
    assert abs(sum(errors) / 200) < 4 * real / math.sqrt(200)
    assert 0.8 < sum(claimed) / 200 / real < 1.3 and sum(alone) > 3 * sum(claimed)
    one = mean_over_seeds((b - a)[:1], strata)
    assert one.se == one.se_data and math.isnan(one.se_seeds)


def test_where_a_curve_gets_there_for_good():
    x, y = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 3, 2, 1])
    assert share_to_match(x, y, 2.5) == pytest.approx(2.5 / 4)
    assert share_to_match(x, y, 1.0) == 1 and share_to_match(x, y, 6.0) == 0.25 and math.isnan(share_to_match(x, y, 0.5))
    assert share_to_match(x, torch.tensor([1.0, 3, 2, 1]), 2.0) == 0.75  # it was there before, and left


def test_a_model_that_pays_the_same_everywhere_leaves_exact_masks_no_error():
    tokens = torch.zeros(32, 20, dtype=torch.long)
    errors = mask_errors(lambda m: torch.ones(len(m.rows)), tokens, mask_id=9, group=16, replicates=20, seed=1)
    assert errors["evaluation"].se < 1e-6 and errors["evaluation"].nll == pytest.approx(1)
    for way in ("antithetic", "mirror"):  # k = 0 contributes nothing, now and then
        assert errors[way].se < errors["mdlm"].se and errors[way].nll == pytest.approx(1, abs=0.05)
    assert errors["mdlm"].nll == pytest.approx(1, abs=0.1) and errors["independent"].nll == pytest.approx(1, abs=0.15)
    steep = mask_errors(lambda m: m.hidden_share[m.rows // 20], tokens, mask_id=9, group=16, replicates=20, seed=1)
    assert steep["evaluation"].se < 0.3 * steep["independent"].se and steep["mdlm"].se < 0.8 * steep["independent"].se
