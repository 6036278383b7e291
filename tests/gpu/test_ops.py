"""What only a GPU shows of the ops: which kernels run there, captured graphs, memory past 2^31, and compute-sanitizer.

The laws of each op are in tests/ops, whose tests run on a GPU too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from adaptive_norm.test_op import check, example
from linear_cross_entropy.slab import Slab, run
from op_checks import BF16, F32, dtypes, on_gpu, same

from atat_fast.ops import gated_residual_norm, linear_cross_entropy, mask_tokens, registry, rotary, rotary_table

OPS = Path(__file__).parents[1] / "ops"
gpu = pytest.mark.gpu
needs_gpu = on_gpu[1]
of_rows = pytest.mark.parametrize("backend", ["cuda", "triton"])
TOOLS = ("memcheck", "racecheck", "synccheck")
EXPECTED = {
    "mask_tokens": ("cuda", "triton"),
    "linear_cross_entropy": ("cuda", "triton"),
    "linear_categorical": ("triton",),
} | dict.fromkeys(("adaptive_layer_norm", "gated_residual_norm", "rotary"), ("triton",))
"""What a GPU has for each op beside PyTorch, fastest first."""


@gpu
@needs_gpu
@pytest.mark.parametrize("op", EXPECTED)
def test_the_fastest_backend_is_chosen(op, monkeypatch):
    monkeypatch.delenv("ATAT_FAST_BACKEND", raising=False)
    where = torch.device("cuda", 0)
    ready = [name for name, reason in registry.explain(op, where).items() if reason is None and name != "torch"]
    assert tuple(ready) == EXPECTED[op], registry.explain(op, where)
    assert registry.choose_backend(op, where) == EXPECTED[op][0]


def captured(call):
    """A graph of the call, and what its replays write to."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@gpu
@needs_gpu
@pytest.mark.parametrize(("op", "backend"), [("masks", "cuda"), ("masks", "triton"), ("dropout", "triton")])
def test_a_captured_graph_draws_anew(op, backend):
    """Noise is a function of the step, which a replay reads from memory."""
    seed, step, ids = (torch.tensor(n, device="cuda") for n in (5, 0, [0, 1, 2, 3]))
    random = {"seed": seed, "step": step, "sample_ids": ids, "backend": backend}
    tokens, counts = torch.zeros(4, 300, dtype=torch.int64, device="cuda"), torch.full((4,), 100, device="cuda")
    stream, row = torch.randn(4, 64, 768, device="cuda"), torch.randn(4, 768, device="cuda")

    def call():
        if op == "masks":
            return mask_tokens(tokens, counts, mask_id=99, num_rows=400, **random)
        return gated_residual_norm(stream, stream, row, row, row, dropout=0.3, **random)

    graph, out = captured(call)
    seen = []
    for now in range(3):
        step.fill_(now)
        graph.replay()
        assert same(out, call())
        seen.append(out[0].clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@gpu
@needs_gpu
@of_rows
def test_a_captured_row_pass(backend):
    logits, target = torch.randn(200, 1000, device="cuda").to(BF16), torch.randint(0, 1000, (200,), device="cuda")
    want = run(backend, Slab(logits, target))
    static = Slab(logits.clone(), target)
    graph, out = captured(lambda: run(backend, static, in_place=True))
    static.logits.copy_(logits)
    graph.replay()
    assert same(out, want)


@gpu
@needs_gpu
def test_a_compiled_rotation_is_captured():
    qkv = torch.randn(2, 64, 3, 4, 64, device="cuda", dtype=BF16, requires_grad=True)
    cos, sin = (t.cuda() for t in rotary_table(64, 64))
    torch._dynamo.reset()  # graphs of other parameters count for this function too

    def f(x):
        return rotary(x * 2, cos, sin, norm=True, backend="triton").square()

    whole = torch.compile(f, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # recorded by the second, replayed by the third
        (ours,) = torch.autograd.grad(whole(qkv).float().sum(), qkv)
    (theirs,) = torch.autograd.grad(f(qkv).float().sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@gpu
@needs_gpu
@of_rows
def test_slabs_of_more_than_two_to_the_31(backend):
    rows, columns = 45_000, 50_304
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    logits = torch.empty(rows, columns, dtype=BF16, device="cuda").normal_(std=3.0)
    slab = Slab(logits, torch.randint(0, columns, (rows,), device="cuda"), torch.rand(rows, device="cuda"))
    last = Slab(logits[-64:].clone(), slab.target[-64:], slab.token_weight[-64:])
    got, want = run(backend, slab, in_place=True), run(backend, last)
    assert torch.equal(got.logits[-64:], want.logits) and torch.equal(got.nll[-64:], want.nll)
    sums, scale = torch.zeros(2, columns, dtype=torch.float64, device="cuda")
    for part in logits.split(1000):
        sums += part.double().sum(0)
        scale += part.double().abs().sum(0)
    assert ((got.bias_gradient.double() - sums).abs() <= 1e-5 * scale).all()


@gpu
@needs_gpu
def test_a_projection_of_more_than_two_to_the_31():
    length, heads, size = 1024, 16, 128
    batch = 2**31 // (length * 3 * heads * size) + 1
    if torch.cuda.mem_get_info()[0] < 5 * batch * length * 3 * heads * size:
        pytest.skip("the tensor of more than 2^31 elements does not fit this device")
    qkv = torch.ones(batch, length, 3, heads, size, dtype=torch.float16, device="cuda")
    cos, sin = (t.cuda() for t in rotary_table(length, size))
    want = rotary(qkv[-1:].clone(), cos, sin, backend="torch")
    assert torch.equal(rotary(qkv, cos, sin, inplace=True, backend="triton")[-1:], want)


@gpu
@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one():
    check("triton", "cuda:1", example(2, 33, 768), F32)


@gpu
@needs_gpu
@dtypes
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_a_target_outside_is_nan_among_the_padding_too(backend, dtype):
    """A vocabulary of 131 is padded to 256 columns on a GPU: 131 is as far outside as 256."""
    hidden, weight = torch.randn(5, 64, device="cuda", dtype=dtype), torch.randn(131, 64, device="cuda")
    target = torch.tensor([130, 131, 255, 256, -1], device="cuda")
    nll = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    assert nll.isnan().tolist() == [False, True, True, True, True]


def sanitized(tool: str, *more: str) -> list[str]:
    """The command that runs the smallest GPU tests of every kernel under a tool of compute-sanitizer.

    Those are the parameters called tiny: it needs minutes for each microsecond of a kernel.
    """
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(OPS), "-m", "gpu", "-k", "tiny"]
    watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"] if tool else []
    return [*watch, *tests, *more]


@pytest.mark.slow
@gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and shutil.which("compute-sanitizer")), reason="no CUDA device, or no compute-sanitizer"
)
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool):
    done = subprocess.run(
        sanitized(tool), env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_sanitizer_s_command_finds_a_test_of_every_kernel():
    done = subprocess.run(sanitized("", "--collect-only"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    for op in ("masking", "linear_cross_entropy", "philox"):
        assert any(f"ops/{op}/" in line and "cuda-gpu" in line for line in found), op
    for op in ("masking", "linear_cross_entropy", "philox", "linear_categorical", "adaptive_norm", "rotary"):
        assert any(f"ops/{op}/" in line and "triton-gpu" in line for line in found), op
    assert all("-gpu" in line for line in found) and 20 <= len(found) <= 40, done.stdout
    assert sanitized("racecheck")[:3] == ["compute-sanitizer", "--tool", "racecheck"]
