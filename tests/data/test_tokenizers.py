from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers as backend
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.data import Tokenizer, make_tokenizer
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
