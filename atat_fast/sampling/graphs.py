"""CUDA graphs for a loop whose steps have few sizes: each size runs once eagerly, then is captured and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from atat_fast.sampling.reveal import StepRows


def rounded_up(count: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few sizes give few graphs, and at most half as many rows again."""
    if count <= 3:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= count else power


class Replay:
    """Calls `advance(sizes)`, from a graph if these sizes came before.

    The first step of a size runs eagerly, which compiles kernels and casts weights outside any graph. The second is captured,
    which runs nothing, and then replayed. Whatever changes from step to step must lie in device memory.
    """

    def __init__(self, advance: Callable[[StepRows], None]) -> None:
        self.advance = advance
        self.met: set[StepRows] = set()
        self.graphs: dict[StepRows, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, sizes: StepRows) -> None:
        """One step."""
        if sizes not in self.met:
            self.met.add(sizes)
            self.advance(sizes)
            return
        if sizes not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.advance(sizes)
            self.graphs[sizes] = graph
        self.graphs[sizes].replay()
