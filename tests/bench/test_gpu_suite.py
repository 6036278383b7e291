"""bench/gpu_suite.py: its orchestration with steps that pass, fail, hang and leave others behind; no GPU is needed."""

import json
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def runs(code):
    return (sys.executable, "-S", "-c", code)


@pytest.fixture
def suite(load, monkeypatch, tmp_path):
    """The module, with results of its own and little patience."""
    module = load("gpu_suite")
    for name, value in {"RESULTS": tmp_path / "results", "STOP_SECONDS": 0.5, "LEAST_SECONDS": 0.05}.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "results").mkdir()
    return module


@pytest.fixture
def run_all(suite):
    """run_all({name: (command, seconds)}) runs steps that need no GPU, unless theirs is "gpu"."""

    def run_all(steps, seconds=60, no_gpu=None):
        todo = [suite.Step(name, *step, needs_gpu=name == "gpu") for name, step in steps.items()]
        return suite.run_all(todo, seconds, no_gpu, dict(os.environ))

    return run_all


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_fails_or_hangs_does_not_stop_the_rest(run_all, tmp_path, capsys):
    child = tmp_path / "child"
    hang = f"""import subprocess, sys, time
p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])
open({str(child)!r}, 'w').write(str(p.pid))
print('begun', flush=True)
time.sleep(60)"""
    broken = runs("print('one'); raise SystemExit('the reason')")
    steps = {"fine": (runs("print('good')"), 20), "broken": (broken, 20), "hangs": (runs(hang), 1.5)}
    steps |= {"absent": (("/no/such/program",), 20), "gpu": (broken, 20), "last": (runs("print('still here')"), 20)}
    begin = time.monotonic()
    outcomes = run_all(steps, no_gpu="torch finds no CUDA device")
    assert time.monotonic() - begin < 30
    assert [o.status for o in outcomes] == ["passed", "failed", "timed out", "failed", "not run", "passed"]
    assert outcomes[0].tail == "good\n" and outcomes[0].code == 0
    assert outcomes[1].code == 1 and "the reason" in outcomes[1].reason and outcomes[1].tail.startswith("one")
    assert outcomes[2].tail.startswith("begun") and outcomes[2].reason == "stopped after 2 s"
    assert "cannot be started" in outcomes[3].reason and "it needs a GPU" in outcomes[4].reason
    assert len(capsys.readouterr().out.splitlines()) == 6
    deadline = time.monotonic() + 10
    while alive(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(child.read_text()))  # what a step started ends with it


def test_a_step_that_is_stopped_may_write_what_it_has(suite, run_all, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "STOP_SECONDS", 30)  # it needs a moment; a busy machine may take its time
    write = f"open({str(tmp_path / 'kept')!r}, 'w').write('half'); print('stopping')"
    code = f"try:\n import time; time.sleep(60)\nexcept KeyboardInterrupt: {write}"
    (outcome,) = run_all({"slow": (runs(code), 4)})
    assert outcome.status == "timed out" and "stopping" in outcome.tail and (tmp_path / "kept").read_text() == "half"


def test_what_has_no_time_left_is_not_begun(run_all):
    begin = time.monotonic()
    first, second = run_all({"long": (runs("import time; time.sleep(60)"), 60), "late": (runs("print(1)"), 60)}, seconds=1)
    assert time.monotonic() - begin < 15
    assert (first.status, second.status, second.reason) == ("timed out", "not run", "the time was over")


@pytest.mark.slow
def test_a_pytest_run_that_collects_nothing_failed(suite):
    (outcome,) = suite.run_all([suite.pytest_step("tests", 60, "tests/conftest.py", why="")], 60, None, dict(os.environ))
    assert outcome.status == "failed" and outcome.reason == "no test was collected"


def test_files_come_back_small_and_whole(suite, tmp_path, monkeypatch, capsys):
    results, out = suite.RESULTS, tmp_path / "out"
    (results / "old").mkdir()
    (results / "old" / "before.json").write_text("[1]")
    os.utime(results / "old" / "before.json", (0, 0))
    write = f"import os; os.makedirs({str(results / 'DEVICE')!r}); open({str(results / 'DEVICE' / 'x.json')!r}, 'w').write('[2]')"
    monkeypatch.setattr(suite, "find_gpu", lambda: ("some-gpu", 24, None))
    todo = [
        suite.Step("writes", runs(write), 20),
        suite.Step("loud", runs("print('x' * 100000)"), 20),
        suite.Step("named", (*runs("import sys; print(sys.argv[1])"), suite.DEVICE_FOLDER), 20),
        suite.Step("bad", runs("raise SystemExit(4)"), 20),
    ]
    assert suite.suite(out, todo, None) == 1
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "summary.json", "summary.txt"]
    assert all(p.stat().st_size < 10 << 20 for p in out.iterdir())
    summary = json.loads((out / "summary.json").read_text())
    assert [s["status"] for s in summary["steps"]] == ["passed", "passed", "passed", "failed"]
    assert len(summary["steps"][1]["tail"]) <= suite.TAIL_CHARACTERS
    assert summary["steps"][2]["tail"].strip() == str(results / "some-gpu")
    assert json.loads((out / "results.json").read_text()) == {"DEVICE/x.json": [2]}
    text = (out / "summary.txt").read_text()
    assert "status 4" in text and "DEVICE/x.json" in text and "=== loud: passed" in text

    elsewhere = tmp_path / "elsewhere"
    suite.unpack(out / "results.json", elsewhere)
    assert json.loads((elsewhere / "DEVICE" / "x.json").read_text()) == [2]

    monkeypatch.setattr(suite, "LARGEST_FILE", 50)
    suite.summarise(out, [], {"small": [1], "large": ["y" * 100]}, [])
    assert json.loads((out / "results.json").read_text()) == {"small": [1]}
    assert json.loads((out / "summary.json").read_text())["left_out"] == ["large"]
    assert (out / "summary.txt").stat().st_size <= 50


@pytest.mark.parametrize("name", ["../../out.json", "/etc/x.json", "x.txt"])
def test_nothing_is_unpacked_outside_the_results(suite, tmp_path, name):
    (tmp_path / "results.json").write_text(json.dumps({"fine.json": [], name: []}))
    with pytest.raises(ValueError, match="nothing was written"):
        suite.unpack(tmp_path / "results.json", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_wheels_are_laid_out_for_import(suite, tmp_path, python):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(ValueError, match=r"holds no \.whl"):
        suite.unpack_wheels(wheels, site)
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer.py", "VALUE = 7")
        wheel.writestr("peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer\nVersion: 1.0\n")
    assert suite.unpack_wheels(wheels, site) == ["peer-1.0-py3-none-any.whl"]
    code = "import peer, importlib.metadata as m; print(peer.VALUE, m.version('peer'))"
    assert python("-S", "-c", code, PYTHONPATH=str(site)).stdout.split() == ["7", "1.0"]
    (wheels / "other-1.0-cp312-cp312-linux_x86_64.whl").write_bytes(b"")
    with pytest.raises(ValueError, match="not a pure-Python wheel"):
        suite.unpack_wheels(wheels, site)


@pytest.fixture
def steps_run(tmp_path, python):
    """steps_run(*options): the script's own process, and its steps."""

    def steps_run(*options):
        done = python(ROOT / "bench" / "gpu_suite.py", *options, "--out", tmp_path / "suite", CUDA_VISIBLE_DEVICES="")
        return done, json.loads((tmp_path / "suite" / "summary.json").read_text())["steps"]

    return steps_run


@pytest.mark.slow
def test_without_a_gpu_it_says_what_needs_one(steps_run):
    done, (first, *others) = steps_run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "these parts need one: ops, ceilings, head, throughput, tests" in done.stdout
    assert first["name"] == "environment" and first["status"] == "passed" and "torch" in first["tail"]
    assert "mask_tokens" in first["tail"] and "tensors on cpu: first of" in first["tail"]
    assert [step["status"] for step in others] == ["not run"] * 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("tier", "names"),
    [(1, ["ceilings.json", "head.json", "throughput-tiny-4097-2.json"]), (2, ["sampling.json", "throughput-tiny-4097-2.json"])],
)
def test_every_part_runs_small_on_a_cpu(tier, names, tmp_path, steps_run):
    """The commands of both tiers with the shapes of --small; those that need more than this machine has say so."""
    done, steps = steps_run("--tier", tier, "--small")
    bad = [step for step in steps if step["status"] != "passed"]
    ends = "".join(f"\n=== {step['name']}: {step['status']} {step['reason']}\n{step['tail'][-3000:]}" for step in bad)
    assert done.returncode == 0, done.stdout + ends
    assert {step["name"] for step in bad if step["status"] == "not run"} <= {"memcheck", "training"}
    assert sorted(path.name for path in (tmp_path / "suite" / "small").rglob("*.json")) == names


@pytest.mark.parametrize(("tier", "most"), [(1, 360), (2, 300), (3, 900)])
def test_a_dry_run_prints_parts_that_are_there_and_limits_that_add_up(suite, tier, most, capsys):
    assert suite.main(["--tier", str(tier), "--dry_run"]) == 0
    *parts, total = capsys.readouterr().out.splitlines()
    limits = [float(line.split(" at most ")[1].split()[0]) for line in (*parts, total)]
    assert sum(limits[:-1]) == limits[-1] <= most and total.startswith(f"all of tier {tier} ")
    assert [line.split("  ")[0] for line in parts] == [step.name for step in suite.steps(tier)]
    words = [word.removeprefix("--ignore=") for step in suite.steps(tier) for word in step.command]
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))


def test_a_part_whose_package_is_missing_is_skipped_and_says_so(suite, tmp_path):
    step = suite.Step("peer", runs("print(1)"), 20, needs_gpu=False, needs=("no_such_package",))
    assert suite.missing(step, None) == "no_such_package is not here"
    (tmp_path / "no_such_package").mkdir()
    assert suite.missing(step, None, str(tmp_path)) is None
    (outcome,) = suite.run_all([step], 60, None, dict(os.environ))
    assert (outcome.status, outcome.reason) == ("not run", "no_such_package is not here")
