"""The commands as a user meets them: settings, help, and one sentence for whatever can be put right."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch
import yaml

from atat_fast import evaluate, sample, train
from atat_fast.cli import make_parser, parse_config
from atat_fast.config import Config, load_preset, preset_names, to_dict
from atat_fast.errors import nearest
from atat_fast.sampling.samplers import SAMPLERS


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """An empty folder, which commands write to if they are told nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATAT_FAST_CACHE", str(tmp_path / "cache"))


def settings(*arguments):
    parser = make_parser()
    for flag in ("--resume", "--dry_run"):
        parser.add_argument(flag, action="store_true")
    return parse_config(parser, arguments)[0]


def test_every_preset_is_its_file_over_the_defaults():
    sizes, ways = {"tiny", "small", "medium", "large"}, {"demo", "plain", "atat", "block"}
    assert set(preset_names()) == sizes | ways | {"wikitext103", "openwebtext"}
    for name in preset_names():
        assert settings("--preset", name) == load_preset(name)
    assert settings() == load_preset("demo")


@pytest.mark.parametrize(("name", "steps", "every"), [("wikitext103", 50_000, 5_000), ("openwebtext", 500_000, 10_000)])
def test_the_seeds_two_runs(name, steps, every):
    config = load_preset(name)
    assert (config.model.dim, config.model.layers, config.model.heads, config.model.length) == (768, 12, 12, 1024)
    assert (config.optim.lr, config.optim.ema, config.optim.weight_decay) == (1e-4, 0.9999, 0.01)
    assert config.train.global_batch == 24 and config.model.dropout == 0.1
    assert (config.train.max_steps, config.eval.every) == (steps, every)


def test_files_lie_over_presets_and_options_over_files_and_options_may_be_lists(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {length: 512}\ntrain: {seed: 9, max_steps: 7}\n")
    got = settings("--preset", "small", "--config", "mine.yaml", "--train.max_steps", "11", "--model.time_conditioning", "true")
    assert (got.model.dim, got.model.length, got.train.seed, got.train.max_steps) == (768, 512, 9, 11)
    assert got.model.time_conditioning is True
    words = ("--curriculum.levels", "[0.0, 2.0]", "--curriculum.boundaries", "[0.5]", "--curriculum.phases", "[a, b]")
    got = settings("--preset", "atat", *words).curriculum
    assert (got.levels, got.boundaries, got.phases) == ([0.0, 2.0], [0.5], ["a", "b"])


def printed(capsys, *arguments):
    """What train says before it leaves."""
    with pytest.raises(SystemExit) as left:
        train.main(arguments)
    assert not left.value.code
    return capsys.readouterr().out


def test_print_config_is_a_config_file(tmp_path, capsys):
    options = ("--preset", "tiny", "--train.seed", "5")
    text = printed(capsys, *options, "--print_config")
    (tmp_path / "all.yaml").write_text(text)
    assert settings("--config", "all.yaml") == settings(*options)
    groups = to_dict(Config())
    assert {k: v for k, v in yaml.safe_load(text).items() if k in groups} == to_dict(settings(*options))


def test_help_names_every_setting(capsys):
    text = printed(capsys, "--help")
    groups = [f"--{group}.{name}" for group, names in to_dict(Config()).items() if isinstance(names, dict) for name in names]
    assert len(groups) > 50
    for option in ("--preset", "--resume", "--dry_run", "--print_config", *groups):
        assert option in text, option
    assert "Width D of the residual stream" in text


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("small", ["parameters   169,627,218", "24 sequences = 24,576 tokens a step", "memory       about", "(estimate)"]),
        ("atat", [" parameters", "% of a step's work", "rho 0.5"]),
        ("wikitext103", ["1,906,177 parameters", "% of a step's work", "rho 0.5"]),
    ],
)
def test_a_dry_run_prints_the_plan_and_touches_nothing(preset, expected, tmp_path, capsys):
    assert train.main(["--preset", preset, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in expected), text
    for part in ("estimator", "masking", "loss", "curriculum"):
        on = preset != "small" and (preset, part) != ("atat", "loss")  # whose weights are ce
        assert bool(re.search(rf"^(atat)? +{part} +on ", text, re.MULTILINE)) == on, part
    assert preset != "small" or "atat         off" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_the_parts_that_see_masks_only(capsys):
    assert (
        train.main(["--dry_run", "--diffusion.spread", "-0.5", "--diffusion.gap_power", "0.5", "--curriculum.kind", "linear"])
        == 0
    )
    text = capsys.readouterr().out
    assert "atat         masking    on   0.5 of the sequences hide one span\n" in text
    assert "             loss       on   tokens weigh (expected loss of their gap)^-0.5\n" in text
    assert "             curriculum on   linear: " in text


def test_a_dry_run_says_what_is_biased(capsys):
    assert train.main(["--preset", "atat", "--importance.sees", "clean", "--diffusion.weighting", "ce", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "note: importance.sees clean lets masks depend on the tokens they hide" in text
    assert "loss       off  ce: importance is not asked" in text


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
    (["--preset", "atat", "--diffusion.spread", "1"], "diffusion.spread 1.0 hides tokens wherever they lie, and importance"),
    (["--preset", "atat", "--importance.rho", "0"], "importance.rho must be above 0 and at most 1, got 0"),
    (["--preset", "atat", "--importance.tilt", "50"], "beyond 40, where fp32 keys"),
    (["--preset", "atat", "--curriculum.boundaries", "[0.7, 0.3]"], "curriculum.boundaries [0.7, 0.3] are out of order"),
    (["--preset", "atat", "--curriculum.kind", "adaptive", "--eval.every", "500"], "make eval.every 124 or less"),
    (["--diffusion.spread", "2"], "diffusion.spread 2.0 times the curriculum's level 1 is no chance"),
    (
        ["--preset", "plain", "--diffusion.counts", "learned", "--diffusion.masking", "bernoulli"],
        "diffusion.counts learned and diffusion.mirror false need",
    ),
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
    (["--data.corpus", "none.txt"], "holds no text"),
    (["--data.corpus", "one.txt"], "tokens"),
    (["--data.corpus", "three.txt"], "tokens"),
    (["--data.corpus", "latin.txt"], "UTF-8"),
]
FILES = {
    "file": b"", "none.txt": b"", "one.txt": b"One document only, and not much of it.", "latin.txt": b"\xff\xfe broken",
    "three.txt": b"a\n<|endoftext|>\nb\n<|endoftext|>\nc",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, refused):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert message in refused(train.main, *arguments)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_a_run_is_refused_and_a_home_folder_is_found(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("kept\n")
    for root in ("runs", "~/runs"):
        assert "already holds a run; add --resume" in refused(train.main, f"--run.root={root}", "--run.name=mine")
        assert (folder / "metrics.jsonl").read_text() == "kept\n" and len(list(folder.iterdir())) == 1
    assert "mine/config.yaml cannot be read" in refused(train.main, "--run.root=~/runs", "--run.name=mine", "--resume")


@pytest.mark.parametrize("main", [evaluate.main, sample.main])
def test_runs_that_are_not_there_are_one_sentence(main, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"there is no run folder {tmp_path}/gone" in refused(main, "--run=~/gone")
    assert "holds no checkpoint" in refused(main, "--run", tmp_path)
    assert "--run" in refused(main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "options"),
    [("train", "--preset=smal"), *(pytest.param(name, "--run=gone", marks=pytest.mark.slow) for name in ("evaluate", "sample"))],
)
def test_a_command_leaves_with_status_2_from_a_fresh_directory(module, options, tmp_path, python):
    done = python("-m", f"atat_fast.{module}", options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_processes_that_cannot_find_each_other_are_refused_in_a_sentence(monkeypatch, refused):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(train.main)
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set" in said and "start them with torchrun" in said


def test_importing_a_command_imports_nothing_heavy(python):
    code = """
import sys
import atat_fast.cli, atat_fast.train
assert not {"torch", "datasets"} & set(sys.modules)
import atat_fast.report
assert "matplotlib" not in sys.modules
import atat_fast.data
assert not {"datasets", "huggingface_hub", "pyarrow"} & set(sys.modules)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


MAPPED_BY_A_LARGE_TENSOR = """
import ctypes
from atat_fast.cli import run_command

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def command(arguments):
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    libc.malloc.restype = ctypes.c_void_p
    before = libc.mallinfo2().hblkhd
    libc.malloc(ctypes.c_size_t(64 << 20))
    print(libc.mallinfo2().hblkhd - before >= 64 << 20)
    return 0

run_command(command)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.parametrize(("arranged", "mapped"), [({}, "False\n"), ({"MALLOC_ARENA_MAX": "2"}, "True\n")])
def test_commands_keep_freed_memory_unless_the_user_arranged_it(arranged, mapped, python, monkeypatch):
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD")):
            monkeypatch.delenv(name)
    assert python("-c", MAPPED_BY_A_LARGE_TENSOR, **arranged).stdout == mapped


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
def test_how_a_command_leaves(body, out, status, said):
    code = f"def command(_):\n    {body}\n    return 0\nrun_command(command)"
    code = f"import os, signal, sys, time\nfrom atat_fast.cli import run_command\n{code}"
    env = os.environ | ({"PYTHONIOENCODING": "ascii"} if out == "ascii" else {})
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        target = {"/dev/full": full, "closed pipe": write}.get(out, subprocess.PIPE)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, env=env, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout == (None if target != subprocess.PIPE else "? ? ?\n" if "print" in body else "")


def test_only_a_word_that_is_close_is_suggested():
    close = {"ddpm": "ddpm_cache", "entropi": "entropy", "low_confidence": "confidence"}
    for word in (*close, "topk", "maskgit", "x"):
        assert nearest(word, ("auto", *SAMPLERS)) == (f" (did you mean {close[word]}?)" if word in close else "")
