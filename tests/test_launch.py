"""The recipes of docs/launch, run as far as a machine without cards, Slurm or a second host can."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = ["one_card.sh", "six_cards.sh", "two_hosts.sh", "slurm.sbatch"]
QUICK = {
    "train.log_every": 1, "train.max_steps": 3, "eval.every": 1000, "eval.sequences": 8, "sample.num_samples": 0,
    "run.tensorboard": False, "model.layers": 1, "model.dim": 16, "model.heads": 2, "model.length": 32,
}  # fmt: skip

pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="the recipes are part of a checkout, and here are its tests alone")


def start(script, *arguments, cwd, **changes):
    own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | own | changes
    command, pipe = ["bash", str(LAUNCH / script), *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def end(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash_that_reads_the_settings_it_names(script):
    for checker in (["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])):
        done = subprocess.run([*checker, str(LAUNCH / script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    text = (LAUNCH / script).read_text()
    for name in re.findall(r"^# ([A-Z_]{4,}) {2,}", text, re.MULTILINE):
        assert name in text.split("set -euo pipefail")[1], f"{script} says {name} and does not read it"


def test_the_page_lists_every_recipe_and_the_container_file_copies_what_there_is_and_runs_shell():
    page = (LAUNCH / "README.md").read_text()
    assert all(file.name == "README.md" or f"({file.name})" in page for file in LAUNCH.iterdir())
    text = (LAUNCH / "Containerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied), copied
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels", "atat_fast"} <= set(copied)
    commands = re.findall(r"^RUN ((?:.+\\\n)*.+)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert subprocess.run(["bash", "-nc", command]).returncode == 0
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"ARG TORCH={pinned}" in text


def test_what_is_missing_is_said_before_anything_starts(tmp_path):
    status, _, err = end(start("two_hosts.sh", cwd=tmp_path))
    assert status != 0 and "set HEAD to host:port" in err
    status, _, err = end(start("slurm.sbatch", "--preset", "demo", cwd=tmp_path))
    assert status == 2 and "give the run a name" in err and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("script", "ranks"), [("one_card.sh", 1), ("six_cards.sh", 2)])
def test_recipes_of_one_machine_train(script, ranks, arguments, rows, tmp_path):
    command = arguments(QUICK, {"run.name": "here"})
    status, out, err = end(start(script, *command, cwd=tmp_path, CARDS=str(ranks), RESTARTS="0"))
    assert status == 0, err
    assert "val/nll" in out and rows(tmp_path / "runs" / "here", "train", "step") == [[1], [2], [3]]
    assert json.loads((tmp_path / "runs" / "here" / "run.json").read_text())["ranks"] == ranks


@pytest.mark.slow
def test_two_hosts_meet_and_train_as_one(arguments, rows, tmp_path):
    """Two launchers on loopback, each with one process, in one order and the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = {"HEAD": f"127.0.0.1:{port}", "CARDS": "1", "RESTARTS": "0", "GLOO_SOCKET_IFNAME": "lo"}
    hosts = [start("two_hosts.sh", *arguments(QUICK, {"run.name": "both"}), cwd=tmp_path, **facts) for _ in range(2)]
    ended = [end(host) for host in hosts]
    assert [status for status, *_ in ended] == [0, 0], ended
    assert json.loads((tmp_path / "runs" / "both" / "run.json").read_text())["ranks"] == 2
    assert len(rows(tmp_path / "runs" / "both", "train")) == 3
    assert sum("val/nll" in out for _, out, _ in ended) == 1  # one rank speaks


FAKES = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',  # as Slurm's, it passes a signal on: exec is the program
    "scontrol": 'echo "$@" >>"$FAKE_LOG"\nif [[ "$1" == show ]]; then echo 127.0.0.1; fi\n',
}


@pytest.mark.slow
def test_a_slurm_job_that_is_told_to_stop_saves_is_queued_again_and_goes_on(arguments, rows, until, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text("#!/usr/bin/env bash\n" + text)
        (tools / name).chmod(0o755)
    log, run = tmp_path / "scontrol.log", tmp_path / "runs" / "job"
    facts = {
        "PATH": f"{tools}:{os.environ['PATH']}", "FAKE_LOG": str(log), "SLURM_JOB_ID": str(1000 + os.getpid() % 10_000),
        "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    command = [*arguments(QUICK, {"run.root": tmp_path / "runs", "run.name": "job"}), "--train.max_steps"]
    job = start("slurm.sbatch", *command, 4000, cwd=tmp_path, **facts)
    until(lambda: len(rows(run, "train")) >= 3, job)
    job.send_signal(signal.SIGTERM)
    status, _, err = end(job)
    assert status != 0 and "SIGTERM: saved" in err
    assert f"requeue {facts['SLURM_JOB_ID']}" in log.read_text()
    stopped = rows(run, "train")[-1]["step"]
    assert 3 <= stopped < 4000 and (run / "checkpoints" / "last").exists()

    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("max_steps: 4000", f"max_steps: {stopped + 3}"))
    status, out, err = end(start("slurm.sbatch", *command, stopped + 3, cwd=tmp_path, **facts))
    assert status == 0 and "resuming" in out, err
    assert log.read_text().count("requeue") == 1
