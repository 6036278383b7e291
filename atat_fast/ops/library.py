"""The compiled library (csrc/): where it is, whether it loads, what was built into it.

The package also works without it, on Triton and PyTorch. Nothing here runs at import time.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "libatat_fast.so"

# A declaration that csrc/library.cpp has only since they last changed: a library without it is older.
NEWEST = "reaches_stream"

# Bits of build_flags(), as in csrc/library.cpp.
CPU_OPS = 1
CUDA_KERNELS = 2


def load() -> bool:
    """Load the library once. Returns whether its ops (``torch.ops.atat_fast_c``) are there.

    Silent if the library is absent; one RuntimeWarning if it is there and does not load. `problem` gives the reason.
    """
    return problem() is None


def build_flags() -> int:
    """What was compiled in: the bits CPU_OPS and CUDA_KERNELS, or 0 without a library. Does not touch a GPU."""
    return int(torch.ops.atat_fast_c.build_flags()) if load() else 0


@functools.cache
def cuda_targets() -> tuple[int, ...]:
    """What the CUDA kernels were compiled for: 89 is machine code for sm_89, -90 is PTX for compute_90. Empty without them."""
    if not build_flags() & CUDA_KERNELS:
        return ()
    found: list[int] = []
    while target := int(torch.ops.atat_fast_c.cuda_target(len(found))):
        found.append(target)
    return tuple(found)


def describe_targets() -> str:
    """`sm_89, sm_90 and PTX of compute_90`, or `no CUDA kernels`."""
    names = [f"sm_{target}" if target > 0 else f"PTX of compute_{-target}" for target in cuda_targets()]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "no CUDA kernels"


def cuda_problem(capability: tuple[int, int]) -> str | None:
    """One sentence: why the CUDA kernels cannot run on this capability, torch and driver. None if they can."""
    if not build_flags() & CUDA_KERNELS:
        return problem() or "the compiled library was built without nvcc"
    if torch.version.hip or not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    ops, number = torch.ops.atat_fast_c, capability[0] * 10 + capability[1]
    if not any(t // 10 == capability[0] and t <= number if t > 0 else -t <= number for t in cuda_targets()):
        return (
            f"the compiled library holds {describe_targets()}, and this device is sm_{number}; "
            f'ATAT_FAST_CUDA_ARCHS="{capability[0]}.{capability[1]}" `pip install --no-build-isolation .` in a checkout builds it'
        )
    runtime, driver = int(ops.cuda_runtime()), int(ops.cuda_driver())
    if driver // 1000 < runtime // 1000:  # CUDA is compatible within a major version
        return (
            f"the compiled library needs CUDA {_version(runtime)}, and the driver supports CUDA up to {_version(driver)}; "
            f"install a newer driver, or build the library with nvcc of CUDA {driver // 1000}"
        )
    if not ops.reaches_stream():
        return (
            "the compiled library was linked without libtorch.so and cannot ask torch for its stream; "
            "`pip install --no-build-isolation .` in a checkout builds it anew"
        )
    return None


def _version(number: int) -> str:
    """13000 as 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def problem() -> str | None:
    """One sentence: why the library cannot be used. None if it is loaded."""
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
    if not hasattr(torch.ops.atat_fast_c, NEWEST):
        return (
            f"{LIBRARY_PATH} was built from older sources than this package's; "
            "`pip install --no-build-isolation .` in a checkout builds it anew"
        )
    return None
