"""Likelihoods on a GPU are a CPU's, mask for mask and token for token."""

from __future__ import annotations

import itertools

import pytest
import torch

from atat_fast.config import ImportanceConfig
from atat_fast.evaluation.likelihood import model_nll
from atat_fast.evaluation.orders import ORDERS, order_nll
from atat_fast.evaluation.precision import estimate_to
from atat_fast.models import DiT
from atat_fast.models.importance import ImportanceEstimator

VOCABULARY, LENGTH = 3, 4


def models(device):
    torch.manual_seed(1)
    model = DiT(VOCABULARY + 1, VOCABULARY, dim=16, layers=2, heads=2, length=LENGTH, dropout=0.0)
    estimator = ImportanceEstimator(ImportanceConfig(source="learned", width=8, layers=1, heads=2), 16, LENGTH)
    with torch.no_grad():
        for name, parameter in itertools.chain(model.named_parameters(), estimator.named_parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else 0.4))
        model.head.weight.mul_(0.1)
    return model.eval().to(device), estimator.eval().to(device)


def texts(device):
    return torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), device=device)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_the_cpus(order, device):
    def run(where):
        (model, estimator), x = models(where), texts(where)
        hidden = torch.ones_like(x, dtype=torch.bool)
        return order_nll(model, x, hidden, order, score=estimator.scorer(model), tilt=3.0, seed=2)[0].cpu()

    assert torch.allclose(run(device), run("cpu"), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_bound_is_the_cpus(device):
    def run(where):
        nll, x = model_nll(models(where)[0]), texts(where)
        options = {"mask_id": VOCABULARY, "se": 0.01, "most_draws": 200, "batch": 32, "seed": 5}
        return estimate_to(nll, lambda i, n: x[i : i + n], len(x), **options)

    found, want = run(device), run("cpu")
    assert found.draws == want.draws and found.estimate.nll == pytest.approx(want.estimate.nll, rel=1e-3)
    assert torch.allclose(found.estimate.values, want.estimate.values, rtol=1e-2, atol=1e-2)
