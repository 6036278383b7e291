"""Shared settings of the tests: no network, one seed, and fresh memory that holds NaN."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait do not spin: a busy machine stays quick

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    specification = importlib.util.spec_from_file_location("interpreter", Path(__file__).parent / "ops" / "interpreter.py")
    interpreter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(interpreter)
    interpreter.exact_bf16()


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
