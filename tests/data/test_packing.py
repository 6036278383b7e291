from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atat_fast.config import DataConfig
from atat_fast.data import Tokenizer, make_tokenizer, open_split, packing, prepare
from atat_fast.data.corpora import open_corpus
from atat_fast.errors import UsageError


def brute_force(config: DataConfig, tokenizer: Tokenizer, split: Any) -> tuple[list[int], int, int]:
    ids: list[int] = []
    documents = list(open_corpus(config).documents(split))
    for text in documents:
        ids += [*tokenizer.encode(text), tokenizer.eos_id]
    return ids, len(documents), sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
@pytest.mark.parametrize("batch", [1, 50, 1 << 17])
def test_tokens_and_counts_are_those_of_one_document_at_a_time(
    config: DataConfig, tokenizer: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(packing.pieces, "__defaults__", (40,))  # cuts every document
    config.tokenizer = tokenizer
    dataset = prepare(config, progress=False)
    assert dataset.tokenizer.name == tokenizer
    for split in (dataset.train, dataset.valid):
        ids, documents, size = brute_force(config, dataset.tokenizer, split.name)
        assert split.tokens.tolist() == ids
        assert (split.num_tokens, split.num_documents, split.num_bytes) == (len(ids), documents, size)
        counts = dataset.manifest["splits"][split.name]
        assert counts["sha256"] == hashlib.sha256(np.array(ids, dtype="<u2").tobytes()).hexdigest()
    assert dataset.train.num_documents + dataset.valid.num_documents == 200


def test_windows(config: DataConfig) -> None:
    train = prepare(config).train
    length = 37
    n = train.num_sequences(length)
    assert n == train.num_tokens // length
    assert train.num_tokens % length != 0, "the test wants a partial window"
    joined = np.concatenate([train.sequence(i, length) for i in range(n)])
    assert np.array_equal(joined, train.tokens[: n * length])
    assert any((train.sequence(i, length)[:-1] == 256).any() for i in range(n)), "windows cross document ends"
    for i in (-1, n):
        with pytest.raises(IndexError, match=f"sequence {i} of {n}"):
            train.sequence(i, length)
    train.require_sequences(train.num_tokens)
    with pytest.raises(UsageError, match=f"{train.num_tokens:,} tokens, shorter than one sequence of {train.num_tokens + 1:,}"):
        train.require_sequences(train.num_tokens + 1)


def test_token_counts_and_entropy(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 1000)
    train = prepare(config).train
    counts = Counter(train.tokens.tolist())
    assert train.token_counts().shape == (258,)
    assert {i: c for i, c in enumerate(train.token_counts().tolist()) if c} == counts
    shares = [c / train.num_tokens for c in counts.values()]
    assert train.unigram_entropy() == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_tokens_cannot_be_written(config: DataConfig) -> None:
    with pytest.raises(ValueError, match="read-only"):
        prepare(config).train.tokens[0] = 1


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(packing, "_write_split", refuse)


def test_a_second_call_opens_what_is_there(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.tokenizer = "bpe-300"
    first = prepare(config)
    no_packing(monkeypatch)
    second = prepare(config)
    assert second.folder == first.folder
    assert second.manifest == first.manifest
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert prepare(config, tokenizer=first.tokenizer).folder == first.folder
    line = second.describe()
    assert "stories.txt" in line
    assert f"{first.train.num_tokens:,} tokens for training" in line
    assert "\n" not in line


def test_other_settings_have_other_folders(config: DataConfig, corpus_file: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("held out text")
    changes: list[dict[str, Any]] = [
        {},
        {"tokenizer": "bpe-300"},
        {"tokenizer": "bpe-301"},
        {"valid_fraction": 0.1},
        {"valid": str(held)},
        {"max_documents": 5},
    ]
    folders = {prepare(dataclasses.replace(config, **change)).folder for change in changes}
    with corpus_file.open("a") as file:
        file.write("\n<|endoftext|>\none more")
    folders.add(prepare(config).folder)
    assert len(folders) == len(changes) + 1
    assert prepare(dataclasses.replace(config, num_workers=1)).folder in folders, "the number of threads changes nothing"
    assert not list((tmp_path / "cache").glob("*part*"))


def test_a_given_tokenizer_is_used(config: DataConfig) -> None:
    other = make_tokenizer("bpe-280", ["some other text about other things"] * 50)
    config.tokenizer = "bpe-280"
    own = prepare(config)
    given = prepare(config, tokenizer=other)
    assert given.folder != own.folder
    assert given.tokenizer is other
    assert given.manifest["tokenizer"]["fingerprint"] == other.fingerprint
    assert given.train.tokens.tolist() == brute_force(config, other, "train")[0]


def test_bpe_is_trained_on_the_training_split_alone(config: DataConfig, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("zyzzyva " * 500)
    config.valid, config.tokenizer = str(held), "bpe-300"
    dataset = prepare(config)
    assert len(dataset.tokenizer.encode("zyzzyva")) == len("zyzzyva")


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "format", "tokenizer", "tokenizer_config", "missing"])
def test_a_damaged_folder_is_made_anew(config: DataConfig, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = prepare(config)
    want, folder = whole.train.tokens.tolist(), whole.folder
    train, manifest = folder / "train.bin", folder / "manifest.json"
    if damage == "truncate":
        os.truncate(train, train.stat().st_size - 1)
    elif damage == "flip":
        data = bytearray(train.read_bytes())
        data[10] ^= 1
        train.write_bytes(data)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif damage == "tokenizer_config":
        (folder / "tokenizer_config.json").write_text("{}")
    else:
        train.unlink()
    with pytest.raises(UsageError, match="delete it and prepare it again"):
        open_split(folder, "train")
    with caplog.at_level(logging.WARNING):
        again = prepare(config)
    assert "anew" in caplog.text
    assert again.folder == folder
    assert again.train.tokens.tolist() == want
    assert open_split(folder, "valid").num_tokens == again.valid.num_tokens
    assert not list(folder.parent.glob("*part*"))


def test_wide_vocabularies_take_four_bytes(config: DataConfig, tmp_path: Path) -> None:
    import tokenizers as backend

    words = {f"w{i}": i for i in range(70_000)}
    raw = backend.Tokenizer(backend.models.WordLevel(words, unk_token="w69999"))
    raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    raw.save(str(tmp_path / "wide.json"))
    config.tokenizer = str(tmp_path / "wide.json")
    dataset = prepare(config)
    assert dataset.train.tokens.dtype == np.uint32
    assert int(dataset.train.tokens.max()) == dataset.tokenizer.eos_id == 70_000
    assert dataset.train.token_counts().sum() == dataset.train.num_tokens


def test_text_that_becomes_the_mask_is_refused(config: DataConfig, tmp_path: Path) -> None:
    import tokenizers as backend

    raw = backend.Tokenizer(backend.models.WordLevel({"?": 0, "[MASK]": 1}, unk_token="?"))
    raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["[MASK]"])
    raw.save(str(tmp_path / "leaky.json"))
    config.tokenizer = str(tmp_path / "leaky.json")
    prepare(config)
    Path(config.corpus).write_text("a [MASK] b\n<|endoftext|>\nother [MASK] text")
    with pytest.raises(UsageError, match="mask token"):
        prepare(config)


@pytest.mark.parametrize("method", ["encode_batch", "lost"])
def test_ctrl_c_ends_tokenising_and_leaves_nothing(
    config: DataConfig, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(*args: Any) -> None:  # as a call of the library is
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        over.wait(5)

    over = threading.Event()
    tokenizer = make_tokenizer("bpe-270", ["some text about things"] * 50)
    monkeypatch.setattr(packing, "_batches", lambda documents, tokenizer: [[(text, True) for text in documents]])
    monkeypatch.setattr(tokenizer, method, deaf)
    before, begin = os.environ.get("TOKENIZERS_PARALLELISM"), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tokenizer=tokenizer)
    finally:
        over.set()
    assert time.monotonic() - begin < 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


@pytest.mark.parametrize(("ending", "share"), [("", 0.0), (" \U0001f600", 1 / 8), ("x" * 400 + "\u0416", 0.0)])
def test_the_share_of_unknown_characters(
    config: DataConfig, ending: str, share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import tokenizers as backend

    letters = {letter: i for i, letter in enumerate("?abcx ")}
    backend.Tokenizer(backend.models.BPE(letters, [], unk_token="?")).save(str(tmp_path / "small.json"))
    documents = [f"{'abcabc'[i % 6 :]}{'abcabc'[: i % 6]}{ending}" for i in range(60)]
    Path(config.corpus).write_text("\n<|endoftext|>\n".join(documents))
    config.tokenizer = str(tmp_path / "small.json")
    dataset = prepare(config)
    for split in (dataset.train, dataset.valid):
        assert split.unknown_share == dataset.manifest["splits"][split.name]["unknown_share"]
        assert split.unknown_share == pytest.approx(share, abs=0.003)
    assert (ending.endswith("\u0416")) == (0 < dataset.train.unknown_share < 0.01)
    assert len(caplog.records) == 2 * bool(share)
    if share:
        assert "lacks 12.5 % of the characters of the train split, '\U0001f600' for one" in caplog.text
        assert "bytes or bpe-N, which lose nothing" in caplog.text


def test_a_folder_without_the_share_still_opens(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(config).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    for counts in manifest["splits"].values():
        assert counts.pop("unknown_share") == 0.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    no_packing(monkeypatch)
    assert prepare(config).train.unknown_share == 0.0


def test_a_cache_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match=r"cannot write token files in .*ATAT_FAST_CACHE"):
        prepare(config)


def test_a_full_disk(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(UsageError, match="no space is left"):
        prepare(config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_empty_held_out_file(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    config.valid = str(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="no text to hold out"):
        prepare(config)


def test_bad_settings_write_nothing(config: DataConfig, tmp_path: Path) -> None:
    for change in ({"num_workers": -1}, {"tokenizer": "bpe-9"}, {"corpus": "wikitext-3"}, {"corpus": str(tmp_path / "no.txt")}):
        with pytest.raises(UsageError):
            prepare(dataclasses.replace(config, **change))
    assert not (tmp_path / "cache").exists()


def test_default_cache_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from atat_fast.data import cache_folder

    monkeypatch.setenv("ATAT_FAST_CACHE", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path
    monkeypatch.delenv("ATAT_FAST_CACHE")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "atat_fast"


def test_processes_that_prepare_at_once_agree(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys; from atat_fast.config import DataConfig; from atat_fast.data import prepare\n"
        "d = prepare(DataConfig(corpus=sys.argv[1], tokenizer='bpe-300', cache_dir=sys.argv[2]))\n"
        "print(d.folder, d.manifest['splits']['train']['sha256'], d.tokenizer.fingerprint)"
    )
    root = Path(packing.__file__).parents[2]
    command = [sys.executable, "-c", code, config.corpus, str(config.cache_dir)]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers) == 1
    config.tokenizer = "bpe-300"
    assert prepare(config).tokenizer.fingerprint in answers.pop(), "another process trains the same tokenizer"
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
