"""Every text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import chi_square
from small import filled

from atat_fast.config import ImportanceConfig
from atat_fast.errors import UsageError
from atat_fast.evaluation import orders
from atat_fast.evaluation.orders import EXACT, check_orders, order_nll
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.sampling import reveal
from atat_fast.sampling.categorical import certainty
from atat_fast.sampling.reveal import TIE
from atat_fast.sampling.samplers import BY_CERTAINTY, sample

VOCABULARY, LENGTH = 3, 4  # and the mask


def net_of(seed=5, scale=0.4, vocabulary=VOCABULARY, **changes):
    """Small modulation: chances that differ, and none too small to be added up."""
    torch.manual_seed(seed)
    made = DiT(vocabulary + 1, vocabulary, **{"dim": 16, "layers": 1, "heads": 2, "length": LENGTH, "dropout": 0.0} | changes)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else scale))
        made.head.weight.mul_(0.1 if vocabulary == VOCABULARY else 1.0)
    return made.eval()


def estimator():
    torch.manual_seed(6)
    config = ImportanceConfig(source="learned", width=8, layers=1, heads=2, tilt=3.0)
    return filled(ImportanceEstimator(config, 16, LENGTH, None), 1.0).eval()


X = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
EVERYWHERE = torch.ones_like(X, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def chances(net, z, share):
    """p of every token at every place, fp64 [L, V]."""
    return torch.softmax(net.logits(net.features(z[None], torch.tensor([share]))).double(), -1)


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("per_pass", [1, 2, 3])
@pytest.mark.parametrize("order", EXACT)
def test_exact_likelihoods_sum_to_one(order, per_pass, time_conditioning):
    """Of every text, and of all continuations of a prompt, whatever is around them."""
    net = net_of(time_conditioning=time_conditioning)
    nll, _ = order_nll(net, X, EVERYWHERE, order, per_pass=per_pass)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-5) and 0.3 < nll.std() < 5
    same, hidden = (X[:, 0] == 1) & (X[:, 2] == 2), torch.tensor([False, True, False, True]).expand(len(X), LENGTH)
    nll, _ = order_nll(net, X[same], hidden[same], order, per_pass=per_pass)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", EXACT)
def test_a_text_has_the_chance_that_the_rule_gives_it(order):
    """One text at a time, by the definition: ask the model, reveal where the rule says, multiply."""
    net = net_of()
    for x in X[::17]:
        z, hidden, total = torch.full((LENGTH,), VOCABULARY), list(range(LENGTH)), 0.0
        while hidden:
            p = chances(net, z, len(hidden) / LENGTH)
            top = p.sort(-1, descending=True).values
            rank = {
                "left_to_right": -torch.arange(LENGTH), "confidence": top[:, 0], "margin": top[:, 0] - top[:, 1],
                "entropy": torch.special.xlogy(p, p).sum(1),
            }[order]  # fmt: skip
            i = min(place for place in hidden if rank[place] >= rank[hidden].max() - TIE)
            total -= float(p[i, x[i]].log())
            z[i] = x[i]
            hidden.remove(i)
        assert float(order_nll(net, x[None], EVERYWHERE[:1], order)[0]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("order", EXACT)
def test_sequences_that_hide_different_numbers_do_not_disturb_each_other(order):
    net, x, hidden = net_of(), X[[5, 40, 77]], torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    together, greedy = order_nll(net, x, hidden, order)
    for i in range(3):
        alone, sure = order_nll(net, x[i : i + 1], hidden[i : i + 1], order)
        assert float(alone) == pytest.approx(float(together[i]), abs=1e-5) and bool(sure) == bool(greedy[i])
    assert together[2] == 0 and bool(greedy[2])
    net.head.bias[1] = torch.nan  # logits that are no numbers have no likelihood
    assert order_nll(net, x[:2], hidden[:2], order)[0].isnan().all()


def test_greedy_says_whether_greedy_decoding_would_write_it():
    net, z = net_of(), torch.full((LENGTH,), VOCABULARY)
    for i in range(LENGTH):
        z[i] = chances(net, z, 1 - i / LENGTH)[i].argmax()
    assert X[order_nll(net, X, EVERYWHERE, "left_to_right")[1]].tolist() == [z.tolist()]


@pytest.mark.parametrize("tilt", [3.0, -3.0, 0.0])
def test_an_importance_order_bounds_its_sampler(tilt):
    """Enumerated: the sampler's chance of a text is the sum over orders; the drawn figure's mean is above -log of it."""
    net, x = net_of(), torch.tensor([2, 0, 1, 1])
    score, both, mean = estimator().scorer(net), 0.0, 0.0
    for order in itertools.permutations(range(LENGTH)):
        z, weight, nll = torch.full((LENGTH,), VOCABULARY), 1.0, 0.0
        for n, i in enumerate(order):
            share = 1 - n / LENGTH
            odds = torch.exp(-tilt * score(z[None], torch.tensor([share]))[0].double())
            weight *= float(odds[i] / odds[list(order[n:])].sum())
            nll -= float(chances(net, z, share)[i, x[i]].log())
            z[i] = x[i]
        both, mean = both + weight * math.exp(-nll), mean + weight * nll
    many = x.expand(3_000, LENGTH)
    drawn, _ = order_nll(net, many, torch.ones_like(many, dtype=torch.bool), "importance", score=score, tilt=tilt, seed=4)
    assert abs(float(drawn.mean()) - mean) < 4 * float(drawn.std() / len(drawn) ** 0.5)
    assert mean > -math.log(both) + 1e-6


def test_orders_that_there_are_not():
    of_hidden = ImportanceConfig(source="frequency", width=8, layers=1, heads=2)
    full = ImportanceEstimator(of_hidden, 16, LENGTH, torch.ones(VOCABULARY + 1))
    for names, estimate, message in (
        (["confidense"], None, "did you mean confidence"),
        (["importance"], None, "needs a model with an importance estimator"),
        (["importance"], full, r"importance\.source frequency knows only the hidden"),
    ):
        with pytest.raises(UsageError, match=message):
            check_orders(names, estimate)
    check_orders([*EXACT, "importance"], estimator())


@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("order", BY_CERTAINTY)
def test_the_sampler_of_that_name_writes_texts_as_often_as_it_says(order, per_pass):
    """8,000 samples against the exact likelihoods of all texts."""
    net, start = net_of(), torch.full((8_000, LENGTH), VOCABULARY)
    nll, _ = order_nll(net, X, EVERYWHERE, order, per_pass=per_pass)
    drawn = sample(net, start, steps=LENGTH // per_pass, sampler=order, seed=11)
    seen = torch.bincount((drawn * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(1), minlength=len(X))
    assert 8_000 * torch.exp(-nll).min() > 2 and chi_square(seen, torch.exp(-nll)) < 3.6


@pytest.mark.parametrize("kind", ["fp32", "bf16", "rounded to quarters"])
@pytest.mark.parametrize(("length", "per_pass"), [(24, 1), (64, 4), (128, 8)])
@pytest.mark.parametrize("order", BY_CERTAINTY)
def test_the_path_is_the_samplers_from_the_first_position_on(order, length, per_pass, kind, monkeypatch):
    """Of texts that the sampler wrote the likelihood goes by the order in which they were written, ties included.

    Certainties of the model differ by rounding where everything is hidden.
    """
    if kind == "rounded to quarters":
        for module in (orders, reveal):
            monkeypatch.setattr(module, "certainty", lambda *known: (certainty(*known) * 4).round() / 4)
    net, start = net_of(length, 0.1, 299, dim=64, layers=2, heads=4, length=length), torch.full((3, length), 299)
    start[2, 5:9] = 7
    written, read, chosen_by = [], [], orders.surest
    monkeypatch.setattr(orders, "surest", lambda *known: read.append(chosen_by(*known)) or read[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        x = sample(net, start, steps=length // per_pass, sampler=order, on_step=lambda _, z: written.append(z != 299))
        order_nll(net, x[:2], start[:2] == 299, order, per_pass=per_pass)
    shown = [torch.zeros(2, length, dtype=torch.bool), *(z[:2] for z in written)]
    assert len(read) == length // per_pass and read[0].nonzero()[:, 1].tolist() == 2 * [*range(per_pass)]
    for (before, after), chosen in zip(itertools.pairwise(shown), read, strict=True):
        assert torch.equal(after & ~before, chosen)
