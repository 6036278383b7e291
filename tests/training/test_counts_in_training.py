"""Laws of the count and mirrored pairs as the trainer uses them: the right sequences, progress and cuts of the batch."""

from __future__ import annotations

import json

import pytest
import torch

from atat_fast import cli
from atat_fast.training import loss as objective
from atat_fast.training.trainer import Trainer


def run(arguments, monkeypatch):
    """A whole run; what was masked, in order, as (tokens, masked batch, progress, first slot), and the training losses."""
    seen = []

    def record(tokens, config, **options):
        masked = hide(tokens, config, **options)
        seen.append((tokens, masked, options["progress"], options["first"]))
        return masked

    hide = objective.hide_for_training
    with monkeypatch.context() as patch:
        patch.setattr(objective, "hide_for_training", record)
        trainer = Trainer(cli.parse_config(cli.make_parser(), arguments)[0], show_progress=False)
        trainer.train()
    rows = map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())
    return seen, [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("micro", [4, 1])
def test_mirrored_pairs_are_the_same_sequence_and_the_data_moves_half_as_fast(small, monkeypatch, micro):
    small = [*small, "--train.dtype", "fp32", "--train.micro_batch", str(micro), "--model.dropout", "0"]
    seen, losses = run(
        [*small, "--diffusion.counts", "uniform", "--diffusion.mirror", "true", "--run.name", "mirror"], monkeypatch
    )
    plain, _ = run([*small, "--run.name", "plain"], monkeypatch)
    tokens, noisy = (torch.cat(parts) for parts in zip(*((t, m.noisy) for t, m, _, _ in seen), strict=True))
    assert torch.equal(tokens[::2], tokens[1::2])
    assert torch.equal(tokens[::2], torch.cat([t for t, *_ in plain])[: len(tokens) // 2])
    hidden = noisy != tokens
    assert (hidden[::2] ^ hidden[1::2]).all()
    whole, same = run(
        [
            *small,
            "--diffusion.counts",
            "uniform",
            "--diffusion.mirror",
            "true",
            "--run.name",
            "whole",
            "--train.micro_batch",
            "4",
        ],
        monkeypatch,
    )
    assert torch.equal(noisy, torch.cat([m.noisy for _, m, _, _ in whole])) and losses == pytest.approx(same, rel=1e-4)


def test_weights_and_law_follow_the_progress_of_the_run(small, monkeypatch):
    law = [
        "--diffusion.counts",
        "bell",
        "--diffusion.counts_anneal_from",
        "0.5",
        "--diffusion.ce_until",
        "0.75",
        "--diffusion.weighting",
        "uniform",
    ]
    seen, _ = run([*small, *law], monkeypatch)
    assert [progress for _, _, progress, _ in seen] == [step / 12 for step in range(12)]
    for step, (tokens, masked, _, _) in enumerate(seen):
        if step < 9:  # 0.75 of 12 steps: a plain mean over what is hidden
            torch.testing.assert_close(masked.weights, torch.full_like(masked.weights, tokens.numel() / len(masked.rows)))
        else:
            assert len(masked.weights.unique()) > 1
