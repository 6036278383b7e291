"""bench/scaling.py: the harness counts what the trainer does, and projections are the plan's and say that they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atat_fast.config import load_preset
from atat_fast.hardware.devices import TABLE
from atat_fast.training.parallel_plan import choose_mode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def scaling(load):
    return load("scaling")


def test_six_cards_do_the_seeds_run_or_say_what_is_in_the_way(scaling):
    rows = scaling.six_cards()
    assert scaling.TOKENS == 1_228_800_000 and rows[0]["global_batch"] == 24 and rows[0]["accumulation"] == 1
    for row in rows:
        assert row["cards"] == 6 and row["fits"]
        assert row["minutes"] == pytest.approx(scaling.TOKENS / row["tokens_per_second"] / 60)
        assert row["within"] == (row["minutes"] <= 45)
    said = scaling.verdict(rows)
    assert f"{rows[0]['minutes']:.0f} minutes" in said
    if not rows[0]["within"]:
        assert "of gradients" in said and any(row["within"] for row in rows)
        assert said.split("within 45: ")[1].split("; ") == [row["what"] for row in rows if row["within"]]
    none = [row | {"within": False} for row in rows]
    assert "within 45: " not in scaling.verdict(none) and "best" in scaling.verdict(none)


def test_a_projection_is_the_plan_of_that_run(scaling):
    config = load_preset("small")
    config.train.global_batch = 24
    plan = choose_mode(config, scaling.VOCABULARY, 6, TABLE["rtx4090"]).estimate
    row = scaling.six_cards()[0]
    assert row["seconds"] == plan.seconds and row["wire_bytes"] == sum(plan.wire.values()) and row["memory_bytes"] == plan.bytes


def test_more_cards_never_compute_for_a_larger_share_of_a_step(scaling):
    rows = scaling.many_cards()
    assert max(row["cards"] for row in rows) == 64 and {row["hosts"] for row in rows if row["cards"] == 64} == {8}
    for key, name, *_ in scaling.MANY:
        own = [row for row in rows if (row["device"], row["preset"]) == (key, name)]
        assert [row["cards"] for row in own] == list(scaling.CARDS)
        ddp = [row["efficiency"] for row in own if row["mode"] == "ddp"]
        assert ddp == sorted(ddp, reverse=True)
        for row in own:
            assert 0 < row["efficiency"] <= 1 and 0 <= row["hidden"] <= 1 and (row["wire_bytes"] > 0) == (row["cards"] > 1)


def test_the_door_prints_projections_that_say_they_are(scaling, capsys):
    assert scaling.main(["--projections"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PROJECTION, not a measurement") and "MEASURED" not in printed and "six cards: " in printed
    assert scaling.main(["--ranks", "0"]) == 2
    assert "--ranks and --steps must be at least 1" in capsys.readouterr().err


def test_what_is_recorded_is_what_the_models_say_today(scaling):
    """After a change of a cost model or of the table of devices: python bench/scaling.py --renew, then bench/report.py."""
    record = json.loads((ROOT / "bench" / "results" / "cpu" / "scaling.json").read_text())
    fresh = json.loads(json.dumps(scaling.projections()))
    for name in ("six", "many", "options"):
        kept = record["projections"][name]
        assert [row["mode"] for row in kept] == [row["mode"] for row in fresh[name]]
        for key in ("seconds", "memory_bytes", "wire_bytes", "tokens_per_second"):
            assert [row[key] for row in kept] == pytest.approx([row[key] for row in fresh[name]], rel=1e-9)
    assert record["results"] and all(row["loss_difference"] < 1e-3 for row in record["results"])


def test_renewing_keeps_what_was_measured(scaling, tmp_path, capsys):
    assert scaling.main(["--renew", "--out", str(tmp_path / "none")]) == 2
    assert "measure first" in capsys.readouterr().err
    (tmp_path / "scaling.json").write_text(json.dumps({"results": [1], "projections": {"label": "old"}}))
    assert scaling.main(["--renew", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert record["results"] == [1] and record["projections"]["six"] and record["projections"]["options"]


@pytest.mark.slow
def test_ranks_are_measured_and_learn_the_same(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "bench" / "scaling.py"),
        "--steps",
        "4",
        "--modes",
        "ddp",
        "--out",
        str(tmp_path / "out"),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MEASURED on this machine, gloo" in done.stdout and "PROJECTION, not a measurement" in done.stdout
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    one, two = record["results"]
    assert (one["ranks"], one["mode"], two["ranks"], two["mode"]) == (1, "none", 2, "ddp")
    assert len(one["losses"]) == 4 and one["tokens_per_second"] > 0 and two["loss_difference"] < 1e-5
    assert record["projections"]["label"] == "PROJECTION, not a measurement" and record["projections"]["six"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
