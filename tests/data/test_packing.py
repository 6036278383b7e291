"""Token files: what is in them, when they are made anew, and that a run that ends early leaves none behind."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers as backend

from atat_fast.config import DataConfig
from atat_fast.data import cache_folder, make_tokenizer, open_split, packing, prepare
from atat_fast.data.corpora import open_corpus
from atat_fast.errors import UsageError


def one_by_one(config, tokenizer, split):
    documents = list(open_corpus(config).documents(split))
    ids = [token for text in documents for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    return ids, len(documents), sum(len(text.encode()) for text in documents)


@pytest.fixture
def no_packing(monkeypatch):
    return lambda: monkeypatch.setattr(packing, "_write_split", lambda *args, **kwargs: pytest.fail("tokenised again"))


@pytest.fixture
def use(config, tmp_path):
    """use(model, special=[]) writes a tokenizer file of that model, which the settings then name."""

    def use(model, *, words=True, special=()):
        raw = backend.Tokenizer(model)
        if words:
            raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
        raw.add_special_tokens(list(special))
        raw.save(str(tmp_path / "tokenizer.json"))
        config.tokenizer = str(tmp_path / "tokenizer.json")

    return use


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
@pytest.mark.parametrize("batch", [1, 50, 1 << 17])
def test_tokens_and_counts_are_those_of_one_document_at_a_time(config, tokenizer, batch, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(packing.pieces, "__defaults__", (40,))  # cuts every document
    config.tokenizer = tokenizer
    dataset = prepare(config, progress=False)
    assert dataset.tokenizer.name == tokenizer
    for split in (dataset.train, dataset.valid):
        ids, documents, size = one_by_one(config, dataset.tokenizer, split.name)
        assert split.tokens.tolist() == ids
        assert (split.num_tokens, split.num_documents, split.num_bytes) == (len(ids), documents, size)
        counts = dataset.manifest["splits"][split.name]
        assert counts["sha256"] == hashlib.sha256(np.array(ids, dtype="<u2").tobytes()).hexdigest()
    assert dataset.train.num_documents + dataset.valid.num_documents == 200


def test_sequences_are_the_whole_windows_of_a_split_whose_tokens_cannot_be_written(config):
    train, length = prepare(config).train, 37
    n = train.num_sequences(length)
    assert n == train.num_tokens // length and train.num_tokens % length != 0, "the test wants a partial window"
    windows = np.stack([train.sequence(i, length) for i in range(n)])
    assert np.array_equal(windows.ravel(), train.tokens[: n * length])
    assert (windows[:, :-1] == 256).any(), "windows cross document ends"
    for i in (-1, n):
        with pytest.raises(IndexError, match=f"sequence {i} of {n}"):
            train.sequence(i, length)
    train.require_sequences(train.num_tokens)
    with pytest.raises(UsageError, match=f"{train.num_tokens:,} tokens, shorter than one sequence of {train.num_tokens + 1:,}"):
        train.require_sequences(train.num_tokens + 1)
    with pytest.raises(ValueError, match="read-only"):
        train.tokens[0] = 1


def test_token_counts_and_entropy_are_those_of_the_whole_split(config, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 1000)
    train = prepare(config).train
    counts = Counter(train.tokens.tolist())
    assert train.token_counts().shape == (258,)
    assert {i: c for i, c in enumerate(train.token_counts().tolist()) if c} == counts
    shares = [c / train.num_tokens for c in counts.values()]
    assert train.unigram_entropy() == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_second_call_opens_what_is_there_and_an_earlier_versions_folder_too(config, no_packing):
    config.tokenizer = "bpe-300"
    first = prepare(config)
    no_packing()
    second = prepare(config)
    assert (second.folder, second.manifest) == (first.folder, first.manifest)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert prepare(config, tokenizer=first.tokenizer).folder == first.folder
    line = second.describe()
    assert "stories.txt" in line and f"{first.train.num_tokens:,} tokens for training" in line and "\n" not in line
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert [counts.pop("unknown_share") for counts in manifest["splits"].values()] == [0.0, 0.0]
    (first.folder / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(config).train.unknown_share == 0.0


def test_other_settings_have_other_folders(config, tmp_path):
    (tmp_path / "held.txt").write_text("held out text")
    changes = [
        {}, {"tokenizer": "bpe-300"}, {"tokenizer": "bpe-301"}, {"valid_fraction": 0.1}, {"valid": str(tmp_path / "held.txt")},
        {"max_documents": 5},
    ]  # fmt: skip
    made = {prepare(dataclasses.replace(config, **change)).folder for change in changes}
    with open(config.corpus, "a") as file:
        file.write("\n<|endoftext|>\none more")
    made.add(prepare(config).folder)
    assert len(made) == len(changes) + 1
    assert prepare(dataclasses.replace(config, num_workers=1)).folder in made, "the number of threads changes nothing"
    assert not list((tmp_path / "cache").glob("*part*"))


def test_a_given_tokenizer_is_used_and_bpe_is_trained_on_the_training_split_alone(config, tmp_path):
    given = make_tokenizer("bpe-280", ["some other text about other things"] * 50)
    config.tokenizer = "bpe-280"
    dataset = prepare(config, tokenizer=given)
    assert dataset.folder != prepare(config).folder
    assert dataset.tokenizer is given and dataset.manifest["tokenizer"]["fingerprint"] == given.fingerprint
    assert dataset.train.tokens.tolist() == one_by_one(config, given, "train")[0]
    (tmp_path / "held.txt").write_text("zyzzyva " * 500)
    config.valid = str(tmp_path / "held.txt")
    assert len(prepare(config).tokenizer.encode("zyzzyva")) == len("zyzzyva")


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.bin", lambda path: os.truncate(path, path.stat().st_size - 1)),
        ("train.bin", flip),
        ("train.bin", Path.unlink),
        ("manifest.json", lambda path: path.write_text(path.read_text()[:-20])),
        ("manifest.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))),
        ("tokenizer.json", lambda path: path.write_text("{}")),
        ("tokenizer_config.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_folder_is_made_anew(config, name, damage, caplog):
    whole = prepare(config)
    want, folder = whole.train.tokens.tolist(), whole.folder
    damage(folder / name)
    with pytest.raises(UsageError, match="delete it and prepare it again"):
        open_split(folder, "train")
    again = prepare(config)
    assert "anew" in caplog.text and again.folder == folder and again.train.tokens.tolist() == want
    assert open_split(folder, "valid").num_tokens == again.valid.num_tokens
    assert not list(folder.parent.glob("*part*"))


def test_wide_vocabularies_take_four_bytes(config, use):
    use(backend.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w69999"))
    dataset = prepare(config)
    assert dataset.train.tokens.dtype == np.uint32
    assert int(dataset.train.tokens.max()) == dataset.tokenizer.eos_id == 70_000
    assert dataset.train.token_counts().sum() == dataset.train.num_tokens


def test_text_that_becomes_the_mask_is_refused(config, use):
    use(backend.models.WordLevel({"?": 0, "[MASK]": 1}, unk_token="?"), special=["[MASK]"])
    prepare(config)
    Path(config.corpus).write_text("a [MASK] b\n<|endoftext|>\nother [MASK] text")
    with pytest.raises(UsageError, match="mask token"):
        prepare(config)


@pytest.mark.parametrize("method", ["encode_batch", "lost"])
def test_ctrl_c_ends_tokenising_and_leaves_nothing(config, method, monkeypatch):
    def deaf(*args):  # as a call of the library is
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        over.wait(5)

    over, tokenizer = threading.Event(), make_tokenizer("bpe-270", ["some text about things"] * 50)
    monkeypatch.setattr(packing, "_batches", lambda documents, tokenizer: [[packing.Piece(text, True) for text in documents]])
    monkeypatch.setattr(tokenizer, method, deaf)
    before, begin = os.environ.get("TOKENIZERS_PARALLELISM"), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tokenizer=tokenizer)
    over.set()
    assert time.monotonic() - begin < 2 and not left_of(config)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def left_of(config):
    return [path for path in Path(config.cache_dir).iterdir() if path.is_dir()]


@pytest.mark.parametrize(("ending", "share"), [("", 0.0), (" \U0001f600", 1 / 8), ("x" * 400 + "\u0416", 0.0)])
def test_the_share_of_unknown_characters_is_kept_and_told_if_it_is_large(config, use, ending, share, caplog):
    use(backend.models.BPE({letter: i for i, letter in enumerate("?abcx ")}, [], unk_token="?"), words=False)
    documents = [f"{'abcabc'[i % 6 :]}{'abcabc'[: i % 6]}{ending}" for i in range(60)]
    Path(config.corpus).write_text("\n<|endoftext|>\n".join(documents))
    dataset = prepare(config)
    for split in (dataset.train, dataset.valid):
        assert split.unknown_share == dataset.manifest["splits"][split.name]["unknown_share"]
        assert split.unknown_share == pytest.approx(share, abs=0.003)
    assert (ending.endswith("\u0416")) == (0 < dataset.train.unknown_share < 0.01)
    assert len(caplog.records) == 2 * bool(share)
    if share:
        assert "lacks 12.5 % of the characters of the train split, '\U0001f600' for one" in caplog.text
        assert "bytes or bpe-N, which lose nothing" in caplog.text


def test_a_cache_that_cannot_be_written_is_one_sentence(config, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(UsageError, match="no space is left"):
        prepare(config)
    assert not left_of(config)
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match=r"cannot write token files in .*ATAT_FAST_CACHE"):
        prepare(config)


def test_settings_that_cannot_be_met_write_nothing(config, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for change in ({"num_workers": -1}, {"tokenizer": "bpe-9"}, {"corpus": "wikitext-3"}, {"corpus": str(tmp_path / "no.txt")}):
        with pytest.raises(UsageError):
            prepare(dataclasses.replace(config, **change))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="no text to hold out"):
        prepare(dataclasses.replace(config, valid=str(tmp_path / "empty.txt")))


def test_the_cache_is_where_the_environment_says_or_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ATAT_FAST_CACHE", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path
    monkeypatch.delenv("ATAT_FAST_CACHE")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "atat_fast"


@pytest.mark.slow
def test_processes_that_prepare_at_once_agree(config):
    code = (
        "import sys; from atat_fast.config import DataConfig; from atat_fast.data import prepare\n"
        "d = prepare(DataConfig(corpus=sys.argv[1], tokenizer='bpe-300', cache_dir=sys.argv[2]))\n"
        "print(d.folder, d.manifest['splits']['train']['sha256'], d.tokenizer.fingerprint)"
    )
    command = [sys.executable, "-c", code, config.corpus, str(config.cache_dir)]
    root = Path(packing.__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(answers) == 1
    config.tokenizer = "bpe-300"
    assert prepare(config).tokenizer.fingerprint in answers.pop(), "another process trains the same tokenizer"
    assert len(left_of(config)) == 1
