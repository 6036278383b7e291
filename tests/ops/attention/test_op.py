"""attention and the attention branch against their specifications in fp64, and the choice of what computes them."""

from __future__ import annotations

import importlib
import importlib.machinery
import itertools
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import BF16, CPU, F32, F64, assert_no_worse, for_gpu, leaves, on_gpu, results
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from atat_fast.ops import (
    Documents,
    adaptive_attention,
    adaptive_layer_norm_reference,
    attention,
    attention_reference,
    document_layout,
    documents_of,
    explain_attention,
    rotary_reference,
    rotary_table,
    self_attention,
)
from atat_fast.ops.attention import IMPLEMENTATIONS, MODULES, choose_attention
from atat_fast.ops.attention import products as attention_products

module = importlib.import_module("atat_fast.ops.attention.op")
rotary_module = importlib.import_module("atat_fast.ops.rotary")
GPU = torch.device("cuda")
READY = [name for name, reason in explain_attention(CPU, F64, 8).items() if reason is None]


def packed(batch, length, heads, size, dtype=F64):
    cos, sin = rotary_table(length, size)
    return torch.randn(batch, length, 3, heads, size, dtype=dtype).requires_grad_(), cos.to(dtype), sin.to(dtype)


shapes = given(batch=st.integers(0, 3), length=st.integers(1, 37), heads=st.integers(1, 5), size=st.sampled_from([2, 6, 32]))


def ids_of(batch, length):
    """Documents of random lengths; ids repeat after a while, so that only neighbours tell a boundary."""
    return (torch.rand(batch, length) < 0.2).cumsum(1).remainder(3).to(torch.int32)


def runs(ids):
    """The same documents numbered so that no two of a row share a number."""
    return torch.cat((torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).cumsum(1)), 1)


@pytest.mark.parametrize("implementation", [None, *READY])
@pytest.mark.parametrize("documents", [False, True])
@settings(max_examples=15, deadline=None)
@shapes
def test_attention_matches_in_fp64_and_documents_keep_to_themselves(implementation, documents, batch, length, heads, size):
    qkv, _, _ = packed(batch, length, heads, size)
    ids = ids_of(batch, length) if documents else None
    got = attention(qkv, document_ids=ids, implementation=implementation)
    want = attention_reference(qkv, runs(ids) if documents else None)
    assert got.shape == (batch, length, heads * size)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(o, qkv, upstream)[0] for o in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", [(3, 40, 4, 16), for_gpu((4, 1024, 12, 64)), for_gpu((3, 509, 41, 8)), for_gpu((3, 77, 2, 32))])
def test_errs_no_more_than_pytorch_against_fp64(name, device, dtype, documents, shape):
    where = torch.device(device, 0 if device == "cuda" else None)
    reason = explain_attention(where, dtype, shape[-1], documents=documents)[name]
    if reason is not None:
        pytest.skip(reason)
    qkv, ids = packed(*shape)[0].detach().to(where, dtype), ids_of(*shape[:2]).to(where) if documents else None
    given, found = runs(ids) if documents else None, []
    upstream = [torch.randn(*shape[:2], shape[2] * shape[3], device=where)]
    for call, wide in (
        (lambda t: attention(t, document_ids=ids, implementation=name), dtype),
        (lambda t: attention_reference(t, given), dtype),
        (lambda t: attention_reference(t, given), F64),
    ):
        inputs = leaves({"qkv": qkv}, where, wide)
        found.append(results(call(inputs["qkv"]), inputs, upstream))
    assert_no_worse(*found, floor=1e-5 if dtype is F32 else 0.0)


def test_one_document_is_no_mask_and_lone_tokens_see_themselves():
    qkv, _, _ = packed(2, 9, 2, 8)
    alone = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(attention(qkv, document_ids=torch.zeros(2, 9)), attention(qkv))
    torch.testing.assert_close(attention(qkv, document_ids=alone), qkv[:, :, 2].flatten(2))


def test_documents_end_with_their_end_token():
    tokens = torch.tensor([[5, 5, 0, 7, 0, 0, 5], [0, 1, 1, 1, 1, 1, 0]])
    found = documents_of(tokens, 0)
    assert found.ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]] and found.ids.dtype is torch.int32
    assert found.most == 64  # 7 rounded up, so that few sizes are compiled
    starts = document_layout(found, "flash_attn")
    assert starts.dtype is torch.int32 and starts.tolist() == [0, 3, 5, 6, 7, 8, *[14] * 9]
    exact = document_layout(Documents(found.ids, 6), "flash_attn_3")
    assert exact.tolist() == [0, 3, 5, 6, 7, 8, 14]


class Package(types.ModuleType):
    """What flash-attn's packages do, by the specification; each call is noted."""

    def __init__(self, name, tuples):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls, self.tuples = [], tuples

    def flash_attn_qkvpacked_func(self, qkv, *, deterministic):
        self.calls.append(("packed", qkv.data_ptr(), deterministic))
        out = attention_reference(qkv).unflatten(2, qkv.shape[-2:])
        return (out, None) if self.tuples else out

    def flash_attn_varlen_qkvpacked_func(self, qkv, starts, longest, *, deterministic):
        self.calls.append(("packed varlen", qkv.data_ptr(), deterministic))
        bounds = starts.tolist()
        assert starts.dtype is torch.int32 and bounds[0] == 0 and bounds[-1] == len(qkv)
        parts = [attention_reference(qkv[a:b][None])[0] for a, b in itertools.pairwise(bounds) if b > a]
        assert max(b - a for a, b in itertools.pairwise(bounds)) <= longest
        return torch.cat(parts).unflatten(1, qkv.shape[-2:])

    def flash_attn_varlen_func(self, q, k, v, starts_q, starts_k, longest_q, longest_k, *, deterministic):
        assert starts_q is starts_k and longest_q == longest_k
        out = self.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), starts_q, longest_q, deterministic=deterministic)
        return (out, None) if self.tuples else out


@pytest.fixture
def imports_anew():
    """What is known of packages is forgotten before and after."""
    module._import_problem.cache_clear()
    yield
    module._import_problem.cache_clear()


@pytest.fixture
def packages(monkeypatch, imports_anew):
    """Both packages installed, as far as anyone can tell."""
    fakes = {name: Package(module_name, tuples=name == "flash_attn_3") for name, module_name in MODULES.items()}
    for fake in fakes.values():
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fakes


@pytest.mark.parametrize("name", list(MODULES))
def test_packages_are_called_with_the_packed_projection_itself(packages, name):
    qkv, _, _ = packed(3, 11, 2, 8)
    got = torch.ops.atat_fast.attention(qkv, None, name)
    torch.testing.assert_close(got, attention_reference(qkv))
    assert packages[name].calls == [("packed", qkv.data_ptr(), False)]
    ids = ids_of(3, 11)
    for most in (None, 33, 64):
        layout = document_layout(Documents(ids, most), name)
        got = torch.ops.atat_fast.attention(qkv, layout, name)
        torch.testing.assert_close(got, attention_reference(qkv, runs(ids)))
    assert name != "flash_attn" or packages[name].calls[-1][:2] == ("packed varlen", qkv.data_ptr())


def choice(capability, dtype=BF16, head_dim=64, **options):
    reasons = explain_attention(GPU, dtype, head_dim, capability=capability, **options)
    assert set(reasons) == set(IMPLEMENTATIONS)
    return next(name for name, reason in reasons.items() if reason is None)


def test_what_gpus_would_use(packages, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert choice((9, 0)) == "flash_attn_3" and choice((10, 0)) == "cudnn" and choice((8, 9)) == choice((8, 0)) == "flash_attn"
    assert choice((9, 0), documents=True) == "flash_attn_3" and choice((8, 9), documents=True) == "flash_attn"
    assert choice((9, 0), F32) == "sdpa_efficient" and choice((9, 0), F64) == "sdpa_math"
    assert choice((7, 5), torch.float16) == "sdpa_efficient" and choice((9, 0), head_dim=60) == "sdpa_math"
    assert choice((8, 9), head_dim=256) == "sdpa_efficient" and choice((9, 0), head_dim=256) == "flash_attn_3"
    reasons = explain_attention(GPU, BF16, 64, capability=(8, 9))
    assert reasons["flash_attn_3"] == "it is made for capability (9, 0), and this device has (8, 9)"


def test_without_the_packages_torch_has_something(monkeypatch, imports_anew):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert choice((9, 0)) == "cudnn" and choice((8, 9)) == "sdpa_flash" and choice((8, 9), documents=True) == "sdpa_efficient"
    assert explain_attention(GPU, BF16, 64, capability=(8, 9))["flash_attn"] == "flash_attn is not installed"


def test_a_package_that_does_not_import_is_said_not_to(monkeypatch, imports_anew):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())

    def broken(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    reasons = explain_attention(GPU, BF16, 64, capability=(9, 0))
    assert reasons["flash_attn_3"] == "flash_attn_interface does not import (flash_attn_interface: undefined symbol)"


def test_the_environment_and_the_caller_ask_by_name(monkeypatch):
    assert choose_attention(CPU, F32, 8) == "sdpa_flash"
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "sdpa_math")
    assert choose_attention(CPU, F32, 8) == "sdpa_math"
    assert choose_attention(CPU, F32, 8, False, "sdpa_flash") == "sdpa_flash"
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "cudnn")
    with pytest.raises(
        ValueError, match="attention cannot use 'cudnn' here: it runs on CUDA tensors; what can run is sdpa_flash"
    ):
        attention(torch.zeros(1, 2, 3, 1, 4))


def test_sdpa_uses_the_kernel_that_was_chosen_and_its_switches_are_put_back():
    before = [allowed() for allowed in module._ALLOWED.values()]
    qkv, _, _ = packed(1, 33, 2, 8, F32)
    for name, kernel in (("sdpa_flash", "_scaled_dot_product_flash_attention_for_cpu"), ("sdpa_math", "bmm")):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            attention(qkv, implementation=name)
        assert any(kernel in event.key for event in seen.key_averages())
    assert [allowed() for allowed in module._ALLOWED.values()] == before


def test_no_copy_is_made_on_the_way_to_sdpa(monkeypatch):
    qkv, _, _ = packed(2, 9, 3, 8, F32)
    seen = []
    original = F.scaled_dot_product_attention

    def noting(q, k, v, **options):
        seen.extend(t.untyped_storage().data_ptr() for t in (q, k, v))
        out = original(q, k, v, **options)
        seen.append(out.untyped_storage().data_ptr())
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    out = attention(qkv)
    assert seen == [qkv.untyped_storage().data_ptr()] * 3 + [out.untyped_storage().data_ptr()]


def test_autocast_attends_in_its_dtype():
    qkv, _, _ = packed(2, 9, 2, 8, F32)
    with torch.autocast("cpu", BF16):
        low = attention(qkv)
    assert low.dtype is BF16
    exact, plain = (
        attention_reference(qkv.double()),
        F.scaled_dot_product_attention(*(part.transpose(1, 2).bfloat16() for part in qkv.unbind(2))).transpose(1, 2).flatten(2),
    )
    assert (low.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("shape", "spread"), [((3, 37, 5, 6), 1), ((2, 128, 3, 32), 2), ((1, 1, 1, 2), 1), ((1, 256, 2, 64), 1)])
def test_products_err_no_more_than_torch_does(shape, spread, documents, monkeypatch):
    """bf16, against fp64; with scores of one head, or of a few that end in the middle of a sequence, at a time."""
    batch, length, heads, size = shape
    qkv = (spread * torch.randn(batch, length, 3, heads, size)).to(BF16)
    ids = ids_of(batch, length) if documents else None
    upstream = [torch.randn(batch, length, heads * size).to(BF16)]

    def of_parts(implementation, dtype=BF16):
        """The output, and the gradients of queries, keys and values."""
        inputs = leaves({"qkv": qkv}, dtype=dtype)
        found = results(attention(inputs["qkv"], document_ids=ids, implementation=implementation), inputs, upstream)
        return found[0], dict(zip("qkv", found["qkv"].unbind(2), strict=True))

    exact, (plain_out, plain), seen = of_parts("sdpa_math", F64)[1], of_parts("sdpa_flash"), []
    for scores in (1, 4 * length**2, 2**22):
        monkeypatch.setattr(attention_products, "SCORES", scores)
        out, ours = of_parts("products")
        assert torch.equal(out, plain_out)
        assert_no_worse(ours, plain, exact, floor=1e-3)
        seen.append(torch.stack(list(ours.values())))
    largest = max(float(t.abs().max()) for t in exact.values())
    torch.testing.assert_close(seen[0], seen[2], rtol=0.02, atol=0.02 * largest)
    assert torch.equal(torch.stack(list(of_parts("products")[1].values())), seen[2])  # two runs


def test_products_are_for_short_sequences_in_bf16(monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)
    assert next(iter(explain_attention(CPU, BF16, 64))) == "products"
    assert next(iter(explain_attention(CPU, F32, 64))) == "sdpa_flash"
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: False)
    assert next(iter(explain_attention(CPU, BF16, 64))) == "sdpa_flash"
    assert explain_attention(GPU, BF16, 64, capability=(9, 0))["products"] == "it runs on CPU tensors"
    for length, ours in ((attention_products.LONGEST, True), (attention_products.LONGEST + 1, False)):
        qkv = torch.randn(1, length, 3, 1, 2, requires_grad=True)
        made = attention(qkv, implementation="products")
        assert ("products" in type(made.grad_fn).__name__.lower()) is ours
        assert torch.equal(made, attention(qkv, implementation="sdpa_flash"))


@pytest.mark.parametrize("documents", [False, True])
def test_rows_of_the_branch_are_rows_of_the_whole(documents):
    batch, length, heads, width = 2, 7, 2, 12
    x, w, o = (torch.randn(*s, dtype=F64).requires_grad_() for s in ((batch, length, width), (36, 12), (12, 12)))
    cos, sin = (t.double() for t in rotary_table(length, 6))
    layout = document_layout(Documents(ids_of(batch, length)), "sdpa_flash") if documents else None
    rows = torch.tensor([3, 0, 13, 8])
    whole = self_attention(x, w, o, cos, sin, heads=heads, documents=layout)
    part = self_attention(x, w, o, cos, sin, heads=heads, documents=layout, rows=rows)
    torch.testing.assert_close(part, whole.flatten(0, 1)[rows], rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(part)
    ours, theirs = (torch.autograd.grad(out, (x, w, o), upstream) for out in (part, whole.flatten(0, 1)[rows]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # rotated in place then
        torch.testing.assert_close(self_attention(x, w, o, cos, sin, heads=heads, documents=layout, rows=rows), part)


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("rows", [[3], [0, 12, 5, 5], [], list(range(13))])
def test_rows_of_one_sequence_are_asked_for_alone(rows, dtype):
    """Without a gradient only their queries are computed: what is asked of attention is R x L, not L x L."""
    heads, width = 2, 16
    x, w, o = torch.randn(1, 13, width).to(dtype), torch.randn(3 * width, width).to(dtype), torch.randn(width, width).to(dtype)
    cos, sin = (t.double() if dtype is F64 else t for t in rotary_table(13, width // heads))
    rows = torch.tensor(rows, dtype=torch.int64)
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        whole = self_attention(x, w, o, cos, sin, heads=heads)[0, rows]
        patch.setattr(
            "torch.nn.functional.scaled_dot_product_attention", lambda q, *r, **m: asked.append(q.shape[2]) or real(q, *r, **m)
        )
        part = self_attention(x, w, o, cos, sin, heads=heads, rows=rows)
    assert asked == ([len(rows)] if len(rows) else []) and part.shape == (len(rows), width)
    tolerance = 1e-12 if dtype is F64 else 0.05 * float(whole.abs().max()) if len(rows) else 0.0
    torch.testing.assert_close(part, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_branch_is_its_parts(qk_norm):
    batch, length, heads, width = 2, 11, 3, 24
    sizes = ((batch, length, width), (batch, width), (batch, width), (width,), (3 * width, width), (width, width))
    x, shift, scale, norm, qkv_w, out_w = inputs = [torch.randn(*s, dtype=F64).requires_grad_() for s in sizes]
    cos, sin = (t.double() for t in rotary_table(length, width // heads))
    got = adaptive_attention(x, shift, scale, norm, qkv_w, out_w, cos, sin, heads=heads, qk_norm=qk_norm)
    qkv = (adaptive_layer_norm_reference(x, shift, scale, norm) @ qkv_w.T).view(batch, length, 3, heads, -1)
    if qk_norm:
        q, k, v = qkv.unbind(2)
        eps = torch.finfo(F64).eps
        q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) for t in (q, k))
        qkv = torch.stack((q, k, v), 2)
    want = attention_reference(rotary_reference(qkv, cos, sin)) @ out_w.T
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    upstream = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(out, inputs, upstream) for out in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_opcheck():
    qkv, cos, sin = packed(2, 5, 2, 4, F32)
    mask = document_layout(Documents(ids_of(2, 5)), "sdpa_flash")
    torch.library.opcheck(torch.ops.atat_fast.attention.default, (qkv, mask, "sdpa_flash"))
    for documents in (None, mask):
        torch.library.opcheck(torch.ops.atat_fast.attention_products.default, (qkv, documents))
    torch.library.opcheck(torch.ops.atat_fast.attention_products_backward.default, (torch.randn(2, 5, 8), qkv.detach(), mask))
    x, w, o = (torch.randn(*s).requires_grad_() for s in ((2, 5, 8), (24, 8), (8, 8)))
    for rows, documents in ((None, None), (torch.tensor([1, 9]), mask)):
        arguments = (x, w, o, cos, sin, 2, False, rows, documents, "sdpa_flash")
        torch.library.opcheck(torch.ops.atat_fast.self_attention.default, arguments)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa_flash", "products"])
def test_compiles_whole(grad, documents, implementation):
    x, w, o = (torch.randn(*s).requires_grad_(grad) for s in ((2, 5, 8), (24, 8), (8, 8)))
    cos, sin = rotary_table(5, 4)
    ids, rows = ids_of(2, 5), torch.tensor([1, 9, 4])

    def f(x, shift):
        layout = document_layout(Documents(ids), "sdpa_flash") if documents else None
        return adaptive_attention(
            x, shift, shift, None, w, o, cos, sin, heads=2, rows=rows, documents=layout, implementation=implementation
        )

    shift = torch.randn(1, 8)
    got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(x, shift), f(x, shift)
    torch.testing.assert_close(got, want)
    if grad:
        upstream = torch.randn_like(want)
        ours, theirs = (torch.autograd.grad(o, (x, w), upstream) for o in (got, want))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(torch.zeros(1, 2, 3, 1, 4), implementation="flash"), "there is no attention 'flash'.*; it is one of"),
        (lambda: attention(torch.zeros(1, 2, 3, 1, 4), implementation="flash_attn"), "cannot use 'flash_attn' here: it runs"),
        (lambda: attention(torch.zeros(1, 2, 3, 1, 4), document_ids=torch.zeros(2, 1)), r"document_ids must have shape \(1, 2\)"),
        (lambda: attention(torch.zeros(2, 3, 2, 2, 4)), r"qkv must be \[batch, length, 3"),
        (
            lambda: adaptive_attention(
                torch.zeros(1, 2, 6),
                torch.zeros(1, 6),
                torch.zeros(1, 6),
                None,
                torch.zeros(18, 6),
                torch.zeros(6, 6),
                torch.zeros(2, 1),
                torch.zeros(2, 1),
                heads=4,
            ),
            "width 6 does not divide into 4 heads",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("lazy", [True, False], ids=["from 2.13", "before"])
def test_a_compiled_block_reads_three_gradients_where_that_compiles(lazy, monkeypatch):
    """torch 2.11 and 2.12 would compile for hours: there the projection stays packed. Eagerly nothing stands in the way."""
    monkeypatch.setattr(rotary_module, "_LAZY_LOG", lazy)
    monkeypatch.setenv("ATAT_FAST_BACKEND", "torch")  # the C++ loop packs
    cos, sin = rotary_table(6, 4)
    weights = torch.randn(24, 8), torch.randn(8, 8)
    seen = []

    def note(graph, inputs):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    def f(x):
        return self_attention(x, *weights, cos, sin, heads=2, implementation="sdpa_math")

    x = torch.randn(2, 6, 8, requires_grad=True)
    out = torch.compile(f, backend=aot_autograd(fw_compiler=note), fullgraph=True)(x)
    assert any("rotary_split" in name for name in set().union(*seen)) == lazy
    with torch.profiler.profile() as watched:
        plain = f(x)
    torch.testing.assert_close(out, plain)
    (ours,), (theirs,) = torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not any(event.key == "aten::stack" for event in watched.key_averages())


def test_threads_leave_torchs_switches_as_they_were(monkeypatch):
    """Each reads them, changes them and puts them back; two at once would put back each other's."""
    qkv = torch.randn(1, 2, 3, 1, 8)
    monkeypatch.setattr(module, "_ALLOWED", {name: lambda f=f: (time.sleep(1e-4), f())[1] for name, f in module._ALLOWED.items()})
    before = {name: allowed() for name, allowed in module._ALLOWED.items()}
    with ThreadPoolExecutor(4) as threads:
        same = [threads.submit(attention, qkv, implementation="sdpa_math") for _ in range(40)]
        assert all(torch.equal(future.result(), same[0].result()) for future in same)
    assert {name: allowed() for name, allowed in module._ALLOWED.items()} == before and before["sdpa_math"]


def test_a_mode_that_sees_it_may_attend_too():
    qkv, seen = torch.randn(1, 2, 3, 1, 8), []

    class Again(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not seen and "softmax" in function.name():
                seen.append(attention(qkv, implementation="sdpa_math"))
            return function(*args, **(kwargs or {}))

    with Again():
        out = attention(qkv, implementation="sdpa_math")
    torch.testing.assert_close(out, seen[0])
