"""Every op on every backend a GPU has, at the model's sizes and at odd ones: against fp64, beside PyTorch's own error, and twice
with the same bits.

One function checks an op's backend on a device at a size. A CPU runs it small, on the backends it has. A GPU must have what
EXPECTED names, each in a test of its own that no other backend can pass: at D = 768, L = 1,024 and an odd vocabulary near
50,304, and at prime lengths and vocabularies. With ATAT_FAST_SMALL=1 a GPU takes the small sizes too: compute-sanitizer needs
minutes for each microsecond of a kernel. Gradients are those of a random signed upstream.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops import (
    adaptive_layer_norm,
    adaptive_layer_norm_reference,
    attention,
    attention_reference,
    explain_attention,
    gated_residual_norm,
    gated_residual_norm_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    mask_tokens,
    registry,
    rotary,
    rotary_reference,
    rotary_split,
    rotary_table,
)
from atat_fast.ops.attention import IMPLEMENTATIONS
from atat_fast.ops.philox import random_words

GPU = torch.cuda.is_available()
SMALL = "ATAT_FAST_SMALL"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
LIMIT = 1.5
"""An op's error may be this much of PyTorch's own at the same dtype."""
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Size:
    """Sequences, tokens of each, width, heads and vocabulary."""

    batch: int
    length: int
    width: int
    heads: int
    vocabulary: int


MODEL, ODD, TINY = Size(4, 1024, 768, 12, 50_257), Size(3, 509, 328, 41, 5_003), Size(3, 40, 64, 4, 131)


def size_for(device: str, size: Size = MODEL) -> Size:
    """The size asked for on a GPU, unless small ones are wanted there too; the small one on a CPU."""
    return size if device == "cuda" and os.environ.get(SMALL) != "1" else TINY


Tensors = tuple[Tensor, ...]


@dataclass
class Case:
    """An op's inputs that want gradients, its call under a backend, and its specification on the same inputs in any dtype."""

    inputs: Tensors
    call: Callable[[str, Tensors], Tensors]
    reference: Callable[[Tensors], Tensors]


def draw(device: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A normal tensor that wants a gradient; made on the host, so that every device sees the same."""
    return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()


def head_case(size: Size, device: str, dtype: torch.dtype) -> Case:
    """linear_cross_entropy over half of the rows, with a bias, weights of both signs and a forbidden id."""
    n = size.batch * size.length
    rows = torch.randperm(n)[: n // 2].sort().values.to(device)
    target = torch.randint(0, size.vocabulary - 1, (len(rows),)).to(device)
    mask_id = size.vocabulary - 1
    inputs = (
        draw(device, n, size.width, dtype=dtype), draw(device, size.vocabulary, size.width, scale=size.width**-0.5),
        draw(device, size.vocabulary, scale=0.1), draw(device, len(rows)),
    )  # fmt: skip

    def call(backend: str, given: Tensors) -> Tensors:
        h, w, b, t = given
        return (linear_cross_entropy(h, w, target, bias=b, token_weight=t, rows=rows, forbidden=mask_id, backend=backend),)

    def reference(given: Tensors) -> Tensors:
        h, w, b, t = given
        nll = linear_cross_entropy_reference(h, w.to(h.dtype), target, b.to(h.dtype), None, rows, mask_id)
        return ((nll.to(t.dtype) * t).sum(),)

    return Case(inputs, call, reference)


def norm_case(size: Size, device: str, dtype: torch.dtype, *, gated: bool, shared: bool) -> Case:
    """One of the norm chains; `shared` conditioning is one row for all samples."""
    rows = 1 if shared else size.batch
    shape = (size.batch, size.length, size.width)
    x, weight = draw(device, *shape, dtype=dtype), draw(device, size.width)
    modulation = [draw(device, rows, size.width, dtype=dtype, scale=0.3) for _ in range(3)]
    if not gated:
        inputs = (x, *modulation[:2], weight)
        return Case(
            inputs, lambda backend, given: (adaptive_layer_norm(*given, backend=backend),),
            lambda given: (adaptive_layer_norm_reference(*given).to(given[0].dtype),),
        )  # fmt: skip
    inputs = (x, draw(device, *shape, dtype=dtype), *modulation, weight)
    return Case(
        inputs, lambda backend, given: gated_residual_norm(*given, backend=backend),
        lambda given: tuple(t.to(given[0].dtype) for t in gated_residual_norm_reference(*given)),
    )  # fmt: skip


def rotary_case(size: Size, device: str, dtype: torch.dtype) -> Case:
    """rotary on a packed projection."""
    head_dim = size.width // size.heads
    cos, sin = (t.to(device) for t in rotary_table(size.length, head_dim))
    qkv = draw(device, size.batch, size.length, 3, size.heads, head_dim, dtype=dtype)

    def table(dtype: torch.dtype) -> Tensors:
        return (cos.double(), sin.double()) if dtype is torch.float64 else (cos, sin)

    return Case(
        (qkv,), lambda backend, given: (rotary(given[0], cos, sin, backend=backend),),
        lambda given: (rotary_reference(given[0], *table(given[0].dtype)),),
    )  # fmt: skip


def normed_rotary_case(size: Size, device: str, dtype: torch.dtype) -> Case:
    """rotary with its norm; PyTorch's own error is that of F.rms_norm and the rotation."""
    head_dim = size.width // size.heads
    cos, sin = (t.to(device) for t in rotary_table(size.length, head_dim))
    qkv = draw(device, size.batch, size.length, 3, size.heads, head_dim, dtype=dtype)
    eps = torch.finfo(torch.float32).eps

    def reference(given: Tensors) -> Tensors:
        (x,) = given
        if x.dtype is torch.float64:
            return (rotary_reference(x, cos.double(), sin.double(), norm=True, eps=eps),)
        return (rotary_reference(torch.cat((F.rms_norm(x[:, :, :2], x.shape[-1:]), x[:, :, 2:]), dim=2), cos, sin),)

    return Case((qkv,), lambda backend, given: (rotary(given[0], cos, sin, norm=True, backend=backend),), reference)


def split_rotary_case(size: Size, device: str, dtype: torch.dtype, *, norm: bool) -> Case:
    """rotary into three tensors."""
    packed = (normed_rotary_case if norm else rotary_case)(size, device, dtype)
    cos, sin = (t.to(device) for t in rotary_table(size.length, size.width // size.heads))

    def reference(given: Tensors) -> Tensors:
        return packed.reference(given)[0].unbind(2)

    return Case(packed.inputs, lambda backend, given: rotary_split(given[0], cos, sin, norm=norm, backend=backend), reference)


def attention_case(size: Size, device: str, dtype: torch.dtype) -> Case:
    """attention; its backends are the implementations that can run."""
    qkv = draw(device, size.batch, size.length, 3, size.heads, size.width // size.heads, dtype=dtype)
    return Case(
        (qkv,), lambda name, given: (attention(given[0], implementation=name),), lambda given: (attention_reference(given[0]),)
    )


CASES: dict[str, Callable[[Size, str, torch.dtype], Case]] = {
    "linear_cross_entropy": head_case,
    "adaptive_layer_norm": lambda *a: norm_case(*a, gated=False, shared=False),
    "adaptive_layer_norm, shared": lambda *a: norm_case(*a, gated=False, shared=True),
    "gated_residual_norm": lambda *a: norm_case(*a, gated=True, shared=False),
    "gated_residual_norm, shared": lambda *a: norm_case(*a, gated=True, shared=True),
    "rotary": rotary_case,
    "rotary, normed": normed_rotary_case,
    "rotary, split": lambda *a: split_rotary_case(*a, norm=False),
    "rotary, split and normed": lambda *a: split_rotary_case(*a, norm=True),
    "attention": attention_case,
}


EXPECTED = {
    "mask_tokens": ("cuda", "triton"),
    "linear_cross_entropy": ("cuda", "triton"),
    "linear_categorical": ("triton",),
} | dict.fromkeys(("adaptive_layer_norm", "gated_residual_norm", "rotary"), ("triton",))
"""What a GPU has for each op beside PyTorch, fastest first."""


def reasons_of(op: str, device: str, dtype: torch.dtype, size: Size) -> dict[str, str | None]:
    """For each backend of `op`, or implementation of attention, why it cannot run here, or None."""
    where = torch.device(device, 0 if device == "cuda" else None)
    if op == "attention":
        return explain_attention(where, dtype, size.width // size.heads)
    return registry.explain(op.split(",")[0], where)


def backends_of(op: str, device: str, dtype: torch.dtype, size: Size) -> list[str]:
    """What can run `op` here, fastest first."""
    return [name for name, reason in reasons_of(op, device, dtype, size).items() if reason is None]


def results(call: Callable[[Tensors], Tensors], inputs: Tensors, upstream: Tensors) -> Tensors:
    """Outputs, then gradients of the inputs."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    out = call(leaves)
    grads = torch.autograd.grad(out, leaves, [u.to(o.dtype).reshape(o.shape) for u, o in zip(upstream, out, strict=True)])
    return (*(o.detach() for o in out), *grads)


def check(op: str, device: str, dtype: torch.dtype, size: Size, backends: Sequence[str]) -> None:
    """Compare backends with fp64 and with PyTorch's own error, and with themselves."""
    torch.manual_seed(0)
    case = CASES[op](size, device, dtype)
    exact_inputs = tuple(t.detach().double() for t in case.inputs)
    upstream = tuple(torch.randn(o.shape).to(device) for o in case.reference(case.inputs))
    exact = results(case.reference, exact_inputs, upstream)
    plain = results(case.reference, case.inputs, upstream)
    for backend in backends:
        got = results(lambda given, b=backend: case.call(b, given), case.inputs, upstream)
        for i, (a, e, p) in enumerate(zip(got, exact, plain, strict=True)):
            error, own = (float((t.double() - e).norm()) for t in (a, p))
            assert error <= LIMIT * own + 1e-5 * float(e.norm()) + 1e-7, (
                f"{op}, {backend}, result {i}: {error:.3e} against {own:.3e}"
            )
        if op != "attention":  # whose libraries promise it under use_deterministic_algorithms alone
            again = results(lambda given, b=backend: case.call(b, given), case.inputs, upstream)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), f"{op}, {backend}: two runs differ"


BOTH = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=on_gpu, id="cuda")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
SIZES = pytest.mark.parametrize("size", [MODEL, ODD], ids=["model", "odd"])
OURS = [op for op in CASES if op != "attention"]


@DTYPES
@pytest.mark.parametrize("op", CASES)
def test_on_a_cpu_every_backend_is_close_to_fp64_and_twice_the_same(op, dtype, poisoned):
    found = backends_of(op, "cpu", dtype, TINY)
    assert found
    check(op, "cpu", dtype, TINY, found)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@SIZES
@DTYPES
@pytest.mark.parametrize(("op", "backend"), [(op, name) for op in OURS for name in EXPECTED[op.split(",")[0]]])
def test_against_fp64_and_twice_the_same(op, backend, dtype, size, poisoned):
    reason = reasons_of(op, "cuda", dtype, size)[backend]
    assert reason is None, f"{op} has no {backend} here: {reason}"
    check(op, "cuda", dtype, size_for("cuda", size), [backend])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@SIZES
@DTYPES
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "products"])
def test_attention_against_fp64(name, dtype, size):
    size = size_for("cuda", size)
    reason = reasons_of("attention", "cuda", dtype, size)[name]
    if reason is not None:
        pytest.skip(reason)
    check("attention", "cuda", dtype, size, [name])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("op", EXPECTED)
def test_the_fastest_backend_is_chosen(op, monkeypatch):
    monkeypatch.delenv("ATAT_FAST_BACKEND", raising=False)
    where = torch.device("cuda", 0)
    chosen = registry.choose_backend(op, where)
    assert chosen == EXPECTED[op][0], f"{op} runs on {chosen} here: {registry.explain(op, where)}"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_philox_is_the_specification_s():
    index = torch.cat([torch.arange(-5, 2000), torch.tensor([2**62, 2**32 - 1, 2**32])]).cuda()
    seed, step = (torch.tensor(n, device="cuda") for n in (2**40 + 7, 3))
    assert torch.equal(torch.ops.atat_fast_c.philox(index, seed, step, 5), torch.stack(random_words(index, seed, step, 5), -1))


@SIZES
@pytest.mark.parametrize("scored", [False, True], ids=["uniform", "scored"])
@pytest.mark.parametrize("device", BOTH)
def test_masks_are_the_specification_s(device, scored, size, poisoned):
    """Uniform masks and their weights are the same bits everywhere; fp32 keys of scored ones may swap two that nearly tie."""
    size = size_for(device, size)
    found = backends_of("mask_tokens", device, torch.int64, size)
    assert device == "cpu" or set(found) >= {"cuda", "triton"}
    tokens = torch.randint(0, size.vocabulary - 1, (size.batch, size.length)).to(device)
    counts = torch.randint(0, size.length + 1, (size.batch,))
    options = {"scores": torch.rand(size.batch, size.length).to(device), "tilt": 2.0} if scored else {}
    options |= {
        "mask_id": size.vocabulary - 1, "num_rows": int(counts.sum()), "sample_ids": torch.arange(size.batch, device=device),
        "seed": torch.tensor(1, device=device), "step": torch.tensor(5, device=device),
    }  # fmt: skip
    want = mask_tokens(tokens, counts.to(device), backend="torch", **options)
    for backend in found:
        got, again = (mask_tokens(tokens, counts.to(device), backend=backend, **options) for _ in range(2))
        for name, a, b, w in zip(("noisy", "rows", "weights"), got, again, want, strict=True):
            assert torch.equal(a, b), f"{backend}: {name} of two runs differ"
            if scored and name == "noisy":
                assert int((a != w).sum()) <= 2, f"{backend}: {int((a != w).sum())} tokens are hidden or shown against the keys"
            elif not scored:
                assert torch.equal(a, w), f"{backend}: {int((a != w).sum())} of {w.numel()} {name} differ"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@DTYPES
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_a_target_outside_is_nan_among_the_padding_too(backend, dtype):
    """A vocabulary of 131 is padded to 256 columns on a GPU: 131 is as far outside as 256."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 64, device="cuda", dtype=dtype), torch.randn(131, 64, device="cuda")
    target = torch.tensor([130, 131, 255, 256, -1], device="cuda")
    nll = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    assert nll.isnan().tolist() == [False, True, True, True, True]


def sanitized(tool: str, *more: str) -> list[str]:
    """The command that runs the tests above, small, under a tool of compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-m", "gpu"]
    wanted = ["-k", "(fp64 or specification) and not attention and not odd"]
    watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"] if tool else []
    return [*watch, *tests, *wanted, *more]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not GPU or not shutil.which("compute-sanitizer"), reason="no CUDA device, or no compute-sanitizer")
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool):
    done = subprocess.run(sanitized(tool), env=os.environ | {SMALL: "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_sanitizer_s_command_finds_tests():
    done = subprocess.run(sanitized("", "--collect-only"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "test_masks_are_the_specification_s[cuda-uniform-model]" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "[linear_cross_entropy-cuda-bf16-model]" in done.stdout and "test_attention" not in done.stdout
    assert sanitized("racecheck")[:3] == ["compute-sanitizer", "--tool", "racecheck"]
