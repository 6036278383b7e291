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
)
from atat_fast.ops.adaptive_norm import WIDEST, dropout_scale


def tensors(batch, length, width, shared, dtype=torch.float64, weight=True):
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


def compare(got, want, inputs, rtol=1e-9, atol=1e-9):
    leaves = [t for t in inputs.values() if t is not None]
    upstream = [torch.randn_like(w) for w in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    ours = torch.autograd.grad(got, leaves, upstream)
    theirs = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@settings(max_examples=40, deadline=None)
@shapes
def test_norm_matches_in_fp64(batch, length, width, shared, weight):
    t = tensors(batch, length, width, shared, weight=weight)
    inputs = {"x": t["residual"], "shift": t["shift"], "scale": t["scale"], "weight": t["weight"]}
    compare([adaptive_layer_norm(**inputs)], [adaptive_layer_norm_reference(**inputs)], inputs, 1e-7, 1e-7)


@settings(max_examples=40, deadline=None)
@shapes
def test_chain_matches_in_fp64(batch, length, width, shared, weight):
    inputs = tensors(batch, length, width, shared, weight=weight)
    compare(gated_residual_norm(**inputs), gated_residual_norm_reference(**inputs), inputs, 1e-7, 1e-7)


@pytest.mark.parametrize("unused", [0, 1])
def test_chain_with_one_output_unused(unused):
    inputs = tensors(2, 5, 8, shared=False)
    leaves = list(inputs.values())
    got = gated_residual_norm(**inputs)[1 - unused]
    want = gated_residual_norm_reference(**inputs)[1 - unused]
    upstream = torch.randn_like(want)
    ours = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(want, leaves, upstream, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-8)


def test_dropout_is_a_function_of_the_sample_and_is_undone_in_backward():
    inputs = tensors(3, 11, 10, shared=False)
    ids = torch.tensor([4, 9, 2])
    options = {"dropout": 0.25, "seed": 7, "step": 3, "layer": 5}
    keep = dropout_scale(inputs["branch"].shape, 0.25, torch.tensor(7), torch.tensor(3), ids, 5).double()
    compare(
        gated_residual_norm(**inputs, sample_ids=ids, **options),
        gated_residual_norm_reference(**inputs, keep=keep),
        inputs,
        1e-7,
        1e-7,
    )
    shuffled = torch.tensor([2, 0, 1])
    moved = {k: t[shuffled] if k != "weight" else t for k, t in inputs.items()}
    whole, part = (
        gated_residual_norm(**inputs, sample_ids=ids, **options)[0],
        gated_residual_norm(**moved, sample_ids=ids[shuffled], **options)[0],
    )
    assert torch.equal(whole[shuffled], part)


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


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_bf16_errs_no_more_than_pytorchs_own(shared, stream):
    low = tensors(3, 65, 96, shared, dtype=torch.float32)
    low = {
        k: t.detach().to(stream if k == "residual" else torch.bfloat16 if k == "branch" else torch.float32)
        for k, t in low.items()
    }
    low["residual"] = low["residual"] + 3.0  # statistics must survive a mean
    sets = []
    for kind in ("ours", "peer", "truth"):
        copy = {k: t.detach().to(torch.float64 if kind == "truth" else t.dtype).requires_grad_() for k, t in low.items()}
        if kind == "ours":
            with torch.autocast("cpu", torch.bfloat16):
                out = gated_residual_norm(**copy)
        elif kind == "peer":  # what a PyTorch model with this stream does: the sum is rounded, then normalised in fp32
            total = (copy["residual"] + copy["gate"][:, None] * copy["branch"]).to(stream)
            out = (total, adaptive_layer_norm_reference(total.float(), copy["shift"], copy["scale"], copy["weight"]).bfloat16())
        else:
            out = gated_residual_norm_reference(**copy)
        sets.append((copy, out))
    upstream = [torch.randn(3, 65, 96).bfloat16() for _ in range(2)]
    grads = [
        torch.autograd.grad(out, list(copy.values()), [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)])
        for copy, out in sets
    ]
    assert sets[0][1][0].dtype is stream and sets[0][1][1].dtype is torch.bfloat16
    for values in (list(zip(*(s[1] for s in sets), strict=True)), list(zip(*grads, strict=True))):
        for ours, peer, truth in values:
            assert rmse(ours, truth) <= 1.5 * rmse(peer, truth) + 1e-6


def test_two_runs_are_the_same_bits(poisoned):
    inputs = tensors(4, 33, 48, shared=False, dtype=torch.float32)
    leaves = list(inputs.values())
    runs = []
    for _ in range(2):
        out = gated_residual_norm(**inputs, dropout=0.1, sample_ids=torch.arange(4))
        runs.append((*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*runs, strict=True))


def test_opcheck():
    t = tensors(2, 3, 8, shared=False, dtype=torch.float32)
    args = (t["residual"], t["shift"], t["scale"], t["weight"], 1e-5, torch.float32, "torch")
    torch.library.opcheck(torch.ops.atat_fast.adaptive_layer_norm.default, args)
    one = {k: v.detach()[:1].requires_grad_() if k in ("gate", "shift", "scale") else v for k, v in t.items()}
    for c, random in ((t, (0.2, torch.tensor(1), torch.tensor(2), torch.arange(2))), (one, (0.0, None, None, None))):
        inputs = tuple(c[k] for k in ("residual", "branch", "gate", "shift", "scale", "weight"))
        torch.library.opcheck(
            torch.ops.atat_fast.gated_residual_norm.default, (*inputs, *random, 3, 1e-5, torch.bfloat16, "torch")
        )


def test_gradients_have_the_dtypes_of_their_inputs():
    t = tensors(2, 3, 8, shared=False, dtype=torch.float32)
    kinds = dict(
        zip(t, (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16), strict=True)
    )
    leaves = {k: v.detach().to(kinds[k]).requires_grad_() for k, v in t.items()}
    total, y = gated_residual_norm(**leaves)
    assert total.dtype is y.dtype is torch.bfloat16
    (total.sum() + y.sum()).backward()
    assert all(v.grad.dtype is kinds[k] for k, v in leaves.items())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_whole(dropout):
    def f(inputs, ids, step):
        total, y = gated_residual_norm(**inputs, dropout=dropout, seed=1, step=step, sample_ids=ids)
        return total + adaptive_layer_norm(y, inputs["shift"], inputs["scale"])

    inputs = tensors(2, 5, 8, shared=False, dtype=torch.float32)
    arguments = (inputs, torch.arange(2), torch.tensor(4))
    want, got = f(*arguments), torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(want, got)
    upstream = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, list(inputs.values()), upstream) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_streams_that_are_not_contiguous():
    inputs = tensors(2, 5, 8, shared=False, dtype=torch.float32)
    apart = {k: v.detach().mT.contiguous().mT.requires_grad_() if k in ("residual", "branch") else v for k, v in inputs.items()}
    for a, b in zip(gated_residual_norm(**inputs), gated_residual_norm(**apart), strict=True):
        assert b.is_contiguous() and torch.equal(a, b)


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_normalise(batch):
    inputs = tensors(batch, 0, 8, shared=False, dtype=torch.float32)
    total, y = gated_residual_norm(**inputs)
    assert total.shape == y.shape == (batch, 0, 8)
    for k, grad in zip(inputs, torch.autograd.grad(y.sum() + total.sum(), list(inputs.values())), strict=True):
        assert grad.shape == inputs[k].shape and not grad.any()


def test_second_derivatives_are_refused_in_a_sentence():
    t = tensors(1, 2, 4, shared=False)
    y = adaptive_layer_norm(t["residual"], t["shift"], t["scale"])
    (grad,) = torch.autograd.grad(y.pow(2).sum(), t["residual"], create_graph=True)
    with pytest.raises(RuntimeError, match="adaptive_layer_norm has no second derivative"):
        torch.autograd.grad(grad.sum(), t["scale"])


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


def test_rows_too_wide_for_registers_run_on_pytorch():
    x, c = torch.randn(1, 2, WIDEST + 8), torch.randn(1, WIDEST + 8)
    torch.testing.assert_close(adaptive_layer_norm(x, c, c), adaptive_layer_norm_reference(x, c, c))
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
