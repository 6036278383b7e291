"""How a model is wrapped: graphs of its blocks."""

from __future__ import annotations

import pytest
import torch
from small import small_dit

from atat_fast.distributed.wrap import compile_blocks
from atat_fast.models.trunk import Randomness


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_blocks_of_any_number_share_their_graphs_with_dropout(again):
    """Only the first, the second and the last differ from the rest, and no later step compiles anything but its own shapes."""
    counts, losses = {}, {}
    for layers in (4, 9):
        torch._dynamo.reset()
        made: list[torch.fx.GraphModule] = []
        model, plain = (small_dit(scale=0.1, layers=layers, dropout=0.3) for _ in range(2))
        for block in model.blocks:
            block.recompute = again
        compile_blocks(model, lambda graph, example, made=made: made.append(graph) or graph.forward)
        for step in range(3):
            tokens, rows = torch.randint(0, 11, (2, 12)), torch.arange(12 + step)
            given = (tokens, rows, torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows)), None)
            drawn = Randomness(1, torch.tensor(step), torch.arange(2))
            loss, want = (m(*given, drawn)[0] for m in (model, plain))
            loss.backward()
            torch.testing.assert_close(loss, want)
            counts.setdefault(layers, []).append(len(made))
            losses.setdefault(layers, []).append(loss.item())
    assert counts[4] == counts[9] and counts[9][-1] <= 6, counts
    assert len(set(losses[9])) == 3
