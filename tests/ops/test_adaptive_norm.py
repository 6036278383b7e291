"""adaptive_layer_norm and gated_residual_norm against their specifications in fp64, and against PyTorch's bf16 error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atat_fast.ops import (
    adaptive_layer_norm,
    adaptive_layer_norm_cost,
    adaptive_layer_norm_reference,
    gated_residual_norm,
    gated_residual_norm_cost,
    gated_residual_norm_reference,
    registry,
)
from atat_fast.ops.adaptive_norm import WIDEST, dropout_scale

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
REASON = registry.explain("gated_residual_norm", torch.device("cpu"))["cpp"]
CPP = pytest.param("cpp", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))
every = pytest.mark.parametrize("backend", ["torch", CPP])  # Triton's kernels: test_adaptive_norm_kernel.py
cpp = pytest.mark.parametrize("backend", [CPP])
WIDE = {"torch": F64, "cpp": F32}
"""The widest dtype a backend takes."""


def tensors(batch, length, width, shared, dtype=F64, weight=True):
    rows = 1 if shared else batch
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    return {
        "residual": make(batch, length, width),
        "branch": make(batch, length, width),
        "gate": make(rows, width),
        "shift": make(rows, width),
        "scale": make(rows, width),
        "weight": make(width) if weight else None,
    }


shapes = given(
    batch=st.integers(1, 4),
    length=st.sampled_from([1, 2, 7, 31]),
    width=st.sampled_from([2, 5, 16, 67]),
    shared=st.booleans(),
    weight=st.booleans(),
)


def compare(op, reference, inputs, **options):
    """Results and gradients against the reference in fp64. fp32 may lose what dividing by a row's spread, twice, makes of it."""
    leaves = [t for t in inputs.values() if t is not None]
    truth = {k: None if t is None else t.detach().double().requires_grad_() for k, t in inputs.items()}
    got, want = op(**inputs), reference(**truth, **options)
    got, want = ([out] if isinstance(out, torch.Tensor) else list(out) for out in (got, want))
    upstream = [torch.randn_like(w).to(g.dtype) for g, w in zip(got, want, strict=True)]
    ours = torch.autograd.grad(got, leaves, upstream)
    theirs = torch.autograd.grad(want, [t for t in truth.values() if t is not None], [u.double() for u in upstream])
    tolerance = 1e-7
    if leaves[0].dtype is F32:
        normed = want[0] if len(want) == 2 else truth["x"]
        tolerance = 5e-6 * (1 + float((normed.detach().var(-1, correction=0) + 1e-5).rsqrt().max())) ** 2
    for a, b in zip([*got, *ours], [*want, *theirs], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@every
@settings(max_examples=40, deadline=None)
@shapes
def test_norm_matches_fp64(backend, batch, length, width, shared, weight):
    t = tensors(batch, length, width, shared, WIDE[backend], weight)
    inputs = {"x": t["residual"], "shift": t["shift"], "scale": t["scale"], "weight": t["weight"]}
    compare(lambda **t: adaptive_layer_norm(**t, backend=backend), adaptive_layer_norm_reference, inputs)


@every
@settings(max_examples=40, deadline=None)
@shapes
def test_chain_matches_fp64(backend, batch, length, width, shared, weight):
    inputs = tensors(batch, length, width, shared, WIDE[backend], weight)
    compare(lambda **t: gated_residual_norm(**t, backend=backend), gated_residual_norm_reference, inputs)


@every
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("unused", [0, 1])
def test_chain_with_one_output_unused(backend, unused, shared, poisoned):
    inputs = tensors(2, 5, 8, shared, WIDE[backend])
    truth = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    got = gated_residual_norm(**inputs, backend=backend)[1 - unused]
    want = gated_residual_norm_reference(**truth)[1 - unused]
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, list(inputs.values()), upstream, allow_unused=True)
    theirs = torch.autograd.grad(want, list(truth.values()), upstream.double(), allow_unused=True)
    tolerance = 1e-8 if WIDE[backend] is F64 else 2e-4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), torch.zeros_like(a).double() if b is None else b, rtol=tolerance, atol=tolerance)


@every
def test_dropout_is_a_function_of_the_sample_and_is_undone_in_backward(backend):
    inputs = tensors(3, 11, 10, shared=False, dtype=WIDE[backend])
    ids = torch.tensor([4, 9, 2])
    options = {"dropout": 0.25, "seed": 7, "step": 3, "layer": 5, "backend": backend}
    keep = dropout_scale(inputs["branch"].shape, 0.25, torch.tensor(7), torch.tensor(3), ids, 5).double()
    compare(lambda **t: gated_residual_norm(**t, sample_ids=ids, **options), gated_residual_norm_reference, inputs, keep=keep)
    shuffled = torch.tensor([2, 0, 1])
    moved = {k: t[shuffled] if k != "weight" else t for k, t in inputs.items()}
    whole, part = (
        gated_residual_norm(**inputs, sample_ids=ids, **options)[0],
        gated_residual_norm(**moved, sample_ids=ids[shuffled], **options)[0],
    )
    assert torch.equal(whole[shuffled], part)


@cpp
@pytest.mark.parametrize("dropout", [1e-12, 0.1, 0.5, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("width", [1, 64, 67, 1002])
def test_dropout_is_the_specification_s_bit_for_bit(backend, dropout, width):
    ids = torch.tensor([2**33, 2**62 // (5 * 251), -4])  # 5 rows of 251 counters a sample: indices pass 2^32 and 2^62
    branch = torch.ones(3, 5, width).requires_grad_()
    want = dropout_scale(branch.shape, dropout, torch.tensor(-3), torch.tensor(2**32 - 1), ids, 9)
    row = torch.ones(1, width)
    total, _ = gated_residual_norm(
        torch.zeros_like(branch), branch, row, row, row, dropout=dropout, seed=-3, step=2**32 - 1, sample_ids=ids, layer=9,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(total.detach(), want)
    assert torch.equal(torch.autograd.grad(total, branch, torch.ones_like(total))[0], want)


def test_dropout_drops_its_share_and_differs_between_layers_and_steps():
    ids, shape = torch.arange(16), torch.Size((16, 64, 48))
    base = dropout_scale(shape, 0.1, torch.tensor(1), torch.tensor(1), ids, 0)
    count = base.numel()
    assert abs(float((base == 0).double().mean()) - 0.1) < 5 * (0.09 / count) ** 0.5
    assert base.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    for other in (
        dropout_scale(shape, 0.1, torch.tensor(1), torch.tensor(1), ids, 1),
        dropout_scale(shape, 0.1, torch.tensor(1), torch.tensor(2), ids, 0),
    ):
        both = float(((base == 0) & (other == 0)).double().mean())
        assert abs(both - 0.01) < 5 * (0.01 / count) ** 0.5


def rmse(a, b):
    return float((a.detach().double() - b.detach().double()).pow(2).mean().sqrt())


@every
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("stream", "conditioning", "width"),
    [(F32, F32, 96), (BF16, F32, 96), (F32, BF16, 131), (BF16, BF16, 131)],
    ids=str,
)
def test_bf16_errs_no_more_than_pytorchs_own(backend, shared, stream, conditioning, width, poisoned):
    kinds = {"residual": stream, "branch": BF16, "weight": F32}
    low = {k: t.detach().to(kinds.get(k, conditioning)) for k, t in tensors(3, 65, width, shared, F32).items()}
    low["residual"] = low["residual"] + 3.0  # statistics must survive a mean
    sets = []
    for kind in ("ours", "peer", "truth"):
        copy = {k: t.detach().to(F64 if kind == "truth" else t.dtype).requires_grad_() for k, t in low.items()}
        if kind == "ours":
            with torch.autocast("cpu", BF16):
                out = gated_residual_norm(**copy, backend=backend)
        elif kind == "peer":  # what a PyTorch model with this stream does: the sum is rounded, then normalised in fp32
            total = (copy["residual"] + copy["gate"][:, None] * copy["branch"]).to(stream)
            modulation = copy["shift"].float(), copy["scale"].float(), copy["weight"]
            out = (total, adaptive_layer_norm_reference(total.float(), *modulation).bfloat16())
        else:
            out = gated_residual_norm_reference(**copy)
        sets.append((copy, out))
    upstream = [torch.randn(3, 65, width).bfloat16() for _ in range(2)]
    grads = [
        torch.autograd.grad(out, list(copy.values()), [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])
        for copy, out in sets
    ]
    assert sets[0][1][0].dtype is stream and sets[0][1][1].dtype is BF16
    for values in (list(zip(*(s[1] for s in sets), strict=True)), list(zip(*grads, strict=True))):
        for ours, peer, truth in values:
            assert rmse(ours, truth) <= 1.5 * rmse(peer, truth) + 1e-6


@cpp
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 2048, 5003])
@pytest.mark.parametrize("stream", [F32, BF16], ids=str)
def test_every_width_and_no_byte_beside_it(backend, width, stream, poisoned):
    """Inputs lie between numbers that would show: rows of conditioning apart, and streams at an odd address."""
    batch, length = 2, 19
    kinds = {"residual": stream, "branch": BF16 if stream is F32 else F32}

    def among(k, t):
        rows = torch.full((t.shape[0], width + 7), torch.inf)[:, 2:-5] if k in ("gate", "shift", "scale") else None
        memory = torch.full((t.numel() + 8,), torch.inf, dtype=kinds.get(k, F32))[3:-5].view(t.shape) if rows is None else rows
        return memory.copy_(t.detach()).requires_grad_()

    inputs = {k: among(k, t) for k, t in tensors(batch, length, width, shared=False, dtype=F32).items()}
    truth = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    random = {"seed": 11, "step": 5, "layer": 2}
    ids = torch.tensor([3, 2**40])
    keep = dropout_scale(inputs["branch"].shape, 0.3, torch.tensor(11), torch.tensor(5), ids, 2)
    want = gated_residual_norm_reference(**truth, keep=keep.double())
    upstream = [torch.randn(t.shape).to(t) for t in (inputs["residual"], inputs["residual"])]
    exact = [*want, *torch.autograd.grad(want, list(truth.values()), [u.double() for u in upstream])]
    found = []
    for name in (backend, "torch"):
        got = gated_residual_norm(**inputs, dropout=0.3, sample_ids=ids, backend=name, **random)
        found.append([*got, *torch.autograd.grad(got, list(inputs.values()), upstream)])
    for ours, peer, c in zip(*found, exact, strict=True):
        # One column has no spread: what cancels there was multiplied by 1 / sqrt(eps).
        floor = 1e-6 * rmse(c, torch.zeros_like(c)) + (3e-4 if width == 1 else 1e-6)
        assert rmse(ours, c) <= 1.5 * rmse(peer, c) + floor


@every
@pytest.mark.parametrize("shared", [False, True])
def test_two_runs_are_the_same_bits_and_samples_do_not_meet(backend, shared, poisoned):
    inputs = tensors(4, 33, 48, shared, dtype=F32)
    with torch.no_grad():
        inputs["residual"][1, 4, 7] = torch.nan
    leaves = list(inputs.values())
    runs = []
    for _ in range(2):
        out = gated_residual_norm(**inputs, dropout=0.1, sample_ids=torch.arange(4), backend=backend)
        runs.append((*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        if a.dim() > 1 and len(a) == 4:
            assert a[[0, 2, 3]].isfinite().all()


@cpp
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(3, 301, 96), (1, 40, 3000), (67, 2, 640)], ids=str)
def test_the_number_of_threads_changes_no_bit(backend, shared, shape):
    inputs = tensors(*shape, shared, dtype=F32)
    upstream = [torch.randn(shape) for _ in range(2)]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = gated_residual_norm(**inputs, dropout=0.1, sample_ids=torch.arange(shape[0]), backend=backend)
            y = adaptive_layer_norm(inputs["residual"], inputs["shift"], inputs["scale"], backend=backend)
            runs.append((*out, y, *torch.autograd.grad([*out, y], list(inputs.values()), [*upstream, upstream[0]])))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@every
def test_opcheck(backend):
    t = tensors(2, 3, 8, shared=False, dtype=F32)
    args = (t["residual"], t["shift"], t["scale"], t["weight"], 1e-5, F32, backend)
    torch.library.opcheck(torch.ops.atat_fast.adaptive_layer_norm.default, args)
    one = {k: v.detach()[:1].requires_grad_() if k in ("gate", "shift", "scale") else v for k, v in t.items()}
    for c, random in ((t, (0.2, torch.tensor(1), torch.tensor(2), torch.arange(2))), (one, (0.0, None, None, None))):
        inputs = tuple(c[k] for k in ("residual", "branch", "gate", "shift", "scale", "weight"))
        torch.library.opcheck(torch.ops.atat_fast.gated_residual_norm.default, (*inputs, *random, 3, 1e-5, BF16, backend))


@every
@pytest.mark.parametrize("weight", [False, True])
def test_opcheck_of_the_backwards(backend, weight):
    t = {k: v if v is None else v.detach() for k, v in tensors(2, 3, 8, shared=False, dtype=F32, weight=weight).items()}
    statistics = torch.randn(2, 3, 1), torch.rand(2, 3, 1) + 0.5
    common = (t["scale"].bfloat16(), t["weight"], *statistics)
    norm = (t["branch"], t["residual"], *common, F32, backend)
    torch.library.opcheck(torch.ops.atat_fast.adaptive_layer_norm_backward.default, norm)
    for upstream in ((t["branch"], None), (None, t["branch"])):
        gated = (*upstream, t["residual"], t["branch"], t["gate"], *common, 0.0, None, None, None, 0, BF16, backend)
        torch.library.opcheck(torch.ops.atat_fast.gated_residual_norm_backward.default, gated)


@every
def test_gradients_have_the_dtypes_of_their_inputs(backend):
    t = tensors(2, 3, 8, shared=False, dtype=torch.float32)
    kinds = dict(
        zip(t, (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16), strict=True)
    )
    leaves = {k: v.detach().to(kinds[k]).requires_grad_() for k, v in t.items()}
    total, y = gated_residual_norm(**leaves, backend=backend)
    assert total.dtype is y.dtype is torch.bfloat16
    (total.sum() + y.sum()).backward()
    assert all(v.grad.dtype is kinds[k] for k, v in leaves.items())


@every
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_whole(backend, dropout):
    def f(inputs, ids, step):
        total, y = gated_residual_norm(**inputs, dropout=dropout, seed=1, step=step, sample_ids=ids, backend=backend)
        return total + adaptive_layer_norm(y, inputs["shift"], inputs["scale"], backend=backend)

    inputs = tensors(2, 5, 8, shared=False, dtype=torch.float32)
    arguments = (inputs, torch.arange(2), torch.tensor(4))
    want, got = f(*arguments), torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(want, got)
    upstream = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, list(inputs.values()), upstream) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


@every
def test_streams_that_are_not_contiguous_and_conditioning_in_parts_of_one_projection(backend):
    inputs = tensors(2, 5, 8, shared=False, dtype=F32)
    parts = dict(zip(("gate", "shift", "scale"), torch.randn(2, 48).chunk(6, dim=1)[1:4], strict=True))
    found = []
    for apart in (False, True):
        streams = {k: inputs[k].detach() for k in ("residual", "branch")}
        streams = {k: t.mT.contiguous().mT if apart else t for k, t in streams.items()}
        conditioning = {k: t if apart else t.clone() for k, t in parts.items()}
        t = {k: v.requires_grad_() for k, v in (inputs | streams | conditioning).items()}
        total, y = gated_residual_norm(**t, backend=backend)
        assert total.is_contiguous() and y.is_contiguous()
        grads = torch.autograd.grad([total.sum(), y.sum()], list(t.values()))  # upstream gradients are expanded
        found.append([total, y, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_to_normalise(backend, batch, length, shared, poisoned):
    inputs = tensors(batch, length, 8, shared, dtype=F32)
    total, y = gated_residual_norm(**inputs, backend=backend)
    assert total.shape == y.shape == (batch, length, 8)
    for k, grad in zip(inputs, torch.autograd.grad(y.sum() + total.sum(), list(inputs.values())), strict=True):
        assert grad.shape == inputs[k].shape and not grad.any()


@every
def test_eager_calls_that_go_past_the_dispatcher_give_what_the_op_gives(backend):
    t = tensors(2, 5, 8, shared=False, dtype=F32)
    random = (0.2, torch.tensor(1), torch.tensor(2), torch.arange(2))
    through = torch.ops.atat_fast.gated_residual_norm(*t.values(), *random, 3, 1e-5, F32, backend)[:2]
    options = dict(zip(("dropout", "seed", "step", "sample_ids"), random, strict=True))
    past = gated_residual_norm(**t, **options, layer=3, backend=backend)
    upstream = [torch.randn_like(o) for o in past]
    found = [(*out, *torch.autograd.grad(out, list(t.values()), upstream)) for out in (through, past)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert not any(o.requires_grad for o in gated_residual_norm(**t, backend=backend))
    assert not any(o.requires_grad for o in gated_residual_norm(**{k: v.detach() for k, v in t.items()}, backend=backend))


@every
def test_who_looks_on_sees_the_op(backend):
    t = {k: v.detach() for k, v in tensors(2, 5, 8, shared=False, dtype=F32).items()}
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        gated_residual_norm(**t, backend=backend)
    assert seen == ["atat_fast.gated_residual_norm.default"]
    inputs = {k: v.requires_grad_() for k, v in t.items()}
    f = lambda: sum(o.sum() for o in gated_residual_norm(**inputs, backend=backend))  # noqa: E731
    want = torch.autograd.grad(f(), list(inputs.values()))
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, use_reentrant=False), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": torch.zeros(3, 8)}, r"shift must be \[2, 8\] or \[1, 8\]"),
        ({"scale": torch.zeros(1, 8)}, "conditioning must have one number of rows, 1 or 2"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \(8,\)"),
        ({"residual": torch.zeros(2, 8)}, "must be \\[batch, length, width\\]"),
        ({"branch": torch.zeros(2, 3, 7)}, "branch must have residual's shape"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": 0.5}, "dropout needs sample_ids"),
        ({"dropout": 0.5, "sample_ids": torch.arange(3)}, r"sample_ids must be int64 of 2 number\(s\), got shape \(3,\)"),
        ({"dropout": 0.5, "sample_ids": torch.arange(2), "step": torch.zeros(())}, "step must be int64"),
        ({"gate": torch.zeros(2, 8, device="meta")}, "gate is on meta and residual on cpu; move one of them"),
        ({"branch": torch.zeros(2, 3, 8).half()}, "branch is fp16, whose range a residual stream leaves; use bf16 or fp32"),
        ({"backend": "cpp", "weight": torch.zeros(8).double()}, "cannot use backend 'cpp' here"),
        ({"backend": "tritn"}, r"has no backend 'tritn' \(did you mean triton"),
        (
            {"backend": "triton", "shift": torch.zeros(2, 8).double()},
            "the kernels take tensors of fp32 and bf16; what can run is",
        ),
    ],
)
def test_bad_input(change, message):
    inputs = tensors(2, 3, 8, shared=False, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        gated_residual_norm(**inputs)


def test_autocast_to_fp16_is_refused():
    inputs = tensors(2, 3, 8, shared=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="autocast asks for fp16"):
        gated_residual_norm(**inputs)


def test_what_a_kernel_cannot_take_runs_elsewhere():
    x, c = torch.randn(1, 2, WIDEST + 8), torch.randn(1, WIDEST + 8)
    torch.testing.assert_close(adaptive_layer_norm(x, c, c), adaptive_layer_norm_reference(x, c, c))
    empty = torch.zeros(2, 3, 0), torch.zeros(1, 0), torch.zeros(1, 0)
    assert adaptive_layer_norm(*empty).shape == (2, 3, 0)
    with pytest.raises(ValueError, match="cannot use backend 'cpp' here"):
        adaptive_layer_norm(*empty, backend="cpp")
    with pytest.raises(ValueError, match="rows are wider than 4,096"):
        adaptive_layer_norm(x, c, c, backend="triton")


def test_costs_count_every_tensor_once():
    rows, width = 32_768, 768
    for residual, forward, backward in ((2, 4, 6), (4, 6, 10)):
        assert adaptive_layer_norm_cost(rows, width, residual_bytes=residual).bytes == rows * width * forward
        assert adaptive_layer_norm_cost(rows, width, residual_bytes=residual, backward=True).bytes == rows * width * backward
    for residual, forward, backward in ((2, 8, 12), (4, 12, 18)):
        assert gated_residual_norm_cost(rows, width, residual_bytes=residual).bytes == rows * width * forward
        assert gated_residual_norm_cost(rows, width, residual_bytes=residual, backward=True).bytes == rows * width * backward
    assert gated_residual_norm_cost(rows, width, backward=True).flops > gated_residual_norm_cost(rows, width).flops
