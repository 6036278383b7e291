"""Likelihoods in an order: exact ones sum to one, and an importance order's is a bound."""

from __future__ import annotations

import itertools

import pytest
import torch

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


def model(**changes):
    torch.manual_seed(5)
    made = DiT(VOCABULARY + 1, VOCABULARY, dim=16, layers=1, heads=2, length=LENGTH, dropout=0.0, **changes)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else 0.4))
        made.head.weight.mul_(0.1)  # chances that differ, and none too small to be added up
    return made.eval()


def estimator(**changes):
    torch.manual_seed(6)
    config = ImportanceConfig(source="learned", width=8, layers=1, heads=2, tilt=3.0)
    made = ImportanceEstimator(config, 16, LENGTH, None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made.eval()


def every_text():
    return torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def everything(x):
    return torch.ones_like(x, dtype=torch.bool)


def chances(net, z, share):
    """p of every token at every place, fp64 [L, V]."""
    return torch.softmax(net.logits(net.features(z[None], torch.tensor([share]))).double(), -1)


@torch.no_grad()
@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("per_pass", [1, 2, 3])
@pytest.mark.parametrize("order", EXACT)
def test_exact_likelihoods_sum_to_one(order, per_pass, time_conditioning):
    net, x = model(time_conditioning=time_conditioning), every_text()
    nll, _ = order_nll(net, x, everything(x), order, per_pass=per_pass)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-5)
    assert 0.3 < nll.std() < 5


@torch.no_grad()
@pytest.mark.parametrize("order", EXACT)
def test_a_text_has_the_chance_that_the_rule_gives_it(order):
    """One text at a time, by the definition: ask the model, reveal where the rule says, multiply."""
    net = model()
    for x in every_text()[::17]:
        z, hidden, total = torch.full((LENGTH,), VOCABULARY), list(range(LENGTH)), 0.0
        while hidden:
            p = chances(net, z, len(hidden) / LENGTH)
            top = p.sort(-1, descending=True).values
            rank = {
                "left_to_right": [-float(i) for i in range(LENGTH)],
                "confidence": top[:, 0].tolist(),
                "margin": (top[:, 0] - top[:, 1]).tolist(),
                "entropy": [float((row[row > 0] * row[row > 0].log()).sum()) for row in p],
            }[order]
            best = max(rank[place] for place in hidden)
            i = min(place for place in hidden if rank[place] >= best - TIE)
            total -= float(p[i, x[i]].log())
            z[i] = x[i]
            hidden.remove(i)
        nll, _ = order_nll(net, x[None], everything(x[None]), order)
        assert float(nll) == pytest.approx(total, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("order", EXACT)
def test_a_prompt_is_given_and_not_scored(order):
    """The chances of all continuations of a prompt sum to one, whatever is around them."""
    net = model()
    x = every_text()
    hidden = everything(x)
    hidden[:, [0, 2]] = False
    same = (x[:, 0] == 1) & (x[:, 2] == 2)
    nll, _ = order_nll(net, x[same], hidden[same], order)
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_sequences_that_hide_different_numbers_do_not_disturb_each_other():
    net, x = model(), every_text()[[5, 40, 77]]
    hidden = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    for order in EXACT:
        together, greedy = order_nll(net, x, hidden, order)
        for i in range(3):
            alone, sure = order_nll(net, x[i : i + 1], hidden[i : i + 1], order)
            assert float(alone) == pytest.approx(float(together[i]), abs=1e-5) and bool(sure) == bool(greedy[i])
        assert together[2] == 0 and bool(greedy[2])


@torch.no_grad()
def test_greedy_says_whether_greedy_decoding_would_write_it():
    net = model()
    z = torch.full((LENGTH,), VOCABULARY)
    for i in range(LENGTH):
        z[i] = chances(net, z, 1 - i / LENGTH)[i].argmax()
    x = every_text()
    _, greedy = order_nll(net, x, everything(x), "left_to_right")
    assert x[greedy].tolist() == [z.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("tilt", [3.0, -3.0, 0.0])
def test_an_importance_order_bounds_its_sampler(tilt):
    """Enumerated: the sampler's chance of a text is the sum over orders; the drawn figure's mean is above -log of it."""
    net, guess = model(), estimator()
    score = guess.scorer(net)
    x = torch.tensor([2, 0, 1, 1])
    log_p, mean = enumerate_orders(net, score, x, tilt)
    drawn = order_nll(
        net, x.expand(3_000, LENGTH), everything(x.expand(3_000, LENGTH)), "importance", score=score, tilt=tilt, seed=4
    )[0]
    error = float(drawn.std() / len(drawn) ** 0.5)
    assert abs(float(drawn.mean()) - mean) < 4 * error
    assert mean > -log_p + 1e-6


def enumerate_orders(net, score, x, tilt):
    """(log of the sum over orders of chance of order and text, mean over orders of -log p of the text along it)."""

    def visit(z, hidden, weight, nll):
        if not hidden:
            return weight * torch.exp(-nll), weight * nll
        share = torch.tensor([len(hidden) / LENGTH])
        odds = torch.exp(-tilt * score(z[None], share)[0].double())
        p = chances(net, z, float(share))
        total = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        for i in hidden:
            shown = z.clone()
            shown[i] = x[i]
            chance = odds[i] / odds[hidden].sum()
            parts = visit(shown, [j for j in hidden if j != i], weight * chance, nll - p[i, x[i]].log())
            total = [a + b for a, b in zip(total, parts, strict=True)]
        return total

    start = torch.full((LENGTH,), VOCABULARY)
    one = torch.ones((), dtype=torch.float64)
    both, mean = visit(start, list(range(LENGTH)), one, one * 0)
    return float(both.log()), float(mean)


def test_orders_that_there_are_not():
    with pytest.raises(UsageError, match="did you mean confidence"):
        check_orders(["confidense"], None)
    with pytest.raises(UsageError, match="needs a model with an importance estimator"):
        check_orders(["importance"], None)
    full = ImportanceEstimator(
        ImportanceConfig(source="frequency", width=8, layers=1, heads=2), 16, LENGTH, torch.ones(VOCABULARY + 1)
    )
    with pytest.raises(UsageError, match=r"importance\.source frequency knows only the hidden"):
        check_orders(["importance"], full)
    check_orders([*EXACT, "importance"], estimator())


@torch.no_grad()
@pytest.mark.parametrize("per_pass", [1, 2])
@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_the_sampler_of_that_name_writes_texts_as_often_as_it_says(order, per_pass):
    """Pearson's chi-square of 8,000 samples against the exact likelihoods of all texts; 0.1 % of fair samplers would fail."""
    net, x, count = model(), every_text(), 8_000
    nll, _ = order_nll(net, x, everything(x), order, per_pass=per_pass)
    start = torch.full((count, LENGTH), VOCABULARY)
    drawn = sample(net, start, steps=LENGTH // per_pass, sampler=order, seed=11)
    number = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    seen = torch.bincount((drawn * number).sum(1), minlength=VOCABULARY**LENGTH)[(x * number).sum(1)].double()
    assert int(seen.sum()) == count
    want = count * torch.exp(-nll)
    assert want.min() > 2
    statistic = float(((seen - want).square() / want).sum())
    freedom = len(want) - 1
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


def wide(length):
    """A model whose certainties differ by rounding where everything is hidden."""
    torch.manual_seed(length)
    made = DiT(300, 299, dim=64, layers=2, heads=4, length=length, dropout=0.0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.03 if "modulation" in name else 0.1))
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fp32", "bf16", "rounded to quarters"])
@pytest.mark.parametrize(("length", "per_pass"), [(24, 1), (64, 4), (128, 8)])
@pytest.mark.parametrize("order", BY_CERTAINTY)
def test_the_path_is_the_samplers_from_the_first_position_on(order, length, per_pass, kind, monkeypatch):
    """Of texts that the sampler wrote the likelihood goes by the order in which they were written, ties included."""
    if kind == "rounded to quarters":
        for module in (orders, reveal):
            monkeypatch.setattr(module, "certainty", lambda *known: (certainty(*known) * 4).round() / 4)
    net, start = wide(length), torch.full((3, length), 299)
    start[2, 5:9] = 7
    written, read = [], []
    chosen_by = orders.surest

    def spy(*known):
        read.append(chosen_by(*known))
        return read[-1]

    monkeypatch.setattr(orders, "surest", spy)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        x = sample(net, start, steps=length // per_pass, sampler=order, on_step=lambda _, z: written.append(z != 299))
        order_nll(net, x[:2], start[:2] == 299, order, per_pass=per_pass)
    shown = [torch.zeros(2, length, dtype=torch.bool), *(z[:2] for z in written)]
    assert len(read) == length // per_pass and read[0].nonzero()[:, 1].tolist() == 2 * [*range(per_pass)]
    for (before, after), chosen in zip(itertools.pairwise(shown), read, strict=True):
        assert torch.equal(after & ~before, chosen)


@torch.no_grad()
@pytest.mark.parametrize("order", EXACT)
def test_a_model_whose_logits_are_no_numbers_has_no_likelihood(order):
    net, x = model(), every_text()[:5]
    net.head.bias[1] = torch.nan
    hidden = everything(x)
    hidden[:, 0] = False
    assert order_nll(net, x, hidden, order)[0].isnan().all()
