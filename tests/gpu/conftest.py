"""The device of a test, and products that repeat themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

# cuBLAS repeats itself bit for bit with a workspace of its own, which it has to be told before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A law of a GPU is a law of a CPU too, which runs it small."""
    return str(request.param)


@pytest.fixture
def no_waiting() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Within no_waiting(device), whatever makes the host wait for a GPU raises."""

    @contextlib.contextmanager
    def no_waiting(device: str) -> Iterator[None]:
        if device != "cuda":
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return no_waiting


@pytest.fixture(params=[pytest.param("cuda", marks=on_gpu)])
def card(request: pytest.FixtureRequest) -> torch.device:
    """A GPU."""
    return torch.device(request.param, 0)
