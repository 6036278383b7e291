"""Two cards train like one: the train door under torchrun, with nccl. tests/training/test_parallel.py is its twin on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_losses_on_two_cards_are_those_of_one(mode, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    settings = [
        "--model.dim", "64", "--model.layers", "2", "--model.length", "64", "--train.max_steps", "10", "--train.log_every", "1",
        "--train.global_batch", "8", "--train.dtype", "fp32", "--optim.name", "adamw", "--eval.every", "10",
        "--eval.sequences", "16", "--sample.num_samples", "0", "--run.root", str(tmp_path), "--run.tensorboard", "false",
    ]  # fmt: skip
    losses = []
    for cards, how in ((1, "none"), (2, mode)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"]
        command += ["-m", "atat_fast.train", *settings, "--parallel.mode", how, "--run.name", str(cards)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = [json.loads(line) for line in (tmp_path / str(cards) / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
