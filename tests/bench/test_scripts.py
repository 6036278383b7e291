"""The scripts in bench/: they run, they check before they time, and the README says what their files say."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(python):
    """script("report.py", *options) runs it from an empty folder."""
    return lambda name, *options, root=ROOT: python(root / "bench" / name, *options)


@pytest.mark.slow
def test_throughput_checks_then_times_and_writes(tmp_path, script):
    sizes = ("--vocabulary", 8192, "--length", 128, "--micro_batch", 2, "--dtype", "fp32")
    small = (*sizes, "--rounds", 2, "--seconds", 0, "--variants", "mdlm", "atat_fast", "--out", tmp_path / "out")
    done = script("throughput.py", *small)
    assert done.returncode == 0, done.stderr
    assert "losses and gradients agree to" in done.stdout
    record = json.loads((tmp_path / "out" / "throughput-tiny-8192-2.json").read_text())
    assert record["agreement"] < 1e-3 and record["environment"]["torch"]
    for name in ("mdlm", "atat_fast"):
        r = record["results"][name]
        assert r["tokens_per_second"] > 0 and r["low"] <= r["tokens_per_second"] <= r["high"] and r["step_memory_bytes"] > 0
    plain, ours = (record["results"][name]["step_memory_bytes"] for name in ("mdlm", "atat_fast"))
    assert plain > ours > 1 << 20  # the logits of every token, and some of those of a slab
    assert record["results"]["mdlm"]["ratio"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "ways"),
    [("bench_block.py", ["--length", 16], ("mdlm", "atat_fast")), ("last_block.py", ["--vocabulary", 50], ())],
)
def test_block_scripts_check_then_time_and_write(tmp_path, script, name, arguments, ways):
    done = script(name, *arguments, "--batch", 2, "--rounds", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "agree to" in done.stdout
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["agreement"] < (5e-2 if record["environment"]["dtype"] == "bf16" else 1e-3) and record["environment"]["torch"]
    assert all(0 < record["results"][way]["low"] <= record["results"][way]["ms"] for way in ways)
    assert ways or 0.8 < record["predicted_ratio"] < 1


@pytest.mark.slow
def test_accelerated_models_agree_with_their_classes_and_are_timed(tmp_path, script):
    pytest.importorskip("transformers")
    small = ["--small", "--rounds", 1, "--models", "bert", "--parts", "step", "--out", tmp_path / "out"]
    done = script("bench_accelerate.py", *small)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "accelerate.json").read_text())
    ways = {(r["model"], r["part"], r["way"]) for r in record["results"]}
    assert {("bert", "step", "transformers"), ("bert", "step", "rows first"), ("bert", "step", "atat_fast")} <= ways
    assert all(r["ms"] > 0 and r["bytes"] >= 0 and r["agreement"] < 8e-2 for r in record["results"])
    assert {"liger", "cce"} <= {*record["missing"], *(way for *_, way in ways)}


@pytest.mark.slow
def test_blocks_are_timed_after_the_texts_agree(tmp_path, script):
    small = ["--block", 4, "--steps", 2, "--length", 32, "--longest", 64, "--vocabulary", 50, "--rounds", 1]
    done = script("bench_blocks.py", *small, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "blocks.json").read_text())
    assert [r["way"] for r in record["results"]] == ["uncached", "bd3lm", "cached", "mdlm loop"]
    assert all(r["low"] <= r["tokens_per_second"] <= r["high"] for r in record["results"])
    assert [row["length"] for row in record["growth"]] == [8, 16, 32, 64]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_blocks", "--block 0", "--block and --length must be at least 1"),
        ("bench_blocks", "--block 7", "model.block 7 does not divide model.length 1024"),
        ("bench_accelerate", "--models brt", "did you mean bert"),
        ("bench_accelerate", "--rounds 0", "--rounds must be at least 1, got 0"),
        ("throughput", "--rounds 0", "must be at least 1"),
        ("throughput", "--preset tny", "did you mean tiny"),
        ("throughput", "--vocabulary 100", "is below"),
        ("throughput", "--variants atatfast", "did you mean atat_fast"),
        ("bench_block", "--preset tny", "did you mean tiny"),
        ("last_block", "--preset tny", "did you mean tiny"),
        ("bench_sampling", "--steps 0", "at least 1"),
        ("bench_sampling", "--ways ddpm", "did you mean ddpm_cache"),
        ("without_bf16", "--rounds 0", "--rounds must be at least 1, got 0"),
        ("ceilings", "--device cpu --rounds 1", "at least 2"),
        ("scaling", "--ranks 0", "--ranks and --steps must be at least 1, and --sums 2; got [0], 20, 8"),
        ("instructions", "", "valgrind is not installed"),
        ("train_short", "--steps 0", "--steps and --seeds must be at least 1"),
        ("compare", "none.json none.json", "cannot be read"),
        ("gpu_suite", "--only bench", "tier 1 has no part 'bench'; its parts are environment, ops"),
        ("gpu_suite", "--unpack nowhere.json", "is not a results.json"),
        ("gpu_suite", "--wheels nowhere", "holds no .whl file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(load, name, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no valgrind is there
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # a script that finds another value begins anew
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
    assert load(name).main() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_ranks_are_measured_and_learn_the_same(tmp_path, script):
    done = script("scaling.py", "--steps", 4, "--ranks", 1, 2, "--sums", 2, "--modes", "ddp", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    one, two = record["results"]
    assert (one["ranks"], one["mode"], two["ranks"], two["mode"]) == (1, "none", 2, "ddp")
    assert len(one["losses"]) == 4 and one["tokens_per_second"] > 0 and two["loss_difference"] < 1e-5
    assert one["sent"] == {} and two["sent"] == pytest.approx(two["formula"], rel=0.02) and set(two["sent"]) == {"all-reduce"}
    errors, apart = record["sums"]["error"], record["sums"]["halves_apart"]
    assert errors["fp32"] < 1e-6 < 1e-4 < errors["bf16"] < 0.02 < apart < 2  # rounding is far below the noise of the batch


@pytest.mark.slow
def test_a_cpu_without_bf16_is_played_checked_and_timed(tmp_path, script):
    done = script("without_bf16.py", "--rounds", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "without_bf16.json").read_text())
    assert len(record["results"]) == 6 and record["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    for before, after in zip(record["results"][::2], record["results"][1::2], strict=True):
        assert (before["what"], before["way"], after["way"]) == (after["what"], "before", "after")
        assert after["speedup"] == pytest.approx(before["median_ms"] / after["median_ms"])


@pytest.mark.slow
def test_the_readme_says_what_the_files_say_and_another_figure_is_noticed(tmp_path, script):
    """That the tree itself passes is what `make check` asks."""
    for name in ("README.md", "bench", "docs"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copyfile(source, tmp_path / name)
    readme = tmp_path / "README.md"
    honest = readme.read_text()
    start = honest.index("<!-- throughput -->")
    readme.write_text(honest[:start] + honest[start:].replace("x |", "9x |", 1))
    assert script("report.py", "--check", root=tmp_path).returncode == 1
    assert script("report.py", root=tmp_path).returncode == 0
    assert readme.read_text() == honest and (tmp_path / "docs" / "images" / "demo.png").stat().st_size > 10_000
