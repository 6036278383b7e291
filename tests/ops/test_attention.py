"""rotary, attention and the attention branch against their specifications in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import (
    adaptive_attention,
    adaptive_layer_norm_reference,
    attention,
    attention_reference,
    rotary,
    rotary_reference,
    rotary_table,
)


def packed(batch, length, heads, size, dtype=torch.float64):
    cos, sin = rotary_table(length, size)
    return torch.randn(batch, length, 3, heads, size, dtype=dtype).requires_grad_(), cos.to(dtype), sin.to(dtype)


shapes = given(batch=st.integers(0, 3), length=st.integers(1, 37), heads=st.integers(1, 5), size=st.sampled_from([2, 6, 32]))


@settings(max_examples=30, deadline=None)
@shapes
def test_rotary_matches_in_fp64_and_keeps_lengths(batch, length, heads, size):
    qkv, cos, sin = packed(batch, length, heads, size)
    got, want = rotary(qkv, cos, sin), rotary_reference(qkv, cos, sin)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.norm(dim=-1), qkv.norm(dim=-1))
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(o, qkv, upstream)[0] for o in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_rotary_makes_scores_depend_on_distance_alone():
    length, size = 12, 8
    cos, sin = (t.double() for t in rotary_table(length, size))
    token = torch.randn(1, 1, 3, 1, size, dtype=torch.float64).expand(1, length, 3, 1, size)
    turned = rotary(token, cos, sin)
    scores = turned[0, :, 0, 0] @ turned[0, :, 1, 0].T
    for distance in range(-length + 1, length):
        line = torch.diagonal(scores, distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)  # tables are fp32


def test_rotary_in_place_is_the_same_bits_and_refuses_gradients():
    qkv, cos, sin = packed(2, 9, 3, 8, torch.float32)
    with torch.no_grad():
        want = rotary(qkv, cos, sin)
        copy = qkv.clone()
        assert rotary(copy, cos, sin, inplace=True).data_ptr() == copy.data_ptr()
        assert torch.equal(copy, want)
    with pytest.raises(ValueError, match="would overwrite values that a gradient needs"):
        rotary(qkv, cos, sin, inplace=True)


def test_rotary_of_a_strided_view_and_bf16(poisoned):
    qkv, cos, sin = packed(2, 9, 6, 8, torch.float32)
    view = qkv.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(rotary(view, cos, sin), rotary(qkv, cos, sin))
    low = qkv.detach().bfloat16()
    torch.testing.assert_close(rotary(low, cos, sin), rotary_reference(low.double(), cos.double(), sin.double()).bfloat16())


@settings(max_examples=20, deadline=None)
@shapes
def test_attention_matches_in_fp64(batch, length, heads, size):
    qkv, _, _ = packed(batch, length, heads, size)
    got, want = attention(qkv), attention_reference(qkv)
    assert got.shape == (batch, length, heads * size)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(o, qkv, upstream)[0] for o in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_branch_is_its_parts(qk_norm):
    batch, length, heads, width = 2, 11, 3, 24
    x, shift, scale = (
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((batch, length, width), (batch, width), (batch, width))
    )
    norm, qkv_w, out_w = (
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((width,), (3 * width, width), (width, width))
    )
    cos, sin = (t.double() for t in rotary_table(length, width // heads))
    got = adaptive_attention(x, shift, scale, norm, qkv_w, out_w, cos, sin, heads=heads, qk_norm=qk_norm)
    qkv = (adaptive_layer_norm_reference(x, shift, scale, norm) @ qkv_w.T).view(batch, length, 3, heads, -1)
    if qk_norm:
        q, k, v = qkv.unbind(2)
        eps = torch.finfo(torch.float64).eps
        q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) for t in (q, k))
        qkv = torch.stack((q, k, v), 2)
    want = attention_reference(rotary_reference(qkv, cos, sin)) @ out_w.T
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    leaves, upstream = (x, shift, scale, norm, qkv_w, out_w), torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_opcheck():
    qkv, cos, sin = packed(2, 5, 2, 4, torch.float32)
    torch.library.opcheck(torch.ops.atat_fast.rotary.default, (qkv, cos, sin, False))
    torch.library.opcheck(torch.ops.atat_fast.attention.default, (qkv,))
    x, w, o = (torch.randn(*s).requires_grad_() for s in ((2, 5, 8), (24, 8), (8, 8)))
    torch.library.opcheck(torch.ops.atat_fast.self_attention.default, (x, w, o, cos, sin, 2, False))


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole(grad):
    x, w, o = (torch.randn(*s).requires_grad_(grad) for s in ((2, 5, 8), (24, 8), (8, 8)))
    cos, sin = rotary_table(5, 4)

    def f(x, shift):
        return adaptive_attention(x, shift, shift, None, w, o, cos, sin, heads=2)

    shift = torch.randn(1, 8)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, shift), f(x, shift))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary(torch.zeros(2, 3, 3, 2, 5), torch.zeros(3, 2), torch.zeros(3, 2)), "even head dimension"),
        (lambda: rotary(torch.zeros(2, 3, 3, 2, 4), torch.zeros(4, 2), torch.zeros(4, 2)), r"must have shape \(3, 2\)"),
        (lambda: attention(torch.zeros(2, 3, 2, 2, 4)), r"qkv must be \[batch, length, 3"),
        (
            lambda: adaptive_attention(
                torch.zeros(1, 2, 6), torch.zeros(1, 6), torch.zeros(1, 6), None, torch.zeros(18, 6), torch.zeros(6, 6),
                torch.zeros(2, 1), torch.zeros(2, 1), heads=4,
            ),
            "width 6 does not divide into 4 heads",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
