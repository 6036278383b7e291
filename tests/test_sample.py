"""The sample command as a user meets it: prompts, blanks, files, JSONL, page and view, and one sentence for what is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

from atat_fast import push, sample
from atat_fast.cli import run_command
from atat_fast.config import Config, ImportanceConfig, ModelConfig
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.errors import UsageError
from atat_fast.models import DiT, hub
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.runs import checkpoint
from atat_fast.sampling import samplers
from atat_fast.sampling.samplers import SAMPLERS

TEXT = "the [MASK][MASK] of [MASK]ll"


def make_run(folder: Path, importance: str = "learned") -> Path:
    """A run folder with a checkpoint of a model that has learned nothing: 24 bytes long."""
    torch.manual_seed(0)
    config = Config(
        model=ModelConfig(dim=16, layers=1, heads=2, length=24, conditioning_dim=8, dropout=0.0),
        importance=ImportanceConfig(source=importance, width=16, layers=1, heads=2),
    )
    tokenizer = make_tokenizer("bytes")
    model = DiT(tokenizer.model_vocab_size, tokenizer.mask_id, **vars(config.model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.head.bias[:32], model.head.bias[127:] = -30.0, -30.0  # letters
    files = {name: dict(model.named_parameters()) for name in (checkpoint.WEIGHTS, checkpoint.EMA)}
    estimator = ImportanceEstimator.of(config, torch.arange(tokenizer.model_vocab_size))
    if estimator is not None:
        torch.nn.init.normal_(estimator.network.head.weight)
        files |= dict.fromkeys((checkpoint.IMPORTANCE, checkpoint.IMPORTANCE_EMA), checkpoint.saved_tensors(estimator))
    checkpoint.save(folder, 1, config, files, tokenizer, {"vocabulary": tokenizer.model_vocab_size})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def call(run, capsys, monkeypatch):
    """Calls the command on the run: (standard output, standard error)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert sample.main(["--run", str(run), "--device", "cpu", *map(str, arguments)]) == 0
        return capsys.readouterr()

    return call


def fits(text, pattern=TEXT):
    """Whether text is the pattern with something of one byte in each blank."""
    return re.fullmatch(re.escape(pattern).replace(re.escape("[MASK]"), "."), text, re.DOTALL) is not None


@pytest.mark.parametrize("sampler", ["auto", *SAMPLERS])
def test_blanks_are_filled_and_words_stay(call, sampler):
    out, err = call("--infill", TEXT, "--sampler", sampler, "--steps", 3)
    assert fits(out.removesuffix("\n")) and "3 tokens in" in err and "tokens/s" in err
    assert "0 hidden" in call("--infill", TEXT, "--sampler", sampler, "--watch", "--steps", 3).err


def test_standard_input_and_files(call, tmp_path):
    out, _ = call("--infill", stdin=f"{TEXT}\n\na[MASK]c\r\n")
    first, one, second, two = out.splitlines()
    assert (first, second) == ("--- sample 1 of 2", "--- sample 2 of 2") and fits(one) and fits(two, "a[MASK]c")
    (tmp_path / "a.txt").write_text(f"\ufeff{TEXT}\n")
    (tmp_path / "b.jsonl").write_text('{"text": "[MASK]b"}\n{"ids": [97, 257, 99]}\n{"prompt": "x[MASK]", "other": 1}\n')
    out, _ = call("--infill", "--prompts", tmp_path / "a.txt", tmp_path / "b.jsonl", "-", stdin="y[MASK]\n")
    found = out.splitlines()[1::2]
    patterns = (TEXT, "[MASK]b", "a[MASK]c", "x[MASK]", "y[MASK]")
    assert all(fits(text, pattern) for text, pattern in zip(found, patterns, strict=True))
    (tmp_path / "b.jsonl").write_text('{"ids": [97, 98]}\n')  # nothing hidden comes back as it is
    out, err = call("--infill", "--prompts", tmp_path / "b.jsonl")
    assert out == "ab\n" and err.startswith("0 tokens in")


def test_prompts_are_continued(call):
    out, _ = call("--prompt", "abc", "--num_samples", 3, "--length", 9, "--steps", 4)
    texts = out.splitlines()[1::2]
    assert len(texts) == 3 == len(set(texts)) and all(len(text) == 9 and text.startswith("abc") for text in texts)
    out, _ = call("--prompts", "-", "--length", 5, stdin="ab\nxyz\n")
    assert [text[:2] for text in out.splitlines()[1::2]] == ["ab", "xy"]
    out, _ = call("--prompt", "abc", "--length", 70, "--block", 8, "--steps", 4)  # longer than the model
    assert len(out.removesuffix("\n")) == 70 and out.startswith("abc")


def test_samples_are_the_same_in_any_batch_and_jsonl_says_how_they_were_made(call, tmp_path):
    rows = {}
    for batch in (1, 2, 5):
        path = tmp_path / f"{batch}.jsonl"
        arguments = ["--infill", "--num_samples", 2, "--batch", batch, "--seed", 3, "--jsonl", path, "--top_p", 0.9]
        out, _ = call(*arguments, stdin=f"{TEXT}\n[MASK][MASK] and more\n")
        assert out == ""
        rows[batch] = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == rows[2] == rows[5] and len(rows[1]) == 4
    first = rows[1][0]
    assert first["given"] == TEXT and fits(first["text"]) and len(first["ids"]) == 13
    assert (first["sampler"], first["steps"], first["seed"], first["top_p"]) == ("ddpm_cache", 128, 3, 0.9)
    assert rows[1][0]["text"] != rows[1][1]["text"]
    out, _ = call("--infill", TEXT, "--jsonl", "-")
    assert json.loads(out)["sample"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl", "5.jsonl"]


def test_the_page_replays_the_sample(call, tmp_path):
    path = tmp_path / "sample.html"
    out, err = call("--infill", TEXT + "</script>", "--html", path, "--steps", 7)
    html = path.read_text()
    assert "http" not in html and "<script src" not in html
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    assert f"written to {path}" in err and data["facts"]["steps"] == "7"
    cells = list(data["start"])
    assert [i for i, cell in enumerate(cells) if cell is None] == [i for i, given in enumerate(data["given"]) if not given]
    assert cells.count(None) == 3
    for _, changed, shown in data["steps"]:
        cells = [dict(shown).get(i, cell) for i, cell in enumerate(cells)]
        assert changed and None not in [cells[i] for i in changed]
    assert "".join(cells) + "\n" == out
    shaded = [score for score in data["importance"] if score is not None]
    assert len(shaded) == 3 and all(0 <= score <= 1 for score in shaded)


BAD = [
    (["--prompt", "x" * 24], "--prompt has 24 tokens, which leaves nothing of 24 to fill in"),
    (["--infill", "[MASK]" * 25], "--infill has 25 tokens, but the model takes at most 24"),
    (["--infill", "no blank"], "--infill has no [MASK] in it"),
    (["--infill"], "there is no text to begin with"),
    (["--prompts", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
    (["--prompts", "bad.jsonl"], "line 2 of bad.jsonl is not JSON"),
    (["--infill", "--prompts", "ids.jsonl"], "line 1 of ids.jsonl has token id 258, outside the vocabulary of 258"),
    (["--prompts", "types.jsonl"], "line 1 of types.jsonl: prompt must be a string"),
    (["--prompts", "empty.jsonl"], "line 1 of empty.jsonl has no prompt, text or ids"),
    (["--prompts", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["--prompt", "a", "--infill", "b[MASK]"], "give either --prompt, which is continued, or --infill"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--temperature", "-1"], "temperature must be at least 0 and finite, got -1"),
    (["--seed", "99999999999999999999"], "--seed is 99999999999999999999; give a whole number from 0 to 9223372036854775807"),
    (["--seed", "-1"], "--seed is -1; give a whole number from 0"),
    (["--steps", "10000000000"], "steps is 10,000,000,000"),
    (["--model", "model"], "say which model: --run runs/NAME, a folder of training, or --model FOLDER, a saved model"),
    (["--tokenizer", "gpt2"], "--tokenizer goes with --model"),
    (["--temperature", "nan"], "Got value: nan"),
    (["--top_p", "0"], "top_p must be above 0 and at most 1, got 0"),
    (["--sampler", "ddpm"], "there is no sampler 'ddpm' (did you mean ddpm_cache?)"),
    (["--length", "25"], "length must be in 1..24"),
    (["--block", "25"], "block must be in 1..24"),
    (["--eta", "3", "--sampler", "remdm_cap"], "eta must be in 0..1"),
    (["--num_samples", "0"], "num_samples must be at least 1"),
    (["--html", "no/such/folder.html"], "its folder does not exist"),
    (["--jsonl", "no/such/folder.jsonl"], "its folder does not exist"),
    (["--jsonl", "folder"], "cannot write folder: it is a folder; give the name of a file"),
    (["--stepps", "3"], "did you mean --steps?"),
    (["--device", "cuda"], "--device is cuda, but torch sees no CUDA device here; use --device cpu"),
    (["--top_k", "-1", "--jsonl", "kept.jsonl"], "top_k"),
]
FILES = {
    "bad.jsonl": b'{"prompt": "a"}\n{"prompt": \n', "ids.jsonl": b'{"ids": [257, 258]}\n', "types.jsonl": b'{"prompt": 3}\n',
    "empty.jsonl": b'{"words": 3}\n', "latin.txt": b"caf\xe9\n", "kept.jsonl": b"kept",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_sentence_and_writes_over_nothing(arguments, message, run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert message in refused(sample.main, "--run", run, *arguments)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "kept.jsonl").read_text() == "kept"


def test_runs_without_what_is_asked_for(run, tmp_path, refused):
    plain, broken = make_run(tmp_path / "plain", "none"), tmp_path / "broken"
    shutil.copytree(run, broken, symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "last" / "tokenizer")
    message = "needs learned importance, and importance.source of"
    assert message in refused(sample.main, "--run", plain, "--sampler", "importance")
    assert "tokenizer" in refused(sample.main, "--run", broken)


def test_the_command_writes_nothing_beside_it(run, tmp_path, python):
    done = python("-m", "atat_fast.sample", "--run", run, "--infill", cwd=tmp_path, input=f"{TEXT}\n")
    assert done.returncode == 0 and fits(done.stdout.removesuffix("\n")), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_is_sampled_as_its_run_is(call, run, tmp_path, capsys):
    hub.save_pretrained(tmp_path / "model", push.with_card(run, "last", average=True))
    expected = call("--infill", TEXT, "--html", tmp_path / "run.html").out
    assert sample.main(["--model", str(tmp_path / "model"), "--infill", TEXT, "--html", str(tmp_path / "model.html")]) == 0
    assert capsys.readouterr().out == expected and (tmp_path / "model.html").is_file()
    alone = tmp_path / "alone"
    checkpoint.load_model(checkpoint.find(run))[0].save_pretrained(alone)
    with pytest.raises(UsageError, match=r"saved without its tokenizer.*--tokenizer gpt2"):
        sample.main(["--model", str(alone), "--infill", TEXT])
    assert sample.main(["--model", str(alone), "--tokenizer", "bytes", "--infill", TEXT]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_what_is_drawn(run, tmp_path, monkeypatch, capsys, after):
    path, real, calls = tmp_path / "kept.jsonl", samplers.sample, []
    path.write_text("old\n")

    def draw(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(samplers, "sample", draw)
    with pytest.raises(SystemExit) as left:
        run_command(sample.main, ["--run", str(run), "--num_samples", "9", "--batch", "1", "--steps", "4", "--jsonl", str(path)])
    assert left.value.code == 130 and "Traceback" not in capsys.readouterr().err
    lines = path.read_text().splitlines()
    assert lines == ["old"] if not after else [json.loads(line)["sample"] for line in lines] == list(range(after))
    assert os.listdir(tmp_path) == ["kept.jsonl"]


def test_jsonl_through_a_pipe_and_a_link(call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target.jsonl")
    heard = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    for name in ("pipe", "link"):
        call("--infill", TEXT, "--seed", 3, "--jsonl", tmp_path / name)
    reader.join(20)
    assert heard == [(tmp_path / "target.jsonl").read_text()] and json.loads(heard[0])["seed"] == 3
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_samples_stop_at_their_end(call, tmp_path, monkeypatch):
    end, mask = make_tokenizer("bytes").eos_id, make_tokenizer("bytes").mask_id
    asked = []

    def draw(model, tokens, *, stop_at, **options):
        asked.append(stop_at)
        out = torch.where(tokens == mask, ord("x"), tokens)
        out[:, 5] = end
        return out

    monkeypatch.setattr(samplers, "sample", draw)
    prompt = json.dumps({"ids": [97, end, 98]})
    (tmp_path / "prompts.jsonl").write_text(prompt + "\n")
    for option, ids in ((["--stop_at_end"], [97, end, 98, 120, 120]), ([], [97, end, 98, 120, 120, end, *[120] * 18])):
        row = json.loads(call("--prompts", tmp_path / "prompts.jsonl", "--jsonl", "-", *option).out)
        assert row["ids"] == ids and row["text"] == make_tokenizer("bytes").decode(ids)
    assert asked == [end, None]


def test_text_that_is_none(call, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\ud800"}\n')
    for options in (["--prompts", tmp_path / "prompts.jsonl"], ["--prompt", "a\udcff"]):
        row = json.loads(call(*options, "--jsonl", "-").out)
        assert row["given"] == "a\ufffd" and row["text"].startswith("a\ufffd")
