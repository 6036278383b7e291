"""Two cards train like one: the train command under torchrun, with nccl. tests/training/test_parallel.py is its twin on CPUs."""

from __future__ import annotations

import pytest
import torch

SETTINGS = {
    "model.dim": 64, "model.layers": 2, "model.length": 64, "train.max_steps": 10, "train.log_every": 1, "train.global_batch": 8,
    "train.dtype": "fp32", "optim.name": "adamw", "eval.every": 10, "eval.sequences": 16, "sample.num_samples": 0,
    "run.tensorboard": False,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_losses_on_two_cards_are_those_of_one(mode, tmp_path, torchrun_started, arguments, rows):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    losses = []
    for cards, how in ((1, "none"), (2, mode)):
        own = {"parallel.mode": how, "run.root": tmp_path, "run.name": cards}
        process = torchrun_started(cards, *arguments(SETTINGS, own))
        _, err = process.communicate(timeout=800)
        assert process.returncode == 0, err[-4000:]
        losses.append([loss for (loss,) in rows(tmp_path / str(cards), "train", "loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
