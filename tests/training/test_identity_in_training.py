"""A run under a token-identity schedule: its rates are kept, and its own bound stands beside val/nll."""

from __future__ import annotations

import json

import pytest
import torch

from atat_fast import cli, evaluate, push
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.runs import checkpoint
from atat_fast.training.trainer import Trainer

IDENTITY = ["--diffusion.schedule", "token_identity", "--diffusion.identity_strength", "1.5"]


def run(arguments):
    return Trainer(cli.parse_config(cli.make_parser(), arguments)[0], show_progress=False)


def rows_of(trainer):
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_reports_its_own_bound_beside_the_uniform_one(small, tmp_path, capsys):
    trainer = run([*small, *IDENTITY, "--run.name", "identity"])
    last = trainer.train()
    plain = run([*small, "--run.name", "plain"])
    plain.train()
    rows, others = rows_of(trainer), rows_of(plain)
    assert all(row["schedule_nll"] > 0 and row["schedule_nll_se"] > 0 for row in rows if row["kind"] == "eval")
    assert not any("schedule_nll" in row for row in others)
    assert [row["loss"] for row in rows if row["kind"] == "train"] != [row["loss"] for row in others if row["kind"] == "train"]

    saved = checkpoint.find(trainer.folder)
    counts = torch.from_numpy(trainer.parts.data.train.token_counts()).double()
    rates = checkpoint.load_process(saved).rates
    assert torch.equal(rates, trainer.parts.process.rates)
    assert float((rates.double() * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)
    assert rates[int(counts.argmax())] == rates.max() and checkpoint.load_process(checkpoint.find(plain.folder)).tensors() == {}

    page = tmp_path / "page.json"
    command = ["--run", str(trainer.folder), "--checkpoint", "last", "--sequences", "8", "--json", str(page)]
    assert evaluate.main(command) == 0
    found = json.loads(page.read_text())
    assert found["schedule_nll"] == pytest.approx(last["schedule_nll"], rel=1e-6) and found["nll"] == pytest.approx(last["nll"])
    assert f"schedule nll     {found['schedule_nll']:.4f}" in capsys.readouterr().out

    saved = hub.save_pretrained(tmp_path / "saved", push.with_card(trainer.folder, "last", average=True))
    assert "masking schedule | token identity: revealed at rates exp(-1.5 * log-rank" in (saved / "README.md").read_text()
    corpus = small[small.index("--data.corpus") + 1]
    command = ["--model", str(saved), "--corpus", corpus, "--sequences", "8", "--json", str(tmp_path / "again.json")]
    assert evaluate.main(command) == 0
    assert json.loads((tmp_path / "again.json").read_text())["schedule_nll"] == pytest.approx(found["schedule_nll"], rel=1e-6)


def test_a_checkpoint_without_its_rates_is_refused(small):
    trainer = run([*small, *IDENTITY])
    trainer.save()
    trainer.close()
    (checkpoint.find(trainer.folder).path / checkpoint.SCHEDULE).unlink()
    with pytest.raises(UsageError, match=r"schedule.safetensors is missing"):
        checkpoint.find(trainer.folder)
