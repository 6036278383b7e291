"""What is summed between log lines, given back to as many ranks as before or others."""

from __future__ import annotations

import pytest
import torch

from atat_fast.distributed.ranks import Launch, Ranks
from atat_fast.training.run_state import Window


def window(rank=0, size=1):
    ranks = Ranks(Launch())
    ranks.rank, ranks.size = rank, size
    return Window(ranks, torch.device("cpu"), 7)


def test_sums_and_the_first_step_that_was_not_finite():
    made = window()
    for step, (loss, norm) in enumerate(((1.0, 2.0), (torch.nan, 3.0), (1.0, torch.inf)), start=8):
        made.add("loss", torch.tensor(loss))
        made.add("quarters", torch.tensor([1.0, loss]))
        made.step(step, torch.tensor(norm))
        if step == 8:
            assert made.totals() == {"loss": 1.0, "norm": 2.0, "quarters": [1.0, 1.0]}
    assert (int(made.sums["odd"]), int(made.sums["bad"])) == (9, 10)


def test_a_state_comes_back_bit_for_bit_and_one_of_other_ranks_by_its_sum():
    made = window()
    made.add("loss", torch.tensor(0.1))
    made.add("norm", torch.tensor(0.3))
    state = made.state()
    assert state["step"] == 7 and len(state["ranks"]) == 1
    back = window()
    back.load(state)
    assert torch.equal(back.sums["loss"], made.sums["loss"]) and torch.equal(back.sums["norm"], made.sums["norm"])
    both = {"step": 7, "ranks": [state["ranks"][0], {"loss": 0.5, "norm": state["ranks"][0]["norm"]}]}
    for rank, loss in ((0, 0.6), (1, 0.0), (2, 0.0)):
        other = window(rank, 3)
        other.load(both)
        assert float(other.sums["loss"]) == pytest.approx(loss) and float(other.sums["norm"]) == pytest.approx(0.3)
    old = window()
    old.load({"step": 5, "loss": 0.25, "norm": 0.5})  # as one process wrote it before there were ranks
    assert old.first == 5 and float(old.sums["loss"]) == 0.25
