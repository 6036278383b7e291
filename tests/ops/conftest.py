"""What the tests of ops need before they start: their helpers on the path, and products that repeat themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself bit for bit with a workspace of its own


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is large enough for a GPU is not tried on a CPU's backends beside it."""
    of = lambda item: getattr(item, "callspec", None) and item.callspec.params.get("device")  # noqa: E731
    dropped = {item for item in items if item.get_closest_marker("gpu") and of(item) in ("cpu", "host")}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]
