"""bf16 under the interpreter's patch is bf16: PyTorch's, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, as test_interpreted sets"
)


@triton.jit
def _elementwise_kernel(Out, A, B, OPERATION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b = tl.load(A + o), tl.load(B + o)
    if OPERATION == 0:
        value = a + b
    elif OPERATION == 1:
        value = a * b
    elif OPERATION == 2:
        value = a - b
    else:
        value = a
    tl.store(Out + o, value.to(Out.dtype.element_ty))


@triton.jit
def _compare_kernel(Out, A, B, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Out + o, tl.load(A + o) < tl.load(B + o))


@triton.jit
def _product_kernel(Out, A, B, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Out + o, tl.dot(tl.load(A + o), tl.load(B + o)))


def every_bf16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same_bits(a, b):
    numbers = ~b.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[numbers].view(torch.int16), b[numbers].view(torch.int16))


@pytest.mark.parametrize("operation", [torch.add, torch.mul, torch.sub], ids=lambda f: f.__name__)
def test_triton_arithmetic(operation):
    a = every_bf16()
    b = a[torch.randperm(len(a))]
    out = torch.empty_like(a)
    _elementwise_kernel[(1,)](out, a, b, [torch.add, torch.mul, torch.sub].index(operation), len(a))
    assert same_bits(out, operation(a, b))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
def test_triton_casts(source, target):
    # Halfway cases, what is just beside them, numbers too large and too small, and what is no number.
    halves = (
        every_bf16().float().view(torch.int32)[:, None] + torch.tensor([0x7FFF, 0x8000, 0x8001], dtype=torch.int32)
    ).flatten()
    value = halves.view(torch.float32)[: 2**17]
    value = torch.randint(-(2**24), 2**24, (2**17,), dtype=torch.int32) if source is torch.int32 else value.to(source)
    out = torch.empty(len(value), dtype=target)
    _elementwise_kernel[(1,)](out, value, value, 3, len(value))
    want = value.to(target)
    assert same_bits(out, want) if target is torch.bfloat16 else torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))


def test_triton_comparison_and_product():
    a, b = torch.randn(2, 32, 32).bfloat16()
    less = torch.zeros(1024, dtype=torch.bool)
    _compare_kernel[(1,)](less, a, b, 1024)
    assert torch.equal(less, (a < b).flatten())
    out = torch.empty(32, 32)
    _product_kernel[(1,)](out, a, b, 32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
