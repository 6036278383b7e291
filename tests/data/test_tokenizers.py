"""Tokenizers: text comes back, special tokens own their ids, and what cannot be used is one sentence."""

import json
import os
import random
from pathlib import Path

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
def tokenizer(request):
    return {"bytes": BYTES, "bpe": BPE}[request.param]


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    for tokenizer in (BYTES, BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not {tokenizer.mask_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.encode_batch(["", text, "two words"]) == [[], ids, tokenizer.encode("two words")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 400)))
def test_any_ids_decode(ids):
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode(ids).count("[MASK]") >= ids.count(tokenizer.mask_id)


def test_bytes_are_their_values(tmp_path):
    assert BYTES.encode("héy\0") == list("héy\0".encode())
    BYTES.save(tmp_path)
    text = "".join(map(chr, range(0x800))) + "\u20ac \U0001f600"
    raw = backend.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode(text).ids == BYTES.encode(text), "the file tells other programs the same"
    assert (BYTES.eos_id, BYTES.mask_id, BYTES.model_vocab_size) == (256, 257, 258)
    assert BYTES.fingerprint.startswith("25faca83c193160c"), "saved runs know it by this"
    assert BYTES.decode([0xC3, 257, 0xA9]) == "\ufffd[MASK]\ufffd"


def test_bpe_has_exactly_the_tokens_asked_for_and_its_training_repeats_itself():
    assert BPE.vocab_size == BPE.model_vocab_size == 300 and (BPE.eos_id, BPE.mask_id) == (298, 299)
    assert len(BPE.encode("The quick brown fox")) < len("The quick brown fox")
    assert make_tokenizer("bpe-300", SAMPLE).fingerprint == BPE.fingerprint
    assert make_tokenizer("bpe-290", SAMPLE).fingerprint != BPE.fingerprint


def test_special_tokens_in_text_are_letters_and_in_prompts_masks(tokenizer):
    text = "a [MASK] b<|endoftext|>[MASK]"
    ids, prompt = tokenizer.encode(text), tokenizer.encode_prompt(text)
    assert tokenizer.mask_id not in ids and tokenizer.decode(ids) == text
    assert prompt.count(tokenizer.mask_id) == 2 and tokenizer.eos_id not in prompt
    assert tokenizer.encode_prompt("plain") == tokenizer.encode("plain")
    assert tokenizer.encode_prompt("[MASK]") == [tokenizer.mask_id]
    assert BPE.encode_prompt("The [MASK] fox") == [*BPE.encode("The"), BPE.mask_id, *BPE.encode(" fox")], "without its space"
    assert BYTES.encode_prompt("a [MASK]") == [97, 32, 257]


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    again = Tokenizer.load(tmp_path / "run")
    for key in ("name", "vocab_size", "model_vocab_size", "mask_id", "eos_id", "fingerprint"):
        assert getattr(again, key) == getattr(tokenizer, key)
    text = "some [MASK] text <|endoftext|> é"
    assert again.encode(text) == tokenizer.encode(text)


def of_another(path):
    make_tokenizer("bpe-290", SAMPLE).save(path.parent / "x")
    (path.parent / "x" / path.name).replace(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer_config.json", lambda path: path.write_text("{")),
        ("tokenizer_config.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", of_another),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_a_damaged_saved_tokenizer_is_a_sentence(name, damage, tmp_path):
    BPE.save(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UsageError, match="tokenizer") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def word_level(words, special):
    raw = backend.Tokenizer(backend.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(special)
    return raw


@pytest.mark.parametrize(
    ("words", "special", "eos", "mask", "size"),
    [(["?", "a", "b"], [], 3, 4, 5), (["?", "a", "[MASK]"], ["<mask>", "</s>"], 4, 3, 5)],
)
def test_a_tokenizer_file_gets_the_specials_it_lacks_and_is_not_cut_or_padded(words, special, eos, mask, size, tmp_path):
    raw = word_level(words, special)
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "words.json"))
    tokenizer = make_tokenizer(str(tmp_path / "words.json"))
    tokenizer.save(tmp_path / "saved")
    for read in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        assert (read.eos_id, read.mask_id, read.model_vocab_size) == (eos, mask, size)
        assert read.vocab_size == size - (mask == size - 1), "a mask that was added is beyond the vocabulary"
        assert read.decode([1, mask, 2]) == f"a [MASK] {words[2]}"
        assert read.encode(f"{words[2]} a a") == [2, 1, 1], "an ordinary word that looks like a mask stays that word"


PRUNED = {f"w{i}": i for i in range(20) if not 3 <= i < 8} | {"[UNK]": 20}  # 16 words, the largest id 20


def pruned(words, added, folder):
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
def test_specials_own_their_ids_where_ids_have_holes(words, added, eos, mask, size, tmp_path):
    path = pruned(words, added, tmp_path / "raw")
    tokenizer = make_tokenizer(str(path.parent))  # a folder will do
    tokenizer.save(tmp_path / "saved")
    other = backend.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for read in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        assert (read.eos_id, read.mask_id, read.model_vocab_size) == (eos, mask, size)
        ordinary = [word for word in words if word not in added]
        assert read.encode(" ".join(ordinary)) == [words[word] for word in ordinary]
        assert read.decode([0, eos, 16, mask]).split()[::2] == ["w0", "w16"]
    assert len(set(other.get_vocab().values())) == len(other.get_vocab()), "other programs read one token for each id"


def test_a_saved_tokenizer_that_confuses_two_tokens_says_so(tmp_path, caplog):
    raw = backend.Tokenizer.from_file(str(pruned(PRUNED, {}, tmp_path)))
    old = Tokenizer(raw, "old")  # as files with holes were read before
    old.save(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 16
    assert "gives id 16 to both <|endoftext|> and the word 'w16'" in caplog.text


@pytest.fixture(scope="module")
def shared():
    """Folder of larger test files, which only developers have."""
    root = Path(os.environ.get("ATAT_FAST_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    if not root.is_dir():
        pytest.skip(f"no folder of shared test files at {root}: set ATAT_FAST_SHARED to one")
    return root / "tokenizers"


@pytest.mark.parametrize(
    ("name", "fingerprint", "sizes"),
    [
        ("gpt2", "dd84a4fc109e9f0c", (50257, 50258, 50257, 50256)),
        ("bert-base-uncased", "71ebdce3a8bd45b1", (30522, 30522, 103, 102)),
    ],
)
def test_published_tokenizers_are_what_they_were_to_saved_runs(shared, name, fingerprint, sizes, tmp_path):
    tokenizer = make_tokenizer(str(shared / f"{name}.json"))
    assert tokenizer.fingerprint.startswith(fingerprint)
    vocab, _, mask, eos = sizes
    assert (tokenizer.vocab_size, tokenizer.model_vocab_size, tokenizer.mask_id, tokenizer.eos_id) == sizes
    assert not {mask, eos, 101} & set(tokenizer.encode("the capital [MASK] of [SEP] <|endoftext|> france"))
    assert tokenizer.encode_prompt("the [MASK] of").count(mask) == 1
    long = "It's 12,345 words, isn't it?  Yes\n\n and no. " * 40
    assert [token for part in pieces(long, 64) for token in tokenizer.encode(part)] == tokenizer.encode(long)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == vocab


def test_bpe_of_short_words_is_the_librarys():
    words = [*SAMPLE, "a" * 999, " " * 999, "漢" * 999, "-" * 999, "7" * 999]
    raw = backend.Tokenizer(backend.models.BPE())
    raw.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = backend.pre_tokenizers.ByteLevel.alphabet()
    trainer = backend.trainers.BpeTrainer(vocab_size=298, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    raw.train_from_iterator(words, trainer)
    ours, theirs = make_tokenizer("bpe-300", words)._backend.get_vocab(), raw.get_vocab()
    assert ours.items() >= theirs.items() and {i for i in ours.values() if i not in theirs.values()} <= {298, 299}


@pytest.mark.parametrize("alphabet", ["ACGT", "0123456789", "\u6f22\u5b57\u8a9e", "-=~", " \t"])
def test_long_words_are_cut_for_training_and_nothing_is_lost(alphabet):
    """A BPE's training takes time that grows with the square of a word's length."""
    text = "".join(random.Random(1).choices(alphabet, k=100_000))
    cut = backend.pre_tokenizers.Split(backend.Regex(tokenizers._LONG_WORDS), "isolated").pre_tokenize_str(text)
    assert "".join(part for part, _ in cut) == text and max(len(part) for part, _ in cut) == tokenizers.LONGEST_WORD
    tokenizer = make_tokenizer("bpe-259", [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ctrl_c_ends_the_training_of_a_bpe(python):
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
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (130, "")
    assert float(done.stdout) < 2, "the training itself takes 5 s from there"


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
def test_what_a_vocabulary_lacks_is_counted(model, text, count, example):
    raw = backend.Tokenizer(model)
    if not isinstance(model, (backend.models.BPE, backend.models.Unigram)):
        raw.pre_tokenizer = backend.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(raw, "small")
    texts = [text, "a a"]
    assert tokenizer.lost(texts, tokenizer.encode_batch(texts)) == (count, example)


@pytest.mark.parametrize(("special", "pad"), [([], "<|endoftext|>"), (["<pad>"], "<pad>"), (["[PAD]", "</s>"], "[PAD]")])
def test_transformers_pads_with_the_saved_tokenizer(special, pad, tmp_path):
    tokenizer = Tokenizer(word_level(["?", "a", "b"], special), "small")
    tokenizer.save(tmp_path, longest=16)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["pad_token"] == pad and said["eos_token"] == ("</s>" if "</s>" in special else "<|endoftext|>")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    assert theirs(["a", "a b"], padding=True)["input_ids"] == [[1, theirs.convert_tokens_to_ids(pad)], [1, 2]]
    assert theirs.pad_token == pad


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("bpe-258", "at least bpe-259"),
        ("bpe-0", "at least"),
        *((setting, "not a number") for setting in ("bpe-many", "bpe--5", "bpe-")),
        ("bpe4096", "did you mean bpe-4096"),
        ("byte", "did you mean bytes"),
        *((setting, "no tokenizer file") for setting in ("nowhere/tokenizer.json", "./nowhere", "no such thing")),
        *((setting, "hub cannot be reached") for setting in ("some-owner/some-model", "gpt2-unheard-of")),
    ],
)
def test_settings_that_cannot_be_met_are_one_sentence(setting, part):
    with pytest.raises(UsageError) as error:
        make_tokenizer(setting, ["text"])
    assert part in str(error.value) and setting in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["the words of a text and of the text", "a few words"])
def test_the_tokenizer_that_a_short_text_is_told_to_use_can_be_had(text):
    with pytest.raises(UsageError, match="tokens, not the 5,000 asked for; use b") as error:
        make_tokenizer("bpe-5000", [text])
    told = str(error.value).rpartition("use ")[2].removesuffix(", or more text").removesuffix(" or less")
    tokenizer = make_tokenizer(told, [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("content", [b"{", b'{"model": 1}', b"", b"\xff\xfe"])
def test_files_that_hold_no_tokenizer_are_one_sentence(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.json"):
        make_tokenizer(str(tmp_path / "a.json"))
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        make_tokenizer(str(tmp_path))


def test_text_ids_and_reading_that_fail_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"2 words but an id 4,000,000,000; number its words from 0 to 1"):
        make_tokenizer(str(pruned({"[UNK]": 0, "a": 4_000_000_000}, {}, tmp_path)))
    tokenizer = Tokenizer(backend.Tokenizer(backend.models.WordLevel({"a": 0}, unk_token="?")), "small")
    with pytest.raises(UsageError, match=r"tokenizer small cannot encode this text \(.*UNK.*choose another"):
        tokenizer.encode("b")

    def documents():
        yield "text"
        raise UsageError("no more text")

    with pytest.raises(UsageError, match="no more text"):  # what reads text raises through the training
        make_tokenizer("bpe-300", documents())


@given(st.text(st.characters(exclude_categories=[])))
def test_surrogates_become_replacement_characters(text):
    clean = valid_unicode(text)
    clean.encode("utf-8")
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert clean == text
    assert BYTES.decode(BYTES.encode(text)) == clean
    assert valid_unicode("a\ud800b") == "a\ufffdb"


@given(st.text("ab \n"), st.integers(1, 9))
def test_pieces_join_to_the_text(text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert [token for part in parts for token in BPE.encode(part)] == BPE.encode(text)
