"""rotary against its specification: every backend, with its norm and without, packed and split, in place and out of place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import BF16, F32, F64, assert_no_worse, backends, compiled_whole, for_gpu, leaves, same

from atat_fast.ops import rotary, rotary_cost, rotary_reference, rotary_split, rotary_table

every = backends("rotary")
on_cpu = backends("rotary", gpu=False)
quick = backends("rotary", gpu=False, quick=True)
norms = pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
EPS = torch.finfo(F32).eps


def packed(batch, length, heads, size, dtype=F64, scale=1.0, norm=False):
    """A projection and its tables. With `norm` rows are scaled, and every third is zero: eps is nothing, matters, or is all."""
    cos, sin = rotary_table(length, size)
    wide = F64 if dtype is F64 else F32
    qkv = torch.randn(batch, length, 3, heads, size).to(dtype)
    if norm:
        qkv = qkv * scale * (torch.arange(length) % 3 != 1).to(dtype)[:, None, None, None]
    return qkv, cos.to(wide), sin.to(wide)


def gradient(call, qkv, upstream):
    leaf = qkv.detach().requires_grad_()
    out = call(leaf)
    return out, torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]


@quick
@norms
@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 37),
    heads=st.integers(1, 6),
    size=st.sampled_from([2, 6, 32, 64, 96, 256]),
    scale=st.sampled_from([1e-12, 1e-8, 1e-3, 1.0, 1e4]),
    stretch=st.sampled_from([1.0, 1.3]),
)
def test_it_matches_in_fp64_and_keeps_lengths(backend, device, norm, batch, length, heads, size, scale, stretch):
    qkv, cos, sin = packed(batch, length, heads, size, scale=scale, norm=norm)
    long = [t * stretch for t in (cos, sin)]  # as some ways to longer contexts have it
    upstream = torch.randn_like(qkv)
    got, ours = gradient(lambda t: rotary(t, *long, norm=norm, backend=backend), qkv, upstream)
    want, theirs = gradient(lambda t: rotary_reference(t, *long, norm=norm), qkv, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12 if norm else 1e-13, atol=1e-13)
    most = float(theirs.abs().max()) if norm and theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0 if norm else 1e-13, atol=1e-13 * most)
    if norm:
        each = rotary(qkv, cos, sin, norm=True, eps=1e-5, backend=backend)[:, :, :2].square().mean(-1)
        mean = qkv[:, :, :2].square().mean(-1)
        torch.testing.assert_close(each, mean / (mean + 1e-5), rtol=1e-6, atol=1e-300)  # tables are fp32
    else:
        torch.testing.assert_close(rotary(qkv, cos, sin, backend=backend).norm(dim=-1), qkv.norm(dim=-1))


SHAPES = [
    (2, 9, 3, 8), (1, 13, 4, 32), (3, 5, 6, 10), (2, 1, 1, 64), (0, 4, 2, 8), (2, 3, 5, 96), (1, 1, 1, 2), (2, 3, 2, 256),
    pytest.param((3, 40, 4, 16), id="tiny"), for_gpu((4, 1024, 12, 64), id="model"), for_gpu((3, 509, 41, 8), id="odd"),
    *(for_gpu(shape, slow=True) for shape in ((3, 131, 7, 32), (2, 257, 3, 128), (2, 65, 5, 96))),
]  # fmt: skip


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(F32, None), (torch.float16, None), (BF16, None), (F32, 1.0), (BF16, 1.0), (torch.float16, 3e-4), (BF16, 3e-4)],
    ids=str,
)
def test_errs_no_more_than_pytorch_against_fp64(poisoned, backend, device, shape, dtype, scale):
    """PyTorch's own error is one rounding, or with the norm that of F.rms_norm and the rotation in the data's dtype."""
    if (backend, dtype) == ("cpp", torch.float16):
        pytest.skip("the C++ loop has no fp16")
    norm = scale is not None
    qkv, cos, sin = (t.to(device) for t in packed(*shape, dtype, scale or 1.0, norm))
    upstream = torch.randn(*shape[:2], 3, *shape[2:]).to(device, dtype)
    call = lambda t: rotary(t, cos, sin, norm=norm, backend=backend)  # noqa: E731
    wide = cos.double(), sin.double()
    got, grad = gradient(call, qkv, upstream)
    exact = gradient(lambda t: rotary_reference(t, *wide, norm=norm, eps=EPS if norm else None), qkv.double(), upstream)
    if norm:
        composed = lambda t: torch.cat((F.rms_norm(t[:, :, :2], t.shape[-1:]), t[:, :, 2:]), dim=2)  # noqa: E731
        plain = gradient(lambda t: rotary_reference(composed(t), cos, sin), qkv, upstream)
    else:
        plain = [t.to(dtype) for t in exact]
    ours = got, grad
    assert all(t.dtype is dtype and t.is_contiguous() and t.isfinite().all() for t in ours)
    if qkv.numel():
        ratio = 1.1 if not norm else 1.2 if qkv.numel() > 16 else 2.0  # a few numbers have no typical error
        assert_no_worse(*(dict(enumerate(t)) for t in (ours, plain, exact)), ratio=ratio, floor=3e-7)
    if qkv.numel() and not norm:
        for t, e, p in zip(ours, exact, plain, strict=True):
            assert (t.double() - e).abs().max() <= 1.1 * (p.double() - e).abs().max() + 3e-7 * e.abs().max()
    assert torch.equal(got[:, :, 2], qkv[:, :, 2]) and torch.equal(grad[:, :, 2], upstream[:, :, 2])
    assert not norm or not got[:, 1::3, :2].any()
    again = gradient(call, qkv, upstream)
    assert same(ours, again)
    assert torch.equal(rotary(qkv.clone(), cos, sin, norm=norm, inplace=True, backend=backend), got)


@every
@norms
def test_in_place_is_the_same_bits_for_rows_that_lie_apart_too_and_refuses_gradients(backend, device, norm):
    qkv, cos, sin = (t.to(device) for t in packed(2, 9, 6, 8, F32, norm=norm))
    options = {"norm": norm, "backend": backend, **({"eps": 1e-6} if norm else {})}
    want = rotary(qkv, cos, sin, **options)
    rows = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # rows apart, each of them dense
    heads = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # a row's heads interleaved
    assert all(torch.equal(rotary(t, cos, sin, **options), want) for t in (rows, heads))
    for place in (rows, qkv.clone()):
        assert rotary(place, cos, sin, inplace=True, **options).data_ptr() == place.data_ptr() and torch.equal(place, want)
    if not norm:
        if backend != "torch":
            with pytest.raises(ValueError, match="in place it needs qkv dense in its last three dimensions"):
                rotary(heads, cos, sin, inplace=True, backend=backend)
        plain = rotary(qkv, cos, sin, backend="torch")
        assert torch.equal(rotary(heads, cos, sin, inplace=True), plain)  # not asked by name: what can take it runs
    with pytest.raises(ValueError, match="would overwrite values that a gradient needs"):
        rotary(qkv.requires_grad_(), cos, sin, inplace=True, **options)


@every
@norms
def test_one_head_and_gradients_that_lie_anyhow(backend, device, norm):
    qkv, cos, sin = (t.to(device) for t in packed(2, 9, 1, 8, F32))
    odd = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # dense, though the stride of the one head says otherwise
    odd = odd.as_strided(odd.shape, (*odd.stride()[:3], 1000, 1)).requires_grad_()
    got = rotary(odd, cos, sin, norm=norm, backend=backend)
    torch.testing.assert_close(got, rotary_reference(qkv, cos, sin, norm=norm))
    dense = torch.randn(2, 9, 3, 1, 8, device=device)
    apart = dense.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    assert not apart.is_contiguous()
    ours, theirs = (torch.autograd.grad(got, odd, g, retain_graph=True)[0] for g in (apart, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (ones,) = torch.autograd.grad(got.sum(), odd)  # an expanded gradient
    _, want = gradient(lambda t: rotary_reference(t, cos, sin, norm=norm), qkv, torch.ones_like(qkv))
    torch.testing.assert_close(ones, want, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_alone():
    length, size = 12, 8
    cos, sin = (t.double() for t in rotary_table(length, size))
    token = torch.randn(1, 1, 3, 1, size, dtype=F64).expand(1, length, 3, 1, size)
    turned = rotary(token, cos, sin)
    scores = turned[0, :, 0, 0] @ turned[0, :, 1, 0].T
    for distance in range(-length + 1, length):
        line = torch.diagonal(scores, distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)  # tables are fp32


@quick
def test_the_opposite_angle_turns_back(backend, device):
    qkv, cos, sin = packed(2, 17, 3, 8)
    back = torch.ops.atat_fast.rotary(rotary(qkv, cos, sin, backend=backend), cos, sin, True, backend)
    torch.testing.assert_close(back, qkv, rtol=1e-6, atol=1e-6)


@quick
def test_opcheck(backend, device):
    qkv, cos, sin = packed(2, 5, 2, 4, F32)
    ops, check, tables = torch.ops.atat_fast, torch.library.opcheck, (cos, sin)
    check(ops.rotary_.default, (qkv.clone(), *tables, False, backend))
    check(ops.rotary_normed_.default, (qkv.clone(), *tables, 1e-6, backend))
    out, rstd = ops.rotary_normed(qkv, *tables, 1e-6, backend)
    check(ops.rotary_normed_backward.default, (torch.randn_like(qkv), out, rstd, *tables, backend))
    leaf = qkv.clone().requires_grad_()
    check(ops.rotary.default, (leaf, *tables, False, backend))
    check(ops.rotary_normed.default, (leaf, *tables, 1e-6, backend))
    for eps in (None, 1e-6) if backend == "torch" else ():
        check(ops.rotary_split.default, (leaf, *tables, eps, backend))
        q, k, v, rstd = ops.rotary_split(qkv, *tables, eps, backend)
        saved = (None, None, None) if eps is None else (q, k, rstd)
        check(ops.rotary_split_backward.default, (q, k, v, *saved, *tables, backend))


@quick
@norms
@pytest.mark.parametrize("form", ["packed", "in place", "split"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_whole(backend, device, norm, form, compiler):
    if compiler == "inductor" and (form == "split" or not norm or backend == "torch"):
        pytest.skip("one form shows it: the norm's, which is read again, as an op that inductor cannot look into")
    qkv, cos, sin = packed(2, 5, 3, 4, F32, norm=norm)

    def f(x):
        if form == "split":
            q, k, v = rotary_split(x * 2, cos, sin, norm=norm, backend=backend)
            return q * k + v
        turned = rotary(x * 2, cos, sin, norm=norm, inplace=form == "in place", backend=backend)
        return turned + turned[:, :, 0:1] * turned[:, :, 1:2]  # which reads it again, as attention does

    whole = compiled_whole(f, compiler)
    torch.testing.assert_close(whole(qkv), f(qkv))
    if form != "in place":
        qkv.requires_grad_()
        ours, theirs = (torch.autograd.grad(g(qkv).square().sum(), qkv)[0] for g in (whole, f))
        torch.testing.assert_close(ours, theirs)


def small(last=4):
    return torch.zeros(2, 3, 3, 2, last), torch.zeros(3, 2), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary(*small(5)), "even head dimension"),
        (lambda: rotary(small()[0], torch.zeros(4, 2), torch.zeros(4, 2)), r"must have shape \(3, 2\)"),
        (lambda: rotary(*small(), backend="trition"), "has no backend 'trition'"),
        (lambda: rotary(*small(), eps=1e-6), "eps 1e-06 is given without norm; pass norm=True"),
        (lambda: rotary(*small(), norm=True, eps=0.0), "eps must be a number of at least 1.17.*, got 0.0"),
        (lambda: rotary(small()[0].half(), *small()[1:], backend="cpp"), "'cpp' here: it has no kernel for torch.float16"),
        (lambda: rotary_split(*small(5)), "even head dimension"),
        (lambda: rotary_split(*small(), eps=1e-6), "eps 1e-06 is given without norm"),
        (lambda: rotary_split(*small(), backend="trition"), "has no backend 'trition'"),
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


@quick
def test_norm_keeps_its_output_and_not_its_input(backend, device):
    qkv, cos, sin = packed(2, 5, 3, 4, F32)
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


@every
@norms
@pytest.mark.parametrize(
    "shape", [(2, 9, 3, 8), (1, 13, 4, 32), (3, 5, 6, 10), (0, 4, 2, 8), (2, 3, 1, 96), for_gpu((4, 1024, 12, 64))], ids=str
)
def test_split_is_the_packed_tensors_parts_and_gradients_are_read_wherever_they_lie(poisoned, backend, device, norm, shape):
    qkv, cos, sin = (t.to(device) for t in packed(*shape, F32, norm=norm))
    one, two = leaves({"qkv": qkv}), leaves({"qkv": qkv})
    want = rotary(**one, cos=cos, sin=sin, norm=norm, backend=backend).unbind(2)
    got = rotary_split(**two, cos=cos, sin=sin, norm=norm, backend=backend)
    assert same(got, want)
    dense = [torch.randn(shape, device=device) for _ in range(3)]
    apart = [
        dense[0],
        *(t.transpose(*axes).contiguous().transpose(*axes) for t, axes in zip(dense[1:], ((1, 2), (0, 3)), strict=True)),
    ]
    (expected,) = torch.autograd.grad(want, one["qkv"], dense)
    for upstream in (dense, apart):
        (ours,) = torch.autograd.grad(got, two["qkv"], upstream, retain_graph=True)
        assert ours.is_contiguous() or not ours.numel()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    (ones,) = torch.autograd.grad(got[0].sum(), two["qkv"])  # an expanded gradient, and none for the others
    _, plain = gradient(lambda t: rotary(t, cos, sin, norm=norm, backend=backend)[:, :, 0], qkv, torch.ones_like(got[0]))
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)
