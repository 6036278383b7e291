"""What goes wrong on one rank, as its user meets it: through torchrun and the train door."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from atat_fast import cli
from atat_fast.runs import checkpoint
from atat_fast.runs import folder as run_folder
from atat_fast.training.trainer import Trainer

RUN = [
    "--train.dtype", "fp32", "--model.dropout", "0.1", "--optim.name", "adamw", "--train.log_every", "1", "--eval.every", "12",
    "--train.checkpoint_every", "2", "--train.keep", "2", "--sample.num_samples", "0", "--run.name", "it",
]  # fmt: skip
FSDP = ["--parallel.mode", "fsdp"]
DDP = ["--parallel.mode", "ddp"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine takes its time


def rows(folder, kind="train"):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if row["kind"] == kind]


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)]


def said(text):
    return [line for line in text.splitlines() if line.startswith(("error: ", "SIG"))]


@pytest.fixture(scope="module")
def stops(tmp_path_factory, small_at, torchrun):
    """The folder of three runs of two ranks: `whole`, which nothing happens to, `poisoned` and `full`."""
    folder = tmp_path_factory.mktemp("stops")
    names = ("whole", "poisoned", "full")
    plans = [json.dumps([*small_at(folder), *RUN, *(DDP if name == "poisoned" else FSDP), "--run.name", name]) for name in names]
    done = torchrun(2, "stops", *plans)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("training into") == 3  # rank 0 alone speaks
    return folder / "runs"


def test_killed_ranks_start_again_where_the_last_checkpoint_is(small, tmp_path, torchrun, stops):
    """kill -9 in the middle of a step, then in the middle of a checkpoint; the launcher starts the ranks again each time."""
    done = torchrun(2, "door_killed", *small, *RUN, *FSDP, restarts=3)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / "it"
    begun = [line.split(" at step ")[1].split(":")[0] for line in done.stdout.splitlines() if line.startswith("resuming")]
    assert begun[-1] == "6" and set(begun[:-1]) <= {"2"}  # step 2's may not have been whole when rank 1 was killed in step 4
    assert len(begun) + done.stdout.count("training into") == 3
    assert (
        "rank 0 stops: it lost contact with another rank" in done.stderr
        and "Traceback" not in done.stderr.split("torch/distributed/run.py")[0]
    )
    assert losses(folder) == losses(stops / "whole")
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"last", "best", "step-00000012"} <= names and not [n for n in names if n.startswith(".")]
    assert checkpoint.find(folder).step == 12


def test_a_full_disk_is_a_sentence_and_the_checkpoint_before_stays(stops):
    """The sentence, the same on all ranks, is looked at where it is raised."""
    folder = stops / "full"
    saved = checkpoint.find(folder)
    assert saved.step == 6 and (folder / "checkpoints" / "last").resolve() == saved.path
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]


def test_nan_on_one_rank_stops_all_and_the_last_good_checkpoint_stays(stops):
    assert checkpoint.find(stops / "poisoned").step == 4
    assert [row["step"] for row in rows(stops / "poisoned")] == [1, 2, 3, 4]


def test_sigterm_saves_and_the_run_goes_on(small, tmp_path, torchrun_started):
    """As a scheduler does it: to the launcher, which tells the ranks."""
    folder = tmp_path / "runs" / "it"
    long = [*small, *RUN, *DDP, "--train.max_steps", "4000", "--eval.every", "4000", "--train.checkpoint_every", "0"]
    process = torchrun_started(2, *long)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not rows(folder):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (sentence,) = said(err)
    assert sentence.startswith("SIGTERM: saved ") and sentence.endswith("; add --resume to continue")
    saved = checkpoint.find(folder)
    assert 0 < saved.step < 4000 and f"at step {saved.step:,};" in sentence and out.count("training into") == 1
    config, _ = cli.parse_config(cli.make_parser(), [a for a in long if a not in DDP])
    trainer = Trainer(config, resume=True, show_progress=False)
    assert trainer.state.step == saved.step and rows(folder)[-1]["step"] <= saved.step
    trainer.close()


def test_a_rank_that_hangs_is_named(small, torchrun):
    begin = time.monotonic()
    done = torchrun(
        2, "door_hung", *small, *RUN, *FSDP, "--parallel.timeout", "8"
    )  # less, and a busy machine is slower than that
    assert done.returncode != 0 and time.monotonic() - begin < 400
    sentences = said(done.stderr)
    assert len(sentences) == 1, done.stderr
    assert sentences[0].startswith(
        "error: rank 1 has not moved for 8 seconds (parallel.timeout): last seen reading a batch, step 4,"
    )


def test_ranks_that_differ_are_refused(small, tmp_path, torchrun, monkeypatch):
    for i, name in enumerate(("host0", "host1")):
        (tmp_path / name).mkdir()
        lines = [f'{{"text": "document {n} of host {i} {"word " * 40}"}}\n' for n in range(40)]
        (tmp_path / name / "text.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    done = torchrun(2, "refusals", *small, *RUN)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tmp_path / "runs").exists() and "training into" not in done.stdout


def test_bad_input_is_said_once_and_all_ranks_leave_with_status_2(small, tmp_path, torchrun):
    done = torchrun(2, "door_plain", *small, *RUN, "--train.global_batch", "3")
    assert said(done.stderr) == ["error: train.global_batch 3 does not divide into 2 ranks; try 2 or 4"]
    assert done.stderr.count("exitcode  : 2") == 2 and not (tmp_path / "runs").exists()  # torchrun's own list


def test_two_jobs_on_one_run_and_a_lock_that_ends_with_its_holder(small, tmp_path):
    """The second is refused while the first lives, and goes on from its checkpoint once that was killed."""
    folder = tmp_path / "runs" / "it"
    command = [sys.executable, "-m", "atat_fast.train", *small, *RUN, "--train.max_steps", "100000", "--eval.every", "100000"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and first.poll() is None and not (folder / "checkpoints" / "last").exists():
            time.sleep(0.05)
        second = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"{folder} is in use: another training run writes there" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    run_folder.lock(folder).release()
    assert checkpoint.find(folder).step > 0
