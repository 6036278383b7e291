"""cuBLAS repeats itself bit for bit with a workspace of its own, which it has to be told before the first product."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
