"""Tokenizers behind one small interface: bytes, a byte-level BPE trained here, or any tokenizer.json.

Every Tokenizer has one mask id and one end-of-document id: the vocabulary's own ([MASK] of BERT, <|endoftext|> of GPT-2) if it
has them, else new ids at the end. Plain text never becomes a special token: `encode` turns the letters "[MASK]" of a corpus into
letters, and only `encode_prompt` turns them into the mask.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import tokenizers as backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from atat_fast.data import network as hub
from atat_fast.data.background import in_background
from atat_fast.data.local import without_folders
from atat_fast.data.text import valid_unicode
from atat_fast.errors import UsageError, nearest
from atat_fast.files import expanded

MASK = "[MASK]"
END = "<|endoftext|>"
MASK_NAMES = (MASK, "<mask>", "<|mask|>", "<|mdm_mask|>")
START_NAMES = ("<s>", "[BOS]", "<bos>", "<|begin_of_text|>", "[CLS]")
END_NAMES = (END, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
NUM_BYTES = 256
SMALLEST_BPE = NUM_BYTES + 3  # the bytes, both specials and at least one merge
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
KNOWN_VOCABULARIES = {"gpt2": (50_258, 50_257), "bert-base-uncased": (30_522, 103)}
OURS = "atat_fast"  # the key of our settings in a tokenizer_config.json that transformers reads too
SAVED = ("vocab_size", "model_vocab_size", "mask_id", "eos_id", "fingerprint")
LARGEST_ID = (1 << 24) - 1  # a model needs a row for every id up to the largest
# Training time grows with the square of a word's length, so longer words are cut, in training only.
LONGEST_WORD = 1_000
_LONG_WORDS = "|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]"))
log = logging.getLogger("atat_fast.data")


class Tokenizer:
    """A `tokenizers.Tokenizer` with a mask and an end of document.

    Args:
        backend_tokenizer: The tokenizer. A missing mask or end-of-document token is appended to it.
        name: Its name in manifests: bytes, bpe-N, a path or a hub id.
        saved: What `save` wrote, if the tokenizer was saved.

    Attributes:
        name: As given.
        vocab_size: Ids of the vocabulary; [MASK] counts only if the vocabulary has its own.
        model_vocab_size: Ids a model needs: the vocabulary and the mask.
        mask_id: The mask's id; the vocabulary's own, else appended last.
        eos_id: The id that ends each document; the vocabulary's own, else appended.
        fingerprint: SHA-256 of the tokenizer's canonical content, mask and end of document included.
    """

    def __init__(self, backend_tokenizer: backend.Tokenizer, name: str, *, saved: dict[str, Any] | None = None) -> None:
        self.name = name
        self._backend = backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        if saved is None:
            self.eos_id = self._special(END_NAMES)
            own_size = self._size()
            self.mask_id = self._special(MASK_NAMES)
            self.vocab_size = own_size if self.mask_id >= own_size else self._size()
        else:  # in the file an appended mask looks like the vocabulary's own, so trust what was saved
            self.eos_id, self.mask_id, self.vocab_size = saved["eos_id"], saved["mask_id"], saved["vocab_size"]
        self.model_vocab_size = self._size()
        self._backend.encode_special_tokens = True  # not part of tokenizer.json: set on every load
        self._mask_text: str = self._backend.id_to_token(self.mask_id) or MASK
        content = json.loads(self._backend.to_str())
        self._content = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(self._content.encode()).hexdigest()
        self._unknown_text, self._unknown_id = _unknown(content["model"])
        # A BPE without bytes or an unknown token drops what its vocabulary lacks.
        self._leaves_out = (
            content["model"]["type"] == "BPE"
            and self._unknown_id is None
            and "ByteLevel" not in json.dumps([content["pre_tokenizer"], content["normalizer"]])
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.name}, vocab_size={self.vocab_size}, mask_id={self.mask_id}, eos_id={self.eos_id})"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added at either end. Lone surrogates, which are not valid Unicode, become U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Runs on the tokenizers library's threads, without Python's lock."""
        clean = [valid_unicode(text) for text in texts]
        if self.name == "bytes":  # the same ids; the library makes a string and offsets for every byte: 20 times slower
            return [list(text.encode("utf-8")) for text in clean]
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(clean, add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exception for text outside a vocabulary without an unknown token
            raise UsageError(f"tokenizer {self.name} cannot encode this text ({error}); choose another tokenizer") from error

    def lost(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> tuple[int, str]:
        """(number of characters of `texts` that became the unknown token or no token, one such piece of text or '').

        Args:
            texts: The argument of `encode_batch`.
            ids: Its result.

        White space counts only inside an unknown token. Texts with an unknown token are tokenised a second time.
        """
        lost: list[str] = []
        if self._leaves_out:
            for character in sorted(set().union(*texts)):
                if not character.isspace() and not self.encode(character):
                    lost += [character] * sum(text.count(character) for text in texts)
        elif self._unknown_id is not None:
            again = [valid_unicode(text) for text, row in zip(texts, ids, strict=True) if self._unknown_id in row]
            for text, encoding in zip(again, self._backend.encode_batch(again, add_special_tokens=False), strict=True):
                spans = zip(encoding.ids, encoding.offsets, strict=True)
                lost += [text[a:b] for i, (a, b) in spans if i == self._unknown_id and text[a:b] != self._unknown_text]
        return sum(map(len, lost)), lost[0] if lost else ""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text`, with the mask for each literal [MASK].

        If a word and the space before it are one token (GPT-2, bpe-N), one space before a [MASK] belongs to the hidden token:
        "the capital [MASK] France" hides the token " of".
        """
        parts = text.split(MASK)
        if self._words_hold_spaces:
            parts = [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += [self.mask_id] * (i > 0) + self.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: the mask as [MASK], other specials by name, broken UTF-8 as U+FFFD.

        Ids outside the vocabulary are left out.
        """
        kept = [int(i) for i in ids]
        kept = [i for i in kept if 0 <= i < self.model_vocab_size]
        text = self._backend.decode(kept, skip_special_tokens=False)
        return text if self._mask_text == MASK else text.replace(self._mask_text, MASK)

    def save(self, folder: str | Path, *, longest: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, and make the folder if needed.

        longest: a model's length, for a folder to give away. The settings are then those that transformers' AutoTokenizer reads,
        ours among them, and a path the tokenizer came from is cut to its last part.
        """
        folder = Path(folder)
        settings: dict[str, Any] = {"name": self.name, **{key: getattr(self, key) for key in SAVED}}
        if longest is not None:
            settings["name"] = without_folders(self.name)
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": longest,
                "clean_up_tokenization_spaces": False,
                "mask_token": self._mask_text,
                "eos_token": self._backend.id_to_token(self.eos_id),
                "pad_token": self._backend.id_to_token(self._own(PAD_NAMES, self.eos_id)),
                OURS: settings,
            }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKENIZER_FILE).write_text(self._content, encoding="utf-8")
            (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises UsageError if a file is missing, damaged or not the one saved."""
        folder = Path(folder)
        path = folder / SETTINGS_FILE
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            saved = saved.get(OURS, saved)
            missing = [key for key in ("name", *SAVED) if key not in saved]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{folder} holds no tokenizer saved by atat_fast: {path.name} cannot be read") from error
        if missing:
            raise UsageError(f"{path} was not saved by atat_fast: it has no {missing[0]}")
        tokenizer = cls(_from_file(folder / TOKENIZER_FILE), saved["name"], saved=saved)
        if any(getattr(tokenizer, key) != saved[key] for key in SAVED):
            raise UsageError(f"{folder / TOKENIZER_FILE} is not the tokenizer that was saved there; restore the folder")
        for token in tokenizer._backend.get_added_tokens_decoder().values():
            i = tokenizer._backend.token_to_id(token.content)
            word = tokenizer._backend.model.id_to_token(i)
            if word not in (None, token.content):  # saved before ids with holes were filled
                log.warning(
                    "the tokenizer in %s gives id %d to both %s and the word %r, and text made with it confuses the two; "
                    "prepare the corpus and train again in new folders",
                    *(folder, i, token.content, word),
                )
        return tokenizer

    @property
    def bos_id(self) -> int:
        """The id that some protocols put before a text: the vocabulary's own start, else its end of document (as GPT-2's)."""
        return self._own(START_NAMES, self.eos_id)

    @functools.cached_property
    def _words_hold_spaces(self) -> bool:
        """Whether the vocabulary has words that begin with a space, as byte-level BPE or SentencePiece write it."""
        return any(len(token) > 1 and token[0] in "\u0120\u2581" for token in self._backend.get_vocab())

    def _own(self, names: Sequence[str], default: int) -> int:
        """Id of the first of `names` that is a special token of the vocabulary, else `default`."""
        added = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        return next((added[name] for name in names if name in added), default)

    def _special(self, names: Sequence[str]) -> int:
        """Id of the first of `names` that is a special token of the vocabulary; if there is none, append one."""
        found = self._own(names, -1)
        if found >= 0:
            return found
        # If the name is an ordinary word of the vocabulary, text could produce it: take another name.
        free = next(name for name in (*names, *(f"<|{names[0]}-{i}|>" for i in range(99))) if not self._has(name))
        self._backend.add_special_tokens([backend.AddedToken(free, special=True, normalized=False)])
        return self._backend.get_vocab(with_added_tokens=True)[free]

    def _has(self, token: str) -> bool:
        return self._backend.token_to_id(token) is not None

    def _size(self) -> int:
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())


def make_tokenizer(setting: str, documents: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that DataConfig.tokenizer names.

    Args:
        setting: bytes, bpe-N, a path to a tokenizer.json (or the folder that holds it), or a hub id.
        documents: Text that bpe-N is trained on.

    Raises UsageError if there is no such tokenizer, N is unusable, or the hub cannot be reached.
    """
    check_setting(setting)
    if setting == "bytes":
        return _bytes()
    if _is_bpe(setting):
        return _train(int(setting.removeprefix("bpe-")), documents if documents is not None else ())
    path = expanded(setting)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        path = hub.tokenizer_file(setting)
    return Tokenizer(_from_file(path, fill=True), setting)


def vocabulary(setting: str) -> tuple[int, int]:
    """(model_vocab_size, mask_id) of the tokenizer that DataConfig.tokenizer names, without training or fetching it.

    A hub id outside KNOWN_VOCABULARIES is fetched all the same. Raises UsageError as `make_tokenizer` does.
    """
    if setting in KNOWN_VOCABULARIES and not Path(setting).exists():
        return KNOWN_VOCABULARIES[setting]
    check_setting(setting)
    if _is_bpe(setting):
        size = int(setting.removeprefix("bpe-"))
        return size, size - 1
    tokenizer = make_tokenizer(setting)
    return tokenizer.model_vocab_size, tokenizer.mask_id


def check_setting(setting: str) -> None:
    """Raises UsageError for a tokenizer setting that cannot work, before anything is read."""
    if _is_bpe(setting):
        size = setting.removeprefix("bpe-")
        if not (size.isascii() and size.isdigit()):
            raise UsageError(f"{size!r} in tokenizer {setting!r} is not a number; write for example bpe-4096")
        if int(size) < SMALLEST_BPE:
            raise UsageError(
                f"tokenizer {setting} is too small: {NUM_BYTES} bytes, the end of document and the mask come first; "
                f"use at least bpe-{SMALLEST_BPE}"
            )
    elif setting != "bytes":
        path = expanded(setting)
        if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
            raise UsageError(f"folder {setting} holds no {TOKENIZER_FILE}")
        looks_local = setting.endswith(".json") or setting.startswith((".", "/", "~")) or setting.count("/") > 1
        if not path.exists() and (looks_local or not hub.is_repository(setting)):
            raise UsageError(f"there is no tokenizer file {setting}; give a tokenizer.json, a hub id, bytes or bpe-N")
        close = nearest(setting, ["bytes", "bpe-4096"])
        if not path.exists() and (setting.lower().startswith(("bpe", "byte")) and "/" not in setting):
            raise UsageError(f"there is no tokenizer {setting!r}{close}; use bytes, bpe-N, a tokenizer.json or a hub id")


def _is_bpe(setting: str) -> bool:
    return setting.startswith("bpe-") and not setting.endswith(".json")


def setting_fingerprint(setting: str) -> str:
    """A string that differs between tokenizer settings: a file's SHA-256, else the setting itself."""
    path = expanded(setting)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if setting == "bytes" or _is_bpe(setting) or not path.is_file():
        return setting
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _byte_level(vocab: dict[str, int]) -> backend.Tokenizer:
    tokenizer = backend.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bytes() -> Tokenizer:
    return Tokenizer(_with_specials(_byte_level({letter: byte for byte, letter in enumerate(_byte_letters())})), "bytes")


def _train(size: int, documents: Iterable[str]) -> Tokenizer:
    tokenizer = _byte_level({})
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size - 2, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = tokenizer.pre_tokenizer
    cut = pre_tokenizers.Split(backend.Regex(_LONG_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    stop = threading.Event()

    def texts() -> Iterator[str]:
        for text in documents:
            if stop.is_set():
                raise KeyboardInterrupt
            yield valid_unicode(text)

    training = in_background(tokenizer.train_from_iterator, texts(), trainer)
    try:
        training.result()
    except BaseException:
        stop.set()
        wait([training], timeout=0.5)
        raise
    tokenizer.pre_tokenizer = words
    found = tokenizer.get_vocab_size() + 2
    if found < size:
        fits = f"bpe-{found} or less" if found >= SMALLEST_BPE else "bytes"
        raise UsageError(f"the training text gives only {found:,} tokens, not the {size:,} asked for; use {fits}, or more text")
    return Tokenizer(_with_specials(tokenizer), f"bpe-{size}")


def _with_specials(tokenizer: backend.Tokenizer) -> backend.Tokenizer:
    tokenizer.add_special_tokens([backend.AddedToken(name, special=True, normalized=False) for name in (END, MASK)])
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: its own if it prints, else the next code point from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(rest)) for byte in range(NUM_BYTES)]


def _unknown(model: dict[str, Any]) -> tuple[str | None, int | None]:
    """Text and id of the unknown token, from a tokenizer.json's model; None if there is none."""
    if model.get("unk_id") is not None:  # Unigram, whose vocabulary is a list
        return model["vocab"][model["unk_id"]][0], model["unk_id"]
    text = model.get("unk_token")
    return text, model["vocab"].get(text) if isinstance(model["vocab"], dict) else None


def _from_file(path: Path, *, fill: bool = False) -> backend.Tokenizer:
    """The tokenizer in `path`. `fill`: fill holes between its ids, if a special token could get a word's id."""
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = backend.Tokenizer.from_str(content)
        filled = _without_holes(content, path) if fill else content
        return tokenizer if filled is content else backend.Tokenizer.from_str(filled)
    except OSError as error:
        raise UsageError(f"cannot read tokenizer {path}: {error.strerror}") from error
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception for an invalid file
        raise UsageError(f"{path} is not a tokenizer.json that the tokenizers library can read") from error


def _without_holes(content: str, path: Path) -> str:
    """A tokenizer.json whose ids have no holes, if tokens will be added to it; else `content` as it is.

    The library gives an added token the number of words as its id, whatever the file says. If the ids have holes, that may be a
    word's id. So each hole is filled: by the added token to which the file gives that id, else by a word that no text has.
    """
    data = json.loads(content)
    words: dict[str, int] = data["model"]["vocab"]
    largest = max(words.values(), default=-1) if isinstance(words, dict) else -1
    if largest < len(words):
        return content
    if largest > LARGEST_ID:
        raise UsageError(f"{path} has {len(words):,} words but an id {largest:,}; number its words from 0 to {len(words) - 1:,}")
    added = data.get("added_tokens") or []
    special = {token["content"] for token in added if token["special"]}
    if (
        all(token["content"] in words for token in added)
        and not special.isdisjoint(END_NAMES)
        and not special.isdisjoint(MASK_NAMES)
    ):
        return content
    holes = set(range(largest)).difference(words.values())
    for token in added:
        if token["content"] not in words and token["id"] in holes:
            words[token["content"]] = token["id"]
            holes.remove(token["id"])
    name = "unused"
    while any(f"<|{name}-{i}|>" in words for i in holes):
        name += "_"
    words |= {f"<|{name}-{i}|>": i for i in holes}
    return json.dumps(data)
