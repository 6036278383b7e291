"""What tests share: no network, one seed, fresh memory that holds NaN, a corpus, small runs, and ways to start processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait do not spin: a busy machine stays quick
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite started in the background: what it starts would be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

MOST_WORKERS = 4
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CASES = TESTS / "training" / "rank_cases.py"
WORDS = ("the", "a", "of", "to", "list", "dict", "value", "key", "returns", "raises", "file", "path", "open", "read", "close")
SHARED_OUT = pytest.StashKey[bool]()
"""Whether this suite's tests are given to its processes by `pytest_xdist_make_scheduler`."""

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    specification = importlib.util.spec_from_file_location("interpreter", TESTS / "ops" / "interpreter.py")
    interpreter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(interpreter)
    interpreter.exact_bf16()
    interpreter.quick()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Whole suites run on as many processes as there are cores, up to MOST_WORKERS, where pytest-xdist is installed.

    Files or tests that are named run in this process, and so does what is debugged or wants a GPU, and everything with `-n 0`.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.collectonly:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    alone = getattr(option, "usepdb", False) or "gpu" in option.markexpr.replace("not gpu", "") or option.keyword
    cores = len(os.sched_getaffinity(0))
    if whole and not alone and cores > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
        option.numprocesses = min(cores, MOST_WORKERS)
        option.dist = "loadscope"
        config.stash[SHARED_OUT] = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files with a fixture of the module go to one process, so that it is made once: some train on four ranks for minutes. Other
    tests go to whichever process is free.
    """
    if not config.stash.get(SHARED_OUT, False):
        return None
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def together(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text(encoding="utf-8")

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return file if together(file) else nodeid

        def remove_node(self, node: Any) -> str | None:
            """Give what a dead process has left to others, and name the test that ended it. xdist's own gives them what is done
            too, for which they wait forever.
            """
            units = self.assigned_work.pop(node)
            crashed = next((test for unit in units.values() for test, done in unit.items() if not done), None)
            if crashed is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.status = node.gateway._io.popen.wait(timeout=10)
                units[self._split_scope(crashed)][crashed] = True
                self.workqueue.update({scope: unit for scope, unit in units.items() if not all(unit.values())})
                for other in self.assigned_work:
                    self._reschedule(other)
            return crashed

        def _reschedule(self, node: Any) -> None:
            """A process begins a test once it has the next."""
            super()._reschedule(node)
            while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    return ByFixture(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(report: Any, sched: Any) -> None:
    """Say how the process of a test ended: -11 is SIGSEGV, -9 what a machine short of memory does."""
    report.longrepr = f"its process ended with status {getattr(sched, 'status', 'unknown')}\n{report.longrepr}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes none is left with a long test while the others have nothing to do: slow ones come first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that whatever an op forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 documents."""
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [f'{{"text": "{i} {" ".join(chooser.choices(WORDS, k=60))}"}}' for i in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments_of(*parts: Any) -> list[str]:
    """A command's arguments, from words, lists of words and settings: arguments_of(small, {"train.seed": 3}, "--resume")."""
    found: list[str] = []
    for part in parts:
        if isinstance(part, Mapping):
            found += [f"--{name}={value}" for name, value in part.items()]
        else:
            found += [part] if isinstance(part, str) else map(str, part)
    return found


@pytest.fixture(scope="session")
def arguments() -> Callable[..., list[str]]:
    """`arguments_of`."""
    return arguments_of


@pytest.fixture(scope="session")
def small_at(corpus: Path) -> Callable[[Path], list[str]]:
    """Arguments of the train command for a run of 12 steps under a folder."""

    def arguments(folder: Path) -> list[str]:
        settings = {
            "data.corpus": corpus, "data.tokenizer": "bytes", "data.cache_dir": corpus.parent / "cache",
            "model.dim": 16, "model.layers": 1, "model.heads": 2, "model.length": 16, "model.dropout": 0.1,
            "train.max_steps": 12, "train.global_batch": 4, "train.log_every": 5, "eval.every": 6, "eval.sequences": 8,
            "sample.num_samples": 1, "sample.steps": 4, "run.root": folder / "runs", "run.tensorboard": "false",
        }  # fmt: skip
        return arguments_of(settings)

    return arguments


@pytest.fixture
def small(small_at: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    """The same under tmp_path."""
    return small_at(tmp_path)


@pytest.fixture(scope="session")
def trainer() -> Callable[..., Any]:
    """trainer(small, {"run.name": "a"}, resume=True) is the Trainer of these arguments; stop=3 sends it SIGTERM after step 3."""
    from atat_fast import cli
    from atat_fast.training.trainer import Trainer

    def make(*parts: Any, resume: bool = False, stop: int = 0) -> Trainer:
        config, _ = cli.parse_config(cli.make_parser(), arguments_of(*parts))
        made = Trainer(config, resume=resume, show_progress=False)
        step = made._train_step

        def step_and_stop() -> None:
            step()
            if made.state.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        made._train_step = step_and_stop  # type: ignore[method-assign]
        return made

    return make


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Any]]:
    """rows(folder, "train") are a run's rows of a kind; rows(folder, "train", "step", "loss") are two numbers of each."""

    def rows(folder: Path, kind: str, *names: str) -> list[Any]:
        path = folder / "metrics.jsonl"
        whole = [line for line in (path.read_text().splitlines(True) if path.exists() else []) if line.endswith("\n")]
        found = [row for row in map(json.loads, whole) if row["kind"] == kind]
        return [[row[name] for name in names] for row in found] if names else found

    return rows


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(lambda: path.exists(), process) waits for a fact, for at most two minutes and while the process lives."""

    def until(fact: Callable[[], object], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 120
        while not fact() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    return until


@pytest.fixture(scope="session")
def trained_run(small_at: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run, of a model with an importance estimator."""
    from atat_fast import train

    root = tmp_path_factory.mktemp("trained")
    settings = {
        "model.dropout": 0.0, "optim.lr": 0.01, "run.name": "small",
        "importance.source": "learned", "importance.width": 16, "importance.layers": 1, "importance.heads": 2,
    }  # fmt: skip
    assert train.main(arguments_of(small_at(root), settings)) == 0
    return root / "runs" / "small"


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """load("compare") is bench/compare.py as a module: bench/ is a folder of scripts, not a package."""
    bench = ROOT / "bench"

    def load(name: str) -> ModuleType:
        if str(bench) not in sys.path:
            sys.path.insert(0, str(bench))
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, bench / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load


@pytest.fixture(scope="session")
def compile_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Compiles a C++ or CUDA source of tests/ops into a library that ctypes loads."""

    def compile_(source: str, compiler: str, *flags: str) -> ctypes.CDLL:
        program = shutil.which(compiler)
        if program is None:
            pytest.skip(f"{compiler} is not on PATH")
        library = tmp_path_factory.mktemp("native") / f"{Path(source).stem}.so"
        command = [program, "-O1", "-std=c++17", "-shared", *flags, str(TESTS / "ops" / source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))

    return compile_


@pytest.fixture
def python_started(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """python_started("-m", "atat_fast.train", *arguments, SETTING="value") is a process of its own.

    It finds atat_fast where this process does. It starts in an empty folder, or in `cwd`.
    """
    import atat_fast

    def start(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(atat_fast.__file__).parents[1])} | more
        cwd, pipe = cwd or tmp_path_factory.mktemp("fresh"), subprocess.PIPE
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture
def python(python_started: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same to its end: its status and what it said, after it was told `input`."""

    def run(*arguments: object, input: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        with python_started(*arguments, **options) as process:
            try:
                out, err = process.communicate(input, timeout=600)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(train.main, "--preset", "smal") is the one sentence that a command leaves with, beside status 2."""
    from atat_fast.cli import run_command

    def refused(main: Callable[[Sequence[str]], int], *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_command(main, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert left.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, out + err
        return err.removeprefix("error: ").removesuffix("\n")

    return refused


def start_ranks(ranks: int, *command: Any, restarts: int = 0, **more: str) -> subprocess.Popen[str]:
    """torchrun with so many ranks of a command: rank_cases.py and a case's name, or -m and a module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return in_session([*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.2", *command], **more)


def in_session(command: Sequence[Any], **more: str) -> subprocess.Popen[str]:
    """A process in a session of its own, so that it can be ended with all that it starts."""
    env, pipe = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more, subprocess.PIPE
    return subprocess.Popen([*map(str, command)], env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What a started process and those it started say, to their end."""
    try:
        out, err = process.communicate(timeout=800)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a case of rank_cases.py on ranks to its end: torchrun(2, "case", *arguments, restarts=0, SETTING="value")."""
    return lambda ranks, case, *arguments, **options: finished(start_ranks(ranks, CASES, case, *arguments, **options))


@pytest.fixture(scope="session")
def forked() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same without torchrun, on ranks that one process forks: forked(2, "case", *arguments)."""

    def run(ranks: int, case: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return finished(in_session([sys.executable, CASES.with_name("forked_ranks.py"), ranks, case, *arguments]))

    return run


@pytest.fixture(scope="session")
def torchrun_started() -> Callable[..., subprocess.Popen[str]]:
    """Starts the train command on ranks and does not wait: torchrun_started(2, *arguments)."""
    return lambda ranks, *arguments, **options: start_ranks(ranks, "-m", "atat_fast.train", *arguments, **options)


@pytest.fixture(scope="session")
def case_started() -> Callable[..., subprocess.Popen[str]]:
    """Starts a case of rank_cases.py on ranks and does not wait: case_started(2, "case", *arguments)."""
    return lambda ranks, *arguments, **options: start_ranks(ranks, CASES, *arguments, **options)
