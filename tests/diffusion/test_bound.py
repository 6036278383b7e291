"""The reported bound: its mean, its standard error, and what it does not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from exact import MASK, Exact, ExactOfBlocks

from atat_fast.audit.masks import Joint
from atat_fast.diffusion.bound import Spread, collapsed_standard_error, estimate_nll, evaluation_strata


@pytest.mark.parametrize("draws", [1, 3])
def test_strata_are_each_used_once(draws):
    strata = evaluation_strata(101, draws, seed=1)
    assert torch.equal(strata.flatten().sort().values, torch.arange(101 * draws))
    # a sequence's draws lie in different parts of the range
    assert draws == 1 or (strata.max(1).values - strata.min(1).values).min() > 101 * draws / 3


@pytest.mark.parametrize("draws", [1, 2])
def test_the_estimate_finds_the_entropy_and_knows_its_error(draws):
    joint = Joint.random(3, 4, seed=0)
    errors, claimed, model = [], [], Exact(joint)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        data = joint.sequences[torch.multinomial(joint.chance, 60, replacement=True, generator=generator)]
        found = estimate_nll(model.nll, lambda f, c, x=data: x[f : f + c], 60, mask_id=MASK, draws=draws, batch=17, seed=seed)
        errors.append(found.nll - joint.entropy() / 4)
        claimed.append(found.se)
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(60)
    assert 0.75 < float(torch.tensor(claimed).mean() / errors.std()) < 1.35


def test_with_prompts_it_is_the_conditional_entropy_of_the_responses():
    """Prompts of one token and of two in turn, and the last token is padding for half of them."""
    joint = Joint.random(3, 4, seed=0)
    model, errors, claimed = Exact(joint), [], []
    extents = torch.tensor([[1, 4], [2, 4]]).repeat(30, 1)
    seen = lambda k: float(torch.special.entr(joint.chance.double().view(-1, 3 ** (4 - k)).sum(1)).sum())  # noqa: E731
    want = (2 * joint.entropy() - seen(1) - seen(2)) / 5  # of the first tokens, which are the slowest digits
    assert torch.equal(joint.sequences[0, :2], joint.sequences[1, :2])
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        data = joint.sequences[torch.multinomial(joint.chance, 60, replacement=True, generator=generator)]

        def nll(masked):
            hidden = masked.noisy == MASK
            assert not hidden[:, 0].any() and hidden.any(1).all()
            return model.nll(masked)

        options = {"mask_id": MASK, "draws": 1, "batch": 20, "seed": seed}
        found = estimate_nll(nll, lambda f, c, x=data: x[f : f + c], 60, extents=lambda f, c: extents[f : f + c], **options)
        errors.append(found.nll - want)
        claimed.append(found.se)
        assert float(found.values.mean()) == pytest.approx(found.nll)
    errors = torch.tensor(errors)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(60)
    assert 0.7 < float(torch.tensor(claimed).mean() / errors.std()) < 1.4


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_bound_of_blocks_is_the_likelihood_of_the_best_model(block):
    """At K = 1 without any noise: the chain rule. At K = L it is the number of a model without blocks."""
    joint = Joint.random(3, 4, seed=0)
    data = joint.sequences[torch.multinomial(joint.chance, 40, replacement=True, generator=torch.Generator().manual_seed(0))]
    truth = float(-joint.chance[(data * 3 ** torch.arange(3, -1, -1)).sum(1)].log().mean()) / 4
    model, found = ExactOfBlocks(joint, block), []
    options = {"mask_id": MASK, "draws": 2, "batch": 16}
    for seed in range(30 if block == 2 else 1):
        found.append(estimate_nll(model.nll, lambda f, c: data[f : f + c], 40, seed=seed, block=block, **options))
    values = torch.tensor([f.nll for f in found])
    if block == 1:
        assert float(values[0]) == pytest.approx(truth, rel=1e-6)
    elif block == 2:
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(30)
        assert found[0].se == pytest.approx(float(found[0].values.std()) / math.sqrt(40)) and found[0].length == 4
    else:
        assert found[0].nll == estimate_nll(Exact(joint).nll, lambda f, c: data[f : f + c], 40, seed=0, **options).nll
    other = Spread(1, 2, total=lambda t: t)  # the batches of one of two processes
    if block == 2:
        half = estimate_nll(model.nll, lambda f, c: data[f : f + c], 40, seed=0, block=2, spread=other, **options).values
        first = estimate_nll(model.nll, lambda f, c: data[f : f + c], 40, seed=0, block=2, spread=Spread(0, 2), **options).values
        torch.testing.assert_close(half + first, found[0].values)


def test_masks_do_not_depend_on_the_batch_or_the_model_and_a_constant_loss_is_found():
    masks = {}
    for batch, loss in ((7, 2.0), (40, 5.0)):

        def nll(masked, batch=batch, loss=loss):
            masks.setdefault(batch, []).append(masked.noisy)
            return torch.full((len(masked.rows),), loss)

        found = estimate_nll(
            nll, lambda f, c: torch.arange(f * 8, (f + c) * 8).view(c, 8), 40, mask_id=999, draws=1, batch=batch, seed=3
        )
        assert found.nll == pytest.approx(loss) and found.se == pytest.approx(0.0)
        assert found.perplexity == pytest.approx(math.exp(loss)) and found.bits_per_token() == pytest.approx(loss / math.log(2))
        assert found.bits_per_byte(4.0) == pytest.approx(loss / 4 / math.log(2))
    assert torch.equal(torch.cat(masks[7]), torch.cat(masks[40]))


def test_the_collapsed_error_groups_neighbours():
    values, strata = torch.tensor([1.0, 3.0, 10.0, 14.0, 11.0], dtype=torch.float64), torch.arange(5)
    expected = math.sqrt(2 * 2.0 + 3 * float(values[2:].var())) / 5
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 1, 2]):
        assert collapsed_standard_error(values[order], strata[order]) == pytest.approx(expected)
    assert collapsed_standard_error(values[:1], strata[:1]) == math.inf
