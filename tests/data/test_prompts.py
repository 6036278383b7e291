"""Rows of prompts and responses: what is kept of each, and what sequences are made of them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from atat_fast.config import DataConfig
from atat_fast.data import SequenceLoader, open_split, packing, prepare
from atat_fast.errors import UsageError

ROWS = [{"prompt": f"the {i} of ", "response": f"list é {i * i}"} for i in range(40)]


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        path.write_text("".join(f"{a},{b}\n" for a, b in [("prompt", "response"), *(row.values() for row in rows)]), "utf-8")
    else:
        parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in ("response", "prompt")}), path)
    return str(path)


@pytest.fixture
def config(tmp_path):
    return DataConfig(corpus="", tokenizer="bytes", prompt_column="prompt", cache_dir=str(tmp_path / "cache"), num_workers=2)


def rows_of(split):
    """Each row's prompt and response as kept: tokens of bytes."""
    starts = np.concatenate(([0], split.rows[:, 0].cumsum()))
    for start, (length, prompt) in zip(starts, split.rows, strict=False):
        tokens = split.tokens[start : start + length].tolist()
        assert tokens[-1] == split.eos_id and split.eos_id not in tokens[:-1]
        yield bytes(tokens[:prompt]).decode(), bytes(tokens[prompt:-1]).decode()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("batch", [1, 1 << 17])
def test_every_row_is_kept_with_its_prompt_apart(config, kind, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch)
    config.corpus = write(tmp_path, kind, ROWS)
    data = prepare(config, progress=False)
    kept = [*rows_of(data.train), *rows_of(data.valid)]
    assert sorted(kept) == sorted(tuple(row.values()) for row in ROWS) and data.valid.num_documents > 0
    responses = [response for _, response in rows_of(data.train)]
    size = sum(len(text.encode()) for text in responses)
    assert data.train.bytes_per_token == pytest.approx(size / (size + len(responses)))
    counts = data.train.token_counts()
    assert counts.sum() == size + len(responses) and counts[ord("h")] == 0 and counts[data.train.eos_id] == len(responses)
    assert data.train.unigram_entropy() > 0


def test_sequences_are_padded_or_cut_and_too_long_prompts_left_out(config, tmp_path):
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in ((0, 1), (3, 4), (7, 2), (8, 2), (9, 1), (2, 30))]
    config.corpus = config.valid = write(tmp_path, "jsonl", rows)
    config.valid = write(tmp_path, "csv", rows[:2])
    split = prepare(config, progress=False).train
    assert split.num_sequences(8) == 4 and split.num_sequences(10) == 6 and split.num_sequences(1) == 1
    end, got = split.eos_id, {}
    for i in range(4):
        ((begin, stop),) = split.extents([i], 8)
        got[int(begin)] = int(stop)
        tokens = split.sequence(i, 8)
        assert len(tokens) == 8 and set(tokens[:begin]) <= {ord("p")} and set(tokens[begin:stop]) <= {ord("r"), end}
        assert (tokens[stop:] == end).all() and (stop == 8 or tokens[stop - 1] == end)
    assert got == {0: 2, 3: 8, 7: 8, 2: 8}  # with their ends, or cut at 8
    loader = SequenceLoader(split, 8, seed=3)
    tokens, extents = loader.batch(5, 9)[0], loader.extents(5, 9)
    assert extents.shape == (9, 2) and (extents[:, 0] < extents[:, 1]).all()
    for row, (begin, stop) in zip(tokens.tolist(), extents.tolist(), strict=True):
        assert set(row[:begin]) <= {ord("p")} and ord("p") not in row[begin:] and set(row[stop:]) <= {end}
    with pytest.raises(IndexError):
        split.sequence(4, 8)


def test_plain_text_has_no_extents(config, tmp_path):
    config.corpus, config.prompt_column, config.text_column = write(tmp_path, "jsonl", ROWS), None, "response"
    split = prepare(config, progress=False).train
    assert split.rows is None and split.extents([0], 4) is None and SequenceLoader(split, 4, seed=1).extents(0, 2) is None


def test_rows_are_prepared_once_and_apart_from_their_text_alone(config, tmp_path, monkeypatch):
    config.corpus = write(tmp_path, "jsonl", ROWS)
    first = prepare(config, progress=False)
    config.prompt_column, config.text_column = None, "response"
    text = prepare(config, progress=False)
    assert text.folder != first.folder
    config.prompt_column, config.text_column = "prompt", None
    monkeypatch.setattr(packing, "_write_split", lambda *args, **kwargs: pytest.fail("tokenised again"))
    again = prepare(config, progress=False)
    assert again.folder == first.folder and again.hashes() == first.hashes()
    assert (again.train.rows == first.train.rows).all()
    (tmp_path / "rows.jsonl").unlink()
    assert prepare(config, progress=False, hashes=first.hashes()).folder == first.folder


def test_where_a_prompt_ends_is_part_of_the_datas_identity(config, tmp_path):
    hashes = []
    for i, cut in enumerate((2, 3)):
        (folder := tmp_path / str(i)).mkdir()
        rows = [{"prompt": text[:cut], "response": text[cut:]} for text in (f"word {i}" for i in range(40))]
        config.corpus = write(folder, "jsonl", rows)
        hashes.append(prepare(config, progress=False).hashes())
    assert hashes[0]["train"] != hashes[1]["train"] and hashes[0]["train"][:64] == hashes[1]["train"][:64]


def test_a_damaged_file_of_rows_is_made_anew(config, tmp_path, caplog):
    config.corpus = write(tmp_path, "jsonl", ROWS)
    folder = prepare(config, progress=False).folder
    whole = (folder / "train.rows.bin").read_bytes()
    (folder / "train.rows.bin").write_bytes(bytes(len(whole)))
    with pytest.raises(UsageError, match=r"train\.rows\.bin is not what was written"):
        open_split(folder, "train")
    prepare(config, progress=False)
    assert (folder / "train.rows.bin").read_bytes() == whole and "preparing" in caplog.text


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        (ROWS, {"prompt_column": "question"}, "column 'question' is missing in .*; its columns are prompt, response"),
        (ROWS, {"text_column": "answer"}, "column 'answer' is missing in"),
        ([{"prompt": 5, "response": "a"}, {"prompt": "b", "response": "c"}], {}, "column 'prompt' is not text in line 1 of"),
        (ROWS[:1], {}, "is one row, and nothing is left to hold out: give held-out text with data.valid"),
        ([{"prompt": "a", "response": " "}, {"prompt": "b", "response": None}], {}, "holds no text"),
        (
            None,
            {"corpus": "python-docs"},
            "data.prompt_column 'prompt' needs rows with columns, and corpus python-docs has plain",
        ),
        (None, {"corpus": "text.txt"}, r"data.prompt_column 'prompt' needs rows with columns, and text\.txt is plain text"),
    ],
)
def test_what_is_refused(config, rows, settings, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text\n")
    if rows is not None:
        config.corpus = write(tmp_path, "jsonl", rows)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(UsageError, match=sentence):
        prepare(config, progress=False)


def test_blank_responses_are_left_out_and_named(config, tmp_path, caplog):
    config.corpus = write(tmp_path, "jsonl", [*ROWS, {"prompt": "nothing ", "response": "  "}, {"prompt": "none "}])
    data = prepare(config, progress=False)
    assert data.train.num_documents + data.valid.num_documents == len(ROWS)
    assert "2 row(s) without text in column 'response' are left out" in caplog.text
    config.corpus = write(tmp_path, "jsonl", [*ROWS, {"response": "an answer to nothing"}])
    data = prepare(config, progress=False)
    assert ("", "an answer to nothing") in [*rows_of(data.train), *rows_of(data.valid)]


def test_no_prompt_leaves_room(config, tmp_path):
    config.corpus = write(tmp_path, "jsonl", ROWS)
    split = prepare(config, progress=False).train
    with pytest.raises(
        UsageError, match=r"no prompt of the training rows is shorter than model.length 4; the shortest has 9 tokens"
    ):
        split.require_sequences(4)
