"""Shared settings of the tests: no network, one seed, and fresh memory that holds NaN."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait do not spin: a busy machine stays quick

import pytest
import torch

MOST_WORKERS = 4
SHARED_OUT = pytest.StashKey[bool]()
"""Whether this suite's tests are given to its processes by `pytest_xdist_make_scheduler`."""

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    specification = importlib.util.spec_from_file_location("interpreter", Path(__file__).parent / "ops" / "interpreter.py")
    interpreter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(interpreter)
    interpreter.exact_bf16()


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

    return ByFixture(config, log)


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
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model with an importance estimator, trained for 12 steps on 60 documents of bytes."""
    from atat_fast import train

    root = tmp_path_factory.mktemp("trained")
    words = ("the", "a", "of", "to", "list", "dict", "value", "key", "returns", "raises", "file", "path", "open", "read")
    lines = [" ".join(words[(7 * i + j * (j + i)) % len(words)] for j in range(60)) for i in range(60)]
    (root / "text.jsonl").write_text("".join(f'{{"text": "{i} {line}"}}\n' for i, line in enumerate(lines)), encoding="utf-8")
    settings = {
        "data.corpus": root / "text.jsonl", "data.tokenizer": "bytes", "data.cache_dir": root / "cache",
        "model.dim": 16, "model.layers": 1, "model.heads": 2, "model.length": 16, "model.dropout": 0.0, "optim.lr": 0.01,
        "train.max_steps": 12, "train.global_batch": 4, "eval.every": 6, "eval.sequences": 8, "sample.num_samples": 1,
        "sample.steps": 4, "run.root": root / "runs", "run.name": "small", "run.tensorboard": "false",
        "importance.source": "learned", "importance.width": 16, "importance.layers": 1, "importance.heads": 2,
    }  # fmt: skip
    assert train.main([part for name, value in settings.items() for part in (f"--{name}", str(value))]) == 0
    return root / "runs" / "small"
