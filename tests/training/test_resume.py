"""Runs that go on elsewhere: from a copy without links, after a kill, on another host, for longer, without their text; and runs
that begin with the weights of another.
"""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

from atat_fast import convert, evaluate, push, train
from atat_fast.data import make_tokenizer
from atat_fast.diffusion import count_law
from atat_fast.distributed.ranks import Launch, Ranks
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.runs import checkpoint
from atat_fast.training.run_state import Window
from atat_fast.training.trainer import Interrupted

LEARNED = {"importance.source": "learned", "importance.width": 16, "importance.layers": 1, "importance.heads": 2}
RUN = {"optim.name": "adamw", "run.name": "it", "train.checkpoint_every": 3, "sample.num_samples": 0}
RUN |= {"model.qk_norm": "false", "model.activation": "gelu", "model.tie_embeddings": "false"}  # as MDLM


@pytest.fixture
def run(small, tmp_path):
    """Arguments of a run, and its folder."""
    return [*small, *(f"--{name}={value}" for name, value in RUN.items())], tmp_path / "runs" / "it"


@pytest.fixture
def stopped(trainer):
    """Trains up to step 6; two checkpoints are then there."""

    def stopped(*arguments):
        with pytest.raises(Interrupted):
            trainer(*arguments, stop=6).train()

    return stopped


def names(folder):
    return set(os.listdir(folder / checkpoint.FOLDER))


def test_a_copy_that_followed_links_goes_on_from_its_newest_step(run, trainer, stopped, tmp_path):
    arguments, folder = run
    stopped(arguments, "--train.keep=5")
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(folder, copy, symlinks=False)
    root = copy / checkpoint.FOLDER
    assert (root / "last").is_dir() and not (root / "last").is_symlink()
    assert checkpoint.find(copy).step == 6  # what only reads takes it as it is
    shutil.rmtree(root / "best")
    (root / "step-00000003").rename(root / "best")  # all that is left of it
    for _ in range(2):
        trainer(arguments, {"run.name": "copy", "train.keep": 5}, resume=True).train()
        assert all((root / link).is_symlink() for link in ("last", "best"))
        assert (root / "last").resolve().name == "step-00000012" and checkpoint.find(copy).step == 12
        assert {"step-00000003", "step-00000006", "step-00000012"} <= names(copy)


def test_weights_and_counts_that_are_learned_go_on_as_if_uninterrupted(run, trainer, monkeypatch):
    """A law of the counts that follows every fourth step, weights by gaps, and masks that lie evenly until half of the run."""
    arguments, folder = run
    monkeypatch.setattr(count_law, "PERIOD", 4)
    blind = {
        "diffusion.counts": "learned", "diffusion.gap_power": 0.5, "diffusion.spread": 1, "diffusion.weighting": "ce",
        "curriculum.kind": "step", "curriculum.phases": "[even, uniform]", "curriculum.boundaries": "[0.5]",
        "curriculum.levels": "[1, 0]",
    }  # fmt: skip
    trainer(arguments, blind, {"run.name": "whole"}).train()
    with pytest.raises(Interrupted):
        trainer(arguments, blind, stop=6).train()
    trainer(arguments, blind, resume=True).train()
    mine, whole = (checkpoint.find(path) for path in (folder, folder.with_name("whole")))
    for name in (checkpoint.WEIGHTS, checkpoint.OBJECTIVE):
        assert all(torch.equal(value, mine.tensors(name)[key]) for key, value in whole.tensors(name).items())
    learned = mine.tensors(checkpoint.OBJECTIVE)
    assert learned.keys() == {"gaps", "count_losses", "count_law"}
    assert learned["gaps"][1].sum() > 0 and float(learned["count_law"].sum()) == pytest.approx(1)


def test_a_file_system_without_links(run, trainer, stopped, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    arguments, folder = run
    stopped(arguments)
    trainer(arguments, resume=True).train()
    root = folder / checkpoint.FOLDER
    assert (root / "last").read_text() == "step-00000012\n"
    assert checkpoint.find(root / "last").step == 12 and checkpoint.find(folder, "best").step in (6, 12)
    assert names(folder) <= {"last", "best", "step-00000006", "step-00000012"}
    assert evaluate.main(["--run", str(root / "last"), "--sequences", "4"]) == 0


def test_what_kill_left_is_gone_after_the_next_start(run, trainer, stopped):
    arguments, folder = run
    stopped(arguments)
    root = folder / checkpoint.FOLDER
    for name in (".step-00000005.99999", ".step-00000009.part", ".old-step-00000003", "step-00000004"):
        (root / name).mkdir()
        (root / name / "weights.safetensors").write_bytes(b"0" * 1000)
    (root / ".last.4711").symlink_to("step-00000003")
    (folder / ".metrics.jsonl.abc.part").touch()
    trainer(arguments, resume=True).train()
    assert names(folder) == {"last", "best", "step-00000012", checkpoint.find(folder, "best").path.name}
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part"))


def test_settings_of_the_host_may_change_and_others_may_not(run, trainer, stopped, corpus, tmp_path, capsys):
    arguments, folder = run
    make_tokenizer("bytes").save(tmp_path / "one")
    arguments.append(f"--data.tokenizer={tmp_path / 'one'}")
    stopped(arguments)
    moved = shutil.copy(corpus, tmp_path / "moved.jsonl")
    (tmp_path / "one").rename(tmp_path / "two")
    arguments.append(f"--data.tokenizer={tmp_path / 'two' / 'tokenizer.json'}")
    other = {"data.cache_dir": tmp_path / "another cache", "data.num_workers": 1, "train.device": "cpu", "eval.batch": 16}
    capsys.readouterr()
    trainer(arguments, other, {"eval.every": 4, "data.corpus": moved}, resume=True).train()
    assert "resuming" in capsys.readouterr().out and checkpoint.find(folder).step == 12
    other = tmp_path / "other.jsonl"
    other.write_text("".join(corpus.read_text().splitlines(True)[:-1]))
    for option, value, message in (
        ("data.corpus", other, "the tokens of .*other.jsonl are not those .*it was started with"),
        ("data.tokenizer", "bpe-300", "was started with data.tokenizer .*, and bpe-300 is another"),
        ("eval.sequences", 4, "was started with eval.sequences 8, but this is 4"),
        ("train.max_steps", 11, "was started with train.max_steps 12, but this is 11"),
    ):
        with pytest.raises(UsageError, match=message):
            trainer(arguments, {option: value}, resume=True)


def test_a_run_may_go_on_for_longer_and_says_what_follows(run, trainer, capsys):
    arguments, folder = run
    arguments.append("--optim.lr=0.01")
    trainer(arguments).train()
    capsys.readouterr()
    trainer(arguments, {"train.max_steps": 18}, resume=True).train()
    said = capsys.readouterr().out
    assert "train.max_steps grew from 12 to 18" in said and "the learning rate goes from 4.00e-05 to 5.88e-03" in said
    assert checkpoint.find(folder).step == 18


def test_a_run_goes_on_and_is_evaluated_when_its_text_is_gone(run, trainer, stopped, rows, arguments, corpus, tmp_path, capsys):
    text, cache = shutil.copy(corpus, tmp_path / "text.jsonl"), tmp_path / "cache"
    whole, cut = (arguments(run[0], {"data.corpus": text, "data.cache_dir": cache, "run.name": n}) for n in ("whole", "cut"))
    trainer(whole).train()
    stopped(cut)
    text.unlink()
    trainer(cut, resume=True).train()
    a, b = (rows(tmp_path / "runs" / name, "train", "step", "loss", "grad_norm") for name in ("cut", "whole"))
    assert a == b
    capsys.readouterr()
    assert evaluate.main(["--run", str(tmp_path / "runs" / "cut"), "--sequences", "8"]) == 0
    assert "not those" not in capsys.readouterr().out
    shutil.rmtree(cache)
    with pytest.raises(UsageError, match=r"there is no file or folder .*text\.jsonl \(and .*cache does not hold the tokens"):
        trainer(cut, resume=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory, small_at, trainer):
    """A run with an importance estimator."""
    made = trainer(small_at(tmp_path_factory.mktemp("first")), RUN, LEARNED)
    made.train()
    return made.folder


@pytest.mark.parametrize("kind", ["run", "saved model", "weights alone", "mdlm"])
def test_a_run_begins_from_weights(run, trainer, tmp_path, first, kind):
    (model, _), source = checkpoint.load_model(checkpoint.find(first, "best")), first
    if kind == "saved model":
        source = hub.save_pretrained(tmp_path / "model", push.with_card(first, "best", average=True))
    elif kind == "weights alone":
        source = tmp_path / "alone"
        model.save_pretrained(source)
    elif kind == "mdlm":
        source = tmp_path / "mdlm.safetensors"
        assert convert.main([str(first), str(source), "--to", "mdlm"]) == 0
    begin = {"train.init_from": source}
    new = trainer(run[0], begin, LEARNED)
    new.close()
    assert all(torch.equal(p, other) for p, other in zip(new.parts.model.parameters(), model.parameters(), strict=True))
    own = checkpoint.load_importance(checkpoint.find(first, "best"))
    same = all(torch.equal(p, q) for p, q in zip(new.parts.estimator.parameters(), own.parameters(), strict=True))
    carried, (note, *_) = kind in ("run", "saved model"), new.parts.notes
    assert same == carried == ("the importance estimator's too" in note) and str(source) in note
    refused = [
        ({"model.dim": 32}, r"do not fit this run: final_norm is \(16,\) there, and here \(32,\)"),
        ({"model.heads": 1}, r"has model\.heads 2, and this run 1; add --model\.heads 2"),
        ({"train.init_from": "nowhere/at/all"}, "nowhere"),
    ]
    if carried:
        refused.append(({"data.tokenizer": "bpe-300"}, "tokenizer bytes, and .* is bpe-300; add --data.tokenizer bytes"))
    for options, message in refused:
        with pytest.raises(UsageError, match=message):
            trainer(run[0], {"run.name": "other"}, begin, options)


def test_a_tokenizer_that_loses_text_bounds_nothing_per_byte(run, arguments, tmp_path, capsys, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("[UNK]", "the", "of", "list", "value", "key"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    assert train.main(arguments(run[0], {"data.tokenizer": tmp_path / "words.json", "data.valid_fraction": 0.3})) == 0
    said = capsys.readouterr().out
    assert "no bound on bits per byte (the tokenizer lacks" in said and "lacks" in caplog.text
    assert evaluate.main(["--run", str(run[1]), "--json", str(tmp_path / "found.json")]) == 0
    assert "no bound on bits per byte" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bits_per_byte"] is None and 0.3 < found["unknown_share"] < 1
    hub.save_pretrained(tmp_path / "model", push.with_card(run[1], "best", average=True))
    for page in (run[1] / "report.html", tmp_path / "model" / "README.md"):
        assert "bits per byte" not in page.read_text()


def window(rank=0, size=1):
    ranks = Ranks(Launch())
    ranks.rank, ranks.size = rank, size
    return Window(ranks, torch.device("cpu"), 7)


def test_a_window_knows_its_sums_and_the_first_step_that_was_not_finite():
    made = window()
    for step, (loss, norm) in enumerate(((1.0, 2.0), (torch.nan, 3.0), (1.0, torch.inf)), start=8):
        made.add("loss", torch.tensor(loss))
        made.add("quarters", torch.tensor([1.0, loss]))
        made.step(step, torch.tensor(norm))
        if step == 8:
            assert made.totals() == {"loss": 1.0, "norm": 2.0, "quarters": [1.0, 1.0]}
    assert (int(made.sums["odd"]), int(made.sums["bad"])) == (9, 10)


def test_a_window_comes_back_bit_for_bit_and_on_other_ranks_by_its_sum():
    made, back = window(), window()
    made.add("loss", torch.tensor(0.1))
    made.add("norm", torch.tensor(0.3))
    state = made.state()
    back.load(state)
    assert state["step"] == 7 and all(torch.equal(back.sums[name], made.sums[name]) for name in ("loss", "norm"))
    both = {"step": 7, "ranks": [*state["ranks"], {"loss": 0.5, "norm": state["ranks"][0]["norm"]}]}
    old = {"step": 5, "loss": 0.25, "norm": 0.5}  # as one process wrote it before there were ranks
    for kept, rank, size, loss, norm in (
        (both, 0, 3, 0.6, 0.3),
        (both, 1, 3, 0.0, 0.3),
        (both, 2, 3, 0.0, 0.3),
        (old, 0, 1, 0.25, 0.5),
    ):
        other = window(rank, size)
        other.load(kept)
        assert other.first == kept["step"]
        assert [float(other.sums[name]) for name in ("loss", "norm")] == pytest.approx([loss, norm])
