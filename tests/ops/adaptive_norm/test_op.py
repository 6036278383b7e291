"""adaptive_layer_norm and gated_residual_norm against their specifications in fp64, and against PyTorch's own error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    BF16,
    F32,
    F64,
    assert_no_worse,
    backends,
    bits_of,
    compiled_whole,
    for_gpu,
    gradients,
    interprets,
    leaves,
    results,
    same,
)

from atat_fast.ops import (
    adaptive_layer_norm,
    adaptive_layer_norm_cost,
    adaptive_layer_norm_reference,
    gated_residual_norm,
    gated_residual_norm_cost,
    gated_residual_norm_reference,
)
from atat_fast.ops.adaptive_norm import WIDEST, dropout_scale

every = backends("gated_residual_norm")
on_cpu = backends("gated_residual_norm", gpu=False)
quick = backends("gated_residual_norm", gpu=False, quick=True)
kernels = backends("gated_residual_norm", without="torch")
cpp = backends("gated_residual_norm", without="torch", gpu=False, quick=True)
shares = pytest.mark.parametrize("shared", [False, True])
WIDE = {"torch": F64, "cpp": F32, "triton": F32}
"""The widest dtype a backend takes."""


def example(batch, length, width, *, shared=False, stream=F32, branch=F32, conditioning=F32, weight=True):
    rows = 1 if shared else batch
    wide = F64 if stream is F64 else F32
    return {
        "residual": torch.randn(batch, length, width, dtype=wide).to(stream),
        "branch": torch.randn(batch, length, width, dtype=wide).to(branch),
        **{k: torch.randn(rows, width, dtype=wide).to(conditioning) for k in ("gate", "shift", "scale")},
        "weight": torch.randn(width, dtype=wide) if weight else None,
    }


def inputs_of(*shape, dtype=F32, **options):
    return leaves(example(*shape, stream=dtype, branch=dtype, conditioning=dtype, **options))


def of_norm(inputs):
    return {"x": inputs["residual"], **{k: inputs[k] for k in ("shift", "scale", "weight")}}


@quick
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.sampled_from([1, 2, 7, 31]),
    width=st.sampled_from([2, 5, 16, 67]),
    shared=st.booleans(),
    weight=st.booleans(),
    gated=st.booleans(),
)
def test_results_and_gradients_match_fp64(backend, device, batch, length, width, shared, weight, gated):
    """fp32 may lose what dividing by a row's spread, twice, makes of it."""
    inputs = inputs_of(batch, length, width, shared=shared, dtype=WIDE[backend], weight=weight)
    if gated:
        op, reference = gated_residual_norm, gated_residual_norm_reference
    else:
        inputs, op, reference = leaves(of_norm(inputs)), adaptive_layer_norm, adaptive_layer_norm_reference
    truth = leaves(inputs, dtype=F64)
    got, want = op(**inputs, backend=backend), reference(**truth)
    upstream = [torch.randn(batch, length, width).to(WIDE[backend]) for _ in range(1 + gated)]
    tolerance = 1e-7
    if WIDE[backend] is F32:
        normed = want[0] if gated else truth["x"]
        tolerance = 5e-6 * (1 + float((normed.detach().var(-1, correction=0) + 1e-5).rsqrt().max())) ** 2
    ours, theirs = results(got, inputs, upstream), results(want, truth, upstream)
    for name, exact in theirs.items():
        torch.testing.assert_close(ours[name].double(), exact, rtol=tolerance, atol=tolerance)


RANDOM = {"seed": 2**40 + 9, "step": 77, "layer": 3}


def sample_ids(batch):
    return torch.arange(batch) * 1_000_003 + 2**33


def check(backend, device, inputs, out, *, dropout=0.0, unused=()):
    """The op beside plain PyTorch in the same dtypes, both against fp64; without a gate it is adaptive_layer_norm.

    With a bf16 `out` autocast to bf16 is on, as in training. An output that is `unused` gets no gradient.
    """
    gated, names = "gate" in inputs, list(inputs)
    inputs[names[0]] = inputs[names[0]] + 3.0  # statistics must survive a mean
    shape, stream = inputs[names[0]].shape, inputs[names[0]].dtype
    kinds, wide = (stream, out) if gated else (out,), F64 if stream is F64 else F32
    ids, random = sample_ids(shape[0]), [torch.tensor(RANDOM[name]) for name in ("seed", "step")]
    keep = dropout_scale(shape, dropout, *random, ids, RANDOM["layer"]) if dropout else torch.ones(shape)
    upstream = [None if i in unused else torch.randn(shape).to(kind) for i, kind in enumerate(kinds)]
    ours, peer, truth = leaves(inputs, device), leaves(inputs), leaves(inputs, dtype=F64)
    op = gated_residual_norm if gated else adaptive_layer_norm
    with torch.autocast(torch.device(device).type, BF16, enabled=out is BF16):
        got = op(**ours, **({"dropout": dropout, "sample_ids": ids.to(device), **RANDOM} if gated else {}), backend=backend)
    assert tuple(o.dtype for o in (got if gated else (got,))) == kinds
    total = peer[names[0]]
    if gated:
        total = (total + peer["gate"][:, None] * (peer["branch"] * keep.to(peer["branch"]))).to(stream)
    modulation = [peer[k].to(wide) for k in ("shift", "scale")]
    y = adaptive_layer_norm_reference(total.to(wide), *modulation, peer["weight"]).to(out)
    exact = gated_residual_norm_reference(**truth, keep=keep.double()) if gated else adaptive_layer_norm_reference(**truth)
    found = results(got, ours, upstream)
    plain = results((total, y) if gated else y, peer, upstream)
    least = (
        3e-4 if shape[2] == 1 and backend != "triton" else 0.0
    )  # what cancels without a spread was multiplied by 1 / sqrt(eps)
    assert_no_worse(found, plain, results(exact, truth, upstream), floor=1e-10 if stream is F64 else 6e-7, least=least)


LOW = {"stream": BF16, "branch": BF16}
CHAINS = [
    ((2, 7, 256), {}, 0.0),
    ((1, 5, 768), {"branch": BF16, "shared": True}, 0.0),
    ((2, 3, 768), LOW, 0.1),
    ((2, 3, 1000), {"branch": BF16, "conditioning": BF16, "weight": False}, 0.0),
    ((2, 3, 1003), {"shared": True}, 0.1),
    ((1, 2, 4096), LOW | {"conditioning": BF16}, 0.0),
    ((1, 1, 4096), {"branch": BF16}, 0.1),
    ((2, 11, 67), {"stream": BF16}, 0.5),
    ((3, 2, 1), {"shared": True, "weight": False}, 0.0),
    ((37, 1, 256), {"shared": True, "branch": BF16}, 0.3),
    ((19, 1, 96), {"shared": True}, 0.0),
    pytest.param((3, 11, 64), LOW | {"shared": True}, 0.2, id="tiny"),
    pytest.param((2, 11, 64), {}, 0.2, id="tiny-fp32"),
    *(((3, 65, 131), options | {"branch": BF16, "shared": shared}, 0.0) for shared in (False, True)
      for options in ({}, {"stream": BF16}, {"conditioning": BF16}, {"stream": BF16, "conditioning": BF16})),
    *(for_gpu(shape, options | {"shared": shared}, 0.1) for shape in ((4, 1024, 768), (3, 509, 328))
      for options in ({}, LOW) for shared in (False, True)),
    *(for_gpu((batch, length, width), {"shared": width > 1100, "stream": stream, "branch": BF16}, 0.1, slow=True)
      for width, batch, length in ((256, 300, 7), (768, 8, 1024), (1000, 5, 997), (1024, 1, 1), (1536, 8, 1024), (2048, 300, 7),
                                   (3072, 5, 997), (4096, 8, 1024)) for stream in (F32, BF16)),
]  # fmt: skip


@every
@pytest.mark.parametrize(("shape", "options", "dropout"), CHAINS, ids=str)
def test_chain_and_gradients_against_fp64(poisoned, backend, device, shape, options, dropout):
    if interprets(backend, device) and (shape[1] == 65 or shape in ((1, 2, 4096), (2, 3, 1000))):
        pytest.skip("the interpreter takes long for so many rows or columns; other shapes have the dtypes and the tiles too")
    inputs = example(*shape, **options)
    check(backend, device, inputs, BF16 if inputs["branch"].dtype is BF16 else inputs["residual"].dtype, dropout=dropout)


@every
@pytest.mark.parametrize(
    ("shape", "shared", "stream", "out"),
    [
        ((1, 7, 384), False, F32, F32),
        ((3, 7, 384), False, F32, BF16),
        ((3, 7, 384), True, BF16, BF16),
        ((1, 7, 384), True, F32, BF16),
        ((3, 7, 384), True, F32, F32),
        ((3, 7, 384), False, BF16, BF16),
        pytest.param((3, 11, 64), True, BF16, BF16, id="tiny"),
        *(
            for_gpu(shape, shared, dtype, dtype)
            for shape in ((4, 1024, 768), (3, 509, 328))
            for shared in (False, True)
            for dtype in (F32, BF16)
        ),
    ],
    ids=str,
)
def test_norm_and_gradients_against_fp64(poisoned, backend, device, shape, shared, stream, out):
    check(backend, device, of_norm(example(*shape, shared=shared, stream=stream)), out)


@every
@pytest.mark.parametrize("unused", [0, 1])
@shares
def test_one_output_unused(poisoned, backend, device, unused, shared):
    for dtype in (BF16,) if interprets(backend, device) else (WIDE[backend], BF16):
        inputs = example(2, 5, 200, stream=dtype, branch=dtype, shared=shared, conditioning=F64 if dtype is F64 else F32)
        check(backend, device, inputs, dtype, dropout=0.2, unused=(unused,))


@quick
def test_dropout_is_a_function_of_the_sample(backend, device):
    inputs, ids = inputs_of(3, 11, 10, dtype=WIDE[backend]), torch.tensor([4, 9, 2])
    options = {"dropout": 0.25, "seed": 7, "step": 3, "layer": 5, "backend": backend}
    shuffled = torch.tensor([2, 0, 1])
    moved = {k: t[shuffled] if k != "weight" else t for k, t in inputs.items()}
    whole = gated_residual_norm(**inputs, sample_ids=ids, **options)[0]
    assert torch.equal(whole[shuffled], gated_residual_norm(**moved, sample_ids=ids[shuffled], **options)[0])


@kernels
@pytest.mark.parametrize(
    ("width", "dropout"),
    [(1, 0.5), (64, 1e-12), (64, 0.999), (67, 1e-12), (67, 0.1), (67, 1 - 1e-12), pytest.param(1002, 0.5, id="tiny")],
)
def test_dropout_is_the_specification_s_bit_for_bit_and_is_undone_in_backward(backend, device, dropout, width):
    ids = torch.tensor([2**33, 2**62 // (5 * 251), -4])  # 5 rows of 251 counters a sample: indices pass 2^32 and 2^62
    branch = torch.ones(3, 5, width)
    want = dropout_scale(branch.shape, dropout, torch.tensor(-3), torch.tensor(2**32 - 1), ids, 9)
    branch, row = branch.to(device).requires_grad_(), torch.ones(1, width, device=device)
    random = {"seed": -3, "step": 2**32 - 1, "sample_ids": ids.to(device), "layer": 9}
    total, _ = gated_residual_norm(torch.zeros_like(branch), branch, row, row, row, dropout=dropout, **random, backend=backend)
    assert torch.equal(total.detach().cpu(), want)
    assert torch.equal(torch.autograd.grad(total, branch, torch.ones_like(total))[0].cpu(), want)


def test_dropout_drops_its_share_and_differs_between_layers_and_steps():
    ids, shape = torch.arange(16), torch.Size((16, 64, 48))
    draw = lambda step, layer: dropout_scale(shape, 0.1, torch.tensor(1), torch.tensor(step), ids, layer)  # noqa: E731
    base = draw(1, 0)
    count = base.numel()
    assert abs(float((base == 0).double().mean()) - 0.1) < 5 * (0.09 / count) ** 0.5
    assert base.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    for other in (draw(1, 1), draw(2, 0)):
        both = float(((base == 0) & (other == 0)).double().mean())
        assert abs(both - 0.01) < 5 * (0.01 / count) ** 0.5


@cpp
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 64, 65, 127, 1000, 2048, 5003])
@pytest.mark.parametrize("stream", [F32, BF16], ids=str)
def test_every_width_and_no_byte_beside_it(poisoned, backend, device, width, stream):
    """Inputs lie between numbers that would show: rows of conditioning apart, and streams at an odd address."""
    kinds = {"residual": stream, "branch": BF16 if stream is F32 else F32}

    def among(k, t):
        rows = torch.full((t.shape[0], width + 7), torch.inf)[:, 2:-5] if k in ("gate", "shift", "scale") else None
        memory = torch.full((t.numel() + 8,), torch.inf, dtype=kinds.get(k, F32))[3:-5].view(t.shape) if rows is None else rows
        return memory.copy_(t).requires_grad_()

    inputs = {k: among(k, t) for k, t in example(2, 19, width).items()}
    truth, ids = leaves(inputs, dtype=F64), torch.tensor([3, 2**40])
    keep = dropout_scale(inputs["branch"].shape, 0.3, torch.tensor(11), torch.tensor(5), ids, 2)
    upstream = [torch.randn(2, 19, width).to(stream) for _ in range(2)]
    exact = results(gated_residual_norm_reference(**truth, keep=keep.double()), truth, upstream)
    random = {"dropout": 0.3, "sample_ids": ids, "seed": 11, "step": 5, "layer": 2}
    ours, plain = (
        results(gated_residual_norm(**inputs, **random, backend=name), inputs, upstream) for name in (backend, "torch")
    )
    # One column has no spread: what cancels there was multiplied by 1 / sqrt(eps).
    assert_no_worse(ours, plain, exact, floor=1e-6, least=3e-4 if width == 1 else 1e-6)


@every
@shares
def test_two_runs_are_the_same_bits_and_samples_do_not_meet(poisoned, backend, device, shared):
    inputs = example(4, 5 if interprets(backend, device) else 33, 48, shared=shared)
    inputs["residual"][1, 4, 7] = torch.nan
    inputs, ids, runs = leaves(inputs, device), sample_ids(4).to(device), []
    for _ in range(2):
        out = gated_residual_norm(**inputs, dropout=0.1, sample_ids=ids, backend=backend)
        runs.append([*out, *gradients(sum(o.sum() for o in out), inputs)])
    assert same(*runs)
    assert all(t[[0, 2, 3]].isfinite().all() for t in runs[0] if t.dim() > 1 and len(t) == 4)


@cpp
@shares
@pytest.mark.parametrize("shape", [(3, 301, 96), (1, 40, 3000), (67, 2, 640)], ids=str)
def test_the_number_of_threads_changes_no_bit(backend, device, shared, shape):
    inputs, upstream = inputs_of(*shape, shared=shared), [torch.randn(shape) for _ in range(2)]

    def call():
        out = gated_residual_norm(**inputs, dropout=0.1, sample_ids=torch.arange(shape[0]), backend=backend)
        y = adaptive_layer_norm(inputs["residual"], inputs["shift"], inputs["scale"], backend=backend)
        return list(results((*out, y), inputs, [*upstream, upstream[0]]).values())

    one, *others = bits_of(call, (1, 2, 3))
    assert all(same(one, other) for other in others)


@on_cpu
@pytest.mark.parametrize("weight", [False, True])
def test_opcheck(backend, device, weight):
    t, ops = inputs_of(2, 3, 8, weight=weight), torch.ops.atat_fast
    random = (0.2, torch.tensor(1), torch.tensor(2), torch.arange(2))
    if interprets(backend, device):
        quick_ones = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = (*t.values(), *random, 3, 1e-5, BF16, backend)
        torch.library.opcheck(ops.gated_residual_norm.default, arguments, test_utils=quick_ones)
        return
    norm = (t["residual"], t["shift"], t["scale"], t["weight"], 1e-5, F32, backend)
    torch.library.opcheck(ops.adaptive_layer_norm.default, norm)
    if not weight:  # and one row of conditioning, without dropout
        t, random = inputs_of(2, 3, 8, shared=True), (0.0, None, None, None)
    torch.library.opcheck(ops.gated_residual_norm.default, (*t.values(), *random, 3, 1e-5, BF16, backend))

    t = {k: v if v is None else v.detach() for k, v in inputs_of(2, 3, 8, weight=weight).items()}
    common = (t["scale"].bfloat16(), t["weight"], torch.randn(2, 3, 1), torch.rand(2, 3, 1) + 0.5)
    backward = (t["branch"], t["residual"], *common, F32, backend)
    torch.library.opcheck(ops.adaptive_layer_norm_backward.default, backward)
    for upstream in ((t["branch"], None), (None, t["branch"])):
        backward = (*upstream, t["residual"], t["branch"], t["gate"], *common, 0.0, None, None, None, 0, BF16, backend)
        torch.library.opcheck(ops.gated_residual_norm_backward.default, backward)


@on_cpu
def test_gradients_have_the_dtypes_of_their_inputs(backend, device):
    kinds = dict(zip(("residual", "branch", "gate", "shift", "scale", "weight"), (BF16, F32, BF16, F32, BF16, BF16), strict=True))
    inputs = leaves({k: t.to(kinds[k]) for k, t in example(2, 3, 8).items()})
    total, y = gated_residual_norm(**inputs, backend=backend)
    assert total.dtype is y.dtype is BF16
    assert [g.dtype for g in gradients(total.sum() + y.sum(), inputs)] == list(kinds.values())


@every
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_whole(backend, device, dropout):
    def f(inputs, ids, step):
        total, y = gated_residual_norm(**inputs, dropout=dropout, seed=1, step=step, sample_ids=ids, backend=backend)
        return total + adaptive_layer_norm(y, inputs["shift"], inputs["scale"], backend=backend)

    arguments = (leaves(example(2, 5, 8), device), torch.arange(2, device=device), torch.tensor(4, device=device))
    upstream = [torch.randn(2, 5, 8)]
    want, got = (results(g(*arguments), arguments[0], upstream) for g in (f, compiled_whole(f)))
    assert same(want.values(), got.values())


@every
def test_streams_that_are_not_contiguous_and_conditioning_in_parts_of_one_projection(backend, device):
    inputs = {k: t.to(device) for k, t in example(2, 5, 8).items()}
    parts = dict(zip(("gate", "shift", "scale"), torch.randn(2, 48, device=device).chunk(6, dim=1)[1:4], strict=True))
    found = []
    for apart in (False, True):
        streams = {k: inputs[k].mT.contiguous().mT if apart else inputs[k].clone() for k in ("residual", "branch")}
        conditioning = {k: t if apart else t.clone() for k, t in parts.items()}
        t = {k: v.detach().requires_grad_() for k, v in (inputs | streams | conditioning).items()}
        total, y = gated_residual_norm(**t, backend=backend)
        assert total.is_contiguous() and y.is_contiguous()
        found.append([total, y, *gradients(total.sum() + y.sum(), t)])  # upstream gradients are expanded
    assert same(*found)


@every
@shares
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_to_normalise(poisoned, backend, device, batch, length, shared):
    inputs = leaves(example(batch, length, 8, shared=shared), device)
    total, y = gated_residual_norm(**inputs, backend=backend)
    assert total.shape == y.shape == (batch, length, 8)
    for leaf, grad in zip(inputs.values(), gradients(y.sum() + total.sum(), inputs), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@quick
def test_eager_calls_that_go_past_the_dispatcher_give_what_the_op_gives(backend, device):
    t = inputs_of(2, 5, 8)
    random = (0.2, torch.tensor(1), torch.tensor(2), torch.arange(2))
    through = torch.ops.atat_fast.gated_residual_norm(*t.values(), *random, 3, 1e-5, F32, backend)[:2]
    options = dict(zip(("dropout", "seed", "step", "sample_ids"), random, strict=True))
    past = gated_residual_norm(**t, **options, layer=3, backend=backend)
    upstream = [torch.randn_like(o) for o in past]
    assert same(*(results(out, t, upstream).values() for out in (through, past)))
    with torch.no_grad():
        assert not any(o.requires_grad for o in gated_residual_norm(**t, backend=backend))
    assert not any(o.requires_grad for o in gated_residual_norm(**{k: v.detach() for k, v in t.items()}, backend=backend))


@quick
def test_who_looks_on_sees_the_op(backend, device):
    inputs, seen = inputs_of(2, 5, 8), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        gated_residual_norm(**inputs, backend=backend)
    assert seen == ["atat_fast.gated_residual_norm.default"]
    f = lambda: sum(o.sum() for o in gated_residual_norm(**inputs, backend=backend))  # noqa: E731
    assert same(gradients(torch.utils.checkpoint.checkpoint(f, use_reentrant=False), inputs), gradients(f(), inputs))


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
        ({"branch": torch.zeros(2, 3, 8).half()}, "branch is fp16, whose range a residual stream exceeds; use bf16 or fp32"),
        ({"backend": "cpp", "weight": torch.zeros(8).double()}, "cannot use backend 'cpp' here"),
        ({"backend": "tritn"}, r"has no backend 'tritn' \(did you mean triton"),
        ({"backend": "triton", "shift": torch.zeros(2, 8).double()}, "its kernels take fp32 and bf16 only; what can run is"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        gated_residual_norm(**inputs_of(2, 3, 8) | change)


def test_autocast_to_fp16_is_refused():
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="autocast asks for fp16"):
        gated_residual_norm(**inputs_of(2, 3, 8))


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
