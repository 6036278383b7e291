"""A CPU without bf16 instructions, as most laptops have: nothing that was not asked for is multiplied in bf16 there, and what was
asked for is multiplied in fp32 by the ops. oneDNN turned off is such a CPU, on any.
"""

from __future__ import annotations

import pytest
import torch

from atat_fast import ops
from atat_fast.config import TrainConfig, load_preset, preset_names
from atat_fast.hardware import compute as compute_module
from atat_fast.hardware.compute import resolve
from atat_fast.models import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.ops import processor, registry
from atat_fast.training.loss import Objective
from atat_fast.training.optimizers import Optimizers

CPU = torch.device("cpu")
SDPA = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", SDPA, f"{SDPA}_backward")


class Products:
    """Counts products within, inside of ops too, and names those whose factors are bf16."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *raised):
        self.profile.__exit__(*raised)
        found = [e for e in self.profile.profiler.kineto_results.events() if e.name() in PRODUCTS]
        self.all = len(found)
        self.bf16 = [e.name() for e in found if "c10::BFloat16" in e.dtypes()]


@pytest.mark.parametrize(
    ("has", "limit", "found"),
    [
        ("_is_avx512_bf16_supported _is_avx512_supported", "", "native"),
        ("_is_amx_tile_supported", "nonsense", "native"),  # oneDNN passes over it too
        ("_is_avx512_supported", "AVX512_CORE_BF16", "emulated"),
        ("_is_avx512_bf16_supported _is_avx512_supported", "AVX512_CORE", "emulated"),
        ("_is_avx512_bf16_supported _is_avx512_supported", "avx2", "none"),
        ("", "", "none"),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_the_processor_has_and_onednn_may_use_decides(monkeypatch, name, has, limit, found):
    for other in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, limit)
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_avx512_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in has.split(), raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert processor._bf16_instructions.__wrapped__() == found


def test_torch_limited_to_avx2_multiplies_as_a_laptop_does(python):
    """On any machine. With AMX, torch's attention in bf16 raises there ("pack_vnni2 is only supported when avx512 is")."""
    code = """
import torch
from atat_fast.ops import attention, processor
qkv = torch.randn(2, 128, 3, 4, 32).bfloat16().requires_grad_()
attention(qkv).sum().backward()
print(processor.bf16_products(), bool(qkv.grad.isfinite().all()))
"""
    done = python("-c", code, ATEN_CPU_CAPABILITY="avx2")
    assert done.stdout.split() == ["none", "True"], done.stderr


def test_products_are_noticed():
    a = torch.randn(4, 4)
    with Products() as products:
        a @ a
        a.bfloat16() @ a.bfloat16()
    assert products.all == 2 and products.bf16 == ["aten::mm"]


@pytest.fixture
def slow(monkeypatch):
    """No oneDNN, and choices that were made with it are forgotten."""
    caches = (registry._choose, compute_module._say_slow)
    with torch.backends.mkldnn.flags(enabled=False):
        assert processor.bf16_products() == "none" and not processor.multiplies_bf16(CPU)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("preset", preset_names())
def test_a_step_multiplies_nothing_in_bf16(preset, slow):
    config = load_preset(preset)
    config.model.dim, config.model.layers, config.model.heads, config.model.length = 32, 2, 2, 32
    compute = resolve(TrainConfig())
    assert compute.dtype is torch.float32
    model = DiT(67, 66, **vars(config.model))
    estimator = ImportanceEstimator.of(config, None)
    objective = Objective(model, config, compute, seed=1, total=4, estimator=estimator)
    optimizers = Optimizers(objective.named_parameters(), config.optim)
    with Products() as products:
        for step in range(2):
            loss, _ = objective.loss(torch.randint(0, 66, (4, 32)), torch.arange(4), first=0, step=step, progress=0.5)
            loss.backward()
            optimizers.step(1e-3)
    assert products.all > 20 and products.bf16 == []


def test_bf16_that_is_asked_for_is_honoured_and_said_once(slow, capsys):
    for _ in range(2):
        assert resolve(TrainConfig(dtype="bf16")).dtype is torch.bfloat16
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "times slower than fp32; --train.dtype auto takes fp32" in said


def errors(call, exact, inputs):
    """Distance of outputs and gradients from fp64's, of inputs in bf16."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, want = call(*leaves), exact(*wide)
    torch.manual_seed(5)
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype)), torch.autograd.grad(want, wide, upstream)
    pairs = [(out, want), *zip(*grads, strict=True)]
    assert all(a.dtype is t.dtype for a, t in zip(grads[0], leaves, strict=True))
    return [float((a.double() - b).detach().norm()) for a, b in pairs]


def worst_ratio(call, exact, inputs):
    """Errors over those with oneDNN's bf16 products, or PyTorch's own."""
    with torch.backends.mkldnn.flags(enabled=False):
        here = errors(call, exact, inputs)
    before = processor.bf16_products
    processor.bf16_products = lambda: "native"
    try:
        plain = errors(call, exact, inputs)
    finally:
        processor.bf16_products = before
    return max(h / (p + 1e-9) for h, p in zip(here, plain, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_head_is_no_less_exact(reduction, slow):
    torch.manual_seed(0)
    target, rows = torch.randint(0, 130, (37,)), torch.randperm(64)[:37]
    inputs = [torch.randn(64, 48).bfloat16(), torch.randn(131, 48) / 7, torch.randn(131)]

    def call(h, w, b):
        return ops.linear_cross_entropy(h, w, target, bias=b, rows=rows, forbidden=130, reduction=reduction, chunk_bytes=4096)

    def exact(h, w, b):
        nll = ops.linear_cross_entropy_reference(h, w, target, b, None, rows, 130)
        return nll.sum() if reduction == "sum" else nll

    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        call(*(t.requires_grad_() for t in inputs)).sum().backward()
    assert products.all >= 3 and products.bf16 == []
    assert worst_ratio(call, exact, inputs) <= 1.05


@pytest.mark.parametrize("implementation", ["products", "sdpa_flash"])
def test_attention_is_no_less_exact(implementation, slow):
    torch.manual_seed(0)
    qkv = torch.randn(2, 24, 3, 2, 16).bfloat16()
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        ops.attention(qkv.requires_grad_(), implementation=implementation).sum().backward()
    assert products.all >= 2 and products.bf16 == []
    assert worst_ratio(lambda x: ops.attention(x, implementation=implementation), ops.attention_reference, [qkv]) <= 1.05


def test_draws_are_the_specification_s(slow):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(200, 32).bfloat16(), torch.randn(131, 32) / 6, torch.randn(131)
    index = torch.arange(200)
    want = ops.linear_categorical_reference(hidden.double(), weight.double(), index, bias.double(), 5, 0.8, seed=7, step=3)
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.linear_categorical(hidden, weight, index, bias=bias, forbidden=5, temperature=0.8, seed=7, step=3)
    assert products.bf16 == [] and float((got == want).float().mean()) > 0.99  # with bf16 logits some 0.95
