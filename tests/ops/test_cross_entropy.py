"""The row pass of linear_cross_entropy: losses and gradients against fp64 and against what has to hold for every row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atat_fast.ops import library, registry
from atat_fast.ops.linear_cross_entropy.row_pass import ROW_PASS, cross_entropy_


def can_run(backend):
    if registry.missing(backend, torch.device("cpu")) is not None:
        return False
    return backend != "cpp" or (library.load() and hasattr(torch.ops.atat_fast_c, "cross_entropy_"))


# With TRITON_INTERPRET=1 that includes triton, in an interpreter: see test_interpreted.py.
READY = [name for name in ROW_PASS if can_run(name)]
QUICK = [name for name in READY if name != "triton"]
every = pytest.mark.parametrize("backend", READY)
quick = pytest.mark.parametrize("backend", QUICK)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
INF, NAN = math.inf, math.nan


@dataclass
class Slab:
    """The pass's inputs."""

    logits: Tensor
    target: Tensor
    token_weight: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    rates: Tensor | None = None
    elapsed: Tensor | None = None

    def to(self, device, dtype=None):
        def move(tensor):
            cast = dtype if dtype and tensor is not None and tensor.is_floating_point() else None
            return None if tensor is None else tensor.to(device, cast)

        return Slab(*(move(getattr(self, name)) for name in self.__dataclass_fields__))


@dataclass
class Result:
    """The pass's outputs."""

    logits: Tensor
    nll: Tensor
    max_probability: Tensor | None
    entropy: Tensor | None
    bias_gradient: Tensor | None
    velocity: Tensor | None = None

    def __iter__(self):
        return iter(tensor for tensor in vars(self).values() if tensor is not None)


def run(backend, slab, *, gradient=True, reports=True, sums=True, in_place=False):
    """The pass on a copy of the slab; outputs hold NaN before."""
    logits = slab.logits if in_place else slab.logits.clone()
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    nll, max_probability, entropy = (logits.new_full((len(logits),), NAN, dtype=wide) for _ in range(3))
    bias_gradient = logits.new_zeros(logits.shape[1], dtype=wide) if sums else None
    velocity = None if slab.rates is None else torch.full_like(nll, NAN)
    result = Result(logits, nll, max_probability if reports else None, entropy if reports else None, bias_gradient, velocity)
    cross_entropy_(
        logits, slab.target, slab.token_weight, slab.hidden, slab.weight, slab.bias, gradient,
        nll, result.max_probability, result.entropy, bias_gradient, slab.rates, slab.elapsed, velocity, backend,
    )  # fmt: skip
    return result


def make(rows, columns, dtype, *, weighted=True, recomputed=True, forbidden=True, spread=3.0, width=24):
    """A slab as linear_cross_entropy makes it: logits are a product rounded to dtype, and one column may not be chosen."""
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(columns, width) * spread / width**0.5).to(dtype)
    bias = torch.randn(columns).to(dtype)
    target = torch.randint(0, columns, (rows,))
    if forbidden and columns > 1:
        bias[columns // 2] = -INF
        target[target == columns // 2] = columns - 1 if columns > 2 else 0
    logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
    token_weight = torch.randn(rows) if weighted else None
    if token_weight is not None and rows > 1:
        token_weight[rows // 2] = 0
    return Slab(logits, target, token_weight, *((hidden, weight, bias) if recomputed else (None, None, None)))


def truth(slab):
    """The definitions in fp64, relative to the target: p_j = e^(z_j - z_t) / (1 + S), S = sum of e^(z_j - z_t), j != t."""
    z, column = slab.logits.double(), slab.target[:, None]
    w = torch.ones(len(z), dtype=torch.float64, device=z.device) if slab.token_weight is None else slab.token_weight.double()
    at_target = z.gather(1, column)[:, 0]
    if slab.hidden is not None:
        at_target = (slab.hidden.double() * slab.weight.double()[slab.target]).sum(1) + slab.bias.double()[slab.target]
    x = z - at_target[:, None]
    odds = x.exp().scatter(1, column, 0.0)
    others = odds.sum(1)
    entropy = others.log1p() - (odds * x.clamp(min=-1e4)).sum(1) / (1 + others)
    gradient = odds.scatter(1, column, -others[:, None]) * (w / (1 + others))[:, None]
    p = odds.scatter(1, column, 1.0) / (1 + others)[:, None]
    live = w != 0
    reports = (others.log1p(), p.amax(1), entropy)
    nll, max_probability, entropy = (torch.where(live, value, 0.0) for value in reports)
    gradient = torch.where(live[:, None], gradient, 0.0)
    return Result(gradient, nll, max_probability, entropy, gradient.sum(0))


def compare(got, want, dtype, columns):
    """Losses to fp32's rounding, of logits too, and gradients to one rounding to their dtype more."""
    torch.testing.assert_close(got.nll.double(), want.nll, atol=2e-6, rtol=4e-6)
    torch.testing.assert_close(got.max_probability.double(), want.max_probability, atol=0, rtol=4e-6)
    torch.testing.assert_close(got.entropy.double(), want.entropy, atol=2e-6 * max(1.0, math.log(columns)), rtol=4e-6)
    rounding = 2**-8 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(got.logits.double(), want.logits, atol=1e-37, rtol=rounding * 1.001 + 6e-6)
    scale = want.logits.abs().sum(0)
    assert ((got.bias_gradient - want.bias_gradient).abs() <= scale * (rounding + 6e-6) + 1e-37).all()


@every
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 7), (8, 128), (4, 131), (3, 1031), (2, 4099)], ids=str)
@pytest.mark.parametrize("options", [{}, {"weighted": False, "recomputed": False}], ids=["given", "bare"])
def test_against_fp64(backend, dtype, shape, options):
    slab = make(*shape, dtype, **options)
    got, want = run(backend, slab), truth(slab)
    compare(got, want, dtype, shape[1])
    if shape[1] > 1:
        assert (got.logits[:, shape[1] // 2] == 0).all()  # forbidden: exactly


def make_rated(rows, columns, dtype, *, aged=True, **options):
    """A slab with rates from 0.2 to 3 and times up to 4, which move logits by as much as ten."""
    slab = make(rows, columns, dtype, **options)
    slab.rates = 0.2 + 2.8 * torch.rand(columns)
    slab.elapsed = 4 * torch.rand(rows) if aged else None
    return slab


def rated_truth(slab):
    """The definitions in fp64, and the sum of the magnitudes that each gradient is a difference of."""
    rates, columns = slab.rates.double(), slab.logits.shape[1]
    z, column = slab.logits.double(), slab.target[:, None]
    s = torch.zeros(len(z), dtype=torch.float64) if slab.elapsed is None else slab.elapsed.double()
    w = torch.ones(len(z), dtype=torch.float64) if slab.token_weight is None else slab.token_weight.double()
    own = rates[slab.target]
    at_target = z.gather(1, column)[:, 0]
    if slab.hidden is not None:
        at_target = (slab.hidden.double() * slab.weight.double()[slab.target]).sum(1) + slab.bias.double()[slab.target]
    odds = (z - s[:, None] * rates - (at_target - s * own)[:, None]).exp().scatter(1, column, 0.0)
    others, live = odds.sum(1), w != 0
    p = odds / (1 + others)[:, None]
    mean, q = (p * rates).sum(1), others / (1 + others)
    velocity = mean - own * q
    gradient = (w[:, None] * p * (rates - velocity[:, None])).scatter(
        1, column, -(w * (own * q**2 + mean / (1 + others)))[:, None]
    )
    size = (w[:, None] * p * (rates + mean[:, None] + (own * q)[:, None])).abs().scatter(1, column, 0.0) + gradient.abs()
    alive = lambda t: torch.where(live if t.dim() == 1 else live[:, None], t, 0.0)  # noqa: E731
    assert columns == len(rates)
    return alive(others.log1p()), alive(velocity), alive(gradient), alive(size), alive(mean + own * q)


def check_rated(got, slab):
    nll, velocity, gradient, size, speeds = rated_truth(slab)
    rounding = 2**-8 * 1.01 if slab.logits.dtype is torch.bfloat16 else 0
    torch.testing.assert_close(got.nll.double(), nll, atol=4e-6, rtol=8e-6)
    assert ((got.velocity.double() - velocity).abs() <= 2e-5 * speeds).all()
    assert ((got.logits.double() - gradient).abs() <= (rounding + 2e-5) * size + 1e-37).all()
    allowed = (size * (rounding + 2e-5)).sum(0) + 1e-37
    assert ((got.bias_gradient.double() - gradient.sum(0)).abs() <= allowed).all()


@every
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 128), (3, 1031), (2, 4099)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"weighted": False, "recomputed": False}, {"aged": False}], ids=["given", "bare", "young"]
)
def test_rates_against_fp64(backend, dtype, shape, options):
    slab = make_rated(*shape, dtype, **options)
    got = run(backend, slab)
    check_rated(got, slab)
    alone = run(backend, slab, gradient=False)
    assert torch.equal(alone.logits, slab.logits)
    torch.testing.assert_close(alone.velocity, got.velocity, rtol=1e-6, atol=1e-7)
    if shape[1] > 1:
        assert (got.logits[:, shape[1] // 2] == 0).all()  # forbidden: exactly


@every
@dtypes
def test_equal_rates_change_nothing(backend, dtype):
    slab = make(9, 300, dtype)
    plain = run(backend, slab)
    slab.rates, slab.elapsed = torch.ones(300), torch.linspace(0, 3, 9)
    got = run(backend, slab)
    torch.testing.assert_close(got.nll, plain.nll, rtol=4e-6, atol=4e-6)
    assert (got.velocity.abs() <= 1e-6).all()
    torch.testing.assert_close(got.logits, plain.logits, rtol=2**-7 if dtype is torch.bfloat16 else 2e-5, atol=1e-30)


@every
def test_a_nearly_certain_row_keeps_its_rated_gradient(backend):
    gaps = torch.tensor([14.0, 20.0, 28.0, 60.0])
    logits = (torch.randn(4, 100) * 64).round() / 256
    target = torch.arange(4) * 9
    logits.scatter_(1, target[:, None], gaps[:, None])
    slab = Slab(logits, target, torch.full((4,), 3.0), rates=1 + torch.arange(100) / 64)
    got = run(backend, slab)
    _, velocity, gradient, size, speeds = rated_truth(slab)
    assert speeds[2] < 1e-8 and ((got.velocity - velocity).abs() <= 2e-6 * speeds).all()
    assert ((got.logits - gradient).abs() <= 4e-6 * size).all()
    own = got.logits.gather(1, target[:, None])
    torch.testing.assert_close(own.double(), gradient.gather(1, target[:, None]), rtol=2e-6, atol=0)


@every
@dtypes
def test_rates_of_rows_that_weigh_nothing_or_have_no_target(backend, dtype):
    slab = make_rated(4, 70, dtype, recomputed=False)
    slab.token_weight = torch.tensor([0.0, 1.0, 2.0, 1.0])
    slab.logits[0] = NAN
    slab.target[1], slab.target[2] = -1, 2**40
    slab.logits[3, 5] = NAN
    got = run(backend, slab)
    assert got.velocity[0] == got.nll[0] == 0 and (got.logits[0] == 0).all()
    assert got.velocity[1:].isnan().all() and got.nll[1:].isnan().all()
    p = torch.softmax(slab.logits[1:3].double() - slab.elapsed[1:3, None].double() * slab.rates, 1)
    want = slab.token_weight[1:3, None] * p * (slab.rates - (p * slab.rates).sum(1, keepdim=True))
    torch.testing.assert_close(got.logits[1:3].double(), want, rtol=2**-7 if dtype is torch.bfloat16 else 2e-4, atol=1e-6)


@quick
@dtypes
def test_many_rows(backend, dtype):
    slab = make(131, 33, dtype)
    compare(run(backend, slab), truth(slab), dtype, 33)


@pytest.mark.skipif("triton" not in READY, reason="TRITON_INTERPRET is not 1")
@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (64, 300), (131, 513), (1000, 7)])
def test_column_sums_of_triton(dtype, rows, columns):
    """With one split of the rows, and with several."""
    from atat_fast.kernels.cross_entropy import sum_columns

    slab = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    start = torch.randn(columns)
    sums = start.clone()
    sum_columns(slab, sums)
    torch.testing.assert_close(sums.double(), start.double() + slab.double().sum(0), rtol=1e-5, atol=1e-4)


def test_the_specification_in_fp64():
    slab = make(9, 200, torch.float64)
    slab.token_weight = slab.token_weight.double()
    got, want = run("torch", slab), truth(slab)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every
def test_a_nearly_certain_row_keeps_its_loss_and_its_gradient(backend):
    """p - 1 has no digits left where the loss is 1e-12."""
    gaps = torch.tensor([5.0, 14.0, 20.0, 28.0, 32.0, 60.0, 80.0])
    logits = (torch.randn(len(gaps), 100) * 64).round() / 256  # differences are exact
    target = torch.arange(len(gaps)) * 9
    logits.scatter_(1, target[:, None], gaps[:, None])
    slab = Slab(logits, target, torch.full((len(gaps),), 3.0))
    got, want = run(backend, slab), truth(slab)
    assert want.nll[3] < 1e-10 and want.nll[4] < 2e-12
    for ours, theirs in ((got.nll, want.nll), (got.logits, want.logits)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=2e-6, atol=0)


@every
@dtypes
def test_rows_of_weight_zero_give_zeros_whatever_they_hold(backend, dtype):
    slab = make(6, 70, dtype)
    slab.token_weight = torch.tensor([0.0, 1.0, -0.0, 0.0, 2.0, 0.0])
    dead = slab.token_weight == 0
    for row, value in ((0, INF), (2, NAN), (3, -INF)):
        slab.logits[row] = value
        slab.hidden[row] = value
    slab.logits[5, 3] = INF
    slab.target[3], slab.target[5] = -1, 2**40
    harmless = torch.where(dead[:, None], 0, slab.logits), torch.where(dead[:, None], 0, slab.hidden)
    want = run(backend, replace(slab, logits=harmless[0], hidden=harmless[1]))
    got = run(backend, slab)
    for tensor in (got.logits, got.nll, got.max_probability, got.entropy):
        assert (tensor[dead] == 0).all() and (tensor[~dead] != 0).any()
    assert all(torch.equal(a[~dead], b[~dead]) for a, b in zip(list(got)[:4], list(want)[:4], strict=True))
    assert got.bias_gradient.isfinite().all()


@every
@dtypes
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_target_outside_gives_its_own_row_no_loss(backend, dtype, recomputed):
    slab = make(7, 40, dtype, recomputed=recomputed, weighted=False)
    sound = run(backend, slab)
    outside = torch.tensor([-1, 40, -100, 2**40, -(2**63), 2**31 + 3])
    slab.target[1:] = outside
    if recomputed:  # weight has fewer rows than logits have columns: a target among the rest is outside too
        slab.target[1], slab.weight = 35, slab.weight[:30].contiguous()
        slab.target[0] = sound_target = 29
        sound = run(backend, replace(slab, target=torch.full_like(slab.target, sound_target)))
    got = run(backend, slab)
    assert got.nll.isnan().tolist() == [False] + [True] * 6
    assert torch.equal(got.nll[0], sound.nll[0]) and torch.equal(got.logits[0], sound.logits[0])
    p = torch.softmax(slab.logits[1:].double(), 1)
    torch.testing.assert_close(got.logits[1:].double(), p, rtol=2**-8 * 1.01 if dtype is torch.bfloat16 else 6e-6, atol=1e-37)
    torch.testing.assert_close(got.max_probability[1:].double(), p.amax(1), rtol=4e-6, atol=0)
    torch.testing.assert_close(got.entropy[1:].double(), torch.special.entr(p).sum(1), rtol=1e-5, atol=0)


@every
@dtypes
def test_what_is_no_number_stays_in_its_row_and_is_seen(backend, dtype):
    slab = make(8, 300, dtype, recomputed=False, weighted=False)
    sound = run(backend, slab)
    slab.target[:] = 7
    slab.logits[0, 8] = NAN
    slab.logits[1, 7] = NAN
    slab.logits[2, 8] = INF
    slab.logits[3, 7] = INF
    slab.logits[4] = NAN
    slab.logits[5] = -INF
    slab.target[6:] = sound_target = torch.randint(0, 100, (2,))
    slab.logits[6:, 150] = -INF
    got = run(backend, slab)
    want = truth(Slab(slab.logits[6:], sound_target))
    assert got.nll.isnan().tolist() == [True] * 6 + [False] * 2
    torch.testing.assert_close(got.nll[6:].double(), want.nll, rtol=4e-6, atol=0)
    assert got.logits[6:].isfinite().all() and sound.logits.isfinite().all()


@every
def test_a_forbidden_target_costs_infinity(backend):
    slab = make(2, 50, torch.float32, recomputed=False, weighted=False)
    slab.target[0] = 25
    got = run(backend, slab)
    assert got.nll[0] == INF and got.nll[1].isfinite() and got.logits[0, 25] == -1
    torch.testing.assert_close(got.logits[0].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


@every
@dtypes
def test_losses_alone_leave_logits_as_they_are(backend, dtype):
    slab = make(5, 333, dtype)
    whole, before = run(backend, slab), slab.logits.clone()
    start = torch.randn(333)
    sums = start.clone()
    nll = torch.full((5,), NAN)
    arguments = (
        slab.target,
        slab.token_weight,
        slab.hidden,
        slab.weight,
        slab.bias,
        False,
        nll,
        None,
        None,
        sums,
        None,
        None,
        None,
    )
    cross_entropy_(slab.logits, *arguments, backend)
    assert torch.equal(slab.logits, before) and torch.equal(sums, start)
    torch.testing.assert_close(nll, whole.nll, rtol=1e-6, atol=0)
    lean = run(backend, slab, reports=False, sums=False)
    assert torch.equal(lean.nll, whole.nll) and torch.equal(lean.logits, whole.logits)


@every
@dtypes
def test_column_sums_are_added(backend, dtype):
    slab = make(20, 50, dtype)
    start = torch.randn(50)
    sums, nll = start.clone(), torch.empty(20)
    logits = slab.logits.clone()
    arguments = (
        slab.target,
        slab.token_weight,
        slab.hidden,
        slab.weight,
        slab.bias,
        True,
        nll,
        None,
        None,
        sums,
        None,
        None,
        None,
    )
    cross_entropy_(logits, *arguments, backend)
    rounding = 2**-8 if dtype is torch.bfloat16 else 2**-20
    allowed = logits.double().abs().sum(0) * rounding + 1e-5
    assert ((sums.double() - start.double() - logits.double().sum(0)).abs() <= allowed).all()
    assert (sums != start).sum() >= 49


@every
@dtypes
@pytest.mark.parametrize(("offset", "gap"), [(0, 8), (0, 3), (1, 0), (5, 11)])
def test_rows_anywhere_in_memory(backend, dtype, offset, gap):
    """Rows apart from each other, at any multiple of an element; what is between them belongs to others."""
    rows, columns = 4, 77
    slab = make(rows, columns, dtype)
    memory = torch.full((offset + rows * (columns + gap) + 16,), 33.0, dtype=dtype)
    view = memory.as_strided((rows, columns), (columns + gap, 1), offset)
    view.copy_(slab.logits)
    want = run(backend, slab)
    got = run(backend, replace(slab, logits=view), in_place=True)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if dtype is torch.bfloat16 else 2e-6, atol=1e-7)
    mine = torch.zeros_like(memory, dtype=torch.bool)
    mine.as_strided((rows, columns), (columns + gap, 1), offset).fill_(True)
    assert (memory[~mine] == 33).all()


@every
@dtypes
def test_a_bf16_target_is_computed_again(backend, dtype):
    """The stored logit is off by up to 2^-9 of itself, and the loss with it; the recomputed one is not."""
    slab = make(32, 60, dtype, weighted=False, spread=12.0)
    want = truth(slab).nll
    stored = run(backend, replace(slab, hidden=None, weight=None, bias=None)).nll
    again = run(backend, slab).nll
    torch.testing.assert_close(again.double(), want, rtol=4e-6, atol=1e-7)
    assert (stored.double() - want).abs().max() > (1e-2 if dtype is torch.bfloat16 else 0)


@every
@dtypes
def test_the_same_bits_however_rows_are_cut(backend, dtype):
    slab = make(11, 500, dtype)
    whole = run(backend, slab)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(backend, slab), strict=True))
    for part in (slice(0, 4), slice(4, 11)):
        some = Slab(slab.logits[part], slab.target[part], slab.token_weight[part], slab.hidden[part], slab.weight, slab.bias)
        got = run(backend, some)
        assert torch.equal(got.logits, whole.logits[part]) and torch.equal(got.nll, whole.nll[part])


@every
@dtypes
def test_nothing_in_nothing_out(backend, dtype):
    slab = Slab(torch.empty(0, 9, dtype=dtype), torch.empty(0, dtype=torch.int64))
    got = run(backend, slab)
    assert got.nll.shape == (0,) and (got.bias_gradient == 0).all()


@quick
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_laws_of_a_row(backend, rows, columns, data):
    values = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([-INF, -3e4, 3e4, 0.0]))
    drawn = data.draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    logits = torch.tensor(drawn, dtype=torch.float32)
    target = torch.tensor(data.draw(st.lists(st.integers(0, columns - 1), min_size=rows, max_size=rows)))
    at_target = logits.gather(1, target[:, None])
    logits = logits.scatter(1, target[:, None], torch.where(at_target == -INF, 0.0, at_target))
    w = torch.tensor(data.draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=rows, max_size=rows)))
    got = run(backend, Slab(logits, target, w))
    live = w != 0
    assert (got.nll >= 0).all() and got.nll.isfinite().all() and (got.nll[~live] == 0).all()
    assert (got.entropy >= 0).all() and (got.entropy <= math.log(columns) + 1e-5).all()
    assert (got.max_probability[live] >= (1 - 1e-5) / columns).all() and (got.max_probability <= 1).all()
    assert (got.logits[logits == -INF] == 0).all()
    unit = torch.where(live[:, None], got.logits / w[:, None], 0.0)
    assert (unit.sum(1).abs() <= 1e-5).all() and (unit.gather(1, target[:, None]) <= 0).all() and (unit.abs() <= 1 + 1e-5).all()
    doubled = run(backend, Slab(logits, target, 2 * w))
    assert torch.equal(doubled.nll, got.nll)
    torch.testing.assert_close(doubled.logits, 2 * got.logits, rtol=0, atol=1e-37)  # the same but for the smallest of numbers
    order = torch.randperm(columns)
    moved = run(backend, Slab(logits[:, order], order.argsort()[target], w))
    torch.testing.assert_close(moved.nll, got.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(moved.logits, got.logits[:, order], rtol=1e-5, atol=1e-37)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnGpu:
    SHAPES = (
        (64, 50_304, torch.bfloat16), (33, 30_592, torch.bfloat16), (8, 131_072, torch.bfloat16), (5, 7, torch.float32),
        (300, 1031, torch.bfloat16), (9, 50_304, torch.float32), (3, 131_072, torch.float32), (4, 1, torch.bfloat16),
    )  # fmt: skip

    @pytest.fixture(autouse=True)
    def _library(self):
        library.load()

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("options", [{"width": 768}, {"weighted": False, "recomputed": False}], ids=["given", "bare"])
    def test_against_fp64(self, poisoned, backend, shape, options):
        _, columns, dtype = shape
        slab = make(*shape, **options).to("cuda")
        first, again = run(backend, slab), run(backend, slab)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        compare(first, truth(slab), dtype, columns)
        alone = run(backend, slab, gradient=False)
        assert torch.equal(alone.logits, slab.logits)
        torch.testing.assert_close(alone.nll, first.nll, rtol=2e-6, atol=0)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_rates(self, poisoned, backend, shape):
        slab = make_rated(*shape, width=64)
        there = slab.to("cuda")
        first, again, alone = run(backend, there), run(backend, there), run(backend, there, gradient=False)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(alone.logits, there.logits)
        check_rated(Result(*(t.cpu() for t in vars(first).values())), slab)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_rows_anywhere_in_memory(self, backend, dtype):
        slab = make(6, 3001, dtype).to("cuda")
        want = truth(slab)
        for offset, gap in ((0, 7), (0, 2), (1, 0), (3, 5)):
            memory = torch.full((offset + 6 * (3001 + gap) + 16,), 33.0, dtype=dtype, device="cuda")
            view = memory.as_strided((6, 3001), (3001 + gap, 1), offset)
            view.copy_(slab.logits)
            compare(run(backend, replace(slab, logits=view), in_place=True), want, dtype, 3001)
            mine = torch.zeros_like(memory, dtype=torch.bool)
            mine.as_strided((6, 3001), (3001 + gap, 1), offset).fill_(True)
            assert (memory[~mine] == 33).all()

    @pytest.mark.parametrize("shape", [(4, 50_304), (4, 131_072)], ids=str)
    def test_rows_that_are_no_numbers_or_weigh_nothing(self, backend, shape):
        slab = make(*shape, torch.bfloat16, recomputed=False).to("cuda")
        slab.token_weight[:] = torch.tensor([1.0, 0.0, 1.0, 1.0])
        slab.logits[1] = NAN
        slab.logits[2, 99] = NAN
        slab.target[3] = 2**40
        got = run(backend, slab)
        assert (got.logits[1] == 0).all() and got.nll[1] == got.entropy[1] == got.max_probability[1] == 0
        assert got.nll.isnan().tolist() == [False, False, True, True]
        p = torch.softmax(slab.logits[3].double(), 0)
        torch.testing.assert_close(got.logits[3].double(), p, rtol=2**-8 * 1.01, atol=1e-37)

    def test_nearly_certain_rows(self, backend):
        logits = (torch.randn(6, 50_304, device="cuda") * 64).round() / 256
        target = torch.arange(6, device="cuda") * 9000
        logits.scatter_(1, target[:, None], torch.tensor([12.0, 20.0, 28.0, 39.0, 50.0, 80.0], device="cuda")[:, None])
        slab = Slab(logits, target)
        got, want = run(backend, slab), truth(slab)
        torch.testing.assert_close(got.nll.double(), want.nll, rtol=2e-6, atol=0)

    def test_slabs_of_more_than_two_to_the_31(self, backend):
        rows, columns = 45_000, 50_304
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GB of free memory")
        logits = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=3.0)
        slab = Slab(logits, torch.randint(0, columns, (rows,), device="cuda"), torch.rand(rows, device="cuda"))
        last = Slab(logits[-64:].clone(), slab.target[-64:], slab.token_weight[-64:])
        got, want = run(backend, slab, in_place=True), run(backend, last)
        assert torch.equal(got.logits[-64:], want.logits) and torch.equal(got.nll[-64:], want.nll)
        sums, scale = torch.zeros(2, columns, dtype=torch.float64, device="cuda")
        for part in logits.split(1000):
            sums += part.double().sum(0)
            scale += part.double().abs().sum(0)
        assert ((got.bias_gradient.double() - sums).abs() <= 1e-5 * scale).all()

    def test_a_captured_graph(self, backend):
        slab = make(200, 1000, torch.bfloat16).to("cuda")
        want = run(backend, slab)
        static, graph = replace(slab, logits=slab.logits.clone()), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(backend, static, in_place=True)
        static.logits.copy_(slab.logits)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
