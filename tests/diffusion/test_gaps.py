"""Weights by gaps: distances, a running table that repeats itself, and settings that do not go together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atat_fast.config import CurriculumConfig, DiffusionConfig, ImportanceConfig
from atat_fast.diffusion.adaptive import check_importance
from atat_fast.diffusion.gaps import CELLS, DECAY, DISTANCES, FLOOR, GapTable, cells_of, check_blind
from atat_fast.errors import UsageError

CPU = torch.device("cpu")


def cell_of(hidden, i):
    """The same, written out."""
    found = []
    for step in (-1, 1):
        places = range(i + step, len(hidden) if step > 0 else -1, step)
        distance = next((abs(j - i) for j in places if not hidden[j]), None)
        edges = [1, 2, 4, 8, 16, 32, 64]
        found.append(8 if distance is None else next((n for n, edge in enumerate(edges) if distance <= edge), 7))
    return found[0] * DISTANCES + found[1]


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_cells_are_distances_to_the_nearest_visible_tokens(rows):
    cells = cells_of(torch.tensor(rows))
    for row, own in zip(rows, cells.tolist(), strict=True):
        assert [own[i] for i in range(9) if row[i]] == [cell_of(row, i) for i in range(9) if row[i]]


@pytest.mark.parametrize("length", [1, 150, 700])
def test_long_gaps_and_sequences_that_are_all_hidden(length):
    hidden = torch.ones(2, length, dtype=torch.bool)
    hidden[1, 0] = False
    cells = cells_of(hidden)
    assert (cells[0] == CELLS - 1).all()
    assert cells[1, 1:].tolist() == [cell_of(hidden[1].tolist(), i) for i in range(1, length)]
    assert cells_of(torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 5)


def test_weights_follow_the_running_losses_and_have_mean_one():
    table = GapTable(0.5, CPU)
    assert table.weights(torch.tensor([0, 5])).tolist() == [1.0, 1.0]  # nothing is known yet
    cells, nll = torch.randint(0, 6, (5000,)), torch.rand(5000) + 0.2
    nll = nll * (1 + cells)
    for _ in range(2):
        table.observe(cells[:2000], nll[:2000])
        table.observe(cells[2000:], nll[2000:])
        table.step(1)
    assert table.sums[1].sum() == pytest.approx(5000 * (1 + DECAY))
    means = torch.stack([nll[cells == c].mean() for c in range(6)])
    torch.testing.assert_close(table.means()[:6], means, rtol=0.03, atol=0)
    weights = table.weights(cells)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    want = (table.means() + FLOOR) ** -0.5
    torch.testing.assert_close(weights[0] / weights[1], want[cells[0]] / want[cells[1]])
    empty = table.weights(torch.zeros(0, dtype=torch.int64))
    table.observe(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert empty.shape == (0,) and not table.fresh.any()


def test_a_table_repeats_itself_and_does_not_depend_on_how_a_step_is_cut():
    cells, nll = torch.randint(0, CELLS, (4096,)), torch.rand(4096) * 5
    tables = [GapTable(1.0, CPU) for _ in range(3)]
    for table, parts in zip(tables, (1, 1, 4), strict=True):
        for c, n in zip(cells.chunk(parts), nll.chunk(parts), strict=True):
            table.observe(c, n)
        table.step(1)
    assert torch.equal(tables[0].sums, tables[1].sums)
    torch.testing.assert_close(tables[2].sums, tables[0].sums)


@pytest.mark.parametrize(
    ("diffusion", "curriculum", "message"),
    [
        ({"spread": 1.5}, 1.0, r"diffusion\.spread 1\.5 times the curriculum's level 1 is no chance; use at most 1"),
        ({"spread": -0.6}, 2.0, "use at most 0.5"),
        ({"spread": 0.5, "masking": "bernoulli"}, 1.0, "diffusion.masking bernoulli in its own way"),
        ({"spread": 0.5, "mirror": True}, 1.0, "diffusion.mirror true in its own way"),
        ({"spread": 0.5, "schedule": "token_identity"}, 1.0, "diffusion.schedule token_identity in its own way"),
        ({"gap_power": 5.0}, 1.0, r"gap_power must be in \[-4, 4\], got 5"),
        ({"gap_power": 0.5, "schedule": "token_identity"}, 1.0, "has weights of its own"),
    ],
)
def test_settings_that_do_not_go_together(diffusion, curriculum, message):
    with pytest.raises(UsageError, match=message):
        check_blind(DiffusionConfig(**diffusion), curriculum)


def test_spread_masks_and_importance_exclude_each_other_and_either_has_a_curriculum():
    linear = CurriculumConfig(kind="linear")
    check_importance(ImportanceConfig(), DiffusionConfig(spread=0.5), linear)
    with pytest.raises(UsageError, match=r"nothing to change if importance\.source is none and diffusion\.spread 0"):
        check_importance(ImportanceConfig(), DiffusionConfig(), linear)
    with pytest.raises(UsageError, match="set one of them to 0 or none"):
        check_importance(ImportanceConfig(source="learned"), DiffusionConfig(spread=0.5), linear)
