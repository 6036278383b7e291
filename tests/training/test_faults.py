"""What goes wrong on one rank, as its user meets it: through torchrun and the train command."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import torch

from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder

KILLS = int(os.environ.get("ATAT_FAST_KILLS", "1"))
"""How often a rank is killed in the middle of a step, and how often in the middle of a save."""
STEPS = 2 + 10 * KILLS
RUN = {
    "train.dtype": "fp32", "model.dropout": 0.1, "optim.name": "adamw", "train.log_every": 1, "train.max_steps": STEPS,
    "eval.every": STEPS,
    "train.checkpoint_every": 2, "train.keep": 2, "sample.num_samples": 0, "run.name": "it",
}  # fmt: skip
DDP, FSDP = RUN | {"parallel.mode": "ddp"}, RUN | {"parallel.mode": "fsdp"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine takes its time


def said(text):
    return [line for line in text.splitlines() if line.startswith(("error: ", "SIG"))]


@pytest.fixture(scope="module")
def stops(tmp_path_factory, small_at, forked, arguments):
    """The folder of three runs of two ranks: `whole`, which nothing happens to, `poisoned` and `full`."""
    folder = tmp_path_factory.mktemp("stops")
    plans = [(FSDP, "whole"), (DDP, "poisoned"), (FSDP, "full")]
    done = forked(2, "stops", *(json.dumps(arguments(small_at(folder), how | {"run.name": name})) for how, name in plans))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("training into") == 3  # rank 0 alone speaks
    return folder / "runs"


def test_killed_ranks_start_again_where_the_last_checkpoint_is(small, arguments, tmp_path, torchrun, stops, rows):
    """kill -9 in the middle of steps, then in the middle of checkpoints; the launcher starts the ranks again each time."""
    done = torchrun(2, "command_killed", KILLS, *arguments(small, FSDP), restarts=2 * KILLS)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / "it"
    starts = [line for line in done.stdout.splitlines() if line.startswith(("training into", "resuming"))]
    begun = [int(line.split(" at step ")[1].split(":")[0]) for line in starts if line.startswith("resuming")]
    assert len(starts) == 2 * KILLS + 1 and begun == sorted(begun) and begun[-1] >= 2 * KILLS  # every second step is saved
    assert done.stderr.count("stops: it lost contact with another rank") >= KILLS
    assert "Traceback" not in done.stderr.split("torch/distributed/run.py")[0]
    a, b = (rows(path, "train", "step", "loss", "grad_norm") for path in (folder, stops / "whole"))
    assert a == b and len(a) == STEPS
    names = set(os.listdir(folder / "checkpoints"))
    assert {"last", "best", f"step-{STEPS:08d}"} <= names and not [n for n in names if n.startswith(".")]
    mine, whole = (checkpoint.find(path).tensors(checkpoint.OPTIMIZER) for path in (folder, stops / "whole"))
    assert all(torch.equal(mine[name], value) for name, value in whole.items())


def test_after_a_full_disk_or_nan_on_one_rank_the_last_good_checkpoint_stays(stops, rows):
    """The sentence, the same on all ranks, is looked at where it is raised."""
    saved = checkpoint.find(stops / "full")
    assert saved.step == 6 and (stops / "full" / "checkpoints" / "last").resolve() == saved.path
    assert not [name for name in os.listdir(stops / "full" / "checkpoints") if name.startswith(".")]
    assert checkpoint.find(stops / "poisoned").step == 4
    assert rows(stops / "poisoned", "train", "step") == [[1], [2], [3], [4]]


def test_sigterm_saves_and_the_run_goes_on(small, arguments, tmp_path, torchrun_started, trainer, rows, until):
    """As a scheduler does it: to the launcher, which tells the ranks."""
    folder, long = tmp_path / "runs" / "it", {"train.max_steps": 4000, "eval.every": 4000, "train.checkpoint_every": 0}
    process = torchrun_started(2, *arguments(small, DDP, long))
    until(lambda: rows(folder, "train"), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    (sentence,) = said(err)
    assert process.returncode != 0 and sentence.startswith("SIGTERM: saved ") and sentence.endswith("; add --resume to continue")
    saved = checkpoint.find(folder)
    assert 0 < saved.step < 4000 and f"at step {saved.step:,};" in sentence and out.count("training into") == 1
    made = trainer(small, RUN, long, resume=True)
    assert made.state.step == saved.step and rows(folder, "train")[-1]["step"] <= saved.step
    made.close()


def hung(folder):
    """What each of two ranks was doing, and the names of the collectives that it began and did not end."""
    found = [json.loads((folder / "hang" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    begun = [[c for c in rank["collectives"]["fr"]["entries"] if not c["retired"]] for rank in found]
    return found, [[c["profiling_name"] for c in some] for some in begun]


def test_a_rank_that_hangs_is_named_and_each_leaves_what_it_was_doing(small, arguments, torchrun, tmp_path):
    begin = time.monotonic()
    done = torchrun(2, "command_hung", *arguments(small, FSDP, {"parallel.timeout": 8}))  # less, and a busy machine is slower
    assert done.returncode != 0 and time.monotonic() - begin < 400
    (sentence,) = said(done.stderr)
    assert sentence.startswith("error: rank 1 has not moved for 8 seconds (parallel.timeout): last seen reading a batch, step 4,")
    (waits, hangs), begun = hung(tmp_path / "runs" / "it")
    assert str(tmp_path / "runs" / "it" / "hang") in sentence
    assert "in hang" in hangs["stack"][-1] and hangs["doing"] == "reading a batch" and hangs["step"] == waits["step"] == 3
    assert waits["doing"] == "in the forward and backward pass" and begun[0] and not begun[1]


def test_sigterm_ends_a_run_that_hangs_in_a_collective(small, arguments, case_started, tmp_path, until):
    """Long before parallel.timeout, and before the launcher loses patience and kills: the sentence shows it."""
    process = case_started(2, "command_hung", *arguments(small, DDP))
    line = iter(process.stdout)
    assert any("rank 1 hangs" in text for text in line)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    (sentence,) = said(err)
    assert process.returncode != 0 and sentence.startswith("SIGTERM: not saved, for rank ")
    assert sentence.endswith("add --resume to go on from the last checkpoint")
    _, begun = hung(tmp_path / "runs" / "it")
    assert begun[0] and not begun[1]
    assert checkpoint.find(tmp_path / "runs" / "it").step == 2


@pytest.mark.parametrize("how", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_rank_that_raises_ends_the_run_with_its_own_traceback(small, arguments, torchrun, how):
    done = torchrun(2, "command_raised", *arguments(small, how, {"parallel.timeout": 600}))
    ours = done.stderr.split("<frozen runpy>")[0]  # before the launcher's own
    assert done.returncode != 0 and ours.count("LookupError: broken on purpose") == 1 and "RuntimeError" not in ours
    assert "rank 1 failed, which ends the run" in ours and "rank 0 stops: it lost contact with another rank" in ours


def test_ranks_that_differ_are_refused(small, arguments, tmp_path, forked, monkeypatch):
    for i, name in enumerate(("host0", "host1")):
        (tmp_path / name).mkdir()
        lines = [f'{{"text": "document {n} of host {i} {"word " * 40}"}}\n' for n in range(40)]
        (tmp_path / name / "text.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    done = forked(2, "refusals", *arguments(small, RUN))
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tmp_path / "runs").exists() and "training into" not in done.stdout


def test_ranks_that_share_no_run_folder_are_refused_before_the_first_step(small, arguments, tmp_path, torchrun):
    for name in ("host0", "host1"):
        (tmp_path / name).mkdir()
    done = torchrun(2, "command_apart", tmp_path, *arguments(small, RUN, {"run.root": "runs"}))
    (sentence,) = said(done.stderr)
    assert "is not the folder that rank 0 writes to; give a --run.root that all hosts share" in sentence
    assert str(tmp_path / "host1" / "runs") in sentence and "step" not in done.stdout
    assert not list((tmp_path / "host0").rglob("checkpoints")) and not list((tmp_path / "host0").rglob(".seen*"))


def test_bad_input_is_said_once_and_no_rank_leaves_with_another_status(small, arguments, tmp_path, torchrun):
    done = torchrun(2, "command", *arguments(small, RUN, {"train.global_batch": 3}))
    assert said(done.stderr) == ["error: train.global_batch 3 does not divide into 2 ranks; try 2 or 4"]
    codes = re.findall(r"exitcode  : (-?\d+)", done.stderr)  # torchrun's list; it ends a rank that is still starting with SIGTERM
    assert len(codes) == 2 and "2" in codes and set(codes) <= {"2", "-15"} and not (tmp_path / "runs").exists()


def test_two_jobs_on_one_run_and_a_lock_that_ends_with_its_holder(small, arguments, tmp_path, python, python_started, until):
    """The second is refused while the first lives, and goes on from its checkpoint once that was killed."""
    folder = tmp_path / "runs" / "it"
    command = arguments("-m", "atat_fast.train", small, RUN, {"train.max_steps": 100_000, "eval.every": 100_000})
    first = python_started(*command)
    try:
        until((folder / "checkpoints" / "last").exists, first)
        second = python(*command, "--resume")
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"{folder} is in use: another training run writes there" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    run_folder.lock(folder).release()
    assert checkpoint.find(folder).step > 0
