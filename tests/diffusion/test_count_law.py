"""A law of the counts that is learned: from the slope of the loss, from any start, the same after a stop."""

from __future__ import annotations

import pytest
import torch

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.count_law import BINS, PERIOD, UNIFORM, CountLaw, bins_of, law_of, spread_out
from atat_fast.diffusion.counts import bell, count_chances, mask_counts

CPU = torch.device("cpu")
SHARE = (torch.arange(BINS) + 0.5) / BINS


def test_the_law_is_the_slope_of_the_loss_mixed_with_uniform_counts():
    flat = torch.full((BINS,), 1 / BINS)
    torch.testing.assert_close(law_of(3 * SHARE), flat)
    torch.testing.assert_close(law_of(torch.ones(BINS)), flat)  # nothing rises
    torch.testing.assert_close(law_of(-SHARE), flat)
    concave = law_of(1 - (1 - SHARE) ** 2)
    want = (1 - UNIFORM) * (1 - SHARE) / (1 - SHARE).sum() + UNIFORM / BINS
    torch.testing.assert_close(concave[:-1], want[:-1], rtol=0.05, atol=0)
    assert want[-1] < concave[-1] < concave[-2]  # smoothed from one side only
    step = law_of((SHARE > 0.5).float())
    assert step.argmax() in (7, 8) and step.min() == pytest.approx(UNIFORM / BINS) and step.sum() == pytest.approx(1)


@pytest.mark.parametrize("length", [1, 3, 16, 37, 128])
def test_chances_of_counts_are_those_of_their_bins(length):
    counts = torch.arange(1, length + 1)
    of_counts = bins_of(counts / length)
    assert of_counts[0] == max(0, -(-BINS // length) - 1) and of_counts[-1] == BINS - 1
    bins = torch.rand(BINS, dtype=torch.float64)
    chances = spread_out(bins, of_counts)
    assert chances[0] == 0 and float(chances.sum()) == pytest.approx(1)
    total = bins[of_counts.unique()].sum()
    for b in of_counts.unique():
        mine = chances[1:][of_counts == b]
        assert torch.allclose(mine, mine[0]) and float(mine.sum()) == pytest.approx(float(bins[b] / total))


def learned_from(centre, slope, steps=400, length=64):
    """A law that began at a bell at `centre` and sees losses that rise as `slope` says, of the counts that it draws itself."""
    torch.manual_seed(0)
    config = DiffusionConfig(counts="learned", counts_centre=centre, counts_width=0.15)
    law = CountLaw(count_chances(config, length, 0.0), CPU)
    for step in range(steps):
        counts = mask_counts(length, 0, 16, 16, seed=1, step=step, chances=law.chances())
        rows = torch.cat([b * length + torch.arange(int(k)) for b, k in enumerate(counts)])
        share = counts / length
        law.observe(share, rows, slope(share[rows // length]) + 0.1 * torch.randn(len(rows)))
        law.step(step, 1)
    return law


def test_it_comes_to_the_same_law_from_a_right_and_a_wrong_start():
    def slope(share):
        return 3 * (1 - (1 - share) ** 3)  # steep where little is hidden

    right, wrong = (learned_from(centre, slope).chances() for centre in (0.2, 0.8))
    k = torch.arange(65) / 64
    centres = [float((chances * k).sum()) for chances in (right, wrong, bell(64, 0.8, 0.15))]
    assert abs(centres[0] - centres[1]) < 0.03 < 0.3 < centres[2] - centres[1]
    assert (wrong[1:] > UNIFORM / 64 * 0.9).all()


def test_it_waits_for_the_device_only_every_period_and_repeats_itself():
    laws = [learned_from(0.5, torch.sqrt, steps=2 * PERIOD + 3) for _ in range(2)]
    assert torch.equal(laws[0].chances(), laws[1].chances())
    law = laws[0]
    before = law.chances()
    law.step(PERIOD, 1)
    assert law.chances() is before
    law.step(2 * PERIOD - 1, 1)
    assert law.chances() is not before
    other = CountLaw(bell(64, 0.5, 0.2), CPU)
    for name, value in other.tensors().items():
        value.copy_(law.tensors()[name])
    assert torch.equal(other.chances(), law.chances())
