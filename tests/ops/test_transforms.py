"""Name: the op, its specification, shapes of its arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from atat_fast.ops import (
    adaptive_attention,
    adaptive_layer_norm,
    adaptive_layer_norm_reference,
    attention,
    attention_reference,
    gated_residual_norm,
    gated_residual_norm_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    registry,
    rotary,
    rotary_reference,
    rotary_split,
    rotary_table,
    self_attention,
)
from atat_fast.ops.adaptive_norm import dropout_scale

F32, F64 = torch.float32, torch.float64
CPP = registry.missing("cpp", torch.device("cpu"))
COS, SIN = rotary_table(5, 4)


def norms(rows):
    return [(2, 5, 8), (rows, 8), (rows, 8), (8,)]


def gated(reference=False, **options):
    if reference:
        keep = dropout_scale((2, 5, 8), 0.3, torch.tensor(1), torch.tensor(2), torch.arange(2), 3) if options else None
        return lambda *t: gated_residual_norm_reference(*t, keep=keep)
    options = options and {"dropout": 0.3, "seed": 1, "step": 2, "sample_ids": torch.arange(2), "layer": 3}
    return lambda *t, backend: gated_residual_norm(*t, **options, backend=backend)


def attend(x, qkv, out, reference=False, norm=False, rows=None):
    if not reference:
        how = None if registry.transformed() else "sdpa_math"
        return self_attention(x, qkv, out, COS, SIN, heads=2, qk_norm=norm, rows=rows, implementation=how)
    packed = rotary_reference(F.linear(x, qkv).view(2, 5, 3, 2, 4), COS, SIN, norm=norm)
    y = F.linear(attention_reference(packed), out)
    return y if rows is None else y.flatten(0, 1)[rows]


TARGET, ROWS, WEIGHTS = torch.tensor([3, 0, 6, 2]), torch.tensor([4, 1, 1, 2]), torch.tensor([0.5, -2.0, 1.5, 3.0])
RATES = (torch.linspace(0.5, 2, 7), torch.tensor([0.0, 0.4, 1.0, 2.0]))


def head(rated=False, **options):
    rates = dict(zip(("rates", "elapsed"), RATES, strict=True)) if rated else {}
    options = {"rows": ROWS, "forbidden": 5} | rates | options

    def op(h, w, b, weights, backend):
        return linear_cross_entropy(h, w, TARGET, bias=b, token_weight=weights, **options, backend=backend)

    def reference(h, w, b, weights):
        wide = {name: value.to(h.dtype) for name, value in rates.items()}
        losses = linear_cross_entropy_reference(h, w, TARGET, b, weights, ROWS, 5, **wide)
        return losses if options.get("reduction") == "none" else losses.sum()

    return op, reference, [(6, 4), (7, 4), (7,), (4,)]


QKV = (2, 5, 3, 2, 4)
NORM = {"norm": True, "eps": 0.1}
BLOCK = [(2, 5, 8), (24, 8), (8, 8)]
LABELS = torch.where(torch.arange(4) == 1, -100, TARGET)
SMOOTH = {"label_smoothing": 0.2, "reduction": "mean"}
PLAIN = lambda *t, backend: adaptive_layer_norm(*t, backend=backend)  # noqa: E731
CASES = {
    "adaptive_layer_norm": (PLAIN, adaptive_layer_norm_reference, norms(2)),
    "adaptive_layer_norm, one row": (PLAIN, adaptive_layer_norm_reference, norms(1)),
    "gated_residual_norm": (gated(), gated(True), [(2, 5, 8), (2, 5, 8), (2, 8), (2, 8), (2, 8), (8,)]),
    "gated_residual_norm, dropout, one row": (
        gated(dropout=True), gated(True, dropout=True), [(2, 5, 8), (2, 5, 8), (1, 8), (1, 8), (1, 8), (8,)],
    ),
    "rotary": (lambda t, backend: rotary(t, COS, SIN, backend=backend), lambda t: rotary_reference(t, COS, SIN), [QKV]),
    "rotary, norm": (
        lambda t, backend: rotary(t, COS, SIN, **NORM, backend=backend), lambda t: rotary_reference(t, COS, SIN, **NORM), [QKV],
    ),
    "rotary_split": (
        lambda t, backend: rotary_split(t, COS, SIN, backend=backend), lambda t: rotary_reference(t, COS, SIN).unbind(2), [QKV],
    ),
    "rotary_split, norm": (
        lambda t, backend: rotary_split(t, COS, SIN, **NORM, backend=backend),
        lambda t: rotary_reference(t, COS, SIN, **NORM).unbind(2), [QKV],
    ),
    "attention, products": (
        lambda t, backend: attention(t, implementation=None if registry.transformed() else "products"),
        attention_reference, [QKV],
    ),
    "self_attention": (
        lambda *t, backend: attend(*t, rows=torch.tensor([7, 2])), lambda *t: attend(*t, True, rows=torch.tensor([7, 2])), BLOCK,
    ),
    "self_attention, norm": (lambda *t, backend: attend(*t, norm=True), lambda *t: attend(*t, True, True), BLOCK),
    "linear_cross_entropy": head(),
    "linear_cross_entropy, low_memory": head(low_memory=True),
    "linear_cross_entropy, none": head(reduction="none"),
    "linear_cross_entropy, rates": head(rated=True),
    "linear_cross_entropy, none, rates": head(rated=True, reduction="none"),
    "linear_cross_entropy, smoothed mean": (
        lambda h, w, b, backend: linear_cross_entropy(h, w, LABELS, bias=b, rows=ROWS, **SMOOTH, backend=backend),
        lambda h, w, b: F.cross_entropy(F.linear(h[ROWS], w, b), LABELS, label_smoothing=0.2), [(6, 4), (7, 4), (7,)],
    ),
}  # fmt: skip


def prepared(name, backend):
    """One number of the tensors, by the op and by its specification in fp64, and the tensors with a direction for each."""
    op, reference, shapes = CASES[name]
    if backend == "cpp" and CPP is not None:
        pytest.skip(CPP)
    generator = torch.Generator().manual_seed(len(name))
    draw = lambda shapes: tuple(torch.randn(s, generator=generator, dtype=F64) for s in shapes)  # noqa: E731
    inputs, along = draw(shapes), draw(shapes)
    if len(shapes) == 4 and name.startswith("linear"):
        inputs = (*inputs[:-1], WEIGHTS.double())
    parts = lambda found: found if isinstance(found, tuple) else (found,)  # noqa: E731
    cotangents = draw(t.shape for t in parts(reference(*inputs)))

    def number(f):
        pairs = lambda given: zip(parts(f(*given)), cotangents, strict=True)  # noqa: E731
        return lambda *given: sum((torch.sin(p) * c.to(p.dtype)).sum() for p, c in pairs(given))

    as_given = lambda tensors: tuple(t.to(F64 if backend == "torch" else F32) for t in tensors)  # noqa: E731
    return number(lambda *given: op(*given, backend=backend)), number(reference), as_given(inputs), as_given(along), inputs, along


def close(got, want):
    loose = {"rtol": 2e-3, "atol": 2e-3} if torch.as_tensor(got[0]).dtype is F32 else {"rtol": 1e-8, "atol": 1e-9}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, **loose)


every = pytest.mark.parametrize("backend", ["torch", "cpp"])
each = pytest.mark.parametrize("name", CASES)


@every
@each
def test_forward_mode(name, backend):
    f, g, x, v, wide, far = prepared(name, backend)
    _, want = torch.func.jvp(g, wide, far)
    close(torch.func.jvp(f, x, v)[1:], (want,))
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, v, strict=True)))
        close((forward_ad.unpack_dual(out).tangent,), (want,))
    leaves = [t.clone().requires_grad_() for t in x]  # the same number by reverse mode
    close((sum((a * b).sum() for a, b in zip(torch.autograd.grad(f(*leaves), leaves), v, strict=True)),), (want,))


@every
@each
def test_functorch(name, backend):
    f, g, x, v, wide, far = prepared(name, backend)
    which = tuple(range(len(x)))
    want = torch.func.grad(g, which)(*wide)
    close(torch.func.grad(f, which)(*x), want)
    close(torch.func.jacrev(f, which)(*x), want)
    stacked, both = (tuple(torch.stack((a, a + b)) for a, b in zip(p, q, strict=True)) for p, q in ((x, v), (wide, far)))
    close((torch.func.vmap(f)(*stacked),), (torch.stack([g(*(t[i] for t in both)) for i in range(2)]),))
    close(torch.func.vmap(torch.func.grad(f, which))(*stacked), torch.func.vmap(torch.func.grad(g, which))(*both))


@every
@each
def test_second_derivatives(name, backend):
    """Reverse over reverse, forward over reverse, and forward mode made of two reverse passes."""
    f, g, x, v, wide, far = prepared(name, backend)
    which = tuple(range(len(x)))
    _, want = torch.func.jvp(torch.func.grad(g, which), wide, far)  # the Hessian's product with the direction

    leaves = [t.clone().requires_grad_() for t in x]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, v, strict=True)), leaves, allow_unused=True)
    close([torch.zeros_like(t) if s is None else s for s, t in zip(second, x, strict=True)], want)

    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(a, b) for a, b in zip(leaves, v, strict=True)]
        tangents = [forward_ad.unpack_dual(t).tangent for t in torch.autograd.grad(f(*dual), dual)]
        close([torch.zeros_like(a) if t is None else t for t, a in zip(tangents, x, strict=True)], want)

    _, along = torch.autograd.functional.jvp(f, x, v)
    close((along,), torch.func.jvp(g, wide, far)[1:])


@each
def test_an_upstream_gradient_may_be_dual_or_batched(name):
    """The op was recorded as always, and only its backward sees the transform."""
    f, _, x, *_ = prepared(name, "torch")
    leaves = [t.clone().requires_grad_() for t in x]
    out = f(*leaves)
    want = torch.autograd.grad(out, leaves, retain_graph=True)
    upstream = torch.tensor([1.0, -2.0], dtype=out.dtype)
    many = torch.autograd.grad(out, leaves, upstream, retain_graph=True, is_grads_batched=True)
    close([t[1] for t in many], [-2 * t for t in want])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 3.0))
        close([forward_ad.unpack_dual(t).tangent for t in torch.autograd.grad(out, leaves, dual)], [3 * t for t in want])


def test_a_third_derivative():
    """What makes second derivatives is differentiable too."""
    for name in ("gated_residual_norm", "rotary_split, norm", "linear_cross_entropy"):
        f, g, x, v, *_ = prepared(name, "torch")

        def third(h, x=x, v=v):
            leaves = [t.clone().requires_grad_() for t in x]
            along = h(*leaves)
            for _ in range(3):
                found = torch.autograd.grad(along, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
                along = sum((a * b).sum() for a, b in zip(found, v, strict=True))
            return (along,)

        close(third(f), third(g))


@pytest.mark.parametrize("name", ["adaptive_layer_norm", "rotary, norm", "linear_cross_entropy", "self_attention, norm"])
def test_transforms_inside_torch_compile(name):
    f, g, x, v, wide, far = prepared(name, "torch")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: torch.func.jvp(f, t, v)[1], fullgraph=True, backend="aot_eager")
    close((compiled(*x),), torch.func.jvp(g, wide, far)[1:])
    compiled = torch.compile(lambda *t: torch.func.grad(f)(*t), fullgraph=True, backend="aot_eager")
    close((compiled(*x),), (torch.func.grad(g)(*wide),))


def test_rotation_in_place_keeps_its_tangent():
    qkv, along = torch.randn(QKV), torch.randn(QKV)
    for norm in (False, True):
        _, want = torch.func.jvp(lambda t, norm=norm: rotary_reference(t, COS, SIN, norm=norm), (qkv,), (along,))
        _, got = torch.func.jvp(lambda t, norm=norm: rotary(t.clone(), COS, SIN, norm=norm, inplace=True), (qkv,), (along,))
        torch.testing.assert_close(got, want)


def test_kernels_without_such_derivatives_are_refused_by_name():
    qkv, table = torch.randn(QKV), COS.clone().requires_grad_()
    with pytest.raises(ValueError, match="attention by 'sdpa_flash' has no forward-mode derivative"):
        torch.func.jvp(lambda t: attention(t, implementation="sdpa_flash"), (qkv,), (qkv,))
    with pytest.raises(ValueError, match=r"requires a gradient, but tables get none; pass cos.detach\(\)"):
        rotary(qkv, table, SIN)
    got, want = (torch.func.jvp(lambda c, f=f: f(qkv, c, SIN), (COS,), (SIN,))[1] for f in (rotary, rotary_reference))
    torch.testing.assert_close(got, want)  # forward mode has one


def test_kernels_without_second_derivatives_are_refused_with_the_way_out(monkeypatch):
    x, qkv, out = torch.randn(2, 5, 8).requires_grad_(), torch.randn(24, 8), torch.randn(8, 8)

    def twice():
        y = self_attention(x, qkv, out, COS, SIN, heads=2)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    monkeypatch.setenv("ATAT_FAST_ATTENTION", "sdpa_flash")
    first, way_out = twice(), "no second derivative; ask for implementation='sdpa_math', or set ATAT_FAST_ATTENTION"
    with pytest.raises(RuntimeError, match=way_out):
        torch.autograd.grad(first.square().sum(), x)
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "sdpa_math")
    torch.testing.assert_close(twice(), first, rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(twice().square().sum(), x)[0].abs().sum() > 0


def test_a_backward_called_by_its_name_is_refused():
    grad, stats = torch.randn(1, 2, 4).requires_grad_(), torch.ones(1, 2, 1)
    op = torch.ops.atat_fast.adaptive_layer_norm_backward
    dx = op(grad, torch.randn(1, 2, 4), torch.zeros(1, 4), None, stats, stats, F32, "torch")[0]
    with pytest.raises(RuntimeError, match="adaptive_layer_norm_backward cannot be differentiated; call adaptive_layer_norm"):
        dx.sum().backward()


def test_adaptive_attention_is_its_two_ops():
    x, shift, v = torch.randn(2, 5, 8), torch.randn(1, 8), torch.randn(2, 5, 8)
    qkv, out = torch.randn(24, 8), torch.randn(8, 8)
    f = lambda x: adaptive_attention(x, shift, shift, None, qkv, out, COS, SIN, heads=2)  # noqa: E731
    g = lambda x: attend(adaptive_layer_norm_reference(x, shift, shift), qkv, out, True)  # noqa: E731
    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,)), torch.func.jvp(g, (x,), (v,)), rtol=1e-4, atol=1e-4)
