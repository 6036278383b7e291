"""Kernels compiled for sm_89 and sm_90 without a GPU: nothing spills, shared memory fits, registers stay near the table's.

Cases are compiled for the two in turn; what multiplies on tensor cores, whose code differs, for both; and CUDA sources for sm_89,
which has less shared memory. With ATAT_FAST_AOT=all everything is compiled for both, which takes twice as long. A kernel that
changed on purpose gets its new numbers from `python tests/aot/resources.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import CUDA, TARGETS, TRITON, linear_categorical
from resources import BUDGETS, Resources, compile_cuda, compile_triton

BAND = 25  # registers move by as much between versions of Triton
CARDS = tuple(TARGETS)
EVERYTHING = os.environ.get("ATAT_FAST_AOT") == "all"
RECORDED = json.loads(BUDGETS.read_text())["registers"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]


def check(name: str, capability: int, resources: Resources) -> None:
    assert resources.spilled == 0, f"{name} spills {resources.spilled} bytes on sm_{capability}"
    assert resources.shared <= TARGETS[capability], f"{name} takes {resources.shared} bytes of shared memory on sm_{capability}"
    recorded = RECORDED[name][f"sm_{capability}"]
    assert abs(resources.registers - recorded) <= BAND, f"{name} takes {resources.registers} registers, {recorded} in the table"


@pytest.mark.parametrize("group", TRITON, ids=lambda group: group.__name__)
def test_triton(group):
    pytest.importorskip("triton")
    for number, case in enumerate(group()):
        for capability in CARDS if EVERYTHING or group is linear_categorical else [CARDS[number % 2]]:
            check(case.name, capability, compile_triton(case, capability))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("capability", CARDS if EVERYTHING else [89])
@pytest.mark.parametrize("source", CUDA, ids=lambda source: source.source)
def test_cuda(source, capability):
    for name, resources in compile_cuda(source, capability).items():
        check(name, capability, resources)


def test_every_source_is_listed():
    folder = BUDGETS.parents[2] / "csrc"
    with_kernels = (path for path in folder.rglob("*.cu*") if "__global__" in path.read_text())
    sources = {str(path.relative_to(folder).with_name("launch.cu")) for path in with_kernels}
    assert sources == {source.source for source in CUDA}
