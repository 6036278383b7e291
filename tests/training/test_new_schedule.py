"""A masking schedule is one file and one line of a table: a toy one is trained, kept, resumed and evaluated."""

from __future__ import annotations

import json

import torch

from atat_fast import evaluate, train
from atat_fast.diffusion import processes
from atat_fast.diffusion.process import MaskedBatch
from atat_fast.ops import mask_tokens
from atat_fast.runs import checkpoint


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

    def hide(self, tokens, counts, *, mask_id, sample_ids, seed, step, weighting="uniform"):
        length = tokens.shape[1]
        scores = torch.linspace(0, 1, length).expand(tokens.shape)
        noisy, rows, weights = mask_tokens(
            tokens, counts, num_rows=int(counts.sum()), mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step,
            scores=scores, tilt=10 * float(self.tilt), weighting=weighting,
        )  # fmt: skip
        hidden.append((noisy == mask_id).float().mean(0))
        return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, counts / length, tokens.numel(), hidden=len(rows))


hidden = []
"""The share of batches that each position was hidden in, batch by batch."""


def test_a_schedule_is_added_by_one_class_and_one_row(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(processes.PROCESSES, "backwards", Backwards)
    command = [
        *small,
        "--diffusion.schedule",
        "backwards",
        "--train.max_steps",
        "3",
        "--train.log_every",
        "1",
        "--run.name",
        "toy",
    ]
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
