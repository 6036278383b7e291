"""The command-line doors as a user meets them: settings, help, and one sentence for whatever can be put right."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atat_fast import evaluate, sample, train
from atat_fast.cli import make_parser, parse_config, run_door
from atat_fast.config import Config, load_preset, preset_names, to_dict
from atat_fast.errors import UsageError, nearest


def door(*arguments, module="train", cwd):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", f"atat_fast.{module}", *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
    )


def settings(*arguments) -> Config:
    parser = make_parser()
    for flag in ("--resume", "--dry_run"):
        parser.add_argument(flag, action="store_true")
    return parse_config(parser, arguments)[0]


def test_every_preset_is_its_file_over_the_defaults():
    assert set(preset_names()) == {"demo", "tiny", "small", "medium", "large", "wikitext103", "openwebtext", "atat", "plain"}
    for name in preset_names():
        assert settings("--preset", name) == load_preset(name)
    assert settings() == load_preset("demo")


def test_the_seeds_two_runs():
    first, second = load_preset("wikitext103"), load_preset("openwebtext")
    for config in (first, second):
        assert (config.model.dim, config.model.layers, config.model.heads, config.model.length) == (768, 12, 12, 1024)
        assert (config.optim.lr, config.optim.ema, config.optim.weight_decay) == (1e-4, 0.9999, 0.01)
        assert config.train.global_batch == 24 and config.model.dropout == 0.1
    assert (first.train.max_steps, first.eval.every) == (50_000, 5_000)
    assert (second.train.max_steps, second.eval.every) == (500_000, 10_000)


def test_files_lie_over_presets_and_options_over_files(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {length: 512}\ntrain: {seed: 9, max_steps: 7}\n")
    got = settings("--preset", "small", "--config", str(file), "--train.max_steps", "11", "--model.time_conditioning", "true")
    assert (got.model.dim, got.model.length, got.train.seed, got.train.max_steps) == (768, 512, 9, 11)
    assert got.model.time_conditioning is True


def test_print_config_is_a_config_file(tmp_path):
    printed = door("--preset", "tiny", "--train.seed", "5", "--print_config", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    file = tmp_path / "all.yaml"
    file.write_text(printed.stdout)
    assert settings("--config", str(file)) == settings("--preset", "tiny", "--train.seed", "5")
    groups = {k: v for k, v in yaml.safe_load(printed.stdout).items() if k in to_dict(Config())}
    assert groups == to_dict(settings("--preset", "tiny", "--train.seed", "5"))


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    done = door("--preset", "small", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters   169,627,218" in done.stdout and "24 sequences = 24,576 tokens a step" in done.stdout
    assert "memory       about" in done.stdout and "(estimate)" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["wikitext103", "openwebtext", "atat"])
def test_dry_run_lists_every_part_of_atat(preset, capsys):
    assert train.main(["--preset", preset, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for part in ("estimator", "masking", "loss", "curriculum"):
        assert re.search(rf"^(atat)? +{part} +on ", printed, re.MULTILINE), part
    assert " parameters, " in printed and "% of a step's work" in printed and "rho 0.5" in printed
    if preset != "atat":
        assert "1,906,177 parameters" in printed


def test_dry_run_says_what_is_off_and_what_is_biased(capsys):
    assert train.main(["--dry_run"]) == 0
    assert "atat         off" in capsys.readouterr().out
    assert train.main(["--preset", "atat", "--importance.sees", "clean", "--diffusion.weighting", "ce", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "note: importance.sees clean lets masks depend on the tokens they hide" in printed
    assert "loss       off  ce: importance is not asked" in printed


def test_lists_come_from_the_command_line():
    got = settings("--preset", "atat", "--curriculum.levels", "[0.0, 2.0]", "--curriculum.boundaries", "[0.5]",
                   "--curriculum.phases", "[a, b]").curriculum  # fmt: skip
    assert (got.levels, got.boundaries, got.phases) == ([0.0, 2.0], [0.5], ["a", "b"])


def test_help_names_every_setting(tmp_path):
    done = door("--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--preset", "--resume", "--dry_run", "--model.dim", "--optim.warmup", "--run.name", "--print_config"):
        assert option in done.stdout
    assert "Width D of the residual stream" in done.stdout


BAD = [
    (["--preset", "smal"], "there is no preset 'smal' (did you mean small?)"),
    (["--modle.dim", "3"], "there is no setting --modle.dim (did you mean --model.dim?)"),
    (["--model.dimm", "3"], "there is no setting --model.dimm (did you mean --model.dim?)"),
    (["--seed", "3"], "there is no setting --seed (did you mean --train.seed or --eval.seed?)"),
    (["--model.dim", "three"], "model.dim"),
    (["--optim.name", "adam"], "adamw"),
    (["--train.global_batch", "24", "--train.micro_batch", "5"], "train.global_batch 24 does not divide into micro-batches of 5"),
    (["--train.max_steps", "0"], "train.max_steps must be at least 1"),
    (["--diffusion.weighting", "importance"], "diffusion.weighting importance needs scores and importance.source is none"),
    (["--importance.source", "learned", "--importance.rho", "0"], "importance.rho must be above 0 and at most 1, got 0"),
    (["--importance.source", "learned", "--importance.tilt", "50"], "beyond 40, where fp32 keys"),
    (["--preset", "atat", "--curriculum.boundaries", "[0.7, 0.3]"], "curriculum.boundaries [0.7, 0.3] are out of order"),
    (["--preset", "atat", "--curriculum.kind", "adaptive", "--eval.every", "500"], "make eval.every 124 or less"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--data.corpus", "wikitext13"], "did you mean wikitext103"),
    (["--data.corpus", "wikitext2", "--data.tokenizer", "bytes"], "wikitext2"),
    (["--data.corpus", "nowhere.txt"], "nowhere.txt"),
    (["--data.tokenizer", "bpe-10"], "bpe-10"),
    (["--run.name", "a/b"], "is not a folder name"),
    (["--resume"], "to resume"),
    (["--train.device", "cuda"], "--train.device is cuda, but torch sees no CUDA device here; use --train.device cpu"),
    (["--run.root", "file/inside"], "cannot write to file/inside"),
    (["--train.seed", "99999999999999999999"], "train.seed is 99999999999999999999; give a whole number from 0"),
    (["--eval.seed", "-1"], "eval.seed is -1; give a whole number from 0 to 9223372036854775807"),
    (["--sample.steps", "10000000000"], "sample.steps is 10,000,000,000"),
    (["--sample.steps", "0"], "sample.steps must be at least 1, got 0"),
    (["--sample.temperature", "-1"], "temperature must be at least 0 and finite, got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATAT_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    with pytest.raises(SystemExit) as left:
        run_door(train.main, arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no text"),
        ("One document only, and not much of it.", "tokens"),
        ("a\n<|endoftext|>\nb\n<|endoftext|>\nc", "tokens"),
        (b"\xff\xfe broken", "UTF-8"),
    ],
)
def test_corpora_that_cannot_be_used(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "text.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        train.main(["--data.corpus", str(file), "--data.cache_dir", str(tmp_path / "cache")])
    assert not (tmp_path / "runs").exists()


def test_a_named_folder_that_holds_a_run_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("kept\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="already holds a run; add --resume"):
        train.main(["--run.name", "mine"])
    assert (folder / "metrics.jsonl").read_text() == "kept\n" and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("main", [evaluate.main, sample.main])
def test_runs_that_are_not_there(main, tmp_path):
    with pytest.raises(UsageError, match="there is no run folder"):
        main(["--run", str(tmp_path / "nothing")])
    with pytest.raises(UsageError, match="holds no checkpoint"):
        main(["--run", str(tmp_path)])


def test_the_doors_leave_with_status_2_from_a_fresh_directory(tmp_path):
    for module, arguments in (
        ("train", ["--preset", "smal"]),
        ("evaluate", ["--run", "nothing"]),
        ("sample", ["--run", "nothing"]),
        ("evaluate", []),
    ):
        done = door(*arguments, module=module, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_processes_that_cannot_find_each_other_are_refused_in_a_sentence(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*start them with torchrun"):
        train.main([])


def test_nothing_heavy_is_imported_by_asking_for_help():
    code = "import sys, atat_fast.cli, atat_fast.train; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.home()).returncode == 0


MAPPED_BY_A_LARGE_TENSOR = """
import ctypes
from atat_fast.cli import run_door

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def door(arguments):
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    libc.malloc.restype = ctypes.c_void_p
    before = libc.mallinfo2().hblkhd
    libc.malloc(ctypes.c_size_t(64 << 20))
    print(libc.mallinfo2().hblkhd - before >= 64 << 20)
    return 0

run_door(door)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_doors_keep_freed_memory_unless_the_user_arranged_it():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    for extra, mapped in (({}, "False"), ({"MALLOC_ARENA_MAX": "2"}, "True")):
        done = subprocess.run(
            [sys.executable, "-c", MAPPED_BY_A_LARGE_TENSOR], env=clean | extra, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == mapped


@pytest.mark.parametrize(
    ("body", "out", "status", "said"),
    [
        ("raise KeyboardInterrupt", None, 130, ""),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", None, 130, ""),
        ("open('no/such/file')", None, 2, "error: No such file or directory: no/such/file\n"),
        ("raise PermissionError(13, 'Permission denied', 'here')", None, 2, "error: Permission denied: here\n"),
        ("print('x')", "/dev/full", 2, "error: No space left on device: standard output\n"),
        ("print('x', flush=True)", "/dev/full", 2, "error: No space left on device: standard output\n"),
        ("[print('x' * 99) for _ in range(9999)]", "closed pipe", 141, ""),
        ("print('x')", "closed pipe", 141, ""),
        ("print('± \\u6f22 \\ud800')", "ascii", 0, ""),
        ("sys.exit('± \\ud800')", "ascii", 1, "? ?\n"),
    ],
)
def test_how_a_door_leaves(body, out, status, said):
    code = "import os, signal, sys, time\nfrom atat_fast.cli import run_door\ndef door(_):\n    {}\n    return 0\nrun_door(door)"
    env = os.environ | ({"PYTHONIOENCODING": "ascii"} if out == "ascii" else {})
    read, write = os.pipe()
    if out == "closed pipe":
        os.close(read)
    with open("/dev/full" if out == "/dev/full" else os.devnull, "w") as file:
        target = {None: subprocess.PIPE, "ascii": subprocess.PIPE, "closed pipe": write}.get(out, file)
        done = subprocess.run(
            [sys.executable, "-c", code.format(body)], stdout=target, stderr=subprocess.PIPE, env=env, text=True, timeout=60
        )
    os.close(write)
    if out != "closed pipe":
        os.close(read)
    assert (done.returncode, done.stderr) == (status, said)
    if out == "ascii" and status == 0:
        assert done.stdout == "? ? ?\n"


def test_a_home_folder_is_found_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for main, option in ((evaluate.main, "--run=~/gone"), (sample.main, "--run=~/gone")):
        with pytest.raises(UsageError, match=f"there is no run folder {tmp_path}/gone"):
            main([option])
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text("kept\n")
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(["--run.root=~/runs", "--run.name=mine"])
    with pytest.raises(UsageError, match=r"mine/config\.yaml cannot be read"):
        train.main(["--run.root=~/runs", "--run.name=mine", "--resume"])


@pytest.mark.parametrize(
    ("word", "meant"),
    [("ddpm", "ddpm_cache"), ("entropi", "entropy"), ("low_confidence", "confidence"), ("topk", ""), ("maskgit", ""), ("x", "")],
)
def test_only_a_word_that_is_close_is_suggested(word, meant):
    from atat_fast.sampling.samplers import SAMPLERS

    assert nearest(word, ("auto", *SAMPLERS)) == (f" (did you mean {meant}?)" if meant else "")
