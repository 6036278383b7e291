"""Two cards train like one: the train command under torchrun, with nccl. tests/training/test_parallel.py is its twin on CPUs.

One card shows what is set up for it.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch

from atat_fast.hardware.devices import grow_segments

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


@pytest.mark.gpu
def test_a_checkpoint_opens_no_second_context_and_ranks_without_peers_say_so(tmp_path, torchrun_started, arguments, rows, until):
    """The thread that writes shards stays on its rank's card: every card has one process."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    nvml = pytest.importorskip("pynvml")
    own = {
        "parallel.mode": "fsdp",
        "run.root": tmp_path,
        "run.name": "it",
        "train.checkpoint_every": 2,
        "train.max_steps": 100_000,
    }
    process = torchrun_started(2, *arguments(SETTINGS, own, {"train.max_steps": 100_000, "eval.every": 100_000}))
    until(lambda: rows(tmp_path / "it", "checkpoint"), process)
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(card) for card in range(2)]
    holders = [{p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)} - {os.getpid()} for handle in handles]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert "SIGTERM: saved" in err, err[-4000:]
    assert not holders[0] & holders[1], holders
    peers = torch.cuda.can_device_access_peer(0, 1)
    assert ("NCCL_P2P_DISABLE=1" in out) <= (not peers)


@pytest.mark.gpu
def test_segments_of_memory_grow(card):
    torch.cuda.empty_cache()
    grow_segments(card)
    kept = torch.empty(64 << 20, dtype=torch.uint8, device=card)
    found = [segment for segment in torch.cuda.memory_snapshot() if segment["address"] <= kept.data_ptr()]
    assert any(segment.get("is_expandable") for segment in found)
