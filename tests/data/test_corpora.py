"""Corpora: files of every kind, data sets of the hub, the side that is held out, and one sentence for what cannot be read."""

import gzip
import json
import sys
import time

import pyarrow as pa
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from atat_fast.config import DataConfig
from atat_fast.data import network, python_docs
from atat_fast.data.corpora import HeldOut, articles, open_corpus
from atat_fast.errors import UsageError


def local(path, **settings):
    return open_corpus(DataConfig(corpus=str(path), **settings))


def both(corpus):
    return list(corpus.documents("train")), list(corpus.documents("valid"))


def everything(corpus):
    return sorted(text for side in both(corpus) for text in side)


def fails(part, corpus, **settings):
    with pytest.raises(UsageError) as error:
        both(local(corpus, **settings))
    assert part in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def shard(path, **columns):
    parquet.write_table(pa.table(columns), path)
    return path


def test_python_docs_are_prose_on_two_sides_that_share_nothing():
    train, valid = both(local("python-docs"))
    assert not set(train) & set(valid) and len(set(train)) == len(train)
    assert 0.03 < len(valid) / (len(train) + len(valid)) < 0.07
    assert 1e6 < sum(len(text.encode()) for text in train + valid) < 4e6
    assert min(map(len, train + valid)) >= python_docs.MIN_CHARACTERS
    assert any("Return an iterator" in text for text in train)
    assert len(python_docs.provenance()["sha256"]) == 64


def test_a_python_without_its_topics_gives_the_docstrings_that_can_be_read(monkeypatch, tmp_path):
    prose = "A module that has a docstring of some length."
    (tmp_path / "good.py").write_text(f'"""{prose}"""\n\nif True:\n    def f():\n        """{"x" * 50}"""\n')
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A docstring of a test, which is not prose for anyone."""\n')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    python_docs.documents.cache_clear()
    try:
        assert python_docs.documents() == (prose, "x" * 50)
    finally:
        python_docs.documents.cache_clear()


def test_documents_of_text_files_end_at_a_line_of_endoftext_or_a_form_feed(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\nstill one\n<|endoftext|>\n\ntwo <|endoftext|> two\n".encode())
    (tmp_path / "b.txt").write_bytes(b"three\x0cfour\n\x0c  \n\x0cfive")
    train, valid = both(local(tmp_path, valid_fraction=0.4))
    assert sorted(train + valid) == sorted(["one\n\nstill one", "two <|endoftext|> two", "three", "four", "five"])
    assert train and valid


def test_a_folder_reads_all_kinds_in_order(tmp_path):
    for folder in ("sub", ".hidden", "held"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("not a corpus file")
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "beta"}\n\n{"text": null}\n{"text": "lone \\ud800 surrogate"}\n')
    (tmp_path / "c.txt").write_text("gamma")
    (tmp_path / "held" / "v.txt").write_text("held out")
    shard(tmp_path / "a.parquet", id=[1, 2], text=pa.array(["alpha", None]))
    parts = {"sub": ["beta", "lone \ufffd surrogate"], "a.parquet": ["alpha"], "c.txt": ["gamma"]}
    for part, texts in parts.items():
        assert list(local(tmp_path / part, valid=str(tmp_path / "held")).documents("train")) == texts
    train, valid = both(local(tmp_path))
    whole = ["alpha", "gamma", "held out", "beta", "lone \ufffd surrogate"]
    assert {*train, *valid} == {*whole} and train == [text for text in whole if text in train]


def test_the_text_column_is_the_one_named_text_the_only_one_or_the_one_asked_for(tmp_path):
    path = rows(tmp_path / "x.jsonl", *({"id": i, "body": f"body {i}"} for i in range(30)))
    assert len(everything(local(path))) == 30
    rows(path, *({"id": i, "body": f"body {i}", "title": f"title {i}"} for i in range(30)))
    assert all(text.startswith("title") for text in everything(local(path, text_column="title")))
    for part, column in (("more than one text column", None), ("column 'nope' is missing", "nope")):
        assert "id, body, title" in fails(part, path, text_column=column)
    fails("column 'id' is not text", path, text_column="id")
    assert everything(local(rows(path, {"text": "a"}, {"txt": "b"}, {"text": "c"}))) == ["a", "c"]
    fails("is not text in line 2", rows(path, {"text": "a"}, {"text": 3}))
    assert "a, b, n" in fails("more than one text column", shard(tmp_path / "x.parquet", a=["x"], b=["y"], n=[1]))
    fails("no text column", shard(tmp_path / "x.parquet", n=[1]))


def test_the_text_column_is_chosen_after_many_rows_and_null_is_unknown(tmp_path, caplog):
    real = [{"text": f"the real text {i}"} for i in range(2, 40)]
    ids = [{"id": f"row-{i}"} | row for i, row in enumerate(real)]
    for first, following in (({"id": "row-1", "text": None}, ids), ({"text": None}, real), ({"title": "a title"}, real)):
        path = rows(tmp_path / "x.jsonl", first, *following)
        for column in (None, "text"):
            assert everything(local(path, text_column=column)) == sorted(row["text"] for row in real)
    assert f"{path}: 1 row(s) without text in column 'text' are left out" in caplog.messages
    late = ({"id": f"row-{i}", "body": None if i < 1500 else "a body"} for i in range(3000))
    fails("has more than one text column; its columns are id, body", rows(tmp_path / "late.jsonl", *late))
    fails("holds no text", rows(tmp_path / "empty.jsonl", *({"id": f"row-{i}", "text": None} for i in range(9))))
    always = rows(tmp_path / "always.jsonl", *({"body": f"b {i}", "meta": None} for i in range(9)))
    assert len(everything(local(always))) == 9  # read to its end, meta holds nothing


def test_the_text_column_of_several_files_is_chosen_from_all_of_them(tmp_path):
    for folder in ("json", "parquet"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        rows(tmp_path / "json" / f"{i}.jsonl", *({"id": f"{i}-{j}", "body": f"b {j}" if i else None} for j in range(9)))
    assert "the 2 files of" in fails("has more than one text column; its columns are id, body", tmp_path / "json")
    assert everything(local(tmp_path / "json", text_column="body", valid_fraction=0.5))
    shard(tmp_path / "parquet" / "0.parquet", id=["a", "b"], body=pa.nulls(2))
    fails("more than one text column", tmp_path / "parquet")
    shard(tmp_path / "parquet" / "1.parquet", id=[1, 2], body=["x", "y"])
    assert everything(local(tmp_path / "parquet", text_column="body", valid_fraction=0.5)) == ["x", "y"]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "JSON", "array.json", "pretty.json", "csv", "tsv"])
def test_every_kind_of_file_is_read_packed_or_not_and_damage_is_told(tmp_path, kind, packed):
    texts = [f'text {i}, with "quotes"' + "\nand a second line" * (kind != "txt") for i in range(40)]
    found = [{"n": i, "text": text} for i, text in enumerate(texts)]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    content = {
        "txt": "\r\n<|endoftext|>\r\n".join(texts),
        "jsonl": "".join(json.dumps(row) + "\n" for row in found),
        "JSON": "\n" + "".join(json.dumps(row) + "\r\n" for row in found),
        "array.json": json.dumps(found),
        "pretty.json": json.dumps(found, indent=2),
        "csv": "\ufeffn,text\r\n" + "".join(f"{i},{text}\r\n" for i, text in enumerate(quoted)),
        "tsv": "n\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(quoted)),
    }[kind].encode()
    half, path = len(content) // 2, tmp_path / f"file.{kind}{packed}"
    data = {
        "": lambda: content,
        ".gz": lambda: gzip.compress(content[:half]) + gzip.compress(content[half:]),  # several members, as pigz writes
        ".zst": lambda: pa.compress(content, codec="zstd", asbytes=True),
    }[packed]()
    path.write_bytes(data)
    assert everything(local(path)) == sorted(texts)
    for damaged in (data[:-5], content) if packed else ():
        path.write_bytes(damaged)
        fails("damaged or cut short", path)


def test_a_folder_is_read_whole_and_says_what_is_left_out(tmp_path, caplog):
    disk, folder = tmp_path / "disk2", tmp_path / "a"
    disk.mkdir()
    folder.mkdir()
    rows(disk / "b.jsonl", *({"text": f"second {i}"} for i in range(50)))
    rows(folder / "a.JSONL", *({"text": f"first {i}"} for i in range(40)))
    rows(folder / "index.jsonl", *({"hash": f"sha256-{i}"} for i in range(30)))
    (folder / "more").symlink_to(disk)
    (folder / "again").symlink_to(disk)  # the same folder once more, and a circle
    (disk / "back").symlink_to(folder)
    (folder / "same.jsonl").symlink_to(disk / "b.jsonl")
    (folder / "README.md").write_text("no text file")
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "text_bytes": 3}, indent=1))
    assert len(everything(local(folder))) == 90
    assert f"{folder}: left out dataset_info.json, index.jsonl (no column 'text')" in caplog.messages
    assert f"{folder}: left out README.md (a kind that is not read)" in caplog.messages
    assert len(caplog.messages) == 2  # once, however often the text is read
    (folder / "part-0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n' * 5))
    (folder / "notes.txt").write_text("licence\n<|endoftext|>\nnotes\n")
    assert len(everything(local(folder))) == 97


@pytest.mark.parametrize(("encoding", "mark"), [("utf-16", ""), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")])
def test_utf_16_is_read_if_its_mark_is_there(tmp_path, encoding, mark):
    path, text = tmp_path / "a.txt", "caf\u00e9 \u6f22\n<|endoftext|>\nb \U0001f600"
    path.write_bytes((mark + text).encode(encoding))
    assert everything(local(path)) == ["b \U0001f600", "caf\u00e9 \u6f22"]
    if mark:
        path.write_bytes(text.encode(encoding))
        fails("UTF-", path)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2).filter(lambda t: len(t.strip()) > 1), st.floats(0.01, 0.99))
def test_of_one_document_the_end_is_held_out(text, fraction):
    held = HeldOut(lambda: [text], fraction, "one", "")
    (train,), (valid,) = both(held)
    assert train + valid == text and train and valid
    assert held.provenance() == {"held_out": "the end of its one document"}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"fine\nnot \xff fine\n", ("byte 9", "a.txt")),
        ("a.txt", "caf\u00e9".encode("latin-1"), ("not UTF-8 at byte 3", "iconv -f LATIN1 -t UTF-8")),
        ("a.txt", b" \n\n", ("holds no text",)),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ("line 2", "a.jsonl")),
        ("a.jsonl", b'["text"]\n', ("not a JSON object",)),
        ("a.jsonl", b'{"text": "the same"}\n' * 100, ("is 100 times the same document", "data.valid")),
        ("a.parquet", b"PAR1 not really", ("not a parquet file",)),
        ("a.docx", b"text\n", ("is not a .txt, .jsonl, .json, .csv or .parquet file; convert it",)),
        ("a.csv", b"n;text\n1;one\n", ("are not separated by ','",)),
        ("a.csv", b'n,text\n1,"one\n2,two\n', ("is not a .csv file that can be read: unexpected end of data",)),
        ("empty", None, ("holds no text",)),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path, name, content, parts):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    assert all(part in fails(parts[0], tmp_path / name) for part in parts)


@pytest.mark.parametrize(
    ("part", "corpus", "settings"),
    [
        ("did you mean wikitext103", "wikitext-103", {}),
        ("did you mean python-docs", "pythondocs", {}),
        ("no file or folder", "./nowhere", {}),
        ("no file or folder", "nowhere.txt", {}),
        ("there is no file or folder ~nobody-at-all/x.txt", "~nobody-at-all/x.txt", {}),
        ("hub:owner/name", "owner/name", {}),
        ("names no data set", "hub:", {}),
        ("names no data set", "hub:a/b/c", {}),
        ("valid_fraction is 0", "python-docs", {"valid_fraction": 0}),
        ("valid_fraction is 1.0", "python-docs", {"valid_fraction": 1.0}),
        ("max_documents is -1", "python-docs", {"max_documents": -1}),
        ("has its own held-out text", "python-docs", {"valid": "x.txt"}),
        ("no file or folder", "a.txt", {"valid": "b.txt"}),
        ("did not see", "a.txt", {"valid": "a.txt"}),
    ],
)
def test_settings_that_cannot_be_met_are_one_sentence(part, corpus, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    fails(part, corpus, **settings)


def test_which_documents_are_held_out_depends_on_each_alone_and_neither_side_is_empty(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    train, valid = both(HeldOut(lambda: texts, 0.1, "c", ""))
    assert sorted(train + valid) == sorted(texts) and 150 < len(valid) < 250
    assert set(HeldOut(lambda: texts[::-1] * 2, 0.1, "c", "").documents("valid")) == set(valid), "order or repeats matter"
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        sides = [*map(len, both(HeldOut(lambda: texts[:3], fraction, "c", "")))]
        assert min(sides) >= 1 and sum(sides) == 3
    path = rows(tmp_path / "a.jsonl", *({"text": text} for text in texts[:100]))
    whole, cut = (both(local(path, valid_fraction=0.5, **options)) for options in ({}, {"max_documents": 3}))
    assert cut == (whole[0][:3], whole[1][:3])
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {i} has words.\nAnd a line.\n\n" for i in range(400)))
    (train,), (valid,) = both(local(tmp_path / "book.txt"))  # one text is held out at a paragraph
    assert valid.startswith("Paragraph") and train.endswith("line.\n\n") and len(valid) == pytest.approx(0.05 * 14_800, rel=0.1)


def test_wikitext_lines_become_articles():
    first = ["", " = First = \n", "", " Text of it . \n", "", " = = Section = = \n"]
    first += ["", " The sum is \n", " = 1 + 2 = \n", " three . \n"]
    second = ["", " = Second one = \n", "", " = = = Deep = = = \n", " End . \n", ""]
    found = list(articles(first + second))
    assert [text.splitlines()[0] for text in found] == [" = First = ", " = Second one = "]
    assert " = = Section = = \n\n The sum is \n = 1 + 2 = \n three . " in found[0]
    assert list(articles([])) == [""]


@pytest.fixture
def online(monkeypatch):
    """online(split={column: values}) stands in for datasets.load_dataset; the list it returns gets what is asked for."""

    def install(**splits):
        import datasets

        tables, asked = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}, []

        def load_dataset(repository, configuration, *, revision, split):
            asked.append((repository, configuration, revision, split))
            return tables if split is None else tables[split]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        monkeypatch.setattr(network, "reachable", lambda: True)
        return asked

    return install


def test_known_data_sets_of_the_hub_have_their_own_sides(online):
    asked = online(
        train={"text": ["", " = A = \n", "", " a \n", " = B = \n"]}, validation={"text": ["", " = V = \n", "", " v \n"]}
    )
    corpus = local("wikitext103")
    assert both(corpus) == ([" = A = \n\n a \n = B = "], [" = V = \n\n v "])
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", None, part) for part in ("train", "validation")]
    assert corpus.provenance()["repository"] == "Salesforce/wikitext"
    assert json.dumps([corpus.fingerprint, corpus.provenance()])
    online(**{"train[:-100000]": {"text": ["t1", "t2"]}, "train[-100000:]": {"text": ["v"]}})
    assert both(local("openwebtext")) == (["t1", "t2"], ["v"])
    asked = online(train={"text": ["t"]}, test={"text": ["v"]})
    assert both(local("lm1b")) == (["t"], ["v"]) and asked[0][2] == "refs/convert/parquet"


def test_any_data_set_of_the_hub_can_be_read(online):
    asked = online(train={"id": [1, 2], "content": ["a", "b"]}, test={"id": [3], "content": ["c"]})
    assert everything(local("hub:owner/name:small")) == ["a", "b"], "the test split is left alone"
    assert asked == [("owner/name", "small", None, None)]
    online(train={"text": ["a"]}, validation={"text": ["v"]})
    assert both(local("hub:owner/name")) == (["a"], ["v"])
    online(train={"a": ["x"], "b": ["y"]})
    assert "a, b" in fails("more than one text column", "hub:owner/name")


def test_failures_of_the_hub_are_one_sentence_and_found_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Config name is missing.\nPlease pick one among ['a', 'b']")

    started = time.monotonic()
    assert "python-docs" in fails("hub cannot be reached", "wikitext103")
    assert time.monotonic() - started < 10
    with monkeypatch.context() as patch:
        patch.setattr(network, "reachable", lambda: True)
        patch.setattr("datasets.load_dataset", refuse)
        fails("data set owner/name cannot be loaded: Config name is missing", "hub:owner/name")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert not network.reachable()
    assert time.monotonic() - started < network.KNOCK_SECONDS + 1
    with network.offline_mode():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
