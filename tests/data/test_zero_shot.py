"""Zero-shot sets: text put together again, blocks by MDLM's protocol, and a hash that tells one token set from another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from atat_fast.data import detokenize
from atat_fast.data.tokenizers import Tokenizer, make_tokenizer
from atat_fast.data.zero_shot import MDLM_TABLE, SETS, open_set, parse_sets, tokens_hash
from atat_fast.errors import UsageError

WRITTEN = [
    (detokenize.wikitext, " = The game 's 10 @,@ 000 @-@ year ( old ) = \n", " = The game's 10,000-year (old) =\n"),
    (detokenize.wikitext, 'He said " yes , sir " ; it was 3 @.@ 5 .', 'He said "yes, sir"; it was 3.5 .'),
    (detokenize.wikitext, "= = Plot = =", "== Plot =="),
    (detokenize.ptb, "mr. <unk> does n't own N N % of the $ N bank 's shares", "mr. ? doesn't own 1 1 % of the $1 bank's shares"),
    (detokenize.lm1b, 'He said : ( it \'s ) , " no " then .', 'He said: (it\'s), "no" then.'),
    (detokenize.lm1b, "See http : / / a.b / c for $ 5 or £ 3 ?", "See http://a.b/c for $5 or £3?"),
    (detokenize.lambada, "  “ No , ” he said ", '\n" No , " he said'),
    (detokenize.scientific_papers, "the method ( see [ 3 ] ) works .", "the method (see [3]) works."),
    (detokenize.plain, " as , it is ", " as , it is "),
]


@pytest.mark.parametrize(("function", "cut", "whole"), WRITTEN)
def test_text_is_put_together_as_the_benchmark_had_it(function, cut, whole):
    assert function(cut) == whole


def rows_file(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_blocks_are_the_protocols(tmp_path):
    tokenizer, rows = make_tokenizer("bytes"), ["abcd", "", "ef", "ghijklm"]
    found = open_set("ag_news", tokenizer, 7, rows_file(tmp_path, rows))
    eos = tokenizer.eos_id
    stream = [t for row in rows for t in (*row.encode(), eos)]  # a blank row is a document end
    want = [[eos, *stream[i : i + 5], eos] for i in range(0, len(stream) - 4, 5)]
    assert found.tokens.reshape(-1, 7).tolist() == want
    assert found.num_sequences(7) == len(want) == 3 and found.num_tokens == 21
    assert found.sequence(1, 7).tolist() == want[1]
    assert found.num_bytes == round(13 * 15 / 17)  # of the text in whole blocks
    kept = found.source.pop("tokens_kept")
    assert found.source.pop("unknown_share") == 0
    assert found.source == {"path": rows_file(tmp_path, rows), "rows": 4, "bytes": 13, "tokens": 17} and kept == 15 / 17


def test_every_thousand_rows_lose_their_remainder(tmp_path):
    tokenizer = make_tokenizer("bytes")
    found = open_set("ag_news", tokenizer, 12, rows_file(tmp_path, ["a"] * 2_003))
    assert found.num_sequences(12) == 200 + 200 + 0  # 2,000 tokens in tens, twice; three rows fill nothing
    assert found.source["rows"] == 2_003 and found.source["tokens_kept"] == 4_000 / 4_006
    assert found.describe(12) == "set ag_news: 2,003 rows, 4,006 tokens; 99.9% of them are in 400 blocks of 12"


def test_a_small_part_of_a_set_is_not_taken_for_the_set(tmp_path):
    """Rows too short to fill more than a block of every thousand."""
    rows = ["sentence"] * 1_000 + ["a"] * 1_500
    found = open_set("ptb", make_tokenizer("bytes"), 4_002, rows_file(tmp_path, rows))
    assert found.num_sequences(4_002) == 2 and found.source["tokens_kept"] == 8_000 / 12_000
    assert found.describe(4_002).startswith("set ptb: 2,500 rows, 12,000 tokens; 66.7% of them are in 2 blocks of 4,002. What is")
    assert "not the set: the protocol drops what is left of every 1,000 rows; a model of a smaller" in found.describe(4_002)
    with pytest.raises(UsageError, match=r"2,500 rows and 12,000 tokens; every 1,000 of them are joined, and that is too few"):
        open_set("ptb", make_tokenizer("bytes"), 9_003, rows_file(tmp_path, rows))


def test_berts_blocks_begin_with_its_own_start(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(names[:5])
    tokenizer = Tokenizer(backend, "words")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (2, 3, 4)
    found = open_set("lm1b", tokenizer, 5, rows_file(tmp_path, ["a b", "b b a"]))
    assert found.tokens.reshape(-1, 5).tolist() == [[2, 5, 6, 3, 3], [2, 6, 6, 5, 3]]


def test_a_word_that_looks_like_a_start_is_none():
    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer = Tokenizer(backend, "words")  # <s> is an ordinary word here: what strikes text out, say
    assert tokenizer.bos_id == tokenizer.eos_id


def test_the_hash_is_of_the_tokens_that_are_read(tmp_path):
    tokenizer, rows = make_tokenizer("bytes"), ["some text here"] * 9
    split = open_set("ag_news", tokenizer, 8, rows_file(tmp_path, rows))
    again = open_set("wikitext2", tokenizer, 8, rows_file(tmp_path, rows, "other.jsonl"))
    assert tokens_hash(split, 8) == tokens_hash(again, 8)
    rows[4] = "some text hero"
    other = open_set("ag_news", tokenizer, 8, rows_file(tmp_path, rows))
    hashes = {tokens_hash(split, 8), tokens_hash(other, 8), tokens_hash(split, 4), tokens_hash(split, 8, 3)}
    assert len(hashes) == 4
    wide = split.tokens.astype(np.uint16)
    split.tokens = wide  # whatever it is kept in
    assert tokens_hash(split, 8) == tokens_hash(again, 8)


def test_rows_of_text_files_and_columns(tmp_path):
    tokenizer = make_tokenizer("bytes")
    (tmp_path / "lines.txt").write_text("one two\n\nthree four\n")
    lines = open_set("ag_news", tokenizer, 5, str(tmp_path / "lines.txt"))
    assert lines.source["rows"] == 3
    sentences = tmp_path / "ptb.jsonl"
    sentences.write_text('{"sentence": "it is n\'t", "n": 1}\n' * 3)
    assert open_set("ptb", tokenizer, 6, str(sentences)).source["bytes"] == 3 * len("it isn't")
    (tmp_path / "text.jsonl").write_text('{"text": "it is n\'t"}\n' * 3)  # the hub calls the column otherwise
    assert open_set("ptb", tokenizer, 6, str(tmp_path / "text.jsonl")).source["bytes"] == 3 * len("it isn't")


def test_what_is_asked_for():
    assert parse_sets("all") == dict.fromkeys(MDLM_TABLE)
    assert parse_sets("ptb, lambada=a/b.jsonl") == {"ptb": None, "lambada": "a/b.jsonl"}
    assert set(MDLM_TABLE) < set(SETS) and len(MDLM_TABLE) == 7


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t, p: parse_sets("ptbb"), "there is no zero-shot set 'ptbb' .did you mean ptb"),
        (lambda t, p: parse_sets(" , "), "names no set"),
        (lambda t, p: open_set("news", t, 8), "there is no zero-shot set 'news'"),
        (lambda t, p: open_set("ptb", t, 2), "2 tokens are too few"),
        (lambda t, p: open_set("ptb", t, 8, str(p / "none.jsonl")), "there is no file or folder"),
        (lambda t, p: open_set("ptb", t, 8, rows_file(p, [])), "has 0 rows and 0 tokens; that is too few for one block of 8"),
        (
            lambda t, p: open_set("ptb", t, 80, rows_file(p, ["short"])),
            "1 rows and 6 tokens; that is too few for one block of 80",
        ),
        (lambda t, p: open_set("ptb", t, 8), "zero-shot set ptb needs .* hub cannot be reached; give its rows .* ptb=PATH"),
        (lambda t, p: open_set("ptb", t, 8, str(p)), "is one file, and .* holds 2"),
    ],
)
def test_sets_that_cannot_be_had_are_one_sentence(ask, message, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match=message):
        ask(make_tokenizer("bytes"), tmp_path)
