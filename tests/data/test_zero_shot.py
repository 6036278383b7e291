"""Zero-shot sets: text put together again, blocks by MDLM's protocol, and a hash that tells one token set from another."""

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


BYTES = make_tokenizer("bytes")


@pytest.fixture
def opened(tmp_path):
    """opened(rows, length) is a set of these rows, in blocks of this many tokens."""

    def opened(rows, length, *, name="ag_news", tokenizer=BYTES, column="text", file="rows.jsonl"):
        text = "".join(json.dumps({column: row}) + "\n" for row in rows) if isinstance(rows, list) else rows
        (tmp_path / file).write_text(text, encoding="utf-8")
        return open_set(name, tokenizer, length, str(tmp_path / file))

    return opened


def test_blocks_are_the_protocols(opened, tmp_path):
    rows, eos = ["abcd", "", "ef", "ghijklm"], BYTES.eos_id
    found = opened(rows, 7)
    stream = [t for row in rows for t in (*row.encode(), eos)]  # a blank row is a document end
    want = [[eos, *stream[i : i + 5], eos] for i in range(0, len(stream) - 4, 5)]
    assert found.tokens.reshape(-1, 7).tolist() == want and found.sequence(1, 7).tolist() == want[1]
    assert found.num_sequences(7) == len(want) == 3 and found.num_tokens == 21
    assert found.num_bytes == round(13 * 15 / 17)  # of the text in whole blocks
    counts = {"rows": 4, "bytes": 13, "tokens": 17, "tokens_kept": 15 / 17, "unknown_share": 0}
    assert found.source == {"path": str(tmp_path / "rows.jsonl")} | counts


def test_every_thousand_rows_lose_their_remainder(opened):
    found = opened(["a"] * 2_003, 12)
    assert found.num_sequences(12) == 200 + 200 + 0  # 2,000 tokens in tens, twice; three rows fill nothing
    assert found.source["rows"] == 2_003 and found.source["tokens_kept"] == 4_000 / 4_006
    assert found.describe(12) == "set ag_news: 2,003 rows, 4,006 tokens; 99.9% of them are in 400 blocks of 12"


def test_a_small_part_of_a_set_is_not_taken_for_the_set(opened):
    """Rows too short to fill more than a block of every thousand."""
    rows = ["sentence"] * 1_000 + ["a"] * 1_500
    found = opened(rows, 4_002, name="ptb")
    assert found.num_sequences(4_002) == 2 and found.source["tokens_kept"] == 8_000 / 12_000
    said = found.describe(4_002)
    assert said.startswith("set ptb: 2,500 rows, 12,000 tokens; 66.7% of them are in 2 blocks of 4,002. What is")
    assert "not the set: the protocol drops what is left of every 1,000 rows; a model of a smaller" in said
    with pytest.raises(UsageError, match=r"2,500 rows and 12,000 tokens; every 1,000 of them are joined, and that is too few"):
        opened(rows, 9_003, name="ptb")


def test_berts_blocks_begin_with_its_own_start(opened):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(names[:5])
    tokenizer = Tokenizer(backend, "words")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (2, 3, 4)
    found = opened(["a b", "b b a"], 5, name="lm1b", tokenizer=tokenizer)
    assert found.tokens.reshape(-1, 5).tolist() == [[2, 5, 6, 3, 3], [2, 6, 6, 5, 3]]
    plain = Tokenizer(Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>")), "words")
    assert plain.bos_id == plain.eos_id, "<s> is an ordinary word here: what strikes text out, say"


def test_the_hash_is_of_the_tokens_that_are_read(opened):
    rows = ["some text here"] * 9
    split, again = opened(rows, 8), opened(rows, 8, name="wikitext2", file="other.jsonl")
    other = opened([*rows[:4], "some text hero", *rows[5:]], 8)
    assert tokens_hash(split, 8) == tokens_hash(again, 8)
    assert len({tokens_hash(split, 8), tokens_hash(other, 8), tokens_hash(split, 4), tokens_hash(split, 8, 3)}) == 4
    split.tokens = split.tokens.astype(np.uint16)  # whatever it is kept in
    assert tokens_hash(split, 8) == tokens_hash(again, 8)


def test_rows_are_lines_of_text_or_of_the_column_of_the_set(opened):
    assert opened("one two\n\nthree four\n", 5, file="lines.txt").source["rows"] == 3
    for column in ("sentence", "text"):  # the hub calls the column otherwise
        assert opened(["it is n't"] * 3, 6, name="ptb", column=column).source["bytes"] == 3 * len("it isn't")


def test_what_is_asked_for():
    assert parse_sets("all") == dict.fromkeys(MDLM_TABLE)
    assert parse_sets("ptb, lambada=a/b.jsonl") == {"ptb": None, "lambada": "a/b.jsonl"}
    assert set(MDLM_TABLE) < set(SETS) and len(MDLM_TABLE) == 7


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda opened, p: parse_sets("ptbb"), "there is no zero-shot set 'ptbb' .did you mean ptb"),
        (lambda opened, p: parse_sets(" , "), "names no set"),
        (lambda opened, p: open_set("news", BYTES, 8), "there is no zero-shot set 'news'"),
        (lambda opened, p: open_set("ptb", BYTES, 2), "2 tokens are too few"),
        (lambda opened, p: open_set("ptb", BYTES, 8, str(p / "none.jsonl")), "there is no file or folder"),
        (
            lambda opened, p: open_set("ptb", BYTES, 8),
            "zero-shot set ptb needs .* hub cannot be reached; give its rows .* ptb=PATH",
        ),
        (lambda opened, p: opened([], 8, name="ptb"), "has 0 rows and 0 tokens; that is too few for one block of 8"),
        (lambda opened, p: opened(["short"], 80), "1 rows and 6 tokens; that is too few for one block of 80"),
        (
            lambda opened, p: [opened("x", 3, file=f) for f in ("a.txt", "b.txt")] and open_set("ptb", BYTES, 8, str(p)),
            "is one file, and .* holds 2",
        ),
    ],
)
def test_sets_that_cannot_be_had_are_one_sentence(ask, message, opened, tmp_path):
    with pytest.raises(UsageError, match=message):
        ask(opened, tmp_path)
