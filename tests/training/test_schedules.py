"""Masking schedules in a run: laws of the count, mirrored pairs, token identity, and one that is added here."""

from __future__ import annotations

import json

import pytest
import torch

from atat_fast import evaluate, push, train
from atat_fast.diffusion import processes
from atat_fast.diffusion.process import MaskedBatch
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.ops import mask_tokens
from atat_fast.runs import checkpoint
from atat_fast.training import loss as objective

IDENTITY = {"diffusion.schedule": "token_identity", "diffusion.identity_strength": 1.5, "run.name": "identity"}


@pytest.fixture
def masked(trainer, rows, monkeypatch):
    """A whole run; what was masked, in order, as (tokens, masked batch, progress), and the training losses."""

    def run(*arguments):
        seen = []

        def record(tokens, config, **options):
            seen.append((tokens, hide(tokens, config, **options), options["progress"]))
            return seen[-1][1]

        hide = objective.hide_for_training
        with monkeypatch.context() as patch:
            patch.setattr(objective, "hide_for_training", record)
            made = trainer(*arguments)
            made.train()
        return seen, [loss for (loss,) in rows(made.folder, "train", "loss")]

    return run


def test_mirrored_pairs_are_the_same_sequence_and_the_data_moves_half_as_fast(small, masked):
    small = [*small, "--train.dtype=fp32", "--model.dropout=0"]
    mirror = [*small, "--diffusion.counts=uniform", "--diffusion.mirror=true"]
    plain = torch.cat([t for t, *_ in masked(small, {"run.name": "plain"})[0]])
    whole, losses = masked(mirror, {"run.name": "whole"})
    tokens, noisy = (torch.cat(parts) for parts in zip(*((t, m.noisy) for t, m, _ in whole), strict=True))
    assert torch.equal(tokens[::2], tokens[1::2]) and torch.equal(tokens[::2], plain[: len(tokens) // 2])
    hidden = noisy != tokens
    assert (hidden[::2] ^ hidden[1::2]).all()
    cut, same = masked(mirror, {"run.name": "cut", "train.micro_batch": 1})
    assert torch.equal(noisy, torch.cat([m.noisy for _, m, _ in cut])) and losses == pytest.approx(same, rel=1e-4)


def test_weights_and_law_follow_the_progress_of_the_run(small, masked):
    law = {"counts": "bell", "counts_anneal_from": 0.5, "ce_until": 0.75, "weighting": "uniform"}
    seen, _ = masked(small, {f"diffusion.{name}": value for name, value in law.items()})
    assert [progress for _, _, progress in seen] == [step / 12 for step in range(12)]
    for step, (tokens, batch, _) in enumerate(seen):
        if step < 9:  # 0.75 of 12 steps: a plain mean over what is hidden
            torch.testing.assert_close(batch.weights, torch.full_like(batch.weights, tokens.numel() / len(batch.rows)))
        else:
            assert len(batch.weights.unique()) > 1


def test_a_run_reports_its_own_bound_beside_the_uniform_one(small, trainer, rows, corpus, tmp_path, capsys):
    made, plain = trainer(small, IDENTITY), trainer(small, {"run.name": "plain"})
    last = made.train()
    plain.train()
    assert all(row["schedule_nll"] > 0 and row["schedule_nll_se"] > 0 for row in rows(made.folder, "eval"))
    assert not any("schedule_nll" in row for row in rows(plain.folder, "eval"))
    assert rows(made.folder, "train", "loss") != rows(plain.folder, "train", "loss")

    counts = torch.from_numpy(made.parts.data.train.token_counts()).double()
    rates = checkpoint.load_process(checkpoint.find(made.folder)).rates
    assert torch.equal(rates, made.parts.process.rates) and rates[int(counts.argmax())] == rates.max()
    assert float((rates.double() * counts).sum() / counts.sum()) == pytest.approx(1, rel=1e-5)
    assert checkpoint.load_process(checkpoint.find(plain.folder)).tensors() == {}

    saved = hub.save_pretrained(tmp_path / "saved", push.with_card(made.folder, "last", average=True))
    assert "masking schedule | token identity: revealed at rates exp(-1.5 * log-rank" in (saved / "README.md").read_text()
    page = tmp_path / "page.json"
    for command in (["--run", str(made.folder), "--checkpoint", "last"], ["--model", str(saved), "--corpus", str(corpus)]):
        assert evaluate.main([*command, "--sequences", "8", "--json", str(page)]) == 0
        found = json.loads(page.read_text())
        assert found["schedule_nll"] == pytest.approx(last["schedule_nll"], rel=1e-6)
        assert found["nll"] == pytest.approx(last["nll"])
        assert f"schedule nll     {found['schedule_nll']:.4f}" in capsys.readouterr().out
    (checkpoint.find(made.folder).path / checkpoint.SCHEDULE).unlink()
    with pytest.raises(UsageError, match=r"schedule.safetensors is missing"):
        checkpoint.find(made.folder)


class Backwards:
    """Hides the last tokens of a sequence first, by a tilt that a checkpoint keeps."""

    own_bound = False

    def __init__(self, tilt):
        self.tilt = tilt

    @classmethod
    def of(cls, config, counts):
        return cls(torch.tensor(float(len(counts())) / 100))

    @classmethod
    def restored(cls, tensors, vocabulary):
        return cls(tensors["tilt"])

    @staticmethod
    def check(config):
        pass

    @staticmethod
    def describe(config):
        return "backwards"

    def tensors(self):
        return {"tilt": self.tilt}

    def to(self, device):
        return self

    def hide(self, tokens, counts, *, mask_id, **options):
        scores = torch.linspace(0, 1, tokens.shape[1]).expand(tokens.shape)
        more = {"num_rows": int(counts.sum()), "scores": scores, "tilt": 10 * float(self.tilt)}
        noisy, rows, weights = mask_tokens(tokens, counts, mask_id=mask_id, **more, **options)
        hidden.append((noisy == mask_id).float().mean(0))
        share = counts / tokens.shape[1]
        return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, share, tokens.numel(), hidden=len(rows))


hidden = []
"""The share of batches that each position was hidden in, batch by batch."""


def test_a_schedule_is_added_by_one_class_and_one_row(small, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(processes.PROCESSES, "backwards", Backwards)
    settings = {"diffusion.schedule": "backwards", "train.max_steps": 3, "train.log_every": 1, "run.name": "toy"}
    command = arguments(small, settings)
    assert train.main(command) == 0 and len(hidden) == 3
    share = torch.stack(hidden).mean(0)
    assert share[8:].mean() > share[:8].mean() + 0.2
    saved = checkpoint.find(tmp_path / "runs" / "toy")
    assert float(checkpoint.load_process(saved).tilt) == float(torch.tensor(2.58))  # bytes and two special tokens, over 100
    assert evaluate.main(["--run", str(saved.path), "--sequences", "8", "--json", str(tmp_path / "page.json")]) == 0
    assert json.loads((tmp_path / "page.json").read_text())["nll"] > 0
    assert train.main([*command, "--resume", "--train.max_steps", "5"]) == 0 and len(hidden) == 5
    capsys.readouterr()
    assert train.main([*command, "--dry_run"]) == 0 and "schedule     backwards" in capsys.readouterr().out
