"""squared_relu is PyTorch's relu and square, to the bit, in every mode and order of differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.models.activation import squared_relu

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def plain(x):
    return F.relu(x).square()


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES), st.integers(0, 99))
def test_value_and_gradient_are_pytorchs_to_the_bit(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(shape, generator=generator, dtype=dtype) * 2**k for k in (5, -3))
    found = []
    for function in (plain, squared_relu):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, upstream)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.dtype is b.dtype is dtype


def test_extremes():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30], requires_grad=True)
    upstream = torch.tensor([3.0, -3.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    y, want = squared_relu(x), plain(x)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    ours, theirs = (torch.autograd.grad(value, x, upstream)[0] for value in (y, want))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_every_order_and_mode():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(squared_relu, x, check_batched_grad=True)
    rows = torch.func.vmap(torch.func.grad(lambda row: squared_relu(row).sum()))(x.detach())
    torch.testing.assert_close(rows, 2 * F.relu(x.detach()))


def test_it_keeps_one_tensor_and_takes_three_passes():
    x, kept = torch.randn(4, 6, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, hooks:
        squared_relu(x).backward(torch.ones(4, 6))
    names = [event.name for event in profile.events()]
    assert [t.shape for t in kept] == [(4, 6)]
    assert [names.count(f"aten::{name}") for name in ("clamp_min", "mul", "addcmul")] == [1, 1, 1]
    assert not {"aten::pow", "aten::copy_", "aten::threshold_backward"} & set(names)


@pytest.mark.slow
def test_torch_compile_gets_pytorchs_steps():
    x = torch.randn(7, 9, requires_grad=True)
    explained = torch._dynamo.explain(squared_relu)(x)
    assert explained.graph_break_count == 0 and "_SquaredReLU" not in str(explained.graphs[0].code)
