"""The CUDA kernels of the row pass, compiled for the CPU once for all tests of this folder."""

from __future__ import annotations

import pytest
from linear_cross_entropy.slab import OnHost


@pytest.fixture(scope="session")
def on_host(compile_source):
    return OnHost(compile_source("linear_cross_entropy/on_host.cpp", "g++", "-fPIC", "-Wall", "-Werror"))
