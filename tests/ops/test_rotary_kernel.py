"""The Triton kernel of rotary by itself, in Triton's interpreter: guards around what it writes, and every configuration.

Runs where TRITON_INTERPRET=1 is set, as test_interpreted.py does. What the compiler makes of it is tests/aot's business.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from atat_fast.ops import rotary_reference, rotary_table

EXACT_BF16 = Path(__file__).with_name("interpreter.py")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernel runs on CPU tensors with TRITON_INTERPRET=1 only"
)
GUARD = 64


def guarded(shape, dtype):
    """A tensor of NaN inside a longer one of -77."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * GUARD,), -77.0, dtype=dtype)
    inside = whole[GUARD : GUARD + count]
    inside.fill_(torch.nan)
    return whole, inside.view(shape)


def check(shape, dtype, tolerance):
    from atat_fast.kernels.rotary import rotary

    batch, length, heads, size = shape
    qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
    cos, sin = rotary_table(length, size)
    for inverse in (False, True):
        want = rotary_reference(qkv.double(), cos.double(), (-sin if inverse else sin).double())
        whole, out = guarded(qkv.shape, dtype)
        rotary(out, qkv, cos, sin, inverse)
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
        assert (whole[:GUARD] == -77).all() and (whole[len(whole) - GUARD :] == -77).all()
        place, inside = guarded(qkv.shape, dtype)
        inside.copy_(qkv)
        rotary(inside, inside, cos, sin, inverse)
        assert torch.equal(inside, out)
        assert (place[:GUARD] == -77).all() and (place[len(place) - GUARD :] == -77).all()


@pytest.mark.parametrize("shape", [(2, 7, 1, 2), (1, 9, 2, 16), (2, 33, 4, 32), (1, 40, 3, 64), (2, 5, 6, 128), (1, 3, 1, 96)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_triton(shape, dtype, tolerance):
    check(shape, dtype, tolerance)


def test_triton_bf16():
    if not EXACT_BF16.is_file():
        pytest.skip("Triton's interpreter gets bf16 wrong, and tests/ops/interpreter.py, which puts it right, is not here")
    check((2, 9, 2, 32), torch.bfloat16, 8e-3)


def check_norm(shape, dtype, tolerance):
    """The scales are guarded too, and the gradient is that of the specification at the op's own, rounded output."""
    from atat_fast.kernels.rotary import normed_backward, rotary

    batch, length, heads, size = shape
    eps = 1e-3
    qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
    qkv[:, 1::3] = 0
    upstream = torch.randn(qkv.shape).to(dtype)
    cos, sin = (1.1 * t for t in rotary_table(length, size))
    exact = qkv.double().requires_grad_()
    want = rotary_reference(exact, cos.double(), sin.double(), norm=True, eps=eps)
    (back,) = torch.autograd.grad(want, exact, upstream.double())
    scales = torch.rsqrt(exact[:, :, :2].square().mean(-1) + eps)
    (whole, out), (kept, rstd) = guarded(qkv.shape, dtype), guarded(scales.shape, torch.float32)
    rotary(out, qkv, cos, sin, False, rstd, eps)
    torch.testing.assert_close(out.double(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rstd.double(), scales.detach(), rtol=1e-6, atol=1e-6)
    assert (out[:, 1::3, :2] == 0).all()
    place, inside = guarded(qkv.shape, dtype)
    inside.copy_(qkv)
    rotary(inside, inside, cos, sin, False, None, eps)
    assert torch.equal(inside, out)
    grads, dqkv = guarded(qkv.shape, dtype)
    normed_backward(dqkv, upstream, out, rstd, cos, sin)
    most = float(back.abs().max())
    torch.testing.assert_close(dqkv.double() / most, back / most, rtol=tolerance, atol=tolerance)
    for buffer in (whole, kept, place, grads):
        assert (buffer[:GUARD] == -77).all() and (buffer[len(buffer) - GUARD :] == -77).all()


@pytest.mark.parametrize("shape", [(2, 7, 1, 2), (1, 9, 2, 16), (2, 33, 4, 32), (1, 40, 3, 64), (1, 3, 1, 96), (1, 5, 2, 256)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_triton_norm(shape, dtype, tolerance):
    check_norm(shape, dtype, tolerance)


def test_triton_norm_bf16():
    if not EXACT_BF16.is_file():
        pytest.skip("Triton's interpreter gets bf16 wrong, and tests/ops/interpreter.py, which puts it right, is not here")
    check_norm((2, 9, 2, 32), torch.bfloat16, 1.6e-2)


def test_triton_rows_that_lie_apart():
    from atat_fast.kernels.rotary import rotary

    storage = torch.randn(3, 11, 2, 3 * 4 * 8)
    qkv = storage[:, :, 0].view(3, 11, 3, 4, 8)  # every second row of a longer tensor
    before = storage[:, :, 1].clone()
    cos, sin = rotary_table(11, 8)
    want = rotary_reference(qkv, cos, sin)
    rotary(qkv, qkv, cos, sin, False)
    torch.testing.assert_close(qkv, want)
    assert torch.equal(storage[:, :, 1], before)


def test_triton_nothing():
    from atat_fast.kernels.rotary import normed_backward, rotary

    empty = torch.empty(0, 4, 3, 2, 8)
    rotary(empty, empty, *rotary_table(4, 8), False)
    rotary(empty, empty, *rotary_table(4, 8), False, None, 1e-6)
    normed_backward(empty, empty, empty, torch.empty(0, 4, 2, 2), *rotary_table(4, 8))
