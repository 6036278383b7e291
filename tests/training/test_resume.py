"""Runs that go on elsewhere: from a copy without links, after a kill, on another host, for longer, without their text; and runs
that begin with the weights of another.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atat_fast import cli, evaluate, push, train
from atat_fast.data import make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.runs import checkpoint
from atat_fast.training.trainer import Trainer

LEARNED = [
    "--importance.source", "learned", "--importance.width", "16", "--importance.layers", "1", "--importance.heads", "2",
]  # fmt: skip
RUN = [
    "--model.qk_norm", "false", "--model.activation", "gelu", "--model.tie_embeddings", "false", "--optim.name", "adamw",
    "--run.name", "it", "--train.checkpoint_every", "3", "--sample.num_samples", "0",
]  # fmt: skip


def trainer(arguments):
    parser = cli.make_parser()
    parser.add_argument("--resume", action="store_true")
    config, parsed = cli.parse_config(parser, arguments)
    return Trainer(config, resume=parsed.resume, show_progress=False)


def trained(arguments):
    trainer(arguments).train()


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / checkpoint.FOLDER).iterdir()}


def stopped(arguments, folder, at=6):
    """A run that was stopped after so many steps: as it was then, with its checkpoint and those before."""

    class Stopped(Exception):
        pass

    def stop(self):
        if self.state.step == at:
            raise Stopped
        step(self)

    step = Trainer._train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop)
        with pytest.raises(Stopped):
            trained(arguments)
    assert checkpoint.find(folder).step == at


def test_a_copy_that_followed_links_goes_on_from_its_newest_step(small, tmp_path):
    stopped([*small, *RUN, "--train.keep", "5"], tmp_path / "runs" / "it")
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(tmp_path / "runs" / "it", copy, symlinks=False)
    root = copy / checkpoint.FOLDER
    assert (root / "last").is_dir() and not (root / "last").is_symlink()
    assert checkpoint.find(copy).step == 6  # what only reads takes it as it is
    shutil.rmtree(root / "best")
    shutil.copytree(root / "step-00000003", root / "best")
    shutil.rmtree(root / "step-00000003")  # `best` is all that is left of it
    for _ in range(2):
        trained([*small, *RUN, "--run.name", "copy", "--resume", "--train.keep", "5"])
        assert all((root / link).is_symlink() for link in ("last", "best"))
        assert (root / "last").resolve().name == "step-00000012" and checkpoint.find(copy).step == 12
        assert {"step-00000003", "step-00000006", "step-00000012"} <= names(copy)


def test_a_file_system_without_links(small, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    stopped([*small, *RUN], tmp_path / "runs" / "it")
    trained([*small, *RUN, "--resume"])
    root = tmp_path / "runs" / "it" / checkpoint.FOLDER
    assert (root / "last").read_text() == "step-00000012\n"
    assert checkpoint.find(root / "last").step == 12 and checkpoint.find(tmp_path / "runs" / "it", "best").step in (6, 12)
    assert names(tmp_path / "runs" / "it") <= {"last", "best", "step-00000006", "step-00000012"}
    assert evaluate.main(["--run", str(root / "last"), "--sequences", "4"]) == 0


def test_what_kill_left_is_gone_after_the_next_start(small, tmp_path):
    arguments, folder = [*small, *RUN], tmp_path / "runs" / "it"
    stopped(arguments, folder)
    root = folder / checkpoint.FOLDER
    for name in (".step-00000005.99999", ".step-00000009.part", ".old-step-00000003", "step-00000004"):
        (root / name).mkdir()
        (root / name / "weights.safetensors").write_bytes(b"0" * 1000)
    (root / ".last.4711").symlink_to("step-00000003")
    (folder / ".metrics.jsonl.abc.part").touch()
    trained([*arguments, "--resume"])
    best = checkpoint.find(folder, "best").path.name
    assert names(folder) == {"last", "best", "step-00000012", best}
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))


def test_settings_of_the_host_may_change(small, corpus, tmp_path, capsys):
    arguments, folder = [*small, *RUN], tmp_path / "runs" / "it"
    stopped(arguments, folder)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(corpus, moved)
    changed = {
        "data.cache_dir": tmp_path / "another cache", "data.num_workers": 1, "train.device": "cpu", "eval.batch": 16,
        "eval.every": 4, "data.corpus": moved,
    }  # fmt: skip
    capsys.readouterr()
    trained([*arguments, "--resume", *(part for k, v in changed.items() for part in (f"--{k}", str(v)))])
    assert "resuming" in capsys.readouterr().out and checkpoint.find(folder).step == 12
    other = tmp_path / "other.jsonl"
    other.write_text("".join(corpus.read_text().splitlines(True)[:-1]))
    for option, value, message in (
        ("data.corpus", other, "the tokens of .*other.jsonl are not those .*it was started with"),
        ("data.tokenizer", "bpe-300", "was started with data.tokenizer bytes, and bpe-300 is another"),
        ("eval.sequences", "4", "was started with eval.sequences 8, but this is 4"),
        ("train.max_steps", "11", "was started with train.max_steps 12, but this is 11"),
    ):
        with pytest.raises(UsageError, match=message):
            trained([*arguments, "--resume", f"--{option}", str(value)])


def test_the_same_tokenizer_by_another_path(small, tmp_path):
    make_tokenizer("bytes").save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    arguments = [*small, *RUN, "--data.tokenizer", str(tmp_path / "one")]
    stopped(arguments, tmp_path / "runs" / "it")
    shutil.rmtree(tmp_path / "one")
    trained([*arguments, "--resume", "--data.tokenizer", str(tmp_path / "two" / "tokenizer.json")])


def test_a_run_may_go_on_for_longer_and_says_what_follows(small, tmp_path, capsys):
    arguments, folder = [*small, *RUN, "--optim.lr", "0.01"], tmp_path / "runs" / "it"
    trained(arguments)
    capsys.readouterr()
    trained([*arguments, "--resume", "--train.max_steps", "18"])
    said = capsys.readouterr().out
    assert "train.max_steps grew from 12 to 18" in said and "the learning rate goes from 4.00e-05 to 5.88e-03" in said
    assert checkpoint.find(folder).step == 18
    with pytest.raises(UsageError, match=r"train\.max_steps 18, but this is 12"):
        trained([*arguments, "--resume"])


def test_a_run_goes_on_and_is_evaluated_when_its_text_is_gone(small, corpus, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus, text)
    arguments = [*small, *RUN, "--data.corpus", str(text), "--data.cache_dir", str(tmp_path / "cache")]
    whole, cut = [*arguments, "--run.name", "whole"], [*arguments, "--run.name", "cut"]
    trained(whole)
    stopped(cut, tmp_path / "runs" / "cut")
    text.unlink()
    trained([*cut, "--resume"])
    assert losses(tmp_path / "runs" / "cut") == losses(tmp_path / "runs" / "whole")
    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path / "runs" / "cut"), "--sequences", "8"]) == 0
    assert "not those" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UsageError, match=r"there is no file or folder .*text\.jsonl \(and .*cache does not hold the tokens"):
        trained([*cut, "--resume"])


@pytest.fixture(scope="module")
def first(tmp_path_factory, small_at):
    """A run with an importance estimator."""
    folder = tmp_path_factory.mktemp("first")
    trained([*small_at(folder), *RUN, "--run.name", "first", *LEARNED])
    return folder / "runs" / "first"


@pytest.mark.parametrize("kind", ["run", "saved model", "weights alone", "mdlm"])
def test_a_run_begins_from_weights(small, tmp_path, first, kind):
    model, _ = checkpoint.load_model(checkpoint.find(first, "best"))
    source = first
    if kind == "saved model":
        source = hub.save_pretrained(tmp_path / "model", push.with_card(first, "best", average=True))
    elif kind == "weights alone":
        source = tmp_path / "alone"
        model.save_pretrained(source)
    elif kind == "mdlm":
        from atat_fast import convert

        source = tmp_path / "mdlm.safetensors"
        assert convert.main([str(first), str(source), "--to", "mdlm"]) == 0
    begin = ["--train.init_from", str(source)]
    new = trainer([*small, *RUN, *begin, *LEARNED])
    new.close()
    assert all(torch.equal(p, other) for p, other in zip(new.parts.model.parameters(), model.parameters(), strict=True))
    own = checkpoint.load_importance(checkpoint.find(first, "best"))
    same = [torch.equal(p, q) for p, q in zip(new.parts.estimator.parameters(), own.parameters(), strict=True)]
    carried = kind in ("run", "saved model")
    assert (
        all(same) == carried
        and ("the importance estimator's too" in new.parts.notes[0]) == carried
        and str(source) in new.parts.notes[0]
    )
    refused = [
        (["--model.dim", "32"], r"do not fit this run: final_norm is \(16,\) there, and here \(32,\)"),
        (["--model.heads", "1"], r"has model\.heads 2, and this run 1; add --model\.heads 2"),
    ]
    if carried:
        refused.append(
            (["--data.tokenizer", "bpe-300"], "tokenizer bytes, and data.tokenizer is bpe-300; add --data.tokenizer bytes")
        )
    for options, message in refused:
        with pytest.raises(UsageError, match=message):
            trainer([*small, *RUN, "--run.name", "other", *options, *begin])


def test_weights_to_begin_with_that_are_not_there(small):
    with pytest.raises(UsageError, match="nowhere"):
        trained([*small, *RUN, "--train.init_from", "nowhere/at/all"])


@pytest.mark.slow
def test_a_terminal_that_lacks_letters_loses_nothing(small, tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "atat_fast.train", *small, *RUN], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "val/nll" in done.stdout and " ? 0." in done.stdout
    assert checkpoint.find(tmp_path / "runs" / "it").step == 12


def test_a_tokenizer_that_loses_text_bounds_nothing_per_byte(small, tmp_path, capsys, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("[UNK]", "the", "of", "list", "value", "key"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    arguments = [*small, *RUN, "--data.tokenizer", str(tmp_path / "words.json"), "--data.valid_fraction", "0.3"]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "no bound on bits per byte (the tokenizer lacks" in said and "lacks" in caplog.text
    assert evaluate.main(["--run", str(tmp_path / "runs" / "it"), "--json", str(tmp_path / "found.json")]) == 0
    assert "no bound on bits per byte" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bits_per_byte"] is None and 0.3 < found["unknown_share"] < 1
    assert "bits per byte" not in (tmp_path / "runs" / "it" / "report.html").read_text()
    hub.save_pretrained(tmp_path / "model", push.with_card(tmp_path / "runs" / "it", "best", average=True))
    assert "bits per byte" not in (tmp_path / "model" / "README.md").read_text()
