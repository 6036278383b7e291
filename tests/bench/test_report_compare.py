"""bench/report.py on comparisons: the table says what compare.json says, and stands where the document wants it."""

import json

import pytest
import torch

from atat_fast.comparison import page as comparison_page
from atat_fast.comparison.run import Budget, Plan
from atat_fast.config import load_preset
from atat_fast.errors import UsageError


def page_of(tmp_path, *, budget="tokens=2000000", recipes=("uniform", "fast", "wild")):
    """A comparison's folder as the command leaves it, of results made up here: `fast` is 0.25 better, `wild` diverged."""
    base, (kind, amount) = load_preset("demo"), budget.split("=")
    plan = Plan(tmp_path / "compare", base, dict.fromkeys(recipes, base), 2, Budget(kind, float(amount)), 2)
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(name, seed):
        values = 2.5 + 0.1 * noise + 0.01 * seed - 0.25 * (name == "fast")
        end = float(values.mean())
        curve = [{"tokens": t, "seconds": t / 1e4, "nll": end + 1 - t / 2e6, "nll_se": 0.02} for t in (1_000_000, 2_000_000)]
        facts = {"seed": seed, "steps": 976, "tokens": 2_000_000, "seconds": 200.0 + seed, "parameters": 900_000, "curve": curve}
        facts |= {"environment": {"device": "CPU (X)", "dtype": "bf16"}, "data": {}}
        return facts | ({"diverged": "nan"} if name == "wild" else {"nll": end, "bits_per_byte": end * 1.45, "values": values})

    results = {name: [run(name, seed) for seed in (1, 2)] for name in recipes}
    found = comparison_page.summary(plan, results)
    plan.folder.mkdir()
    comparison_page.write(plan, results, found, comparison_page.table(found))
    return plan.folder, found


@pytest.fixture
def report(load, tmp_path, monkeypatch):
    module = load("report")
    for name, place in {"RESULTS": "results", "IMAGES": "images", "COMPARED": "atat.md"}.items():
        monkeypatch.setattr(module, name, tmp_path / place)
    monkeypatch.setattr(module.audit, "table", lambda: "")  # another table of that document, which takes seconds
    (tmp_path / "results").mkdir()
    return module


def test_a_recorded_comparison_becomes_a_table_in_its_document(report, tmp_path):
    folder, found = page_of(tmp_path)
    assert "compare_demo" not in report.tables()[report.COMPARED]
    assert report.record_compare(folder) == tmp_path / "results" / "cpu" / "compare-demo-tokens-2000000.json"
    assert (tmp_path / "images" / "cpu-compare-demo-tokens-2000000.png").read_bytes() == (folder / "curves.png").read_bytes()
    table = report.tables()[report.COMPARED]["compare_demo"]
    assert "Preset demo on python-docs, 2 M tokens a run, 2 seeds; CPU (X), bf16." in table
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("| ")}
    (d,) = found["differences"]
    assert (d["of"], d["minus"], d["better"]) == ("uniform", "fast", 2) and d["difference"] == pytest.approx(0.25)
    assert "| 0.250 | 2 of 2 |" in lines["fast"] and "75% of its tokens" in lines["fast"] and "diverged" in lines["wild"]
    document = "# ATAT\n\n<!-- compare -->\nold\n<!-- /compare -->\nend\n"
    assert report.rewrite(document, {"compare": table}, "atat.md") == document.replace("old", table)
    with pytest.raises(UsageError, match=r"atat\.md has no <!-- compare -->"):
        report.rewrite("# ATAT\n", {"compare": table}, "atat.md")


def test_minutes_and_masks_are_said(report, tmp_path):
    folder, found = page_of(tmp_path, budget="minutes=1.5", recipes=("uniform", "fast"))
    row = {"masks": "evaluation", "what": "exact", "nll": 2.0, "se": 0.05, "of_mdlm": 0.45, "of_independent": 0.2}
    (folder / "compare.json").write_text(json.dumps(found | {"masks": [row]}))
    report.record_compare(folder)
    (tmp_path / "other").mkdir()  # another budget stands beside it
    other = page_of(tmp_path / "other", budget="tokens=800000", recipes=("uniform", "fast"))[0]
    assert report.record_compare(other, "again").name == "compare-demo-tokens-800000-again.json"
    assert len(list((tmp_path / "results" / "cpu").iterdir())) == 2
    table = report.tables()[report.COMPARED]["compare_demo"]
    assert "800 k tokens a run" in table and table.count("| recipe |") == 2
    assert "1.5 min of training a run" in table and "of its time" in table
    assert "| evaluation: exact | 0.0500 | 0.45x | 0.20x |" in table


@pytest.mark.parametrize("text", [None, "{", "[]", '{"benchmark": "masking", "results": []}'])
def test_what_is_no_comparison_is_refused(report, tmp_path, text):
    (tmp_path / "compare").mkdir()
    if text is not None:
        (tmp_path / "compare" / "compare.json").write_text(text)
    with pytest.raises(UsageError, match=r"holds no compare\.json of a finished comparison"):
        report.record_compare(tmp_path / "compare")
    assert list((tmp_path / "results").iterdir()) == []
