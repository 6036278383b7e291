"""Checkpoint folders: which one is found, what is offered where one is damaged, how many stay."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from atat_fast.config import OptimConfig
from atat_fast.distributed.ranks import Launch, Ranks
from atat_fast.errors import UsageError
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.training.optimizers import Optimizers
from atat_fast.training.trainer import Trainer


@pytest.fixture
def run(small, trainer, tmp_path):
    """A run of 12 steps, a checkpoint every second one, three of them kept; its folder and a way to resume it."""
    settings = {"train.checkpoint_every": 2, "train.keep": 3, "sample.num_samples": 0, "run.name": "it"}
    trainer(small, settings).train()
    return tmp_path / "runs" / "it", lambda *more: trainer(small, settings, *more, resume=True)


def test_the_newest_stay_and_one_before_a_damaged_one_is_offered(run):
    folder, resume = run
    root = folder / checkpoint.FOLDER
    assert {"step-00000008", "step-00000010", "step-00000012"} <= {p.name for p in checkpoint.steps(root)}
    assert len(checkpoint.steps(root)) <= 4  # the best one may be another
    (root / "step-00000012" / checkpoint.EMA).write_bytes(b"cut")
    (root / "step-00000010" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"00012 is damaged: .*; .*step-00000008 \(step 8\) is whole: delete step-00000012"):
        resume()
    for name in ("step-00000012", "step-00000010"):
        shutil.rmtree(root / name)
    trainer = resume()
    assert trainer.state.step == 8
    trainer.train()
    assert checkpoint.find(folder).step == 12


def test_what_does_not_fit_or_is_in_use_is_refused_and_ranks_started_again_resume_their_own_run_alone(run):
    folder, resume = run
    settings = (folder / run_folder.SETTINGS).read_text()
    (folder / run_folder.SETTINGS).write_text(settings.replace("mlp_ratio: 4", "mlp_ratio: 3"))
    with pytest.raises(UsageError, match=r"does not fit the model: blocks.0.\S+ is \(.*\) there, and here \("):
        resume("--model.mlp_ratio=3")
    (folder / run_folder.SETTINGS).write_text(settings)
    held = run_folder.lock(folder)
    with pytest.raises(UsageError, match="is in use: another training run writes there"):
        resume()
    held.release()
    trainer = resume()
    trainer.close()
    facts = json.loads((folder / run_folder.FACTS).read_text())
    (folder / run_folder.FACTS).write_text(json.dumps(facts | {"launch": "job7@a:1"}))
    with pytest.raises(UsageError, match="already holds a run"):
        Trainer(trainer.config, show_progress=False, ranks=Ranks(Launch(restarts=1, name="job8@a:2")))
    again = Trainer(trainer.config, show_progress=False, ranks=Ranks(Launch(restarts=1, name="job7@b:9")))
    assert again.state.step == 12
    again.close()
    assert not run_folder.begun_by(folder, "none@a:3") and not run_folder.begun_by(folder, f"@a:{os.getpid()}")


def test_what_an_optimizer_keeps_comes_back_in_its_dtype(tmp_path):
    """Moments in 8 bits are codes and scales of other shapes and dtypes than their parameter."""
    kept = {"weight/step": torch.tensor(3.0), "weight/exp_avg.scale": torch.rand(2), "bias/exp_avg": torch.rand(3).bfloat16()}
    kept["weight/exp_avg.codes"] = torch.arange(12, dtype=torch.uint8).view(3, 4)
    save_file(kept, tmp_path / checkpoint.OPTIMIZER)
    saved = checkpoint.Checkpoint(tmp_path, {"format": checkpoint.FORMAT})
    room = Optimizers(torch.nn.Linear(4, 3), OptimConfig()).room(saved.layout(checkpoint.OPTIMIZER))
    saved.restore({checkpoint.OPTIMIZER: room})
    assert room.keys() == kept.keys()
    assert all(room[name].dtype is value.dtype and torch.equal(room[name], value) for name, value in kept.items())
