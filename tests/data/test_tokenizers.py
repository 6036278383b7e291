from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers as backend
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.data import Tokenizer, make_tokenizer, tokenizers
from atat_fast.data.text import pieces, valid_unicode
from atat_fast.errors import UsageError

SAMPLE = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "naïve café — 12,345 dogs\n\n\tand foxes [MASK] <|endoftext|>",
] * 20
BYTES = make_tokenizer("bytes")
BPE = make_tokenizer("bpe-300", SAMPLE)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return {"bytes": BYTES, "bpe": BPE}[request.param]


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    for tokenizer in (BYTES, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.mask_id not in ids
        assert tokenizer.eos_id not in ids


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 400)))
def test_any_ids_decode(ids: list[int]) -> None:
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(ids).count("[MASK]") >= ids.count(tokenizer.mask_id)


def test_bytes_are_their_values(tmp_path: Path) -> None:
    assert BYTES.encode("héy\0") == list("héy\0".encode())
    BYTES.save(tmp_path)
    text = "".join(map(chr, range(0x800))) + "\u20ac \U0001f600"
    raw = backend.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode(text).ids == BYTES.encode(text), "the file tells other programs the same"
    assert (BYTES.eos_id, BYTES.mask_id, BYTES.model_vocab_size) == (256, 257, 258)
    assert BYTES.decode([0xC3, 257, 0xA9]) == "\ufffd[MASK]\ufffd"


def test_bpe_has_exactly_the_tokens_asked_for() -> None:
    assert BPE.vocab_size == BPE.model_vocab_size == 300
    assert (BPE.eos_id, BPE.mask_id) == (298, 299)
    assert len(BPE.encode("The quick brown fox")) < len("The quick brown fox")


def test_bpe_training_is_repeatable() -> None:
    assert make_tokenizer("bpe-300", SAMPLE).fingerprint == BPE.fingerprint
    assert make_tokenizer("bpe-290", SAMPLE).fingerprint != BPE.fingerprint


def test_special_tokens_in_text_are_letters_and_in_prompts_masks(tokenizer: Tokenizer) -> None:
    text = "a [MASK] b<|endoftext|>[MASK]"
    assert tokenizer.mask_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.encode_prompt(text)
    assert prompt.count(tokenizer.mask_id) == 2
    assert tokenizer.eos_id not in prompt
    assert tokenizer.encode_prompt("plain") == tokenizer.encode("plain")
    assert tokenizer.encode_prompt("[MASK]") == [tokenizer.mask_id]


def test_a_prompt_hides_the_space_with_the_word() -> None:
    assert BPE.encode_prompt("The [MASK] fox") == [*BPE.encode("The"), BPE.mask_id, *BPE.encode(" fox")]
    assert BYTES.encode_prompt("a [MASK]") == [97, 32, 257]


def test_batches_are_the_single_texts(tokenizer: Tokenizer) -> None:
    texts = ["", "one", "two words", "é"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    for key in ("name", "vocab_size", "model_vocab_size", "mask_id", "eos_id", "fingerprint"):
        assert getattr(again, key) == getattr(tokenizer, key)
    text = "some [MASK] text <|endoftext|> é"
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("damage", ["settings", "tokenizer", "other", "field", "missing"])
def test_a_damaged_saved_tokenizer_is_a_sentence(damage: str, tmp_path: Path) -> None:
    BPE.save(tmp_path)
    if damage == "settings":
        (tmp_path / "tokenizer_config.json").write_text("{")
    elif damage == "tokenizer":
        (tmp_path / "tokenizer.json").write_text("{}")
    elif damage == "other":
        make_tokenizer("bpe-290", SAMPLE).save(tmp_path / "x")
        (tmp_path / "x" / "tokenizer.json").replace(tmp_path / "tokenizer.json")
    elif damage == "field":
        (tmp_path / "tokenizer_config.json").write_text("{}")
    else:
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="tokenizer") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def word_level(words: list[str], special: list[str]) -> backend.Tokenizer:
    tokenizer = backend.Tokenizer(backend.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_a_tokenizer_file_without_specials_gets_both(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    word_level(["?", "a", "b"], []).save(str(path))
    tokenizer = make_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.mask_id, tokenizer.model_vocab_size) == (4, 3, 4, 5)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").vocab_size == 4
    assert tokenizer.decode([1, 4, 2]) == "a [MASK] b"


def test_a_mask_of_another_name_is_shown_as_mask(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    word_level(["?", "a", "[MASK]"], ["<mask>", "</s>"]).save(str(path))
    tokenizer = make_tokenizer(str(path))
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.model_vocab_size) == (3, 4, 5, 5)
    assert tokenizer.decode([1, 3]) == "a [MASK]"
    assert tokenizer.encode("[MASK] a") == [2, 1], "an ordinary word that looks like a mask stays that word"


def test_truncation_and_padding_of_a_file_are_switched_off(tmp_path: Path) -> None:
    raw = word_level(["?", "a"], [])
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "t.json"))
    assert make_tokenizer(str(tmp_path / "t.json")).encode("a a a") == [1, 1, 1]


UNK = {"[UNK]": 20}
PRUNED = {f"w{i}": i for i in range(20) if not 3 <= i < 8} | UNK  # 16 words, the largest id 20


def pruned(words: dict[str, int], added: dict[str, int], folder: Path) -> Path:
    """A tokenizer.json of words with these ids, and special tokens to which the file gives these."""
    raw = backend.Tokenizer(backend.models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(added))
    data = json.loads(raw.to_str())
    data["model"]["vocab"] = words
    for token in data["added_tokens"]:
        token["id"] = added[token["content"]]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("words", "added", "eos", "mask", "size"),
    [
        (PRUNED, {}, 21, 22, 23),
        (PRUNED | {"<|unused-5|>": 19, "w19": 21}, {}, 22, 23, 24),  # a word that looks like what fills a hole
        (PRUNED, {"[MASK]": 16, "</s>": 17}, 22, 21, 23),  # the ids of w16 and w17
        (PRUNED, {"[MASK]": 5, "</s>": 3}, 3, 5, 21),  # ids that no word has
        (PRUNED | {"[MASK]": 4, "[SEP]": 6}, {"[MASK]": 4, "[SEP]": 6}, 6, 4, 21),  # nothing is added
        (PRUNED | {"[MASK]": 4}, {}, 21, 22, 23),  # the mask's name is an ordinary word
    ],
)
def test_specials_own_their_ids_where_ids_have_holes(
    words: dict[str, int], added: dict[str, int], eos: int, mask: int, size: int, tmp_path: Path
) -> None:
    path = pruned(words, added, tmp_path / "raw")
    tokenizer = make_tokenizer(str(path))
    tokenizer.save(tmp_path / "saved")
    other = backend.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for read in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        assert (read.eos_id, read.mask_id, read.model_vocab_size) == (eos, mask, size)
        ordinary = [word for word in words if word not in added]
        assert read.encode(" ".join(ordinary)) == [words[word] for word in ordinary]
        assert read.decode([0, eos, 16, mask]).split()[::2] == ["w0", "w16"]
    assert len(set(other.get_vocab().values())) == len(other.get_vocab()), "other programs read one token for each id"


def test_a_far_id_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 words but an id 4,000,000,000; number its words from 0 to 1"):
        make_tokenizer(str(pruned({"[UNK]": 0, "a": 4_000_000_000}, {}, tmp_path)))


def test_a_saved_tokenizer_that_confuses_two_tokens_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = backend.Tokenizer.from_file(str(pruned(PRUNED, {}, tmp_path)))
    old = Tokenizer(raw, "old")  # as files with holes were read before
    old.save(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 16
    assert "gives id 16 to both <|endoftext|> and the word 'w16'" in caplog.text


def test_fingerprints_stay_those_of_saved_runs(shared: Path) -> None:
    assert BYTES.fingerprint.startswith("25faca83c193160c")
    assert make_tokenizer(str(shared / "tokenizers" / "gpt2.json")).fingerprint.startswith("dd84a4fc109e9f0c")
    assert make_tokenizer(str(shared / "tokenizers" / "bert-base-uncased.json")).fingerprint.startswith("71ebdce3a8bd45b1")


def test_bpe_of_short_words_is_the_librarys() -> None:
    words = [*SAMPLE, "a" * 999, " " * 999, "漢" * 999, "-" * 999, "7" * 999]
    raw = backend.Tokenizer(backend.models.BPE())
    raw.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = backend.pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = backend.trainers.BpeTrainer(vocab_size=298, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    raw.train_from_iterator(words, trainer)
    trained = make_tokenizer("bpe-300", words)
    assert {word: i for word, i in raw.get_vocab().items() if i < 298} == {
        word: i for word, i in trained._backend.get_vocab().items() if i < 298
    }


@pytest.mark.parametrize("alphabet", ["ACGT", "0123456789", "\u6f22\u5b57\u8a9e", "-=~", " \t"])
def test_long_words_are_cut_for_training_and_nothing_is_lost(alphabet: str) -> None:
    """A BPE's training takes time that grows with the square of a word's length."""
    text = "".join(random.Random(1).choices(alphabet, k=100_000))
    cut = backend.pre_tokenizers.Split(backend.Regex(tokenizers._LONG_WORDS), "isolated").pre_tokenize_str(text)
    assert "".join(part for part, _ in cut) == text and max(len(part) for part, _ in cut) == tokenizers.LONGEST_WORD
    tokenizer = make_tokenizer("bpe-259", [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ctrl_c_ends_the_training_of_a_bpe() -> None:
    code = """
import os, random, signal, threading, time
from atat_fast.data import make_tokenizer
def documents():
    rng = random.Random(0)
    for _ in range(200):
        yield " ".join(f"{rng.getrandbits(48):x}" for _ in range(1000))
    threading.Timer(0.3, lambda: (sent.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
sent = []
try:
    make_tokenizer("bpe-60000", documents())
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
    raise SystemExit(130)
"""
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert float(done.stdout) < 2, "the training itself takes 5 s from there"


def test_what_reads_text_raises_through_the_training() -> None:
    def documents() -> Any:
        yield "text"
        raise UsageError("no more text")

    with pytest.raises(UsageError, match="no more text"):
        make_tokenizer("bpe-300", documents())


@pytest.mark.parametrize(
    ("model", "text", "count", "example"),
    [
        (backend.models.WordLevel({"?": 0, "a": 1}, unk_token="?"), "a ? foo bar a", 6, "foo"),
        (backend.models.BPE({"?": 0, "a": 1, " ": 2}, [], unk_token="?"), "a жж a", 2, "ж"),
        (backend.models.BPE({"a": 0, " ": 1}, []), "жa b cж", 4, "b"),  # leaves them out
        (backend.models.Unigram([("?", 0.0), ("a", -1.0), (" ", -1.0)], 0, False), "a éé a", 2, "éé"),
        (backend.models.WordPiece({"?": 0, "a": 1, "##b": 2}, unk_token="?"), "ab a", 0, ""),
    ],
)
def test_what_a_vocabulary_lacks_is_counted(model: Any, text: str, count: int, example: str) -> None:
    raw = backend.Tokenizer(model)
    if not isinstance(model, (backend.models.BPE, backend.models.Unigram)):
        raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(raw, "small")
    texts = [text, "a a"]
    assert tokenizer.lost(texts, tokenizer.encode_batch(texts)) == (count, example)


def test_text_that_no_token_stands_for_is_one_sentence() -> None:
    tokenizer = Tokenizer(backend.Tokenizer(backend.models.WordLevel({"a": 0}, unk_token="?")), "small")
    with pytest.raises(UsageError, match=r"tokenizer small cannot encode this text \(.*UNK.*choose another"):
        tokenizer.encode("b")


@pytest.mark.parametrize(("special", "pad"), [([], "<|endoftext|>"), (["<pad>"], "<pad>"), (["[PAD]", "</s>"], "[PAD]")])
def test_transformers_pads_with_the_saved_tokenizer(special: list[str], pad: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(word_level(["?", "a", "b"], special), "small")
    tokenizer.save(tmp_path, longest=16)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == pad
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    assert theirs(["a", "a b"], padding=True)["input_ids"] == [[1, theirs.convert_tokens_to_ids(pad)], [1, 2]]
    assert theirs.pad_token == pad


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("bpe-258", "at least bpe-259"),
        ("bpe-0", "at least"),
        ("bpe-many", "not a number"),
        ("bpe--5", "not a number"),
        ("bpe-", "not a number"),
        ("bpe4096", "did you mean bpe-4096"),
        ("byte", "did you mean bytes"),
        ("nowhere/tokenizer.json", "no tokenizer file"),
        ("./nowhere", "no tokenizer file"),
        ("no such thing", "no tokenizer file"),
        ("some-owner/some-model", "hub cannot be reached"),
        ("gpt2-unheard-of", "hub cannot be reached"),
    ],
)
def test_bad_settings_are_one_sentence(setting: str, part: str) -> None:
    with pytest.raises(UsageError) as error:
        make_tokenizer(setting, ["text"])
    assert part in str(error.value)
    assert setting in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    for name, content in (("a.json", "{"), ("b.json", json.dumps({"model": 1})), ("c.json", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=name):
            make_tokenizer(str(tmp_path / name))
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"d\.json"):
        make_tokenizer(str(tmp_path / "d.json"))
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        make_tokenizer(str(tmp_path))


def test_too_little_text_for_so_many_tokens() -> None:
    with pytest.raises(UsageError, match="use bpe-"):
        make_tokenizer("bpe-5000", ["a few words"])


@given(st.text(st.characters(exclude_categories=[])))
def test_surrogates_become_replacement_characters(text: str) -> None:
    clean = valid_unicode(text)
    clean.encode("utf-8")
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert clean == text
    assert BYTES.decode(BYTES.encode(text)) == clean
    assert valid_unicode("a\ud800b") == "a\ufffdb"


@given(st.text("ab \n"), st.integers(1, 9))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert [token for part in parts for token in BPE.encode(part)] == BPE.encode(text)


@pytest.mark.parametrize(
    ("name", "vocab", "model_vocab", "mask", "eos"),
    [("gpt2", 50257, 50258, 50257, 50256), ("bert-base-uncased", 30522, 30522, 103, 102)],
)
def test_published_tokenizers(shared: Path, tmp_path: Path, name: str, vocab: int, model_vocab: int, mask: int, eos: int) -> None:
    tokenizer = make_tokenizer(str(shared / "tokenizers" / f"{name}.json"))
    assert tokenizer.vocab_size == vocab
    assert tokenizer.model_vocab_size == model_vocab
    assert (tokenizer.mask_id, tokenizer.eos_id) == (mask, eos)
    text = "the capital [MASK] of [SEP] <|endoftext|> france"
    assert not {mask, eos, 101} & set(tokenizer.encode(text))
    assert tokenizer.encode_prompt("the [MASK] of").count(mask) == 1
    long = "It's 12,345 words, isn't it?  Yes\n\n and no. " * 40
    assert [token for part in pieces(long, 64) for token in tokenizer.encode(part)] == tokenizer.encode(long)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == vocab
