"""The Triton kernels of adaptive_layer_norm and gated_residual_norm: in the interpreter, and on a GPU where there is one.

`pytest -m slow tests/ops/test_interpreted.py` runs this file with TRITON_INTERPRET=1, and `pytest -m gpu` runs it on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from atat_fast.ops import (
    adaptive_layer_norm,
    adaptive_layer_norm_reference,
    gated_residual_norm,
    gated_residual_norm_reference,
)
from atat_fast.ops.adaptive_norm import dropout_scale

pytest.importorskip("triton")
F32, BF16 = torch.float32, torch.bfloat16
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, as test_interpreted.py sets"
)
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_both = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=interpreted, id="triton-interpreter"),
        pytest.param("cuda", marks=[no_gpu, pytest.mark.gpu], id="triton-gpu"),
    ],
)


def example(batch, length, width, *, shared=False, stream=F32, branch=F32, conditioning=F32, weight=True):
    rows = 1 if shared else batch
    inputs = {
        "residual": (torch.randn(batch, length, width) + 3.0).to(stream),  # statistics must survive a mean
        "branch": torch.randn(batch, length, width).to(branch),
        "gate": torch.randn(rows, width).to(conditioning),
        "shift": torch.randn(rows, width).to(conditioning),
        "scale": torch.randn(rows, width).to(conditioning),
    }
    return inputs | ({"weight": torch.randn(width)} if weight else {})


def leaves(inputs, device="cpu", dtype=None):
    return {k: t.to(device=device, dtype=dtype or t.dtype).requires_grad_() for k, t in inputs.items()}


def rmse(a, b):
    return float((a.detach().cpu().double() - b.detach().double()).pow(2).mean().sqrt())


def compare(ours, peer, truth, ratio=1.5):
    """Each holds results, then gradients, by name; the error of ours is at most `ratio` times the peer's and fp32's rounding."""
    for name, exact in truth.items():
        assert ours[name].isfinite().all(), name
        floor = 6e-7 * rmse(exact, torch.zeros_like(exact))
        assert rmse(ours[name], exact) <= ratio * rmse(peer[name], exact) + floor, name


def results(outputs, inputs, upstream):
    """Outputs by number and gradients by name; an output whose upstream is None is not used."""
    used = [(o, u.to(device=o.device, dtype=o.dtype)) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    grads = torch.autograd.grad([o for o, _ in used], list(inputs.values()), [u for _, u in used], allow_unused=True)
    found = {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(inputs.items(), grads, strict=True)}
    return dict(enumerate(outputs)) | found


RANDOM = {"seed": 2**40 + 9, "step": 77, "layer": 3}


def sample_ids(batch):
    return torch.arange(batch) * 1_000_003 + 2**33


def three_ways(device, inputs, *, dropout=0.0, unused=()):
    """gated_residual_norm on the kernels, as plain PyTorch in the same dtypes, and in fp64.

    With a bf16 branch autocast to bf16 is on, as in training.
    """
    stream, branch = inputs["residual"].dtype, inputs["branch"].dtype
    dtypes = (stream, BF16 if branch is BF16 else stream)
    shape, ids = inputs["branch"].shape, sample_ids(len(inputs["branch"]))
    scale = torch.tensor(RANDOM["seed"]), torch.tensor(RANDOM["step"]), ids, RANDOM["layer"]
    keep = dropout_scale(shape, dropout, *scale) if dropout else torch.ones(shape)
    upstream = [None if i in unused else torch.randn(shape).to(t) for i, t in enumerate(dtypes)]

    ours = leaves(inputs, device)
    with torch.autocast(torch.device(device).type, BF16, enabled=branch is BF16):
        out = gated_residual_norm(**ours, dropout=dropout, sample_ids=ids.to(device), backend="triton", **RANDOM)
    assert tuple(o.dtype for o in out) == dtypes
    found = [results(out, ours, upstream)]

    peer = leaves(inputs)
    weight = peer.get("weight")
    total = (peer["residual"] + peer["gate"][:, None] * (peer["branch"] * keep.to(branch))).to(stream)
    y = adaptive_layer_norm_reference(total.float(), peer["shift"].float(), peer["scale"].float(), weight).to(dtypes[1])
    found.append(results((total, y), peer, upstream))

    truth = leaves(inputs, dtype=torch.float64)
    found.append(results(gated_residual_norm_reference(**truth, keep=keep.double()), truth, upstream))
    return found


@on_both
@pytest.mark.parametrize(
    ("shape", "options", "dropout"),
    [
        ((3, 7, 256), {}, 0.0),
        ((1, 5, 768), {"stream": F32, "branch": BF16, "shared": True}, 0.0),
        ((3, 7, 768), {"stream": BF16, "branch": BF16}, 0.1),
        ((3, 5, 1000), {"stream": F32, "branch": BF16, "conditioning": BF16, "weight": False}, 0.0),
        ((2, 3, 1003), {"shared": True}, 0.1),
        ((1, 2, 4096), {"stream": BF16, "branch": BF16, "conditioning": BF16}, 0.0),
        ((1, 1, 4096), {"stream": F32, "branch": BF16}, 0.1),
        ((2, 17, 67), {"stream": BF16, "branch": F32}, 0.5),
        ((3, 2, 1), {"shared": True, "weight": False}, 0.0),
        ((37, 1, 256), {"shared": True, "branch": BF16}, 0.3),
        ((19, 1, 96), {"shared": True}, 0.0),
    ],
    ids=str,
)
def test_chain_and_gradients_against_fp64(device, poisoned, shape, options, dropout):
    compare(*three_ways(device, example(*shape, **options), dropout=dropout))


@on_both
@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_one_output_unused(device, poisoned, unused, shared):
    compare(*three_ways(device, example(2, 5, 256, stream=BF16, branch=BF16, shared=shared), dropout=0.2, unused=(unused,)))


@on_both
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("stream", "out"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=str)
def test_norm_and_gradients_against_fp64(device, poisoned, batch, shared, stream, out):
    inputs = example(batch, 13, 384, shared=shared, stream=stream)
    inputs["x"] = inputs.pop("residual")
    inputs = {k: inputs[k] for k in ("x", "shift", "scale", "weight")}
    upstream = [torch.randn(batch, 13, 384).to(out)]
    ours, peer, truth = leaves(inputs, device), leaves(inputs), leaves(inputs, dtype=torch.float64)
    with torch.autocast(torch.device(device).type, BF16, enabled=out is BF16):
        found = results([adaptive_layer_norm(**ours, backend="triton")], ours, upstream)
    assert found[0].dtype is out
    plain = adaptive_layer_norm_reference(peer["x"].float(), *(peer[k] for k in ("shift", "scale", "weight"))).to(out)
    compare(found, results([plain], peer, upstream), results([adaptive_layer_norm_reference(**truth)], truth, upstream))


@on_both
@pytest.mark.parametrize("dropout", [1e-12, 0.1, 0.5, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("width", [64, 67])
def test_dropout_is_the_specification_s_bit_for_bit(device, dropout, width):
    ids, one = sample_ids(2), torch.ones(2, 5, width)
    want = dropout_scale(one.shape, dropout, torch.tensor(-3), torch.tensor(2**32 - 1), ids, 9)
    branch = one.to(device).requires_grad_()
    row = torch.ones(1, width, device=device)
    total, _ = gated_residual_norm(
        torch.zeros_like(branch), branch, row, row, row, dropout=dropout, seed=-3, step=2**32 - 1, sample_ids=ids.to(device),
        layer=9, backend="triton",
    )  # fmt: skip
    assert torch.equal(total.detach().cpu(), want)
    (gradient,) = torch.autograd.grad(total, branch, torch.ones_like(total))
    assert torch.equal(gradient.cpu(), want)


@on_both
def test_programs_that_go_over_several_tiles(device, poisoned, monkeypatch):
    from atat_fast.kernels import adaptive_norm as kernels

    monkeypatch.setattr(kernels, "RESIDENT", 5)
    monkeypatch.setattr(kernels, "BRIEF", 4)
    assert kernels.plan(2, 23, 256, 5)[:2] == ((2, 2), 12)  # three tiles of four rows, then two and three quarters
    compare(*three_ways(device, example(2, 23, 256, stream=BF16, branch=BF16), dropout=0.1))


@on_both
@pytest.mark.parametrize(("groups", "splits"), [(1, 301), (3, 129), (2, 1)])
def test_second_stage(device, poisoned, groups, splits):
    from atat_fast.kernels import adaptive_norm as kernels

    partials = torch.randn(3, groups * splits, 40)
    scale, weight = torch.randn(groups, 40), torch.randn(40)
    out = [torch.empty(groups, 40, device=device) for _ in range(3)] + [torch.empty(40, device=device)]
    kernels.sums(partials.to(device), splits, scale.to(device), weight.to(device), *out)
    shift, full, gate = partials.double().view(3, groups, splits, 40).sum(2)
    for got, want in zip(out, (shift, full * weight, gate, (full * (1 + scale)).sum(0)), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=2e-5)


@on_both
def test_conditioning_in_parts_of_one_projection_and_upstreams_that_are_expanded(device):
    batch, length, width = 2, 3, 256
    inputs = example(batch, length, width)
    projected = torch.randn(batch, 6 * width, device=device)
    parts = dict(zip(("gate", "shift", "scale"), projected.chunk(6, dim=1)[1:4], strict=True))
    assert not parts["gate"].is_contiguous()
    found = []
    for conditioning in (parts, {k: v.clone() for k, v in parts.items()}):
        t = leaves(inputs | conditioning, device)
        total, y = gated_residual_norm(**t, backend="triton")
        found.append([total, y, *torch.autograd.grad([total.sum(), y.sum()], list(t.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@on_both
def test_two_runs_are_the_same_bits_and_samples_do_not_meet(device, poisoned):
    inputs = example(3, 5, 128)
    inputs["residual"][1, 4, 7] = torch.nan
    runs = []
    for _ in range(2):
        t = leaves(inputs, device)
        out = gated_residual_norm(**t, dropout=0.1, sample_ids=sample_ids(3).to(device), backend="triton")
        runs.append([*out, *torch.autograd.grad(out, list(t.values()), [torch.ones_like(o) for o in out])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
        if a.dim() > 1:
            assert a[[0, 2]].isfinite().all()


@on_both
@pytest.mark.parametrize(("batch", "length", "shared"), [(0, 4, False), (0, 4, True), (2, 0, False), (2, 0, True)])
def test_nothing_to_normalise(device, poisoned, batch, length, shared):
    t = leaves(example(batch, length, 64, shared=shared), device)
    total, y = gated_residual_norm(**t, backend="triton")
    assert total.shape == y.shape == (batch, length, 64)
    for (name, leaf), grad in zip(t.items(), torch.autograd.grad(total.sum() + y.sum(), list(t.values())), strict=True):
        assert grad.shape == leaf.shape and not grad.any(), name


@on_both
def test_opcheck_and_compile(device):
    t = leaves(example(2, 3, 64), device)
    random = (0.2, *(torch.tensor(v, device=device) for v in (1, 2)), sample_ids(2).to(device))
    arguments = tuple(t[k] for k in ("residual", "branch", "gate", "shift", "scale", "weight"))
    torch.library.opcheck(
        torch.ops.atat_fast.gated_residual_norm.default, (*arguments, *random, 3, 1e-5, BF16, "triton"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip

    def f(inputs):
        total, y = gated_residual_norm(**inputs, backend="triton")
        return total + adaptive_layer_norm(y, inputs["shift"], inputs["scale"], backend="triton")

    want, got = f(t), torch.compile(f, fullgraph=True, backend="aot_eager")(t)
    assert torch.equal(want, got)
    upstream = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, list(t.values()), upstream) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


class TestOnGpu:
    pytestmark = [pytest.mark.gpu, no_gpu]  # noqa: RUF012

    @pytest.mark.parametrize("width", [256, 768, 1000, 1024, 1536, 2048, 3072, 4096])
    @pytest.mark.parametrize(("batch", "length"), [(1, 1), (8, 1024), (5, 997), (300, 7)])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("stream", [F32, BF16], ids=str)
    def test_against_pytorch_in_fp64(self, poisoned, width, batch, length, shared, stream):
        inputs = example(batch, length, width, shared=shared, stream=stream, branch=BF16)
        compare(*three_ways("cuda", inputs, dropout=0.1))

    def test_a_captured_graph_draws_anew(self):
        t = {k: v.cuda() for k, v in example(2, 64, 768).items()}
        step, options = torch.tensor(0, device="cuda"), {"dropout": 0.3, "sample_ids": sample_ids(2).cuda(), "backend": "triton"}
        options["seed"] = torch.tensor(5, device="cuda")
        gated_residual_norm(**t, step=step, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gated_residual_norm(**t, step=step, **options)
        seen = []
        for now in range(3):
            step.fill_(now)
            graph.replay()
            assert torch.equal(captured[0], gated_residual_norm(**t, step=step, **options)[0])
            seen.append(captured[0].clone())
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_tensors_on_another_device_than_the_current_one(self):
        compare(*three_ways("cuda:1", example(2, 33, 768)))
