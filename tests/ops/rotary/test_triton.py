"""The Triton kernels of rotary by themselves, in Triton's interpreter: guards around what they write, and every configuration.

What the compiler makes of them is tests/aot's business.
"""

from __future__ import annotations

import pytest
import torch
from op_checks import BF16, F32, Guards, interpreted

from atat_fast.ops import rotary_reference, rotary_table

pytestmark = interpreted
# One head or several at a time, halves that fill a block and not, and sizes up to the widest.
SHAPES = [(2, 7, 1, 2), (1, 9, 2, 16), (2, 33, 4, 32), (1, 3, 1, 96), (2, 5, 6, 128), (1, 5, 2, 256)]
CASES = [*((shape, F32) for shape in SHAPES), *((shape, torch.float16) for shape in SHAPES[1:3]), ((2, 9, 2, 32), BF16)]
TOLERANCE = {F32: 1e-6, torch.float16: 1e-3, BF16: 8e-3}


def place(guards, qkv):
    inside = guards.empty(qkv.shape, qkv.dtype)
    return inside.copy_(qkv)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_out_of_place_and_in_place(shape, dtype):
    from atat_fast.kernels.rotary import rotary

    batch, length, heads, size = shape
    qkv, guards, tolerance = torch.randn(batch, length, 3, heads, size).to(dtype), Guards(), TOLERANCE[dtype]
    cos, sin = rotary_table(length, size)
    for inverse in (False, True):
        want = rotary_reference(qkv.double(), cos.double(), (-sin if inverse else sin).double())
        out, inside = guards.empty(qkv.shape, dtype), place(guards, qkv)
        rotary(out, qkv, cos, sin, inverse)
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
        rotary(inside, inside, cos, sin, inverse)
        assert torch.equal(inside, out)
    guards.check()


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_the_norm_and_its_gradient(shape, dtype):
    """The scales are guarded too, and the gradient is that of the specification at the op's own, rounded output."""
    from atat_fast.kernels.rotary import normed_backward, rotary

    batch, length, heads, size = shape
    eps, guards, tolerance = 1e-3, Guards(), 2 * TOLERANCE[dtype]
    qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
    qkv[:, 1::3] = 0
    upstream = torch.randn(qkv.shape).to(dtype)
    cos, sin = (1.1 * t for t in rotary_table(length, size))
    exact = qkv.double().requires_grad_()
    want = rotary_reference(exact, cos.double(), sin.double(), norm=True, eps=eps)
    (back,) = torch.autograd.grad(want, exact, upstream.double())
    scales = torch.rsqrt(exact[:, :, :2].square().mean(-1) + eps).detach()
    out, rstd, dqkv = guards.empty(qkv.shape, dtype), guards.empty(scales.shape, F32), guards.empty(qkv.shape, dtype)
    rotary(out, qkv, cos, sin, False, rstd, eps)
    torch.testing.assert_close(out.double(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rstd.double(), scales, rtol=1e-6, atol=1e-6)
    assert (out[:, 1::3, :2] == 0).all()
    inside = place(guards, qkv)
    rotary(inside, inside, cos, sin, False, None, eps)
    assert torch.equal(inside, out)
    normed_backward(dqkv, upstream, out, rstd, cos, sin)
    most = float(back.abs().max())
    torch.testing.assert_close(dqkv.double() / most, back / most, rtol=tolerance, atol=tolerance)
    guards.check()


def test_rows_that_lie_apart_and_nothing():
    from atat_fast.kernels.rotary import normed_backward, rotary

    storage = torch.randn(3, 11, 2, 3 * 4 * 8)
    qkv = storage[:, :, 0].view(3, 11, 3, 4, 8)  # every second row of a longer tensor
    before = storage[:, :, 1].clone()
    cos, sin = rotary_table(11, 8)
    want = rotary_reference(qkv, cos, sin)
    rotary(qkv, qkv, cos, sin, False)
    torch.testing.assert_close(qkv, want)
    assert torch.equal(storage[:, :, 1], before)
    empty, tables = torch.empty(0, 4, 3, 2, 8), rotary_table(4, 8)
    rotary(empty, empty, *tables, False)
    rotary(empty, empty, *tables, False, None, 1e-6)
    normed_backward(empty, empty, empty, torch.empty(0, 4, 2, 2), *tables)
