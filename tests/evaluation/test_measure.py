"""The evaluate command: figures with their errors, what they are, and what they were measured on."""

from __future__ import annotations

import json
import os

import pytest

from atat_fast import evaluate, push
from atat_fast.cli import run_command
from atat_fast.data import prepare
from atat_fast.data.zero_shot import tokens_hash
from atat_fast.errors import UsageError
from atat_fast.evaluation import measure
from atat_fast.models import hub
from atat_fast.runs import checkpoint


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def measured(*arguments):
    assert evaluate.main([*map(str, arguments), "--json", "out.json", "--dtype", "fp32"]) == 0
    with open("out.json", encoding="utf-8") as file:
        return json.load(file)


def test_masks_are_drawn_until_their_error_is_met(trained_run, capsys):
    one = measured("--run", trained_run)
    assert (one["draws"], one["error_of"], one["kind"]) == (1, "masks and text", "upper bound")
    split = prepare(checkpoint.find(trained_run, "best").config.data).valid
    assert one["tokens_sha256"] == tokens_hash(split, 16)
    assert measured("--run", trained_run, "--sequences", 3)["tokens_sha256"] == tokens_hash(split, 16, 3)
    more = measured("--run", trained_run, "--se", one["nll_se"] / 4)
    assert more["nll_se"] <= one["nll_se"] / 4 < more["nll_se_text"]
    assert more["error_of"] == "masks" and more["draws"] > 2 and more["draws"] % 2 == 0
    assert abs(more["nll"] - one["nll"]) < 4 * one["nll_se"]
    assert more["tokens_sha256"] == one["tokens_sha256"]
    printed = capsys.readouterr().out
    assert f"nll              {more['nll']:.4f} ± {more['nll_se']:.4f} nats a token (upper bound; the error of masks)" in printed
    assert f"± {more['nll_se_text']:.4f} with the choice of text" in printed
    assert f"{more['draws']} mask(s) each" in printed and f"sha256 {more['tokens_sha256'][:12]}" in printed
    again = measured("--run", trained_run, "--se", one["nll_se"] / 4, "--batch", 5)
    assert again["nll"] == pytest.approx(more["nll"], rel=1e-5) and again["draws"] == more["draws"]
    with pytest.raises(UsageError, match=r"1e-06 is not reached with 4 masks of each of \d+ sequences: the error is 0\.\d+"):
        evaluate.main(["--run", str(trained_run), "--se", "1e-6", "--max_draws", "4", "--json", "none.json"])
    assert not os.path.exists("none.json")


def test_orders_stand_beside_the_bound(trained_run, capsys):
    found = measured("--run", trained_run, "--order", "left_to_right,confidence,importance", "--order_sequences", 6)
    figures = {figure["measure"]: figure for figure in found["figures"]}
    assert list(figures) == ["uniform", "left_to_right", "confidence", "importance"]
    assert [figure["kind"] for figure in figures.values()] == ["upper bound", "exact", "exact", "upper bound"]
    assert all(figure["sequences"] == 6 for name, figure in figures.items() if name != "uniform")
    hashes = [figure["tokens_sha256"] for figure in figures.values()]
    assert hashes[1] == hashes[2] == hashes[3] != hashes[0]
    assert figures["importance"]["tilt"] == 2.0 and "tilt" not in figures["confidence"]
    for name, figure in figures.items():
        assert 2 < figure["nll"] < 7 and figure["nll_se"] > 0
        if name != "uniform":  # the same sequences, whose spread cancels
            assert abs(figure["minus_bound"]) < 1 and figure["minus_bound_se"] > 0
    printed = capsys.readouterr().out
    assert f"{figures['confidence']['minus_bound']:+.4f} ± {figures['confidence']['minus_bound_se']:.4f}" in printed
    for figure in figures.values():
        assert f"{figure['nll']:.4f}" in printed and figure["tokens_sha256"][:12] in printed
    fewer = measured("--run", trained_run, "--order", "confidence", "--order_sequences", 6, "--tokens_per_pass", 4)["figures"][1]
    assert fewer["tokens_per_pass"] == 4 and fewer["nll"] != figures["confidence"]["nll"]


def test_zero_shot_sets_from_files(trained_run, tmp_path, capsys):
    for name, column in (("ptb", "sentence"), ("ag_news", "text")):
        rows = "".join(json.dumps({column: f"{i} the list is n't a dict of {i * i} <unk> keys"}) + "\n" for i in range(30))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    found = measured("--run", trained_run, "--zero_shot", "ptb=ptb.jsonl,ag_news=ag_news.jsonl", "--se", 0.5)
    assert [figure["text"] for figure in found["figures"]] == ["ptb", "ag_news"] and "nll" not in found
    one, other = found["figures"]
    assert one["tokens_sha256"] != other["tokens_sha256"]  # is n't and <unk> are put together for ptb alone
    assert one["source"]["rows"] == 30 and one["source"]["path"] == "ptb.jsonl" and one["nll_se"] <= 0.5
    assert one["bits_per_byte"] == pytest.approx(one["bits_per_token"] / one["bytes_per_token"])
    printed = capsys.readouterr().out
    for figure in found["figures"]:
        kept = figure["source"]["tokens_kept"]
        assert 0.9 < kept < 1 and f"set {figure['text']}: 30 rows, {figure['source']['tokens']:,} tokens; {kept:.1%}" in printed
        row = next(line for line in printed.splitlines() if line.startswith(figure["text"] + " "))
        assert figure["tokens_sha256"][:12] in row and "upper bound" in row


@pytest.mark.parametrize("error", [UsageError, KeyboardInterrupt])
def test_figures_of_the_sets_before_a_failure_are_kept(trained_run, tmp_path, monkeypatch, capsys, error):
    for name in ("ptb", "lm1b"):
        (tmp_path / f"{name}.txt").write_text("the list is a dict of keys\n" * 30)
    real, out = measure.measure, tmp_path / "out.json"

    def fail(model, split, *rest):
        if split.name == "lm1b":
            raise error("too few masks")
        return real(model, split, *rest)

    monkeypatch.setattr(measure, "measure", fail)
    with pytest.raises(error, match="too few masks"):
        evaluate.main(["--run", str(trained_run), "--zero_shot", "ptb=ptb.txt,lm1b=lm1b.txt", "--json", str(out)])
    assert [figure["text"] for figure in json.loads(out.read_text())["figures"]] == ["ptb"]
    assert "ptb " in capsys.readouterr().out


def test_a_set_without_a_block_costs_nothing_of_the_others(trained_run, tmp_path, monkeypatch):
    (tmp_path / "ptb.txt").write_text("some rows of text\n" * 30)
    (tmp_path / "few.txt").write_text("a row\n")
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured before all sets were opened"))
    with pytest.raises(UsageError, match=r"set lm1b, read from few.txt, has 1 rows and 6 tokens; that is too few for one block"):
        measured("--run", trained_run, "--zero_shot", "ptb=ptb.txt,lm1b=few.txt")


BAD = [
    ([], "nothing to evaluate: give --run runs/NAME, --model FOLDER, or --samples FILE"),
    (["--run", "RUN", "--model", "x"], "say which model: --run runs/NAME, a folder of training, or --model FOLDER, a saved"),
    (["--model", "x"], "there is no folder x, and it is no hub id"),
    (["--run", "RUN", "--zero_shot", "ptbb"], "there is no zero-shot set 'ptbb' (did you mean ptb?)"),
    (["--run", "RUN", "--zero_shot", "ptb=empty.txt"], "set ptb, read from empty.txt, has 0 rows"),
    (["--run", "RUN", "--zero_shot", "ptb"], "zero-shot set ptb needs the data set"),
    (["--run", "RUN", "--zero_shot", "all", "--corpus", "x.txt"], "give --corpus, one text, or --zero_shot"),
    (["--run", "RUN", "--corpus", "empty.txt"], "corpus empty.txt holds no text"),
    (["--run", "RUN", "--corpus", "nothing.txt"], "there is no file or folder nothing.txt"),
    (["--run", "RUN", "--order", "confidense"], "there is no order 'confidense' (did you mean confidence?)"),
    (["--run", "RUN", "--order", "entropy", "--tokens_per_pass", "0"], "tokens revealed in a pass must be at least 1, got 0"),
    (["--run", "RUN", "--order", "entropy", "--order_sequences", "-2"], "--order_sequences must be at least 0, which reads all"),
    (["--run", "RUN", "--se", "0"], "the standard error asked for must be above 0, got 0"),
    (["--run", "RUN", "--se", "0.1", "--max_draws", "3"], "an error can be told from 4 draws on"),
    (["--run", "RUN", "--draws", "0"], "--batch and --draws must be at least 1"),
    (["--run", "RUN", "--sequences", "-1"], "--batch and --draws must be at least 1 and --sequences at least 0"),
    (["--run", "RUN", "--causal_lm", "gpt2"], "--causal_lm measures samples; give them with --samples FILE"),
    (["--run", "RUN", "--tokenizer", "gpt2"], "--tokenizer goes with --model"),
    (["--run", "RUN", "--json", "no/out.json"], "cannot write no/out.json: its folder does not exist"),
    (["--samples", "nothing.jsonl"], "there is no file or folder nothing.jsonl"),
    (["--samples", "empty.txt"], "samples empty.txt hold no text"),
    (["--samples", "text.txt", "--reference", "text.txt"], "--reference needs --causal_lm"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, trained_run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(SystemExit) as left:
        run_command(evaluate.main, [str(trained_run) if part == "RUN" else part for part in arguments])
    error = capsys.readouterr().err  # what was read may have been told before
    assert left.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert {f.name for f in tmp_path.iterdir()} == {"empty.txt", "text.txt"}


def test_a_saved_model_says_what_it_lacks(trained_run, corpus, tmp_path):
    saved = push.with_card(trained_run, "best", average=True)
    hub.save_pretrained(tmp_path / "plain", hub.Saved(saved.model, saved.tokenizer))
    with pytest.raises(UsageError, match="needs a model with an importance estimator, and this one has none"):
        measured("--model", "plain", "--order", "importance", "--corpus", corpus)
    with pytest.raises(UsageError, match="plain does not say what it was trained on; give --corpus"):
        measured("--model", "plain")


@pytest.mark.slow
def test_the_command_from_a_fresh_directory(trained_run, tmp_path, python):
    done = python("-m", "atat_fast.evaluate", "--run", trained_run, "--se", 0.2, "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["nll_se"] <= 0.2
