"""linear_cross_entropy against its specification in fp64, and against PyTorch's own bf16 error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import linear_cross_entropy, linear_cross_entropy_cost, linear_cross_entropy_reference


def case(n, d, v, r=None, dtype=torch.float64, forbidden=None, bias=True):
    rows = None if r is None else torch.randperm(n)[:r].sort().values
    count = n if r is None else r
    target = torch.randint(0, v, (count,))
    if forbidden is not None:
        target = torch.where(target == forbidden, (forbidden + 1) % v, target)
    return {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (torch.randn(v, d, dtype=dtype) / d**0.5).requires_grad_(),
        "target": target,
        "bias": torch.randn(v, dtype=dtype).requires_grad_() if bias else None,
        "token_weight": torch.randn(count, dtype=dtype).requires_grad_(),
        "rows": rows,
        "forbidden": forbidden,
    }


def gradients(loss, inputs):
    wanted = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(loss, wanted)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 61),
    d=st.sampled_from([1, 3, 16, 37]),
    v=st.sampled_from([2, 7, 131]),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    forbid=st.booleans(),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 5_000, 10**9]),
)
def test_fp64_matches_the_specification(n, d, v, share, forbid, bias, chunk):
    inputs = case(n, d, v, None if share is None else round(share * n), forbidden=v - 1 if forbid else None, bias=bias)
    for reduction in ("sum", "none"):
        reference = linear_cross_entropy_reference(**inputs)
        loss = linear_cross_entropy(**inputs, reduction=reduction, chunk_bytes=chunk)
        if reduction == "none":
            torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-11)
            upstream = torch.randn_like(loss) * (torch.rand_like(loss) > 0.3)  # signed, some exactly zero
            loss, want = (loss * upstream).sum(), (reference * upstream).sum()
        else:
            want = reference.sum()
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-11)
        for got, expected in zip(gradients(loss * -1.7, inputs), gradients(want * -1.7, inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_forbidden_column_is_exactly_zero(poisoned):
    inputs = case(50, 8, 11, 30, dtype=torch.float32, forbidden=4)
    loss = linear_cross_entropy(**inputs, chunk_bytes=1)
    _, dweight, dbias, _ = gradients(loss, inputs)
    assert dweight[4].abs().max() == 0 and dbias[4] == 0
    assert dweight.isfinite().all()


def test_rows_of_weight_zero_give_zeros_whatever_they_hold(poisoned):
    inputs = case(20, 8, 11, dtype=torch.float32)
    with torch.no_grad():
        inputs["token_weight"][::2] = 0
        inputs["hidden"][0] = torch.inf
        inputs["hidden"][2] = torch.nan
    loss, nll = linear_cross_entropy(**inputs, return_nll=True)
    dhidden, dweight, dbias, dtoken = gradients(loss, inputs)
    assert loss.isfinite() and dweight.isfinite().all() and dbias.isfinite().all() and dtoken.isfinite().all()
    assert (dhidden[::2] == 0).all() and (nll[::2] == 0).all() and dhidden.isfinite().all()
    rows = linear_cross_entropy(**inputs, reduction="none")
    assert (rows[::2] == 0).all()


def test_only_listed_rows_are_read(poisoned):
    inputs = case(30, 8, 11, 9, dtype=torch.float32)
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[inputs["rows"]] = False
    with torch.no_grad():
        inputs["hidden"][untouched] = torch.nan
    loss = linear_cross_entropy(**inputs)
    dhidden = gradients(loss, inputs)[0]
    assert loss.isfinite() and (dhidden[untouched] == 0).all() and dhidden.isfinite().all()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "token_weight"])
def test_any_input_may_be_frozen(wanted):
    inputs = case(20, 8, 11, 13)
    full = dict(zip(("hidden", "weight", "bias", "token_weight"), gradients(linear_cross_entropy(**inputs), inputs), strict=True))
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_(name == wanted)
    for reduction in ("sum", "none"):
        (got,) = gradients(linear_cross_entropy(**inputs, reduction=reduction).sum(), inputs)
        torch.testing.assert_close(got, full[wanted], rtol=1e-12, atol=1e-12)


def test_chunking_changes_nothing_but_the_last_bits():
    inputs = case(257, 16, 101, 200, dtype=torch.float32)
    results = [linear_cross_entropy(**inputs, chunk_bytes=c) for c in (1, 101 * 4 * 64, 10**9)]
    grads = [gradients(r, inputs) for r in results]
    for loss, grad in zip(results[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, results[0], rtol=1e-5, atol=1e-3)
        for a, b in zip(grad, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_runs_are_the_same_bits():
    inputs = case(129, 32, 503, 64, dtype=torch.float32, forbidden=502)
    first, second = (gradients(linear_cross_entropy(**inputs, chunk_bytes=50_000), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rmse(a, b):
    return float((a.detach().double() - b.detach().double()).pow(2).mean().sqrt())


@pytest.mark.parametrize("v", [997, 4096])
def test_bf16_errs_no_more_than_pytorchs_own_bf16(v):
    exact = case(512, 64, v, 300, forbidden=v - 1)
    low = {
        k: t.detach().to(torch.bfloat16) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in exact.items()
    }
    low["token_weight"] = exact["token_weight"].detach().float()
    low["bias"] = low["bias"].float()
    low["weight"] = low["weight"].float()  # an fp32 master copy of bf16 values
    for t in low.values():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    truth = {
        k: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in low.items()
    }
    want_loss = linear_cross_entropy_reference(**truth).sum()
    want = gradients(want_loss, truth)

    peer = dict(low)
    with torch.autocast("cpu", torch.bfloat16):
        peer_loss = linear_cross_entropy_reference(**peer).sum()
    peer_grads = gradients(peer_loss, peer)
    loss = linear_cross_entropy(**low)
    ours = gradients(loss, low)
    loss, peer_loss, want_loss = (float(value.detach()) for value in (loss, peer_loss, want_loss))
    assert abs(loss - want_loss) <= 1.5 * abs(peer_loss - want_loss) + 1e-3 * abs(want_loss)
    for name, got, theirs, exact_grad, limit in zip(
        ("hidden", "weight", "bias", "token_weight"), ours, peer_grads, want, (1.5, 1.1, 1.5, 1.5), strict=True
    ):
        assert rmse(got, exact_grad) <= limit * rmse(theirs, exact_grad) + 1e-9, name
    assert ours[1].dtype is torch.float32


def test_autocast_takes_fp32_activations_in_bf16():
    inputs = case(64, 16, 31, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**inputs)
    half = dict(inputs, hidden=inputs["hidden"].detach().bfloat16().requires_grad_())
    assert torch.equal(loss, linear_cross_entropy(**half))
    assert all(g.dtype is torch.float32 for g in gradients(loss, inputs))


def test_second_derivatives_are_refused_in_a_sentence():
    inputs = case(8, 4, 5)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(**inputs, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), inputs["weight"], allow_unused=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"hidden must be \[N, D\] and weight \[V, D\]"),
        ({"target": torch.tensor([0, 1, 5])}, "target has id 5, outside the vocabulary of 5"),
        ({"target": torch.tensor([0, -1, 2])}, "target has id -1"),
        ({"target": torch.tensor([0, 1])}, r"target must have shape \(3,\)"),
        ({"token_weight": torch.zeros(4)}, r"token_weight must have shape \(3,\)"),
        ({"forbidden": 5}, "forbidden is 5, outside"),
        ({"forbidden": 1}, "forbidden id 1: its loss would be infinite"),
        ({"reduction": "mean"}, "reduction 'mean' is unknown"),
        ({"backend": "cuda"}, "has no backend 'cuda'"),
    ],
)
def test_bad_input(change, message):
    inputs = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs)


@pytest.mark.parametrize("listed", [None, 6])
def test_opcheck(listed):
    c = case(9, 4, 7, listed, forbidden=6)
    args = (c["hidden"], c["weight"], c["target"], c["bias"], c["token_weight"], c["rows"], 6, 100, True, True, True)
    torch.library.opcheck(torch.ops.atat_fast.linear_cross_entropy_sum.default, args)
    args = (c["hidden"], c["weight"], c["target"], c["bias"], c["rows"], 6, 100)
    torch.library.opcheck(torch.ops.atat_fast.linear_cross_entropy_rows.default, args)


def test_compiles_whole():
    inputs = case(40, 8, 13, 21, dtype=torch.float32)

    def f(hidden, weight, bias):
        return linear_cross_entropy(**dict(inputs, hidden=hidden, weight=weight, bias=bias))

    args = (inputs["hidden"], inputs["weight"], inputs["bias"])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(*args), f(*args)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, args), torch.autograd.grad(want, args), strict=True):
        assert torch.equal(a, b)


def test_cost_counts_three_products_and_four():
    assert linear_cross_entropy_cost(10, 3, 7).flops == 3 * 2 * 10 * 3 * 7
    assert linear_cross_entropy_cost(10, 3, 7, recompute=True).flops == 4 * 2 * 10 * 3 * 7
    assert linear_cross_entropy_cost(10, 3, 7, backward=False).flops == 2 * 10 * 3 * 7
