from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from atat_fast.config import DataConfig
from atat_fast.data import corpora, python_docs
from atat_fast.data import network as hub
from atat_fast.data.corpora import Corpus, HeldOut, articles, open_corpus
from atat_fast.errors import UsageError


def both(corpus: Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("valid"))


def local(path: Path, **settings: Any) -> Corpus:
    return open_corpus(DataConfig(corpus=str(path), **settings))


def everything(corpus: Corpus) -> list[str]:
    return sorted(text for side in both(corpus) for text in side)


def fails(part: str, corpus: str | Path, **settings: Any) -> str:
    with pytest.raises(UsageError) as error:
        both(open_corpus(DataConfig(corpus=str(corpus), **settings)))
    assert part in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_python_docs() -> None:
    train, valid = both(open_corpus(DataConfig(corpus="python-docs")))
    assert not set(train) & set(valid)
    assert len(set(train)) == len(train)
    assert 0.03 < len(valid) / (len(train) + len(valid)) < 0.07
    assert 1e6 < sum(len(text.encode()) for text in train + valid) < 4e6
    assert min(map(len, train + valid)) >= python_docs.MIN_CHARACTERS
    assert any("Return an iterator" in text for text in train)
    assert len(python_docs.provenance()["sha256"]) == 64


def test_python_docs_of_a_bare_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        '"""A module that has a docstring of some length."""\n\nif True:\n    def f():\n        """' + "x" * 50 + '"""\n'
    )
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A docstring of a test, which is not prose for anyone."""\n')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    python_docs.documents.cache_clear()
    try:
        assert python_docs.documents() == ("A module that has a docstring of some length.", "x" * 50)
    finally:
        python_docs.documents.cache_clear()


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\nstill one\n<|endoftext|>\n\ntwo <|endoftext|> two\n".encode())
    (tmp_path / "b.txt").write_bytes(b"three\x0cfour\n\x0c  \n\x0cfive")
    train, valid = both(local(tmp_path, valid_fraction=0.4))
    assert sorted(train + valid) == sorted(["one\n\nstill one", "two <|endoftext|> two", "three", "four", "five"])
    assert train
    assert valid


def test_a_folder_reads_all_kinds_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("not a corpus file")
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "beta"}\n\n{"text": null}\n{"text": "lone \\ud800 surrogate"}\n')
    (tmp_path / "c.txt").write_text("gamma")
    parquet.write_table(pa.table({"id": [1, 2], "text": pa.array(["alpha", None])}), tmp_path / "a.parquet")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "v.txt").write_text("held out")
    parts = tmp_path / "sub", tmp_path / "a.parquet", tmp_path / "c.txt"
    assert [list(local(part, valid=str(tmp_path / "held")).documents("train")) for part in parts] == [
        ["beta", "lone \ufffd surrogate"],
        ["alpha"],
        ["gamma"],
    ]
    train, valid = both(local(tmp_path))
    assert set(train) | set(valid) == {"alpha", "beta", "lone \ufffd surrogate", "gamma", "held out"}
    assert train == [text for text in ["alpha", "gamma", "held out", "beta", "lone \ufffd surrogate"] if text in train]


def test_the_text_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"id": i, "body": f"body {i}"} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, valid = both(local(path))
    assert len(train) + len(valid) == 30
    path.write_text("\n".join(json.dumps(row | {"title": f"title {row['id']}"}) for row in rows))
    assert "id, body, title" in fails("more than one text column", path)
    train, _ = both(local(path, text_column="title"))
    assert train[0].startswith("title")
    assert "id, body, title" in fails("column 'nope' is missing", path, text_column="nope")
    fails("column 'id' is not text", path, text_column="id")
    path.write_text('{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n')
    assert everything(local(path)) == ["a", "c"]
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    fails("is not text in line 2", path)
    parquet.write_table(pa.table({"a": ["x"], "b": ["y"], "n": [1]}), tmp_path / "x.parquet")
    assert "a, b, n" in fails("more than one text column", tmp_path / "x.parquet")
    parquet.write_table(pa.table({"n": [1]}), tmp_path / "x.parquet")
    fails("no text column", tmp_path / "x.parquet")


def rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_the_text_column_is_chosen_after_many_rows_and_null_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    real = [{"text": f"the real text {i}"} for i in range(2, 40)]
    ids = [{"id": f"row-{i}"} | row for i, row in enumerate(real)]
    for first, following in (({"id": "row-1", "text": None}, ids), ({"text": None}, real), ({"title": "a title"}, real)):
        path = rows(tmp_path / "x.jsonl", [first, *following])
        for column in (None, "text"):
            assert everything(local(path, text_column=column)) == sorted(row["text"] for row in real)
    assert f"{path}: 1 row(s) without text in column 'text' are left out" in caplog.messages
    body = [{"id": f"row-{i}", "body": None if i < 1500 else "a body"} for i in range(3000)]
    fails("has more than one text column; its columns are id, body", rows(tmp_path / "late.jsonl", body))
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        rows(
            tmp_path / "shards" / f"{shard}.jsonl",
            [{"id": f"{shard}-{i}", "body": f"b {i}" if shard else None} for i in range(9)],
        )
    assert "the 2 files of" in fails("has more than one text column; its columns are id, body", tmp_path / "shards")
    assert both(local(tmp_path / "shards", text_column="body", valid_fraction=0.5))
    only = rows(tmp_path / "empty.jsonl", [{"id": f"row-{i}", "text": None} for i in range(9)])
    fails("holds no text", only)
    always = rows(tmp_path / "always.jsonl", [{"body": f"b {i}", "meta": None} for i in range(9)])
    assert sum(map(len, both(local(always)))) == 9  # read to its end, meta holds nothing


def test_a_parquet_shard_of_nulls(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"id": ["a", "b"], "body": pa.nulls(2)}), tmp_path / "0.parquet")
    fails("more than one text column", tmp_path)
    parquet.write_table(pa.table({"id": [1, 2], "body": ["x", "y"]}), tmp_path / "1.parquet")
    assert everything(local(tmp_path, text_column="body", valid_fraction=0.5)) == ["x", "y"]


PACKED = ("", ".gz", ".zst")


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "JSON", "array", "pretty", "csv", "tsv"])
def test_every_kind_of_file_packed_or_not(tmp_path: Path, kind: str, packed: str) -> None:
    texts = [f'text {i}, with "quotes"' + "\nand a second line" * (kind != "txt") for i in range(40)]
    found = [{"n": i, "text": text} for i, text in enumerate(texts)]
    delimiter = "," if kind == "csv" else "\t"
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    content = {
        "txt": "\r\n<|endoftext|>\r\n".join(texts),
        "jsonl": "".join(json.dumps(row) + "\n" for row in found),
        "JSON": "\n" + "".join(json.dumps(row) + "\r\n" for row in found),
        "array": json.dumps(found),
        "pretty": json.dumps(found, indent=2),
        "csv": "\ufeffn,text\r\n" + "".join(f"{i},{text}\r\n" for i, text in enumerate(quoted)),
        "tsv": f"n{delimiter}text\n" + "".join(f"{i}{delimiter}{text}\n" for i, text in enumerate(quoted)),
    }[kind].encode()
    suffix = "json" if kind in ("array", "pretty") else kind
    path = tmp_path / f"file.{suffix}{packed}"
    data = content if not packed else pa.compress(content, codec={".gz": "gzip", ".zst": "zstd"}[packed], asbytes=True)
    if packed == ".gz":  # as pigz and cat write it: several members
        half = len(content) // 2
        data = gzip.compress(content[:half]) + gzip.compress(content[half:])
    path.write_bytes(data)
    assert everything(local(path)) == sorted(texts)
    if packed:
        path.write_bytes(data[: len(data) - 5])
        fails("damaged or cut short", path)
        path.write_bytes(content)
        fails("damaged or cut short", path)


def test_a_folder_is_read_whole_and_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk, folder = tmp_path / "disk2", tmp_path / "a"
    disk.mkdir()
    folder.mkdir()
    rows(disk / "b.jsonl", [{"text": f"second {i}"} for i in range(50)])
    rows(folder / "a.JSONL", [{"text": f"first {i}"} for i in range(40)])
    rows(folder / "index.jsonl", [{"hash": f"sha256-{i}"} for i in range(30)])
    (folder / "more").symlink_to(disk)
    (folder / "again").symlink_to(disk)  # the same folder once more, and a circle
    (disk / "back").symlink_to(folder)
    (folder / "same.jsonl").symlink_to(disk / "b.jsonl")
    (folder / "README.md").write_text("no text file")
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "text_bytes": 3}, indent=1))
    assert sum(map(len, both(local(folder)))) == 90
    assert f"{folder}: left out dataset_info.json, index.jsonl (no column 'text')" in caplog.messages
    assert f"{folder}: left out README.md (a kind that is not read)" in caplog.messages
    assert len(caplog.messages) == 2  # once, however often the text is read
    (folder / "part-0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n' * 5))
    (folder / "notes.txt").write_text("licence\n<|endoftext|>\nnotes\n")
    assert sum(map(len, both(local(folder)))) == 97


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_with_a_mark_is_read_and_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    text = "caf\u00e9 \u6f22\n<|endoftext|>\nb \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    assert everything(local(tmp_path / "a.txt")) == ["b \U0001f600", "caf\u00e9 \u6f22"]
    if not mark:
        return
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    fails("UTF-", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "iconv -f LATIN1 -t UTF-8" in fails("not UTF-8 at byte 3", tmp_path / "a.txt")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2).filter(lambda t: len(t.strip()) > 1), st.floats(0.01, 0.99))
def test_of_one_document_the_end_is_held_out(text: str, fraction: float) -> None:
    held = HeldOut(lambda: [text], fraction, "one", "")
    (train,), (valid,) = (list(held.documents(split)) for split in ("train", "valid"))
    assert train + valid == text and train and valid
    assert held.provenance() == {"held_out": "the end of its one document"}


def test_one_text_file_is_held_out_at_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {i} has words.\nAnd a line.\n\n" for i in range(400)))
    (train,), (valid,) = both(local(tmp_path / "book.txt"))
    assert valid.startswith("Paragraph") and train.endswith("line.\n\n") and len(valid) == pytest.approx(0.05 * 14_800, rel=0.1)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine\n")
    assert "a.txt" in fails("byte 9", tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "a.jsonl" in fails("line 2", tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('["text"]\n')
    fails("not a JSON object", tmp_path / "b.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    fails("not a parquet file", tmp_path / "a.parquet")
    (tmp_path / "a.docx").write_text("text\n")
    fails("is not a .txt, .jsonl, .json, .csv or .parquet file; convert it", tmp_path / "a.docx")
    (tmp_path / "empty").mkdir()
    fails("holds no text", tmp_path / "empty")
    (tmp_path / "e.txt").write_text(" \n\n")
    fails("holds no text", tmp_path / "e.txt")
    (tmp_path / "semicolons.csv").write_text("n;text\n1;one\n")
    fails("are not separated by ','", tmp_path / "semicolons.csv")
    (tmp_path / "open.csv").write_text('n,text\n1,"one\n2,two\n')
    fails("is not a .csv file that can be read: unexpected end of data", tmp_path / "open.csv")
    fails("there is no file or folder ~nobody-at-all/x.txt", "~nobody-at-all/x.txt")
    (tmp_path / "same.jsonl").write_text('{"text": "the same"}\n' * 100)
    assert "data.valid" in fails("is 100 times the same document", tmp_path / "same.jsonl")


def test_bad_names(tmp_path: Path) -> None:
    fails("did you mean wikitext103", "wikitext-103")
    fails("did you mean python-docs", "pythondocs")
    fails("no file or folder", tmp_path / "nowhere")
    fails("no file or folder", "nowhere.txt")
    fails("hub:owner/name", "owner/name")
    fails("names no data set", "hub:")
    fails("names no data set", "hub:a/b/c")
    fails("valid_fraction is 0", "python-docs", valid_fraction=0)
    fails("valid_fraction is 1.0", "python-docs", valid_fraction=1.0)
    fails("max_documents is -1", "python-docs", max_documents=-1)
    fails("has its own held-out text", "python-docs", valid="x.txt")
    (tmp_path / "a.txt").write_text("text")
    fails("no file or folder", tmp_path / "a.txt", valid=str(tmp_path / "b.txt"))
    fails("did not see", tmp_path / "a.txt", valid=str(tmp_path / "a.txt"))


def test_held_out_documents() -> None:
    texts = [f"document {i}" for i in range(2000)]
    held_out = HeldOut(lambda: texts, 0.1, "c", "")
    train, valid = list(held_out.documents("train")), list(held_out.documents("valid"))
    assert sorted(train + valid) == sorted(texts)
    assert 150 < len(valid) < 250
    assert set(HeldOut(lambda: texts[::-1] * 2, 0.1, "c", "").documents("valid")) == set(valid), "order or repeats matter"
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        few = HeldOut(lambda: texts[:3], fraction, "c", "")
        sides = len(list(few.documents("train"))), len(list(few.documents("valid")))
        assert min(sides) >= 1
        assert sum(sides) == 3


def test_max_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(100)))
    whole = both(local(path, valid_fraction=0.5))
    few = both(local(path, valid_fraction=0.5, max_documents=3))
    assert few == (whole[0][:3], whole[1][:3])


def test_wikitext_lines_become_articles() -> None:
    rows = [
        "",
        " = First = \n",
        "",
        " Text of it . \n",
        "",
        " = = Section = = \n",
        "",
        " The sum is \n",
        " = 1 + 2 = \n",
        " three . \n",
    ]
    rows += ["", " = Second one = \n", "", " = = = Deep = = = \n", " End . \n", ""]
    found = list(articles(rows))
    assert [text.splitlines()[0] for text in found] == [" = First = ", " = Second one = "]
    assert " = = Section = = \n\n The sum is \n = 1 + 2 = \n three . " in found[0]
    assert list(articles([])) == [""]


class FakeHub:
    """Stands in for datasets.load_dataset; holds tables and remembers what was asked for."""

    def __init__(self, **splits: Any) -> None:
        import datasets

        self.tables = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, repository: str, configuration: str | None, *, revision: str | None, split: str | None) -> Any:
        self.asked.append((repository, configuration, revision, split))
        return self.tables if split is None else self.tables[split]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import datasets

    def install(**splits: Any) -> FakeHub:
        fake = FakeHub(**splits)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        monkeypatch.setattr(hub, "reachable", lambda: True)
        return fake

    return install


def test_known_hub_corpora(online: Any) -> None:
    fake = online(
        train={"text": ["", " = A = \n", "", " a \n", " = B = \n"]}, validation={"text": ["", " = V = \n", "", " v \n"]}
    )
    corpus = open_corpus(DataConfig(corpus="wikitext103"))
    assert both(corpus) == ([" = A = \n\n a \n = B = "], [" = V = \n\n v "])
    assert fake.asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", None, part) for part in ("train", "validation")]
    assert corpus.provenance()["repository"] == "Salesforce/wikitext"
    assert json.dumps([corpus.identity, corpus.provenance()])

    online(**{"train[:-100000]": {"text": ["t1", "t2"]}, "train[-100000:]": {"text": ["v"]}})
    assert both(open_corpus(DataConfig(corpus="openwebtext"))) == (["t1", "t2"], ["v"])
    fake = online(train={"text": ["t"]}, test={"text": ["v"]})
    assert both(open_corpus(DataConfig(corpus="lm1b"))) == (["t"], ["v"])
    assert fake.asked[0][2] == "refs/convert/parquet"


def test_any_hub_data_set(online: Any) -> None:
    fake = online(train={"id": [1, 2], "content": ["a", "b"]}, test={"id": [3], "content": ["c"]})
    train, valid = both(open_corpus(DataConfig(corpus="hub:owner/name:small")))
    assert sorted(train + valid) == ["a", "b"], "the test split is left alone"
    assert fake.asked == [("owner/name", "small", None, None)]
    online(train={"text": ["a"]}, validation={"text": ["v"]})
    assert both(open_corpus(DataConfig(corpus="hub:owner/name"))) == (["a"], ["v"])
    online(train={"a": ["x"], "b": ["y"]})
    assert "a, b" in fails("more than one text column", "hub:owner/name")


def test_failures_of_the_hub_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    started = time.monotonic()
    message = fails("hub cannot be reached", "wikitext103")
    assert "python-docs" in message
    assert time.monotonic() - started < 10
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one among ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    fails("data set owner/name cannot be loaded: Config name is missing", "hub:owner/name")


def test_a_dead_hub_is_found_dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert not hub.reachable()
    assert time.monotonic() - started < hub.KNOCK_SECONDS + 1
    with hub.offline_mode():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_importing_the_package_imports_no_datasets() -> None:
    code = "import sys, atat_fast.data; sys.exit(int(any(m in sys.modules for m in ('datasets', 'huggingface_hub', 'pyarrow'))))"
    root = Path(corpora.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
