"""Tokens that hold the end of one character and the beginning of the next."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from atat_fast.data.tokenizers import Tokenizer as Ours
from atat_fast.data.tokenizers import make_tokenizer
from atat_fast.evaluation.pieces import BROKEN, HIDDEN, PART, Pieces
from atat_fast.evaluation.trajectory import Recorder, page, show

TEXT = "a你好 😀\n\te\u0301é 👩‍👩‍👧🇩🇪🇫🇷 नमस्ते שלום مرحبا 👍🏽."
BYTES = make_tokenizer("bytes")
WORDS = ["[MASK]", "\u2581the", "\u2581a", "b"]


def sentencepiece():
    """Words with their spaces, and bytes for all other characters, which are decoded one by one until all are there."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["[MASK]"])
    return Ours(backend, "sentencepiece")


BPE = make_tokenizer("bpe-275", ["你好世界 你好世界 naïve naïve 😀😀 "] * 20)


def texts(tokenizer, ids):
    return [piece.text for piece in Pieces(tokenizer.decode, tokenizer.mask_id)(ids)]


def masked(tokenizer, ids, hidden):
    return [tokenizer.mask_id if i in hidden else token for i, token in enumerate(ids)]


def test_a_character_of_several_tokens_is_one_piece():
    nepali, family = ["न", "म", "स\u094d", "त\u0947"], ["👩‍👩‍👧", "🇩🇪", "🇫🇷"]
    assert "".join(texts(BYTES, BYTES.encode(TEXT))) == TEXT
    assert texts(BYTES, BYTES.encode(TEXT)) == [
        *"a你好 😀\n\t", "e\u0301", "é", " ", *family, " ", *nepali, " ", *"שלום مرحبا ", "👍🏽", "."
    ]  # fmt: skip


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_pieces_add_up_to_the_text_whatever_the_bytes(tokenizer):
    rng, pieces = random.Random(0), Pieces(tokenizer.decode, tokenizer.mask_id)
    for _ in range(300):
        letters = bytes(rng.choice(b"a \xe4\xbd\xa0\xf0\x9f\x98\x80\xc3\xa9\xef\xbf\xbd") for _ in range(12))
        ids = list(letters) if tokenizer is BYTES else [rng.randrange(tokenizer.model_vocab_size - 2) for _ in range(12)]
        found = pieces(ids)
        assert [piece.first for piece in found] == [0, *(piece.end for piece in found[:-1])] and found[-1].end == len(ids)
        plain = re.sub("[\0-\x08\x0b-\x1f\x7f]", lambda sign: f"^{chr(ord(sign[0]) ^ 64)}", tokenizer.decode(ids))
        plain = re.sub("[\x80-\x9f]", lambda sign: f"[U+{ord(sign[0]):04X}]", plain)
        assert "".join(piece.text for piece in found) == plain


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ({1}, ["a", None, PART, "好"]),
        ({2}, ["a", PART, None, PART, "好"]),
        ({3}, ["a", PART, None, "好"]),
        ({2, 3}, ["a", PART, None, None, "好"]),
        ({0, 4}, [None, "你", None, PART]),
        ({3, 4}, ["a", PART, None, None, PART]),
        (set(range(7)), [None] * 7),
    ],
)
def test_what_is_visible_of_a_partly_hidden_character_is_one_sign(hidden, shown):
    for tokenizer, first in ((BYTES, 0), (sentencepiece(), len(WORDS))):
        ids = [first + byte for byte in "a你好".encode()]
        assert texts(tokenizer, masked(tokenizer, ids, hidden)) == shown


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_nothing_broken_is_shown_while_valid_text_is_filled_in(tokenizer):
    ids, rng = tokenizer.encode("你好世界 naïve 😀😀" + TEXT), random.Random(0)
    assert len(texts(tokenizer, ids)) < len(ids)
    for _ in range(200):
        share = rng.random()
        now = masked(tokenizer, ids, {i for i in range(len(ids)) if rng.random() < share})
        shown = texts(tokenizer, now)
        assert shown.count(None) == now.count(tokenizer.mask_id)
        assert BROKEN not in "".join(text or "" for text in shown)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [  # broken bytes, a mark without its letter, and control characters
        ([0x80, 0x80, 97, 0xE4, 98, 0xE4, 0xBD], [BROKEN, BROKEN, "a", BROKEN, "b", BROKEN]),
        ([BYTES.mask_id, *"\u0301a".encode()], [None, PART + "\u0301", "a"]),
        ([*b"\x1b[31m\r\n\t\x00\x7f"], ["^[", *"[31m", "^M", "\n", "\t", "^@", "^?"]),
        ([*"\x85\u202eabc\u2066".encode()], ["[U+0085]", "[U+202E]", *"abc", "[U+2066]"]),
    ],
)
def test_what_is_no_plain_text_is_shown_by_signs(ids, shown):
    assert texts(BYTES, ids) == shown


def test_spaces_are_those_of_the_whole_text():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "un": 2, "##known": 3, ".": 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    words, pieces = Ours(backend, "wordpiece"), sentencepiece()
    assert texts(words, [1, 2, 3, 4]) == ["the", " un", "known", "."]
    assert texts(words, [1, words.mask_id, 3, words.mask_id, 1]) == ["the", None, "known", None, " the"]
    assert texts(pieces, [1, 2, 3]) == ["the", " a", "b"] and texts(pieces, [0, 1, 0, 3]) == [None, " the", None, "b"]


def test_the_view_marks_a_character_by_all_its_tokens():
    ids = BYTES.encode("a你b")
    view = show(ids, masked(BYTES, ids, {2, 3}), [3], Pieces(BYTES.decode, BYTES.mask_id))
    assert view.plain == "a你b" and [str(span.style) for span in view.spans] == ["bold", "black on green", "bold"]
    view = show([ids[0], BYTES.mask_id], [ids[0], 5], [1], Pieces(BYTES.decode, BYTES.mask_id))
    assert view.plain == f"a{HIDDEN}" and str(view.spans[-1].style) == "red"


def record(hidden, scores=None):
    """A page of "a你b", whose `hidden` tokens are revealed from the last to the first."""
    ids = BYTES.encode("a你b")
    tokens = torch.tensor([masked(BYTES, ids, hidden)])
    recorder = Recorder(tokens, BYTES.mask_id, scores=scores)
    for step, i in enumerate(sorted(hidden, reverse=True)):
        tokens[0, i] = ids[i]
        recorder(step, tokens)
    return page(recorder, Pieces(BYTES.decode, BYTES.mask_id), {"run": "x"})


def data_of(html):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL)[1])


def test_a_page_has_the_pieces_of_every_step_and_of_hiding_again():
    data = data_of(record({1, 2, 3}))
    assert data["start"] == ["a", None, None, None, "b"]
    assert [shown for _, _, shown in data["steps"]] == [[[3, PART]], [[2, PART], [3, ""]], [[1, "你"], [2, ""]]]
    recorder = Recorder(torch.tensor([[1, 9, 9]]), 9)
    for step, tokens in enumerate(([1, 4, 9], [1, 4, 9], [1, 9, 5], [1, 6, 5])):
        recorder(step, torch.tensor([tokens]))
    assert recorder.steps == [(0, [(1, 4)]), (2, [(1, 9), (2, 5)]), (3, [(1, 6)])] and recorder.tokens == [1, 6, 5]
    pieces = Pieces(lambda ids: "".join(f"<{i}>" for i in ids), 9)
    html = page(recorder, pieces, {"what": "</script><b>\udc80"})
    assert html.count("</script>") == 2 and "<b>" not in html and html.encode()
    data = data_of(html)
    assert data["importance"] is None and data["facts"]["what"] == f"</script><b>{BROKEN}"
    assert data["start"] == ["<1>", None, None] and data["given"] == [True, False, False]
    assert data["steps"] == [[0, [1], [[1, "<4>"]]], [2, [1, 2], [[1, None], [2, "<5>"]]], [3, [1], [[1, "<6>"]]]]


DOCUMENT = """
const made = {};
const element = () => ({style: {}, children: [], addEventListener() {}, appendChild(e) { this.children.push(e); return e; }});
globalThis.document = {createElement: element, getElementById: id => made[id] ??= element()};
"""
DRAW = """
console.log(JSON.stringify(frames.map((_, k) => {
  draw(k);
  return spans.map(s => [s.textContent, s.className, s.style.background || "", s.title]);
})));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_pages_script_draws_every_frame(tmp_path):
    """The script itself, on a document of a few lines: spans, classes and shades of a character of three tokens."""
    html = record({2, 3}, scores=lambda seen, share: torch.tensor([[0.0, 0.75, 0.5, 0.25, 0.0]]))
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    data = f"made.data = {{textContent: {json.dumps(json.dumps(data_of(html)))}}};"
    (tmp_path / "page.js").write_text(DOCUMENT + data + script + DRAW)
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60, check=True)
    start, one, two = json.loads(done.stdout)
    a, b, away = ["a", "given", "", "given"], ["b", "given", "", "given"], ["", "", "", ""]
    assert start == [a, [PART, "given", "", "given"], [HIDDEN, "hidden", "", "hidden"], [HIDDEN, "hidden", "", "hidden"], b]
    shade = "rgba(var(--shade), 0.150)"
    assert one[1:4] == [start[1], start[2], [PART, "new", shade, "step 1, importance 0.25"]]
    assert two == [a, ["你", "new", "rgba(var(--shade), 0.300)", "step 2, importance 0.5"], away, away, b]
