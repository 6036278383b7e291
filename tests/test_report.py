"""The run report: what it says, that it is one safe page, and that bad input ends in one sentence."""

import contextlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

import atat_fast.report as report
from atat_fast.config import Config, to_dict
from atat_fast.errors import UsageError
from atat_fast.files import replacing
from atat_fast.runs.figures import compact, duration, measured, overview_png, smooth

PICTURES = ("loss.png", "throughput.png", "overview.png")
FACTS = {
    "version": "0.1.0", "commit": "3f2a9c1", "device": "a device", "torch": "2.9.0", "triton": None, "python": "3.12.4",
    "cpu_threads": 8, "dtype": "fp32", "compile": False, "started": "2025-01-02T03:04:05", "data": "some <b>text</b>",
    "parameters": {"embedding": 700_000, "blocks": 2_000_000, "conditioning": 100_000, "head": 700_000, "total": 3_500_000},
    "tokens_per_step": 4096, "unigram_entropy": 6.12, "bytes_per_token": 3.4, "vocabulary": 4096, "sequence_length": 128,
}  # fmt: skip


def train(step, loss=None):
    loss = 3 + 6 * math.exp(-step / 100) if loss is None else loss
    row = {"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens": 4096 * step}
    return row | {"tokens_per_second": 12_345.0 + step % 7, "seconds": step / 2}


def evaluation(step, nll, se=0.0123):
    row = {"kind": "eval", "step": step, "nll": nll, "nll_se": se, "unigram_entropy": 6.12, "sequences": 256, "seconds": 3.0}
    return row | {"bits_per_token": nll / math.log(2), "bits_per_byte": nll / math.log(2) / 3.4}


def sample(step, *texts):
    return {"kind": "sample", "step": step, "sampler": "ddpm_cache", "steps": 128, "texts": list(texts)}


FULL = [*(train(step) for step in range(10, 501, 10)), evaluation(250, 4.5), evaluation(500, 4.1234), sample(500, "Plain words.")]


def make_run(folder, rows, facts=None, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.model.dim, config.train.max_steps, config.run.name = 192, 500, folder.name
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(FACTS if facts is None else facts), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open[-1:] else ""


def write(run):
    path = report.write_report(run)
    assert path == run / "report.html"
    for name in PICTURES:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob(".*"))  # nothing written aside is left
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "demo", FULL)
    return run, write(run)


@pytest.fixture
def undrawn(monkeypatch):
    """Replaces the pictures where drawing them is beside the point: it is most of a report's time."""
    for picture in ("loss_png", "throughput_png", "overview_png"):
        monkeypatch.setattr(report, picture, lambda *_: b"\x89PNG")


def test_numbers_of_a_full_run(full):
    text = full[1].text
    for expected in (
        "4.123 ± 0.012",
        "nats per token, at step 500",
        "61.77",
        f"{4.1234 / math.log(2) / 3.4:.3f}",
        "6.120",
        "val/nll is 2.00 below it",
        "12.3 k",
        "4 min 10 s",
        "2.05 M",
        "500 steps",
        "Plain words.",
        "step 500 of 500",
        "a device",
        "4.500 ± 0.012",
        "2,000,000",
        "3,500,000 (3.5 M)",
        "drawn by ddpm_cache, 128 steps",
        "NELBO",
        "EMA",
        "standard error",
    ):
        assert expected in text, expected
    assert text.startswith("demo") or "\ndemo" in text
    assert "Importance" not in text and not (full[0] / "importance.png").exists()
    assert report.importance_of(report.read_run(full[0])) is None


def test_settings_that_differ_come_first_and_alone(full):
    table, folded = full[1].text.split("Settings that differ from the defaults")[1].split("All settings (config.yaml)")
    assert all(part in table for part in ("model.dim", "192", "768", "train.max_steps"))
    assert "layers" not in table and "run.name" not in table and "layers: 12" in folded


def test_the_page_stands_alone(full):
    run, page = full
    source = (run / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not [part for part in ("http://", "https://", "@import", "url(") if part in source]
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 4 and all(value.startswith("data:image/png;base64,") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "viewport" in source and "prefers-color-scheme: dark" in source


def test_one_run_gives_the_same_bytes_again_and_leaves_matplotlibs_settings_alone(full, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.write_report(full[0], tmp_path / "new" / "folder")
    for name in (*PICTURES, "report.html"):
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (full[0] / name).read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert int.from_bytes((full[0] / "overview.png").read_bytes()[16:20], "big") == 1200, "its width"


@pytest.mark.usefixtures("undrawn")
def test_text_is_escaped_and_made_visible(tmp_path):
    text = "<script>alert(1)</script> &amp; \x00\x1b[31m \u202eabc \ud800 \"'</div>\r\nnext"
    facts = dict(FACTS, device="<img src=x onerror=alert(2)>", **{"<i>odd": "</main>"})
    page = write(make_run(tmp_path / "a<b>&", [train(10), sample(10, text)], facts))
    assert "script" not in page.tags and "i" not in page.tags and page.tags.count("img") == 2
    assert "<script>alert(1)</script> &amp; ␀␛[31m ⟨U+202E⟩abc ⟨U+D800⟩ \"'</div>\nnext" in page.text
    assert "a<b>&" in page.text and "some <b>text</b>" in page.text and "onerror=alert(2)>" in page.text


DEGENERATE = {
    "nothing at all": [],
    "step zero": [train(0)],
    "no evaluation": [train(step) for step in range(10, 101, 10)],
    "evaluation alone": [evaluation(0, 8.3)],
    "all NaN": [train(10, math.nan), train(20, math.inf), evaluation(20, math.nan, math.nan)],
    "some NaN": [train(10), train(20, math.nan), train(30), evaluation(30, 5.0, 0.0)],
    "outlier": [*(train(step) for step in range(1, 400)), train(400, 1e6)],
    "bare rows": [{"kind": "train", "step": 10, "loss": None}, {"kind": "eval", "step": 10}, sample(10), sample(10, "")],
    "diverged": [train(10), evaluation(10, 1e4, 3e3)],
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("facts", [FACTS, {}], ids=["facts", "no facts"])
@pytest.mark.filterwarnings("error")
def test_runs_with_little_in_them_have_a_page_without_nan_or_none(tmp_path, name, facts):
    run = report.read_run(make_run(tmp_path / "run", DEGENERATE[name], facts))
    # One picture has both panels, and what facts change in it shows in any case: enough here, and quick.
    curves = report.curves_of(run)
    if facts or name in ("nothing at all", "some NaN"):
        assert overview_png(curves).startswith(b"\x89PNG")
    pictures = dict.fromkeys(PICTURES, b"")
    text = Page(report._page(run, curves, pictures, pictures)).text
    assert not re.search(r"\b(nan|inf|None(?! yet))\b", text.split("All settings")[0])
    assert "evaluation" in name or "eval" in str(DEGENERATE[name]) or "none yet" in text
    assert name != "some NaN" or "The loss is not finite in 1 of 3 training rows" in text


@pytest.mark.usefixtures("undrawn")
def test_other_files_may_be_missing(tmp_path):
    run = make_run(tmp_path / "run", FULL)
    for name in ("config.yaml", "run.json"):
        (run / name).unlink()
    text = write(run).text
    assert "There is no config.yaml in this run" in text and "There is no run.json" in text and "4.123 ± 0.012" in text


def importance(step, **change):
    row = {"phase": "hard", "level": 1.0, "tilt": 2.0, "focus": 1.0, "importance_loss": 0.5, "importance_baseline": 0.6}
    return train(step) | row | {"nll_quarters": [1.0, 2.0, 3.0, 4.0]} | change


RELIABLE = {"count": [0, 30, 70], "predicted": [0.0, 0.4, 0.8], "observed": [0.0, 0.5, 0.7]}


def test_importance_has_a_section_with_pictures_and_passages(tmp_path):
    rows = [*(importance(step) for step in (10, 20, 30)), evaluation(30, 4.0) | {"reliability": RELIABLE}]
    run = make_run(tmp_path / "run", rows)
    passages = [{"tokens": ["<u>", " x\x00", "end"], "scores": [0.04, 0.55, 1.0]}, "odd", {"tokens": [1]}]
    (run / "importance.json").write_text(json.dumps({"step": 30, "passages": passages}), encoding="utf-8")
    page = write(run)
    assert (run / "importance.png").read_bytes().startswith(b"\x89PNG") and page.tags.count("img") == 3
    assert "Held-out passage 1 at step 30" in page.text and "<u> x␀end" in page.text and "u" not in page.tags
    assert [value for name, value in page.attributes if name == "class" and re.fullmatch(r"i\d", value)] == ["i0", "i5", "i9"]
    assert "0.5000 nats; always the mean would pay 0.6000" in page.text
    assert "url(" not in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "rows",
    [
        [importance(10, nll_quarters=[None] * 4)],
        [importance(10, nll_quarters="odd", tilt=None, focus="x", importance_loss=None)],
        [train(10), importance(20), evaluation(20, 4.0) | {"reliability": {"count": [0, 0], "predicted": 3}}],
        [importance(10), importance(20), evaluation(20, 4.0) | {"reliability": [1]}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_importance_with_gaps(tmp_path, rows):
    curves = report.importance_of(report.read_run(make_run(tmp_path / "run", rows)))
    assert curves is not None and report.importance_png(curves).startswith(b"\x89PNG")


def test_a_cut_last_line_is_left_out_with_a_note_and_a_repeated_step_counts_as_written_last(tmp_path):
    run = make_run(tmp_path / "run", [train(10), evaluation(10, 5.0)], tail='{"kind": "eval", "step": 20, "nl')
    found = report.read_run(run)
    assert found.notes == ["The last line of metrics.jsonl was cut off and is left out."] and len(found.evals) == 1
    (run / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "sample", "texts": ["\xe2\x80')
    assert len(report.read_run(run).notes) == 1
    (run / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    assert report.read_run(run).notes == [] and len(report.read_run(run).train) == 2
    rows = [train(10), train(20, 9.0), train(30, 9.0), {"kind": "later", "what": 1}, train(20, 4.0), train(30, 3.0)]
    found = report.read_run(make_run(run, rows))
    assert [(row["step"], row["loss"]) for row in found.train] == [(10, rows[0]["loss"]), (20, 4.0), (30, 3.0)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", b'{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n', "line 2 of .* is not JSON"),
        ("metrics.jsonl", b'{"kind": "train", "step": 1}\n\xff\xfe\n', "line 2 of .* is not JSON"),
        ("metrics.jsonl", b"[1, 2]\n", "line 1 of .* is not a row with a kind"),
        ("metrics.jsonl", b'{"kind": "train"}\n', "line 1 of .* has step None, not a whole number"),
        ("metrics.jsonl", b'\n{"kind": "eval", "step": 1, "nll": "low"}\n', "line 2 of .* has nll 'low', not a number"),
        ("metrics.jsonl", b'{"kind": "sample", "step": 1, "texts": [3]}\n', "line 1 of .* has no list of texts"),
        ("config.yaml", b"model: [1\n", "config.yaml is not YAML"),
        ("config.yaml", b"- 1\n", "config.yaml holds a list"),
        ("config.yaml", b"\xff\n", "config.yaml cannot be read"),
        ("run.json", b"{", "run.json is not JSON"),
        ("run.json", b"3", "run.json holds a int"),
        ("importance.json", b"{", "importance.json is not JSON"),
        ("importance.json", b"[]", "importance.json holds a list"),
    ],
)
def test_malformed_files_are_named_and_nothing_is_overwritten(tmp_path, name, content, words):
    run = make_run(tmp_path / "run", [train(10)])
    (run / name).write_bytes(content)
    (run / "report.html").write_text("a good report", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UsageError, match=words) as caught:
        report.write_report(run)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_failed_write_leaves_the_earlier_report(tmp_path, monkeypatch):
    earlier = {name: b"earlier " + name.encode() for name in (*PICTURES, "report.html")}
    for name, content in earlier.items():
        (tmp_path / name).write_bytes(content)

    @contextlib.contextmanager
    def disk_full(path, **options):
        with replacing(path, **options) as stream:
            if path.name == "report.html":
                stream.write(b"half")
                raise OSError(28, "No space left on device")
            yield stream

    monkeypatch.setattr(report, "replacing", disk_full)
    with pytest.raises(UsageError, match="No space left on device"):
        report._write_all(tmp_path, dict.fromkeys(earlier, b"new and longer"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


def test_the_command_writes_where_it_is_told_from_a_fresh_folder(tmp_path, python):
    make_run(tmp_path / "runs" / "demo", FULL)
    done = python("-m", "atat_fast.report", "--run", "runs/demo", "--out", "page", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "page/report.html\n", "")
    assert (tmp_path / "page" / "report.html").is_file() and not (tmp_path / "runs" / "demo" / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--run runs/dmeo", "there is no run folder runs/dmeo (did you mean demo?); runs has demo"),
        ("--run nowhere/run", "there is no run folder nowhere/run; give --run"),
        ("--run runs", "holds no metrics.jsonl"),
        ("--run file", "there is no run folder"),
        ("--run runs/demo --out file", "the report cannot be written to"),
        ("--run runs/demo --out file/deeper", "the report cannot be written to"),
        ("", "--run must be given; --help says what"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, words, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "demo", [train(10)])
    (tmp_path / "file").touch()
    assert words in refused(report.main, *arguments.split())


def test_numbers_for_people():
    counts = {0: "0", 950: "950", 9_876: "9,876", 9_999.7: "10 k", 12_345: "12.3 k", 999_999: "1 M", 1.5e9: "1.5 B", 2e12: "2 T"}
    assert {value: compact(value) for value in counts} == counts and compact(1_000, 1_000) == "1 k"
    times = {0.42: "0.42 s", 42: "42 s", 59.7: "1 min", 250: "4 min 10 s", 11_100: "3 h 5 min", 187_200: "2 d 4 h"}
    assert {value: duration(value) for value in times} == times and duration(math.nan) == "not known"
    assert measured(4.12345, 0.0123) == "4.123 ± 0.012" and measured(1e4, 3e3) == "10,000 ± 3,000"
    assert measured(4.12345) == "4.123" and measured(math.nan, 1.0) == "not finite"


def test_a_smoothed_curve_follows_and_has_at_most_1000_points():
    x, noise = np.arange(5000.0), np.random.default_rng(0).standard_normal(5000)
    where, line = smooth(x, noise + 5)
    assert len(where) == len(line) == 1000 and float(np.abs(line[50:] - 5).max()) < 0.5
    assert np.allclose(smooth(x[:7], np.full(7, 2.0))[1], 2.0)
