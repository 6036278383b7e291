"""What a launcher says of a process, and what the watch says of ranks that do not move."""

from __future__ import annotations

import pytest

from atat_fast.distributed.ranks import Launch
from atat_fast.distributed.watch import RankState, verdict
from atat_fast.errors import UsageError

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_the_launcher_says_who_this_is():
    at = Launch.of(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (at.rank, at.size, at.local_rank, at.local_size, at.restarts) == (3, 4, 1, 2, 2)
    assert Launch.of({}).size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 4, but RANK is not set, so the ranks cannot find each other; start them with torchrun"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "4"}, "RANK is 4, outside the 4 ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a whole number"),
    ],
)
def test_a_missing_meeting_point_is_a_sentence(change, message):
    with pytest.raises(UsageError, match=message):
        Launch.of(TORCHRUN | change)


def test_the_watch_names_the_ranks_that_do_not_move():
    ahead, behind = RankState(9, 3, "evaluating", False), RankState(8, 3, "reading a batch", False)
    text = verdict([ahead, behind, ahead], [1], [], 30.0)
    assert text.startswith("rank 1 has not moved for 30 seconds (parallel.timeout): last seen reading a batch, step 4,")
    assert verdict([ahead, behind, behind], [1, 2], [1, 2], 5.0).startswith("ranks 1, 2 have said nothing for 5 seconds")
    assert "look at the network" in verdict([ahead, ahead], [0, 1], [], 5.0)
