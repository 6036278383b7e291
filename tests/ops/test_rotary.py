"""rotary against its specification: every backend that runs here, in place and out of place, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import registry, rotary, rotary_cost, rotary_reference, rotary_split, rotary_table

# With TRITON_INTERPRET=1 that includes triton, in an interpreter: see test_interpreted.py.
READY = [name for name, reason in registry.explain("rotary", torch.device("cpu")).items() if reason is None]
QUICK = [name for name in READY if name != "triton"]
every = pytest.mark.parametrize("backend", READY)
quick = pytest.mark.parametrize("backend", QUICK)
shapes = given(batch=st.integers(0, 3), length=st.integers(1, 37), heads=st.integers(1, 6), size=st.sampled_from([2, 6, 32]))


def packed(batch, length, heads, size, dtype=torch.float64):
    cos, sin = rotary_table(length, size)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return torch.randn(batch, length, 3, heads, size).to(dtype), cos.to(wide), sin.to(wide)


@quick
@settings(max_examples=30, deadline=None)
@shapes
def test_it_matches_in_fp64_and_keeps_lengths(backend, batch, length, heads, size):
    qkv, cos, sin = packed(batch, length, heads, size)
    qkv.requires_grad_()
    got, want = rotary(qkv, cos, sin, backend=backend), rotary_reference(qkv, cos, sin)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.norm(dim=-1), qkv.norm(dim=-1))
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(o, qkv, upstream)[0] for o in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@every
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 13, 4, 32), (3, 5, 6, 10), (2, 1, 1, 64), (0, 4, 2, 8), (2, 3, 5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_backend_errs_no_more_than_pytorch(poisoned, backend, shape, dtype):
    if (backend, dtype) in (("cpp", torch.float16), ("triton", torch.bfloat16)):
        pytest.skip("the C++ loop has no fp16, and Triton's interpreter no right bf16 by itself: see test_rotary_kernel.py")
    qkv, cos, sin = packed(*shape, dtype)
    qkv.requires_grad_()
    upstream = torch.randn(qkv.shape).to(dtype)
    got = rotary(qkv, cos, sin, backend=backend)
    (grad,) = torch.autograd.grad(got, qkv, upstream)
    want = rotary_reference(qkv.detach().double(), cos.double(), sin.double())
    back = rotary_reference(upstream.double(), cos.double(), -sin.double())
    for ours, exact in ((got, want), (grad, back)):
        assert ours.dtype is dtype and ours.is_contiguous()
        assert ours.isfinite().all()
        if exact.numel():
            own = (exact.to(dtype).double() - exact).abs().max()  # rounding once
            assert (ours.double() - exact).abs().max() <= 1.1 * own + 3e-7 * exact.abs().max()
        assert torch.equal(ours[:, :, 2], (qkv if ours is got else upstream)[:, :, 2])


@every
def test_in_place_is_the_same_bits_and_refuses_gradients(backend):
    qkv, cos, sin = packed(2, 9, 3, 8, torch.float32)
    want = rotary(qkv, cos, sin, backend=backend)
    copy = qkv.clone()
    assert rotary(copy, cos, sin, inplace=True, backend=backend).data_ptr() == copy.data_ptr()
    assert torch.equal(copy, want)
    qkv.requires_grad_()
    with pytest.raises(ValueError, match="would overwrite values that a gradient needs"):
        rotary(qkv, cos, sin, inplace=True, backend=backend)


@every
def test_strided_inputs(backend):
    qkv, cos, sin = packed(2, 9, 6, 8, torch.float32)
    want = rotary(qkv, cos, sin, backend=backend)
    rows = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # rows apart, each of them dense
    assert torch.equal(rotary(rows, cos, sin, backend=backend), want)
    assert torch.equal(rotary(rows, cos, sin, inplace=True, backend=backend), want)
    heads = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # a row's heads interleaved
    assert torch.equal(rotary(heads, cos, sin, backend=backend), want)
    if backend != "torch":
        with pytest.raises(ValueError, match="in place it needs qkv dense in its last three dimensions"):
            rotary(heads, cos, sin, inplace=True, backend=backend)
    plain = rotary(qkv, cos, sin, backend="torch")
    assert torch.equal(rotary(heads, cos, sin, inplace=True), plain)  # not asked by name: what can take it runs


@every
@pytest.mark.parametrize("norm", [False, True])
def test_one_head_and_gradients_that_lie_anyhow(backend, norm):
    qkv, cos, sin = packed(2, 9, 1, 8, torch.float32)
    odd = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # dense, though the stride of the one head says otherwise
    odd = odd.as_strided(odd.shape, (*odd.stride()[:3], 1000, 1)).requires_grad_()
    got = rotary(odd, cos, sin, norm=norm, backend=backend)
    torch.testing.assert_close(got, rotary_reference(qkv, cos, sin, norm=norm))
    dense = torch.randn(2, 9, 3, 1, 8)
    apart = dense.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    assert not apart.is_contiguous()
    ours, theirs = (torch.autograd.grad(got, odd, g, retain_graph=True)[0] for g in (apart, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (ones,) = torch.autograd.grad(got.sum(), odd)  # an expanded gradient
    leaf = qkv.requires_grad_()
    (want,) = torch.autograd.grad(rotary_reference(leaf, cos, sin, norm=norm).sum(), leaf)
    torch.testing.assert_close(ones, want, rtol=1e-5, atol=1e-5)


@every
def test_two_runs_are_the_same_bits(poisoned, backend):
    qkv, cos, sin = packed(2, 33, 4, 16, torch.float32)
    assert torch.equal(rotary(qkv, cos, sin, backend=backend), rotary(qkv, cos, sin, backend=backend))


def test_scores_depend_on_distance_alone():
    length, size = 12, 8
    cos, sin = (t.double() for t in rotary_table(length, size))
    token = torch.randn(1, 1, 3, 1, size, dtype=torch.float64).expand(1, length, 3, 1, size)
    turned = rotary(token, cos, sin)
    scores = turned[0, :, 0, 0] @ turned[0, :, 1, 0].T
    for distance in range(-length + 1, length):
        line = torch.diagonal(scores, distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)  # tables are fp32


@quick
def test_the_opposite_angle_turns_back(backend):
    qkv, cos, sin = packed(2, 17, 3, 8)
    back = torch.ops.atat_fast.rotary(rotary(qkv, cos, sin, backend=backend), cos, sin, True, backend)
    torch.testing.assert_close(back, qkv, rtol=1e-6, atol=1e-6)


@quick
def test_opcheck(backend):
    qkv, cos, sin = packed(2, 5, 2, 4, torch.float32)
    torch.library.opcheck(torch.ops.atat_fast.rotary_.default, (qkv, cos, sin, False, backend))
    torch.library.opcheck(torch.ops.atat_fast.rotary.default, (qkv.requires_grad_(), cos, sin, False, backend))


@quick
@pytest.mark.parametrize("inplace", [False, True])
def test_it_compiles_whole(backend, inplace):
    qkv, cos, sin = packed(2, 5, 3, 4, torch.float32)
    torch._dynamo.reset()  # graphs of other parameters count for this function too

    def f(x):
        return rotary(x * 2, cos, sin, inplace=inplace, backend=backend) + 1

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(qkv), f(qkv))
    if not inplace:
        qkv.requires_grad_()
        ours, theirs = (torch.autograd.grad(g(qkv).square().sum(), qkv)[0] for g in (torch.compile(f, backend="aot_eager"), f))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary(torch.zeros(2, 3, 3, 2, 5), torch.zeros(3, 2), torch.zeros(3, 2)), "even head dimension"),
        (lambda: rotary(torch.zeros(2, 3, 3, 2, 4), torch.zeros(4, 2), torch.zeros(4, 2)), r"must have shape \(3, 2\)"),
        (
            lambda: rotary(torch.zeros(2, 3, 3, 2, 4), torch.zeros(3, 2), torch.zeros(3, 2), backend="trition"),
            "has no backend 'trition'",
        ),
        (
            lambda: rotary(torch.zeros(2, 3, 3, 2, 4), torch.zeros(3, 2), torch.zeros(3, 2), eps=1e-6),
            "eps 1e-06 belongs to the norm; say norm=True",
        ),
        (
            lambda: rotary(torch.zeros(2, 3, 3, 2, 4), torch.zeros(3, 2), torch.zeros(3, 2), norm=True, eps=0.0),
            "eps must be a number of at least 1.17.*, got 0.0",
        ),
        (
            lambda: rotary(torch.zeros(2, 3, 3, 2, 4).half(), torch.zeros(3, 2), torch.zeros(3, 2), backend="cpp"),
            "cannot use backend 'cpp' here: it has no kernel for torch.float16",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_cost_is_the_bytes_that_must_move():
    assert rotary_cost(8192, 12, 64).bytes == 8192 * 6144
    assert rotary_cost(8192, 12, 64, inplace=False).bytes == 8192 * 9216
    assert rotary_cost(8192, 12, 64, norm=True).bytes == 8192 * 6144  # nothing is kept
    assert rotary_cost(8192, 12, 64, inplace=False, norm=True).bytes == 8192 * (9216 + 24 * 4)
    # The gradient is read and written whole, turned queries and keys are read, and what the forward kept.
    assert rotary_cost(8192, 12, 64, inplace=False, norm=True, backward=True).bytes == 8192 * (9216 + 3072 + 24 * 4)
    flops = [rotary_cost(1, 1, 2, norm=norm, backward=back).flops for norm in (False, True) for back in (False, True)]
    assert flops == [3 * 4, 3 * 4, 6 * 4, 8 * 4]


# The norm. Rows are scaled so that eps is nothing, matters, or is all there is; every third is zero.


def uneven(batch, length, heads, size, dtype=torch.float64, scale=1.0):
    qkv, cos, sin = packed(batch, length, heads, size, dtype)
    return qkv * scale * (torch.arange(length) % 3 != 1).to(dtype)[:, None, None, None], cos, sin


@quick
@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2), length=st.integers(1, 19), heads=st.integers(1, 6), size=st.sampled_from([2, 6, 32, 64, 96, 256]),
    scale=st.sampled_from([1e-12, 1e-8, 1e-3, 1.0, 1e4]), stretch=st.sampled_from([1.0, 1.3]),
)  # fmt: skip
def test_norm_matches_in_fp64(backend, batch, length, heads, size, scale, stretch):
    qkv, cos, sin = uneven(batch, length, heads, size, scale=scale)
    cos, sin = cos * stretch, sin * stretch  # as some ways to longer contexts have it
    qkv.requires_grad_()
    got, want = rotary(qkv, cos, sin, norm=True, backend=backend), rotary_reference(qkv, cos, sin, norm=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(o, qkv, upstream)[0] for o in (got, want))
    most = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13 * most)
    each = rotary(qkv, cos / stretch, sin / stretch, norm=True, eps=1e-5, backend=backend)[:, :, :2].square().mean(-1)
    mean = qkv[:, :, :2].square().mean(-1)
    torch.testing.assert_close(each, mean / (mean + 1e-5), rtol=1e-6, atol=1e-300)  # tables are fp32


def composed(qkv, cos, sin):
    """What the op replaces, in the data's dtype."""
    return rotary_reference(torch.cat((F.rms_norm(qkv[:, :, :2], qkv.shape[-1:]), qkv[:, :, 2:]), dim=2), cos, sin)


@every
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 13, 4, 32), (3, 5, 6, 10), (2, 1, 1, 64), (0, 4, 2, 8), (2, 3, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_norm_errs_no_more_than_pytorch_and_takes_its_eps(poisoned, backend, shape, dtype, scale):
    if (backend, dtype) in (("cpp", torch.float16), ("triton", torch.bfloat16)):
        pytest.skip("the C++ loop has no fp16, and Triton's interpreter no right bf16 by itself: see test_rotary_kernel.py")
    qkv, cos, sin = uneven(*shape, dtype, scale)
    upstream = torch.randn(qkv.shape).to(dtype)
    leaves = [qkv.requires_grad_(), qkv.detach().clone().requires_grad_(), qkv.detach().double().requires_grad_()]
    exact = rotary_reference(leaves[2], cos.double(), sin.double(), norm=True, eps=torch.finfo(torch.float32).eps)
    outs = [rotary(leaves[0], cos, sin, norm=True, backend=backend), composed(leaves[1], cos, sin), exact]
    grads = [torch.autograd.grad(o, x, upstream.to(o.dtype))[0] for o, x in zip(outs, leaves, strict=True)]
    for ours, plain, want in (outs, grads):
        assert ours.dtype is dtype and ours.is_contiguous() and ours.isfinite().all()
        error, own = (float((t.double() - want).detach().norm()) for t in (ours, plain))
        assert error <= 1.2 * own + 3e-7 * float(want.detach().norm())
    zero = slice(1, None, 3)
    assert (outs[0][:, zero, :2] == 0).all() and torch.equal(outs[0][:, :, 2], qkv[:, :, 2])
    assert torch.equal(grads[0][:, :, 2], upstream[:, :, 2])


@every
def test_norm_in_place_is_the_same_bits_and_refuses_gradients(backend):
    qkv, cos, sin = uneven(2, 9, 3, 8, torch.float32)
    want = rotary(qkv, cos, sin, norm=True, eps=1e-6, backend=backend)
    rows = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # rows apart, each of them dense
    assert torch.equal(rotary(rows, cos, sin, norm=True, eps=1e-6, backend=backend), want)
    for place in (rows, qkv.clone()):
        assert rotary(place, cos, sin, norm=True, eps=1e-6, inplace=True, backend=backend).data_ptr() == place.data_ptr()
        assert torch.equal(place, want)
    heads = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # a row's heads interleaved
    assert torch.equal(rotary(heads, cos, sin, norm=True, eps=1e-6, backend=backend), want)
    with pytest.raises(ValueError, match="would overwrite values that a gradient needs"):
        rotary(qkv.requires_grad_(), cos, sin, norm=True, inplace=True, backend=backend)


@quick
def test_norm_keeps_its_output_and_not_its_input(backend):
    qkv, cos, sin = packed(2, 5, 3, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = rotary(qkv.requires_grad_() * 1, cos, sin, norm=True, backend=backend)
    large = [t for t in kept if t.numel() >= qkv.numel()]
    assert [t.data_ptr() for t in large] == [out.data_ptr()]
    assert sum(t.numel() for t in kept) == qkv.numel() + 2 * 5 * 2 * 3 + 2 * cos.numel()
    out = rotary(qkv, cos, sin, norm=True, backend=backend)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@quick
def test_norm_opcheck(backend):
    qkv, cos, sin = packed(2, 5, 2, 4, torch.float32)
    grad = torch.randn_like(qkv)
    torch.library.opcheck(torch.ops.atat_fast.rotary_normed_.default, (qkv.clone(), cos, sin, 1e-6, backend))
    out, rstd = torch.ops.atat_fast.rotary_normed(qkv, cos, sin, 1e-6, backend)
    torch.library.opcheck(torch.ops.atat_fast.rotary_normed_backward.default, (grad, out, rstd, cos, sin, backend))
    torch.library.opcheck(torch.ops.atat_fast.rotary_normed.default, (qkv.requires_grad_(), cos, sin, 1e-6, backend))


@quick
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_norm_compiles_whole(backend, inplace, compiler):
    qkv, cos, sin = uneven(2, 5, 3, 4, torch.float32)
    torch._dynamo.reset()  # graphs of other parameters count for this function too

    def f(x):
        turned = rotary(x * 2, cos, sin, norm=True, inplace=inplace, backend=backend)
        return turned + turned[:, :, 0:1] * turned[:, :, 1:2]  # which reads it again, as attention does

    whole = torch.compile(f, fullgraph=True, backend=compiler)
    torch.testing.assert_close(whole(qkv), f(qkv))
    if not inplace:
        qkv.requires_grad_()
        ours, theirs = (torch.autograd.grad(g(qkv).square().sum(), qkv)[0] for g in (whole, f))
        torch.testing.assert_close(ours, theirs)


# Into three tensors: rotary's own numbers, and gradients that are read wherever they lie.


@every
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 3, 8), (1, 13, 4, 32), (3, 5, 6, 10), (0, 4, 2, 8), (2, 3, 1, 96)])
def test_split_is_the_packed_tensors_parts(poisoned, backend, norm, shape):
    qkv, cos, sin = uneven(*shape, torch.float32)
    one, two = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    want, got = (
        rotary(one, cos, sin, norm=norm, backend=backend).unbind(2),
        rotary_split(two, cos, sin, norm=norm, backend=backend),
    )
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    dense = [torch.randn(shape) for _ in range(3)]
    apart = [
        dense[0],
        dense[1].transpose(1, 2).contiguous().transpose(1, 2),
        dense[2].transpose(0, 3).contiguous().transpose(0, 3),
    ]
    (expected,) = torch.autograd.grad(want, one, dense)
    for upstream in (dense, apart):
        (ours,) = torch.autograd.grad(got, two, upstream, retain_graph=True)
        assert ours.is_contiguous() or not ours.numel()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    (ones,) = torch.autograd.grad(got[0].sum(), two)  # an expanded gradient, and none for the others
    (plain,) = torch.autograd.grad(rotary(one, cos, sin, norm=norm, backend=backend)[:, :, 0].sum(), one)
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)


@quick
@pytest.mark.parametrize("norm", [False, True])
def test_split_compiles_whole_and_passes_opcheck(backend, norm):
    qkv, cos, sin = packed(2, 5, 3, 4, torch.float32)
    qkv.requires_grad_()
    torch._dynamo.reset()  # graphs of other parameters count for this function too

    def f(x):
        q, k, v = rotary_split(x * 2, cos, sin, norm=norm, backend=backend)
        return q * k + v

    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(qkv), f(qkv))
    ours, theirs = (torch.autograd.grad(g(qkv).square().sum(), qkv)[0] for g in (whole, f))
    torch.testing.assert_close(ours, theirs)
    if backend == "torch":
        eps = 1e-6 if norm else None
        torch.library.opcheck(torch.ops.atat_fast.rotary_split.default, (qkv, cos, sin, eps, backend))
        q, k, v, rstd = torch.ops.atat_fast.rotary_split(qkv.detach(), cos, sin, eps, backend)
        saved = (q, k, rstd) if norm else (None, None, None)
        torch.library.opcheck(torch.ops.atat_fast.rotary_split_backward.default, (q, k, v, *saved, cos, sin, backend))


def test_split_refuses_what_rotary_refuses():
    tables = torch.zeros(3, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="even head dimension"):
        rotary_split(torch.zeros(2, 3, 3, 2, 5), *tables)
    with pytest.raises(ValueError, match="eps 1e-06 belongs to the norm"):
        rotary_split(torch.zeros(2, 3, 3, 2, 4), *tables, eps=1e-6)
    with pytest.raises(ValueError, match="has no backend 'trition'"):
        rotary_split(torch.zeros(2, 3, 3, 2, 4), *tables, backend="trition")


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(8, 1024, 12, 64), (3, 131, 7, 32), (2, 257, 3, 128), (2, 65, 5, 96), (1, 1, 1, 2)])
    def test_against_the_specification(self, poisoned, shape, dtype):
        qkv, cos, sin = (t.cuda() for t in packed(*shape, dtype))
        got, want = (rotary(qkv, cos, sin, backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype is torch.float32 else 8e-3, atol=1e-6)
        assert torch.equal(got, rotary(qkv.clone(), cos, sin, inplace=True, backend="triton"))
        back = torch.ops.atat_fast.rotary(got, cos, sin, True, "triton")
        torch.testing.assert_close(back, qkv, rtol=2e-2 if dtype is not torch.float32 else 1e-5, atol=2e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(8, 1024, 12, 64), (3, 131, 7, 32), (2, 257, 3, 128), (2, 65, 5, 96), (1, 1, 1, 2)])
    def test_norm_against_fp64(self, poisoned, shape, dtype):
        qkv, cos, sin = uneven(*shape, dtype)
        upstream = torch.randn_like(qkv).cuda()
        qkv, cos, sin = (t.cuda() for t in (qkv, cos, sin))
        leaves = [qkv.requires_grad_(), qkv.detach().clone().requires_grad_(), qkv.detach().double().requires_grad_()]
        exact = rotary_reference(leaves[2], cos.double(), sin.double(), norm=True, eps=torch.finfo(torch.float32).eps)
        outs = [rotary(leaves[0], cos, sin, norm=True, backend="triton"), composed(leaves[1], cos, sin), exact]
        grads = [torch.autograd.grad(o, x, upstream.to(o.dtype))[0] for o, x in zip(outs, leaves, strict=True)]
        for ours, plain, want in (outs, grads):
            assert ours.isfinite().all()
            error, own = (float((t.double() - want).detach().norm()) for t in (ours, plain))
            assert error <= 1.2 * own + 1e-6 * float(want.detach().norm())
        place = qkv.detach().clone()
        assert torch.equal(rotary(place, cos, sin, norm=True, inplace=True, backend="triton"), outs[0])

    def test_norm_compiles_whole_and_in_a_graph(self):
        qkv, cos, sin = (t.cuda() for t in packed(2, 64, 4, 64, torch.bfloat16))
        qkv.requires_grad_()
        torch._dynamo.reset()  # graphs of other parameters count for this function too

        def f(x):
            return rotary(x * 2, cos, sin, norm=True, backend="triton").square()

        whole = torch.compile(f, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):  # recorded by the second, replayed by the third
            (ours,) = torch.autograd.grad(whole(qkv).float().sum(), qkv)
        (theirs,) = torch.autograd.grad(f(qkv).float().sum(), qkv)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

    def test_offsets_beyond_32_bits(self):
        length, heads, size = 1024, 16, 128
        batch = 2**31 // (length * 3 * heads * size) + 1
        if torch.cuda.mem_get_info()[0] < 5 * batch * length * 3 * heads * size:
            pytest.skip("the tensor of more than 2^31 elements does not fit this device")
        qkv = torch.ones(batch, length, 3, heads, size, dtype=torch.float16, device="cuda")
        cos, sin = (t.cuda() for t in rotary_table(length, size))
        want = rotary(qkv[-1:].clone(), cos, sin, backend="torch")
        assert torch.equal(rotary(qkv, cos, sin, inplace=True, backend="triton")[-1:], want)
