"""Saved models: what is in a folder, that it comes back in a fresh process, and everything that is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_dit

from atat_fast import evaluate, push
from atat_fast.cli import run_command
from atat_fast.config import ImportanceConfig
from atat_fast.data import network
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.diffusion.identity import IdentitySchedule
from atat_fast.errors import UsageError
from atat_fast.models import hub
from atat_fast.models.card import fenced, model_card
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator


def small(**changes):
    tokenizer = make_tokenizer("bytes")
    return small_dit(tokenizer.model_vocab_size, tokenizer.mask_id, **changes), tokenizer


@pytest.fixture
def folder(tmp_path):
    return hub.save_pretrained(tmp_path / "model", hub.Saved(*small()))


def logits(model):
    ids = torch.tensor([[104, 257, 257, 111]])
    return model.eval().logits(model.features(ids, torch.tensor([0.5])))


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"time_conditioning": True, "qk_norm": True}])
def test_a_model_comes_back(changes, tmp_path):
    model, tokenizer = small(**changes)
    config = ImportanceConfig(source="full", width=8, layers=1, heads=2)
    estimator = ImportanceEstimator(config, 16, 12, torch.arange(258))
    rates = IdentitySchedule(torch.rand(258) + 0.1)
    folder = hub.save_pretrained(tmp_path / "model", hub.Saved(model, tokenizer, estimator, {"step": 7}, rates))
    assert {f.name for f in folder.iterdir()} == set(hub.FILES)
    back = hub.from_pretrained(folder, longest=12)
    assert torch.equal(logits(back.model), logits(model)) and back.model.config == model.config
    assert back.tokenizer.fingerprint == tokenizer.fingerprint and back.facts["step"] == 7
    assert back.estimator is not None and back.estimator.config == config
    assert torch.equal(back.process.rates, rates.rates)
    for name, value in estimator.state_dict().items():
        assert torch.equal(back.estimator.state_dict()[name], value), name
    assert torch.equal(logits(DiT.from_pretrained(folder)), logits(model))  # the hub library's own way reads it too
    with pytest.raises(UsageError, match="takes at most 12 tokens, and 13 are asked"):
        hub.from_pretrained(folder, longest=13)


def test_a_folder_of_an_earlier_version_or_without_its_tokenizer_is_read(folder):
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("model_type") == "atat_fast"
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    assert torch.equal(logits(hub.from_pretrained(folder, tokenizer="bytes").model), logits(small()[0]))


@pytest.mark.parametrize("rates", [torch.ones(257), torch.zeros(258), torch.full((258,), torch.nan), None])
def test_rates_that_are_none_are_refused(folder, rates):
    save_file({"rates": rates} if rates is not None else {"other": torch.ones(1)}, folder / "schedule.safetensors")
    with pytest.raises(UsageError, match=r"schedule\.safetensors does not hold a schedule of this vocabulary"):
        hub.from_pretrained(folder)


def test_pickles_are_refused_unread_and_none_is_saved(folder):
    assert {f.suffix for f in folder.iterdir()} == {".json", ".safetensors", ".md"}
    assert "auto_map" not in (folder / "config.json").read_text()  # no code either
    for f in folder.glob("*.json"):
        json.loads(f.read_text())

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "exploded"),))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match=r"pytorch_model\.bin .* is a pickle"):
        hub.from_pretrained(folder)
    assert not (folder / "exploded").exists()


def test_the_tokenizer_is_one_that_transformers_reads_and_pads_with(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ours, text = make_tokenizer("bytes"), "for i in range(3): café"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text and len(theirs) == ours.model_vocab_size
    assert (theirs.mask_token_id, theirs.eos_token_id, theirs.model_max_length) == (ours.mask_id, ours.eos_id, 12)
    assert theirs("a [MASK]")["input_ids"] == [*ours.encode("a "), ours.mask_id]
    assert theirs(["a", "bcd"], padding=True)["input_ids"] == [[97, ours.eos_id, ours.eos_id], [*b"bcd"]]


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


BROKEN = [
    (lambda f: change(f, "config.json", vocab_size=300), "the model has 300 ids with mask 257, and the tokenizer 258"),
    (lambda f: change(f, "config.json", mask_id=3), "the model has 258 ids with mask 3, and the tokenizer 258 with mask 257"),
    (lambda f: change(f, "config.json", length=24), "the tokenizer is for 12 tokens and the model for 24"),
    (lambda f: change(f, "config.json", layers=3), r"does not fit its config.json: modulation\.bias is \(224,\) there, and here"),
    (lambda f: change(f, "config.json", colour="red"), r"config\.json is not of a model that atat_fast saved: .*colour"),
    (lambda f: (f / "config.json").write_text("[1]"), "holds a list, not names with values"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "config.json").unlink(), "cannot be read as JSON"),
    (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))), "extra is .* not part of this model"),
    (lambda f: change_weights(f, lambda t: t.update({"head.bias": torch.ones(2)})), r"head\.bias is \(2,\) there, and here \(2"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04."), "cannot be read as safetensors"),
    (lambda f: (f / "model.safetensors").unlink(), r"holds no model\.safetensors, so it is no saved model"),
    (lambda f: (f / "tokenizer.json").unlink(), "was saved without its tokenizer"),
    (lambda f: (f / "tokenizer_config.json").write_text("{}"), "was not saved by atat_fast"),
    (lambda f: change(f, "atat_fast.json") or (f / "atat_fast.json").write_text("3"), "holds a int"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_folders_that_are_not_right_are_one_sentence(spoil, message, folder):
    spoil(folder)
    with pytest.raises(UsageError, match=message) as raised:
        hub.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_what_is_there_is_not_written_over_and_a_full_disk_leaves_it(folder, monkeypatch):
    saved, before = hub.Saved(*small(dim=8)), contents(folder)

    def refused(message, **options):
        with pytest.raises(UsageError, match=message):
            hub.save_pretrained(folder, saved, **options)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    refused("is already there")
    (folder / "notes.txt").write_text("mine")
    refused(r"holds more than a saved model .notes\.txt.", overwrite=True)
    (folder / "notes.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "model_card", full)
        refused(r"cannot write to .*model: No space left", overwrite=True)
    assert contents(folder) == before
    hub.save_pretrained(folder, saved, overwrite=True)
    assert hub.from_pretrained(folder).model.config.dim == 8
    with pytest.raises(UsageError, match="its folder does not exist"):
        hub.save_pretrained(folder / "a" / "b", saved)
    assert [f.name for f in folder.parent.iterdir()] == ["model"]  # nothing is left beside it


def test_a_run_is_saved_with_a_card_of_its_own(trained_run, corpus, tmp_path, capsys):
    assert push.main(["--run", str(trained_run), "--out", str(tmp_path / "out"), "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "read " in printed and "model.safetensors" in printed and "note " not in printed
    card = (tmp_path / "out" / "README.md").read_text()
    data = huggingface_hub.ModelCard(card).data
    last = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in last if row["kind"] == "eval"), key=lambda row: row["nll"])
    assert data.license == "mit" and data.library_name == "atat_fast"
    assert next((r.metric_type, r.metric_value) for r in data.eval_results) == ("nll", round(best["nll"], 4))
    assert f"{best['nll']:.4f} ± {best['nll_se']:.4f} nats a token" in card
    (sample,) = [row for row in last if row["kind"] == "sample"]
    assert fenced(sample["texts"][0]) in card
    for words in ("text.jsonl", "documents", "tokens seen", "Weights: mit.", "importance estimator"):
        assert words in card, words
    everything = "".join(f.read_text() for f in (tmp_path / "out").iterdir() if f.suffix != ".safetensors")
    for place in (trained_run.parents[1], corpus.parent):  # where it was trained is nobody's business
        assert str(place) not in everything


def test_a_card_says_what_nobody_said():
    card = model_card({"data": {"corpus": "wikitext103"}}, name="me/it")
    data = huggingface_hub.ModelCard(card).data
    assert data.license == "unknown" and data.datasets == ["Salesforce/wikitext"] and data.eval_results is None
    assert "no licence was stated" in card and "CC BY-SA" in card and "nats a token" not in card


@pytest.mark.parametrize("text", ["plain", "a ``` b", "````\n`", "tab\tnul\x00 esc\x1b[2J \u202e", "| a | b |\r\nc"])
def test_samples_stay_inside_their_block(text):
    fence, *body, last = fenced(text).split("\n")
    assert fence == last + "text" and set(last) == {"`"}
    assert all(last not in line for line in body)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", "\n".join(body))


@pytest.mark.slow
def test_a_saved_model_has_the_same_nll_in_a_fresh_process(trained_run, corpus, tmp_path, python):
    """Both through the command, the folder moved away from where it was written, and torch.load out of reach."""
    assert evaluate.main(["--run", str(trained_run), "--json", str(tmp_path / "run.json"), "--dtype", "fp32"]) == 0
    assert push.main(["--run", str(trained_run), "--out", str(tmp_path / "written")]) == 0
    (elsewhere := tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "written", elsewhere / "model")
    code = (
        "import sys, pickle, torch\n"
        "def no(*a, **k): raise SystemExit('unpickled')\n"
        "torch.load = pickle.load = pickle.loads = no\n"
        "from atat_fast import evaluate\n"
        "sys.exit(evaluate.main(sys.argv[1:]))"
    )
    options = ("--model", "model", "--corpus", corpus, "--json", "out.json", "--dtype", "fp32")
    done = python("-c", code, *options, cwd=elsewhere, ATAT_FAST_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    run, model = (json.loads(Path(p).read_text()) for p in (tmp_path / "run.json", elsewhere / "out.json"))
    assert model["nll"] == pytest.approx(run["nll"], rel=1e-6) and model["nll_se"] == pytest.approx(run["nll_se"], rel=1e-5)
    assert model["tokens_sha256"] == run["tokens_sha256"] and model["step"] == run["step"]


def test_pushing(trained_run, tmp_path, monkeypatch, capsys):
    made, sent = [], {}

    def upload_folder(*, repo_id, folder_path, allow_patterns, commit_message):
        sent[repo_id] = {name: value for name, value in contents(Path(folder_path)).items() if name in allow_patterns}

    def create_repo(repository, **options):
        made.append((repository, options))
        return f"hub/{repository}"

    api = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    command, out = ["--run", str(trained_run), "--push", "me/small"], tmp_path / "kept"
    with pytest.raises(UsageError, match=f"push it later with  hf upload me/small {out}"):  # the hub cannot be reached
        push.main([*command, "--out", str(out)])
    assert (out / "model.safetensors").is_file()
    capsys.readouterr()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(network, "reachable", lambda: True)
    assert push.main([*command, "--private"]) == 0
    assert made == [("me/small", {"private": True, "exist_ok": True, "repo_type": "model"})]
    assert set(sent["me/small"]) == set(hub.FILES) - {hub.SCHEDULE} and b"me/small" in sent["me/small"]["README.md"]
    printed = capsys.readouterr().out
    assert "pushed hub/me/small" in printed and "nobody stated a licence" in printed and "wrote" not in printed
    api.create_repo = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("401 Unauthorized\nmore"))
    with pytest.raises(UsageError, match="me/small cannot be pushed: 401 Unauthorized; log in"):
        push.main(command)


def test_loading_from_the_hub_takes_the_files_it_knows(folder, monkeypatch):
    asked = {}
    for name, message in (
        ("nowhere", r"there is no folder nowhere, and it is no hub id"),
        ("me/not-cached", "neither a folder here nor in the local cache, and the hub cannot be reached"),
    ):
        with pytest.raises(UsageError, match=message):
            hub.from_pretrained(name)

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(network, "reachable", lambda: True)
    assert torch.equal(logits(hub.from_pretrained("me/small").model), logits(small()[0]))
    assert asked == {"repository": "me/small", "allow_patterns": list(hub.FILES), "local_files_only": False}


BAD = [
    (["--run", "nothing", "--out", "new"], "there is no run folder nothing"),
    (["--run", "nothing"], "give --out FOLDER, --push owner/name, or both"),
    (["--run", "nothing", "--push", "small"], "--push takes a hub id such as owner/name, got 'small'"),
    (["--run", "nothing", "--out", "a/b/c"], "cannot write a/b/c: its folder does not exist"),
    (["--run", "RUN", "--push", "me/small"], "me/small cannot be pushed: the hub cannot be reached; give --out FOLDER to save"),
    (["--run", "RUN", "--out", "there"], "there is already there"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_the_command_refuses_in_one_sentence(arguments, message, trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit) as left:
        run_command(push.main, [str(trained_run) if part == "RUN" else part for part in arguments])
    error = capsys.readouterr().err  # what was read may have been told before
    assert left.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert [f.name for f in tmp_path.iterdir()] == ["there"]
