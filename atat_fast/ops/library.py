"""The compiled library (csrc/): where it is, whether it loads, what was built into it.

The package works without it, on Triton and PyTorch, so its absence is no error. Nothing here runs at import time.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "libatat_fast.so"

# Bits of build_flags(), as in csrc/library.cpp.
CPU_OPS = 1
CUDA_KERNELS = 2


def load() -> bool:
    """Load the library once and say whether its ops (``torch.ops.atat_fast_c``) are there.

    Absent is False without a word. Present but not loadable is False with one RuntimeWarning; `problem` keeps the sentence.
    """
    return problem() is None


def build_flags() -> int:
    """What was compiled in: the bits CPU_OPS and CUDA_KERNELS, or 0 without a library. Asks nothing of a GPU."""
    return int(torch.ops.atat_fast_c.build_flags()) if load() else 0


@functools.cache
def problem() -> str | None:
    """Why the library cannot be used, one sentence, or None when it is loaded."""
    if not LIBRARY_PATH.is_file():
        return (
            "the compiled library was not built; with torch installed and nvcc or g++ on PATH, "
            "`pip install --no-build-isolation .` in a checkout builds it"
        )
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        sentence = (
            f"{LIBRARY_PATH} does not load with torch {torch.__version__} ({reason}); rebuild it with "
            "`pip install --no-build-isolation .` in a checkout, or delete it to run on Triton and PyTorch alone"
        )
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
        return sentence
    return None
