"""The row pass of linear_cross_entropy: losses and gradients against fp64 and against what has to hold for every row.

Besides the backends, the CUDA kernels are tried without a GPU, compiled for the CPU: see test_cuda_on_host.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cross_entropy.slab import INF, NAN, Slab, compare, make, run, truth
from op_checks import BF16, F32, F64, backends, dtypes, for_gpu, interprets, same

HOST = [pytest.param(kind, "host", id=f"cuda-{kind}-on-host") for kind in ("kept", "read-twice")]
every = backends("linear_cross_entropy", *HOST)


@pytest.fixture
def row_pass(request, backend, device):
    """What `run` takes for a backend."""
    return functools.partial(request.getfixturevalue("on_host"), kept=backend == "kept") if device == "host" else backend


def placed(slab, device):
    return slab if device == "host" else slab.to(device)


BARE = {"weighted": False, "recomputed": False}
CASES = [
    *(((*shape, dtype), options) for dtype in (F32, BF16) for shape, options in (
        ((1, 1), {}), ((1, 1), {"rated": True}), ((3, 2), BARE), ((5, 7), {}), ((5, 7), BARE | {"rated": True}),
        ((3, 128), {}), ((4, 131), {"rated": True, "aged": False}), ((3, 1031), {}), ((3, 1032), BARE),
        ((2, 4099), {}), ((2, 4099), {"rated": True}), ((131, 33), {}), ((2, 4096), BARE | {"rated": True}))),
    pytest.param((7, 131, F32), {"rated": True}, id="tiny-fp32"), pytest.param((7, 131, BF16), {}, id="tiny-bf16"),
    *(for_gpu(shape, options, slow=slow) for slow, shape in (
        (False, (64, 50_304, BF16)), (False, (3, 131_072, F32)), (True, (33, 30_592, BF16)), (True, (8, 131_072, BF16)),
        (True, (300, 1031, BF16)), (True, (9, 50_304, F32)))
      for options in ({"width": 768}, BARE, {"width": 64, "rated": True})),
]  # fmt: skip


@every
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_losses_and_gradients_against_fp64(poisoned, row_pass, backend, device, shape, options):
    if device == "host" or interprets(backend, device):  # where a row takes milliseconds
        shape = (min(shape[0], 9), *shape[1:])
    slab = placed(make(*shape, **options), device)
    got, alone = run(row_pass, slab), run(row_pass, slab, gradient=False)
    compare(got, slab, strict=device == "host")
    if shape[1] > 1:
        assert (got.logits[:, shape[1] // 2] == 0).all()  # forbidden: exactly
    assert torch.equal(alone.logits, slab.logits) and not alone.bias_gradient.any()
    torch.testing.assert_close(alone.nll, got.nll, rtol=2e-6, atol=0)
    if "rated" in options:
        torch.testing.assert_close(alone.velocity, got.velocity, rtol=1e-6, atol=1e-6 if device == "host" else 1e-7)
    assert interprets(backend, device) or same(got, run(row_pass, slab))


def test_the_specification_in_fp64():
    slab = make(9, 200, F64)
    slab.token_weight = slab.token_weight.double()
    for ours, theirs in zip(run("torch", slab), truth(slab)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every
@dtypes
def test_equal_rates_change_nothing(row_pass, device, dtype):
    slab = placed(make(9, 300, dtype), device)
    plain = run(row_pass, slab)
    slab.rates, slab.elapsed = torch.ones_like(slab.logits[0], dtype=F32), torch.linspace(0, 3, 9).to(slab.logits.device)
    got = run(row_pass, slab)
    torch.testing.assert_close(got.nll, plain.nll, rtol=4e-6, atol=4e-6)
    assert (got.velocity.abs() <= 1e-6).all()
    torch.testing.assert_close(got.logits, plain.logits, rtol=2**-7 if dtype is BF16 else 2e-5, atol=1e-30)


@every
@pytest.mark.parametrize("columns", [100, 600, for_gpu(50_304)])
@pytest.mark.parametrize("rated", [False, True])
def test_a_nearly_certain_row_keeps_its_loss_and_its_gradient(row_pass, device, rated, columns):
    """p - 1 has no digits left where the loss is 1e-12."""
    gaps = torch.tensor([5.0, 14.0, 20.0, 28.0, 32.0, 60.0, 80.0])
    logits = (torch.randn(7, columns) * 64).round() / 256  # differences are exact
    target = torch.arange(7) * (columns // 11)
    logits.scatter_(1, target[:, None], gaps[:, None])
    rates = 1 + torch.arange(columns) / columns if rated else None
    slab = placed(Slab(logits, target, torch.full((7,), 3.0), rates=rates), device)
    got, (want, size, speeds) = run(row_pass, slab), truth(slab)
    assert columns > 100 or (want.nll[3] < 1e-10 and want.nll[4] < 2e-12)
    torch.testing.assert_close(got.nll.double(), want.nll, rtol=1e-6 if columns <= 600 else 2e-6, atol=0)
    if columns > 600:
        return
    of_target = [t.logits.double().gather(1, slab.target[:, None]) for t in (got, want)]
    torch.testing.assert_close(*of_target, rtol=2e-6 if rated else 1e-6, atol=0)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=2e-6, atol=0)
    assert ((got.logits - want.logits).abs() <= (4e-6 * size if rated else 1e-6 * want.logits.abs())).all()
    if rated:
        assert ((got.velocity - want.velocity).abs() <= 2e-6 * speeds).all()


@every
@dtypes
def test_rates_of_rows_that_weigh_nothing_or_have_no_target(row_pass, device, dtype):
    slab = make(4, 70, dtype, recomputed=False, rated=True)
    slab.token_weight = torch.tensor([0.0, 1.0, 2.0, 1.0])
    slab.logits[0] = NAN
    slab.target[1], slab.target[2] = -1, 2**40
    slab.logits[3, 5] = NAN
    slab = placed(slab, device)
    got = run(row_pass, slab)
    assert got.velocity[0] == got.nll[0] == 0 and (got.logits[0] == 0).all()
    assert got.velocity[1:].isnan().all() and got.nll[1:].isnan().all()
    p = torch.softmax(slab.logits[1:3].double() - slab.elapsed[1:3, None].double() * slab.rates, 1)
    want = slab.token_weight[1:3, None] * p * (slab.rates - (p * slab.rates).sum(1, keepdim=True))
    torch.testing.assert_close(got.logits[1:3].double(), want, rtol=2**-7 if dtype is BF16 else 2e-4, atol=1e-6)


@every
@dtypes
def test_rows_of_weight_zero_give_zeros_whatever_they_hold(row_pass, device, dtype):
    slab = make(6, 70, dtype)
    slab.token_weight = torch.tensor([0.0, 1.0, -0.0, 0.0, 2.0, 0.0])
    dead = slab.token_weight == 0
    for row, value in ((0, INF), (2, NAN), (3, -INF)):
        slab.logits[row] = value
        slab.hidden[row] = value
    slab.logits[5, 3] = INF
    slab.target[3], slab.target[5] = -1, 2**40
    harmless = [torch.where(dead[:, None], 0, t) for t in (slab.logits, slab.hidden)]
    want = run(row_pass, placed(replace(slab, logits=harmless[0], hidden=harmless[1]), device))
    got = run(row_pass, placed(slab, device))
    for ours, theirs in zip(list(got)[:4], list(want)[:4], strict=True):
        assert (ours[dead] == 0).all() and (ours[~dead] != 0).any() and torch.equal(ours[~dead], theirs[~dead])
    assert got.bias_gradient.isfinite().all()


@every
@dtypes
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("columns", [40, for_gpu(50_304), for_gpu(131_072)])
def test_a_target_outside_gives_its_own_row_no_loss(row_pass, device, dtype, columns, recomputed):
    slab = make(7, columns, dtype, recomputed=recomputed, weighted=False)
    slab.target[0] = sound_target = 29
    sound = run(row_pass, placed(slab, device))
    slab.target[1:] = torch.tensor([-1, columns, -100, 2**40, -(2**63), 2**31 + 3])
    if recomputed:  # weight has fewer rows than logits have columns: a target among the rest is outside too
        slab.target[1], slab.weight = 35, slab.weight[:30].contiguous()
        inside = replace(slab, target=torch.full_like(slab.target, sound_target))
        sound = run(row_pass, placed(inside, device))
    slab = placed(slab, device)
    got = run(row_pass, slab)
    assert got.nll.isnan().tolist() == [False] + [True] * 6
    assert torch.equal(got.nll[0], sound.nll[0]) and torch.equal(got.logits[0], sound.logits[0])
    p = torch.softmax(slab.logits[1:].double(), 1)
    torch.testing.assert_close(got.logits[1:].double(), p, rtol=2**-8 * 1.01 if dtype is BF16 else 6e-6, atol=1e-37)
    torch.testing.assert_close(got.max_probability[1:].double(), p.amax(1), rtol=4e-6, atol=0)
    torch.testing.assert_close(got.entropy[1:].double(), torch.special.entr(p).sum(1), rtol=1e-5, atol=0)


@every
@dtypes
@pytest.mark.parametrize("columns", [300, for_gpu(50_304), for_gpu(131_072)])
def test_what_is_no_number_stays_in_its_row_and_is_seen(row_pass, device, dtype, columns):
    slab = make(8, columns, dtype, recomputed=False, weighted=False)
    slab.target[:] = 7
    for row, column, value in ((0, 8, NAN), (1, 7, NAN), (2, 8, INF), (3, 7, INF)):
        slab.logits[row, column] = value
    slab.logits[4] = NAN
    slab.logits[5] = -INF
    slab.target[6:] = torch.randint(0, 100, (2,))
    slab.logits[6:, 150] = -INF
    slab = placed(slab, device)
    got, (want, *_) = run(row_pass, slab), truth(Slab(slab.logits[6:], slab.target[6:]))
    assert got.nll.isnan().tolist() == [True] * 6 + [False] * 2
    torch.testing.assert_close(got.nll[6:].double(), want.nll, rtol=5e-6, atol=0)
    assert got.logits[6:].isfinite().all()


@every
def test_a_forbidden_target_costs_infinity(row_pass, device):
    slab = make(2, 50, F32, recomputed=False, weighted=False)
    slab.target[0] = 25
    got = run(row_pass, placed(slab, device))
    assert got.nll[0] == INF and got.nll[1].isfinite() and got.logits[0, 25] == -1
    torch.testing.assert_close(got.logits[0].sum().cpu(), torch.tensor(0.0), atol=1e-6, rtol=0)


@every
@dtypes
def test_only_what_is_asked_for_is_written_and_column_sums_are_added(row_pass, device, dtype):
    slab = placed(make(9, 50, dtype), device)
    start = torch.randn(50).to(slab.logits.device)
    whole, lean = run(row_pass, slab), run(row_pass, slab, reports=False, sums=False)
    assert torch.equal(lean.nll, whole.nll) and torch.equal(lean.logits, whole.logits)
    alone = run(row_pass, slab, gradient=False, reports=False, start=start)
    assert torch.equal(alone.logits, slab.logits) and torch.equal(alone.bias_gradient, start)
    torch.testing.assert_close(alone.nll, whole.nll, rtol=1e-6, atol=0)
    added = run(row_pass, slab, reports=False, start=start)
    wide = added.logits.double()
    allowed = wide.abs().sum(0) * (2**-8 if dtype is BF16 else 2**-20) + 1e-5
    assert ((added.bias_gradient.double() - start.double() - wide.sum(0)).abs() <= allowed).all()
    assert (added.bias_gradient != start).sum() >= 49


@every
@dtypes
@pytest.mark.parametrize(
    ("columns", "offset", "gap"),
    [(77, 0, 3), (77, 1, 0), (77, 5, 11), (128, 0, 1), (128, 0, 8), (128, 8, 16), *(for_gpu(3001, *p) for p in ((0, 7), (3, 5)))],
)
def test_rows_anywhere_in_memory(row_pass, device, dtype, columns, offset, gap):
    """Rows apart from each other, at any multiple of an element; what is between them belongs to others."""
    slab = make(4, columns, dtype)
    where = torch.device("cpu" if device == "host" else device)
    memory = torch.full((offset + 4 * (columns + gap) + 16,), 33.0, dtype=dtype, device=where)
    view = memory.as_strided((4, columns), (columns + gap, 1), offset)
    view.copy_(slab.logits)
    slab = placed(slab, device)
    compare(run(row_pass, replace(slab, logits=view), in_place=True), slab, strict=device == "host")
    memory.as_strided((4, columns), (columns + gap, 1), offset).fill_(33.0)
    assert (memory == 33).all()


@backends("linear_cross_entropy")
def test_a_slab_of_more_than_two_to_the_31_elements(backend, device):
    """Two rows that far apart; what lies between is never touched, so a CPU gives it no memory."""
    slab = make(2, 77, BF16)
    view = torch.empty((1 << 31) + 99, dtype=BF16, device=device).as_strided((2, 77), ((1 << 31) + 11, 1), 1)
    view.copy_(slab.logits)
    slab = slab.to(device)
    compare(run(backend, replace(slab, logits=view), in_place=True), slab)


@every
@dtypes
def test_a_bf16_target_is_computed_again(row_pass, device, dtype):
    """The stored logit is off by up to 2^-9 of itself, and the loss with it; the recomputed one is not."""
    slab = placed(make(13, 60, dtype, weighted=False, spread=12.0), device)
    want = truth(slab)[0].nll
    stored = run(row_pass, replace(slab, hidden=None, weight=None, bias=None)).nll
    torch.testing.assert_close(run(row_pass, slab).nll.double(), want, rtol=4e-6, atol=1e-7)
    assert (stored.double() - want).abs().max() > (1e-2 if dtype is BF16 else 0)


@every
@dtypes
def test_the_same_bits_however_rows_are_cut(row_pass, device, dtype):
    slab = placed(make(11, 500, dtype), device)
    whole = run(row_pass, slab)
    for part in (slice(0, 4), slice(4, 11)):
        some = Slab(slab.logits[part], slab.target[part], slab.token_weight[part], slab.hidden[part], slab.weight, slab.bias)
        got = run(row_pass, some)
        assert torch.equal(got.logits, whole.logits[part]) and torch.equal(got.nll, whole.nll[part])


@every
@dtypes
def test_nothing_in_nothing_out(row_pass, device, dtype):
    got = run(row_pass, placed(Slab(torch.empty(0, 9, dtype=dtype), torch.empty(0, dtype=torch.int64)), device))
    assert got.nll.shape == (0,) and (got.bias_gradient == 0).all()


@backends("linear_cross_entropy", gpu=False, quick=True)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_laws_of_a_row(backend, device, rows, columns, data):
    values = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([-INF, -3e4, 3e4, 0.0]))
    drawn = data.draw(st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    logits = torch.tensor(drawn, dtype=F32)
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
