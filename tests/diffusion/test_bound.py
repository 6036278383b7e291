"""The reported bound: its mean, its standard error, and what it does not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from atat_fast.audit.masks import Joint
from atat_fast.diffusion.bound import collapsed_standard_error, estimate_nll, evaluation_strata


def exact_model(joint):
    """-log p*(x_i | visible) of the joint, for MaskedBatch."""

    def nll(masked):
        noisy, length = masked.noisy, joint.length
        out = []
        for row, target in zip(masked.rows.tolist(), masked.target.tolist(), strict=True):
            z, i = noisy[row // length], row % length
            fits = ((z == 99) | (joint.sequences == z)).all(1)
            given = joint.chance[fits].sum()
            out.append(-(joint.chance[fits & (joint.sequences[:, i] == target)].sum() / given).log())
        return torch.stack(out).float()

    return nll


@pytest.mark.parametrize("draws", [1, 3])
def test_strata_are_each_used_once(draws):
    strata = evaluation_strata(101, draws, seed=1)
    assert torch.equal(strata.flatten().sort().values, torch.arange(101 * draws))
    if draws > 1:  # a sequence's draws lie in different parts of the range
        spread = strata.max(1).values - strata.min(1).values
        assert spread.min() > 101 * draws / 3


@pytest.mark.parametrize("draws", [1, 2])
def test_the_estimate_finds_the_entropy_and_knows_its_error(draws):
    joint = Joint.random(3, 4, seed=0)
    model = exact_model(joint)
    errors, claimed = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        data = joint.sequences[torch.multinomial(joint.chance, 60, replacement=True, generator=generator)]
        found = estimate_nll(model, lambda f, c, x=data: x[f : f + c], 60, mask_id=99, draws=draws, batch=17, seed=seed)
        errors.append(found.nll - joint.entropy() / 4)
        claimed.append(found.se)
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(60)
    assert 0.75 < float(torch.tensor(claimed).mean() / errors.std()) < 1.35


def test_masks_do_not_depend_on_the_batch_or_the_model():
    joint = Joint.random(3, 4, seed=0)
    data = joint.sequences[:40]
    seen = {}

    def record(name):
        def nll(masked):
            seen.setdefault(name, []).append(masked.noisy)
            return torch.ones(len(masked.rows))

        return nll

    for name, batch in (("small", 7), ("whole", 40)):
        estimate_nll(record(name), lambda f, c: data[f : f + c], 40, mask_id=99, draws=1, batch=batch, seed=3)
    assert torch.equal(torch.cat(seen["small"]), torch.cat(seen["whole"]))


def test_numbers_that_follow():
    found = estimate_nll(
        lambda m: torch.full((len(m.rows),), 2.0), lambda f, c: torch.zeros(c, 8, dtype=torch.int64), 9,
        mask_id=99, draws=1, batch=4, seed=0,
    )  # fmt: skip
    assert found.nll == pytest.approx(2.0) and found.se == pytest.approx(0.0)
    assert found.perplexity == pytest.approx(math.exp(2)) and found.bits_per_token() == pytest.approx(2 / math.log(2))
    assert found.bits_per_byte(4.0) == pytest.approx(0.5 / math.log(2))


def test_the_collapsed_error_groups_neighbours():
    values = torch.tensor([1.0, 3.0, 10.0, 14.0, 11.0], dtype=torch.float64)
    strata = torch.tensor([0, 1, 2, 3, 4])
    last = torch.tensor([10.0, 14.0, 11.0], dtype=torch.float64)
    expected = math.sqrt(2 * 2.0 + 3 * float(last.var())) / 5
    assert collapsed_standard_error(values, strata) == pytest.approx(expected)
    assert collapsed_standard_error(values[[3, 0, 4, 1, 2]], strata[[3, 0, 4, 1, 2]]) == pytest.approx(expected)
    assert collapsed_standard_error(values[:1], strata[:1]) == math.inf
