"""linear_cross_entropy against its specification in fp64, and against PyTorch's own bf16 error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    BF16,
    CPU,
    F32,
    F64,
    assert_no_worse,
    backends,
    compiled_whole,
    differentiable,
    dtypes,
    for_gpu,
    gradients,
    interprets,
    leaves,
    results,
    rmse,
    same,
)

from atat_fast.ops import linear_cross_entropy, linear_cross_entropy_cost, linear_cross_entropy_reference, registry
from atat_fast.ops.linear_cross_entropy.slabs import (
    CHUNK_BYTES_CPU,
    CHUNK_BYTES_GPU,
    _budget,
    default_budget,
    most_rows,
    new_slab,
    rows_per_slab,
)

every = backends("linear_cross_entropy", gpu=False)
reductions = pytest.mark.parametrize("reduction", ["sum", "none"])
low_memories = pytest.mark.parametrize("low_memory", [False, True])


def case(n, d, v, r=None, dtype=F64, forbidden=None, bias=True):
    rows = None if r is None else torch.randperm(n)[:r].sort().values
    count = n if r is None else r
    target = torch.randint(0, v, (count,))
    if forbidden is not None:
        target = torch.where(target == forbidden, (forbidden + 1) % v, target)
    return {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (torch.randn(v, d, dtype=dtype) / d**0.5).requires_grad_(),
        "target": target,
        "bias": torch.randn(v, dtype=dtype).requires_grad_() if bias else None,
        "token_weight": torch.randn(count, dtype=dtype).requires_grad_(),
        "rows": rows,
        "forbidden": forbidden,
    }


def logits_of(inputs):
    """With the forbidden column at -inf."""
    hidden = inputs["hidden"] if inputs["rows"] is None else inputs["hidden"][inputs["rows"]]
    logits = F.linear(hidden, inputs["weight"], inputs["bias"])
    forbidden = torch.arange(logits.shape[1]) == (-1 if inputs["forbidden"] is None else inputs["forbidden"])
    return logits.masked_fill(forbidden, -torch.inf)


@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(0, 61),
    d=st.sampled_from([1, 3, 16, 37]),
    v=st.sampled_from([2, 7, 131]),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    forbid=st.booleans(),
    bias=st.booleans(),
    rated=st.sampled_from(["", "", "young", "aged"]),
    chunk=st.sampled_from([1, 5_000, 10**9]),
    form=st.sampled_from(["sum", "none", "low_memory"]),
)
def test_fp64_matches_the_specification(n, d, v, share, forbid, bias, rated, chunk, form):
    inputs = case(n, d, v, None if share is None else round(share * n), forbidden=v - 1 if forbid else None, bias=bias)
    count = len(inputs["target"])
    ages = 4 * torch.rand(count).double() if rated == "aged" else None
    rates = {"rates": 0.1 + 3 * torch.rand(v).double(), "elapsed": ages} if rated else {}
    want = linear_cross_entropy_reference(**inputs, **rates)
    options = {"reduction": "none"} if form == "none" else {"low_memory": form == "low_memory"}
    got, nll = linear_cross_entropy(**inputs, **rates, chunk_bytes=chunk, return_nll=True, **options)
    close = {"rtol": 1e-11, "atol": 1e-11} if rated else {"rtol": 1e-12, "atol": 1e-11}
    upstream = torch.tensor(-1.7).double()
    if form == "none":
        upstream = torch.randn(count).double() * (torch.rand(count) > 0.3)  # signed, some exactly zero
    else:
        want = want.sum()
    torch.testing.assert_close(got, want, **close)
    tilted = logits_of(inputs) - (0 if ages is None else ages[:, None] * rates["rates"])
    exact = -tilted.log_softmax(1).gather(1, inputs["target"][:, None])[:, 0].detach()
    torch.testing.assert_close(nll, torch.where(inputs["token_weight"] == 0, 0.0, exact))
    ours, theirs = (gradients((loss * upstream).sum(), inputs) for loss in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-9 if rated else 1e-10, atol=1e-10)


@every
@reductions
def test_rates_of_one_are_the_plain_loss(backend, device, reduction):
    inputs = case(30, 8, 57, 21, dtype=F32, forbidden=4)
    plain = linear_cross_entropy(**inputs, reduction=reduction, backend=backend)
    rates = {"rates": torch.ones(57), "elapsed": 5 * torch.rand(21)}
    rated = linear_cross_entropy(**inputs, reduction=reduction, backend=backend, **rates)
    torch.testing.assert_close(rated, plain, rtol=2e-6, atol=4e-6)
    for a, b in zip(gradients(rated.sum(), inputs), gradients(plain.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"label_smoothing": 0.3}], ids=str)
def test_forbidden_column_is_exactly_zero(poisoned, backend, device, options):
    inputs = case(50, 8, 11, 30, dtype=F32, forbidden=4)
    loss = linear_cross_entropy(**inputs, chunk_bytes=1, backend=backend, **options)
    _, dweight, dbias, _ = gradients(loss, inputs)
    assert not dweight[4].any() and dbias[4] == 0 and dweight.isfinite().all()


@every
@dtypes
@low_memories
def test_rows_of_weight_zero_give_zeros_whatever_they_hold(poisoned, backend, device, dtype, low_memory):
    inputs = case(12, 8, 11, dtype=F32)
    inputs["hidden"] = inputs["hidden"].detach().to(dtype).requires_grad_()
    with torch.no_grad():
        inputs["token_weight"][::2] = 0
        inputs["hidden"][0] = torch.inf
        inputs["hidden"][2] = torch.nan
    loss, nll, known = linear_cross_entropy(
        **inputs, return_nll=True, return_statistics=True, backend=backend, low_memory=low_memory
    )
    found = gradients(loss, inputs)
    assert loss.isfinite() and all(g.isfinite().all() for g in found)
    assert not found[0][::2].any() and not nll[::2].any() and not found[-1][::2].any()
    assert all((s[::2] == 0).all() and s.isfinite().all() for s in known)
    assert (linear_cross_entropy(**inputs, reduction="none", backend=backend)[::2] == 0).all()


@every
@reductions
def test_statistics_are_those_of_the_softmax(backend, device, reduction):
    inputs = case(57, 8, 1031, 31, dtype=F32, forbidden=1030)
    p = torch.softmax(logits_of(leaves(inputs, dtype=F64)), 1).detach()
    *_, known = linear_cross_entropy(**inputs, return_statistics=True, reduction=reduction, backend=backend)
    torch.testing.assert_close(known.max_probability.double(), p.amax(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(known.entropy.double(), torch.special.entr(p).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(known.nll.double(), -p.gather(1, inputs["target"][:, None])[:, 0].log(), rtol=1e-5, atol=1e-6)
    assert not any(s.requires_grad for s in known)


def test_only_listed_rows_are_read(poisoned):
    inputs = case(30, 8, 11, 9, dtype=F32)
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[inputs["rows"]] = False
    with torch.no_grad():
        inputs["hidden"][untouched] = torch.nan
    loss = linear_cross_entropy(**inputs)
    dhidden = gradients(loss, inputs)[0]
    assert loss.isfinite() and (dhidden[untouched] == 0).all() and dhidden.isfinite().all()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "token_weight"])
def test_any_input_may_be_frozen(wanted):
    inputs = case(20, 8, 11, 13)
    full = dict(zip(differentiable(inputs), gradients(linear_cross_entropy(**inputs), inputs), strict=True))
    for name, tensor in differentiable(inputs).items():
        tensor.requires_grad_(name == wanted)
    for form in ({}, {"reduction": "none"}, {"low_memory": True}):
        (got,) = gradients(linear_cross_entropy(**inputs, **form).sum(), inputs)
        torch.testing.assert_close(got, full[wanted], rtol=1e-12, atol=1e-12)


def rounded(inputs, dtype):
    """Inputs with hidden in dtype; the rest, in fp32, holds values that dtype has."""
    low = leaves(inputs, dtype=dtype)
    return leaves(low | {k: low[k].float() for k in ("bias", "token_weight", "weight") if low[k] is not None})


@dtypes
@every
def test_the_size_of_a_slab_moves_no_more_than_one_last_place(dtype, backend, device):
    inputs = rounded(case(35, 16, 101, 26) if interprets(backend, device) else case(257, 16, 101, 200), dtype)
    losses = [linear_cross_entropy(**inputs, chunk_bytes=c, backend=backend) for c in (1, 101 * 4 * 64, 10**9)]
    grads = [gradients(loss, inputs) for loss in losses]
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-3)
        for a, b in zip(grad, grads[0], strict=True):
            if dtype is BF16:
                assert (a.double() - b.double()).abs().max() <= torch.finfo(dtype).eps * float(b.abs().max())
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@dtypes
@low_memories
def test_two_runs_are_the_same_bits(dtype, low_memory):
    inputs = rounded(case(129, 32, 503, 64, forbidden=502), dtype)
    call = lambda: gradients(linear_cross_entropy(**inputs, chunk_bytes=50_000, low_memory=low_memory), inputs)  # noqa: E731
    assert same(call(), call())


def test_backward_may_be_taken_twice_and_a_row_listed_twice_gets_both_gradients():
    inputs = case(5, 4, 7)
    inputs |= {"rows": torch.tensor([3, 1, 3, 3, 0])}
    loss, upstream = linear_cross_entropy(**inputs), torch.tensor(-2.0, dtype=F64)
    wanted = list(differentiable(inputs).values())
    first = torch.autograd.grad(loss, wanted, grad_outputs=upstream, retain_graph=True)
    assert same(first, torch.autograd.grad(loss, wanted, grad_outputs=upstream))
    want = gradients(-2 * linear_cross_entropy_reference(**inputs).sum(), inputs)
    torch.testing.assert_close(first, want, rtol=1e-12, atol=1e-12)


SIZES = [
    *((n, 64, v) for n, v in ((512, 997), (512, 4096))), (331, 96, 2), (331, 96, 7), pytest.param(40, 64, 131, id="tiny"),
    *(pytest.param(n, 64, v, marks=pytest.mark.slow) for n, v in ((701, 30_522), (701, 50_257), (701, 50_258), (211, 131_072))),
    for_gpu(4096, 768, 50_257, id="model"), for_gpu(1527, 328, 5_003, id="odd"),
]  # fmt: skip


@backends("linear_cross_entropy")
@dtypes
@pytest.mark.parametrize(("n", "d", "v"), SIZES)
def test_errs_no_more_than_pytorch_against_fp64(poisoned, backend, device, dtype, n, d, v):
    """PyTorch's own error is that of the same function under autocast; weights are of both signs."""
    if interprets(backend, device):
        n = min(n, 50)
    low = rounded(case(n, d, v, round(0.6 * n), forbidden=v - 1 if v > 2 else None), dtype)
    here, plain, exact = leaves(low, device), leaves(low, device), leaves(low, device, F64)
    one = [torch.ones(())]
    want = linear_cross_entropy_reference(**exact)
    with torch.autocast(device, BF16, enabled=dtype is BF16):
        peer = linear_cross_entropy_reference(**plain)
    call = lambda: linear_cross_entropy(**here, backend=backend, chunk_bytes=v * 2 * 160, return_nll=True)  # noqa: E731
    loss, nll = call()
    assert rmse(nll * here["token_weight"], want) <= rmse(peer, want) * (1 if dtype is BF16 else 1.5) + 1e-7
    found, theirs, truth = (results(out.sum(), t, one) for out, t in ((loss, here), (peer, plain), (want, exact)))
    size = float(want.detach().abs().sum())  # weights are signed: the loss itself may cancel to nothing
    if v >= 30_000:  # the rounding of so many logits averages out in their sum, and the target's own is not rounded
        assert abs(float(loss.detach()) - float(want.detach().sum())) <= 1e-6 * size
    for of_all in (found, theirs, truth):
        del of_all[0]
    few = 2**-9 * max(float(t.abs().max()) for t in truth.values()) if v < 16 else 0.0  # two numbers have no typical error
    limits = {"weight": 1.1} if device == "cpu" and dtype is BF16 else {}
    assert_no_worse(found, theirs, truth, floor=0 if dtype is BF16 else 1e-5, least=few + 1e-9, limits=limits)
    assert found["weight"].dtype is F32
    if device == "cuda":
        assert same(found.values(), gradients(call()[0], here))


@every
def test_nearly_certain_rows_keep_their_small_loss(backend, device):
    weight = torch.zeros(1000, 2)
    weight[1:, 0] = -1.0
    hidden = torch.tensor([[40.0, 0.0], [20.0, 0.0]], requires_grad=True)
    weight.requires_grad_()
    nll = linear_cross_entropy(hidden, weight, torch.zeros(2, dtype=torch.int64), reduction="none", backend=backend)
    want = torch.log1p(999 * torch.exp(-hidden.detach()[:, 0].double()))
    torch.testing.assert_close(nll.detach().double(), want, rtol=1e-5, atol=0)
    dhidden, dweight = torch.autograd.grad(nll.sum(), (hidden, weight))
    torch.testing.assert_close(dhidden[:, 0].double(), -want, rtol=1e-4, atol=0)  # -(1 - p_target), which p - 1 would round away
    assert (dweight[0, 0] < 0) and dweight[0, 0].isfinite()


def test_what_is_not_a_number_is_never_hidden():
    for name in ("hidden", "token_weight", "weight", "bias"):
        inputs = case(9, 4, 7, dtype=F32)
        with torch.no_grad():
            inputs[name].view(-1)[5] = torch.nan
        for form in ({}, {"low_memory": True}):
            assert linear_cross_entropy(**inputs, **form).isnan()
    inputs = case(3, 4, 7, dtype=F32)
    with torch.no_grad():
        inputs["hidden"].fill_(1e30)
        inputs["weight"].fill_(1e30)
    assert linear_cross_entropy(**inputs).isnan()  # logits beyond fp32


def test_a_sharded_weight_is_refused_with_the_way_out():
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inputs = case(6, 4, 5, dtype=F32)
        whole = inputs["weight"].detach()
        inputs["weight"] = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(ValueError, match=r"weight is a DTensor; pass weight.full_tensor\(\)"):
            linear_cross_entropy(**inputs)
        want = linear_cross_entropy(**inputs | {"weight": whole})
        assert torch.equal(linear_cross_entropy(**inputs | {"weight": inputs["weight"].full_tensor()}), want)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_takes_fp32_activations_in_bf16():
    inputs = case(64, 16, 31, dtype=F32)
    with torch.autocast("cpu", BF16):
        loss = linear_cross_entropy(**inputs)
    half = dict(inputs, hidden=inputs["hidden"].detach().bfloat16().requires_grad_())
    assert torch.equal(loss, linear_cross_entropy(**half))
    assert all(g.dtype is F32 for g in gradients(loss, inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"hidden must be \[N, D\] and weight \[V, D\]"),
        ({"target": torch.tensor([0, 1, 5])}, "target has id 5, outside the vocabulary of 5"),
        ({"target": torch.tensor([0, -1, 2])}, "target has id -1"),
        ({"target": torch.tensor([0, 1])}, r"target must have shape \(3,\)"),
        ({"token_weight": torch.zeros(4)}, r"token_weight must have shape \(3,\)"),
        ({"forbidden": 5}, "forbidden is 5, outside"),
        ({"forbidden": 1}, "forbidden id 1: its loss would be infinite"),
        ({"reduction": "means"}, r"reduction 'means' is unknown \(did you mean mean\?\)"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": 0.1, "rates": torch.ones(5)}, "label_smoothing is not defined with rates"),
        ({"elapsed": torch.ones(3)}, "elapsed is given without rates"),
        ({"rates": torch.ones(4)}, "rates must have shape"),
        ({"rates": torch.ones(5), "elapsed": torch.ones(2)}, "elapsed must have shape"),
        ({"rates": torch.ones(5, requires_grad=True)}, "rates requires a gradient"),
        ({"backend": "cuda"}, "cannot use backend 'cuda' here: it runs on CUDA tensors"),
        ({"backend": "cudnn"}, "has no backend 'cudnn'"),
        ({"backend": "cpp", "hidden": torch.zeros(3, 4).double()}, "cannot use backend 'cpp' here: hidden is float64"),
        ({"rows": torch.tensor([0, 3, 1])}, "rows has 3, outside hidden, whose row count is 3"),
        ({"hidden": torch.zeros(3, 4).half()}, "hidden is torch.float16; pass bfloat16 or float32"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta and hidden on cpu"),
    ],
)
def test_bad_input(change, message):
    inputs = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs)


@pytest.mark.parametrize("listed", [None, 6])
@pytest.mark.parametrize("rated", [False, True])
def test_opcheck(listed, rated):
    c = case(9, 4, 7, listed, forbidden=6)
    given = (torch.rand(7) + 0.1, torch.rand(len(c["target"]))) if rated else (None, None)
    head, ops = (c["hidden"], c["weight"], c["target"], c["bias"]), torch.ops.atat_fast
    of_sum = (*head, c["token_weight"], c["rows"], 6, *given, 100, True, True, True, True, "torch")
    torch.library.opcheck(ops.linear_cross_entropy_sum.default, of_sum)
    torch.library.opcheck(ops.linear_cross_entropy_rows.default, (*head, c["rows"], 6, *given, 100, True, "torch"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_memory": True},
        {"rated": True},
        {"rated": True, "low_memory": True},
        {"label_smoothing": 0.1, "reduction": "mean"},
    ],
    ids=str,
)
def test_compiles_whole(options):
    inputs = case(40, 8, 13, 21, dtype=F32, forbidden=12 if "reduction" in options else None)
    if options.get("rated"):
        inputs |= {"rates": torch.rand(13) + 0.1, "elapsed": torch.rand(21)}
    elif "reduction" in options:
        inputs["target"][::4] = -100
        del inputs["token_weight"]
    options = {name: value for name, value in options.items() if name != "rated"}

    def f(hidden, weight, bias):
        return linear_cross_entropy(**dict(inputs, hidden=hidden, weight=weight, bias=bias), **options)

    args = (inputs["hidden"], inputs["weight"], inputs["bias"])
    got, want = compiled_whole(f)(*args), f(*args)
    assert same([got, *torch.autograd.grad(got, args)], [want, *torch.autograd.grad(want, args)])
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(f(*args), want, rtol=1e-2, atol=1e-2 * float(want.detach().abs() + 1))


@pytest.mark.parametrize(("count", "budget"), [(0, 1), (1, 1), (5, 10**9), (16_384, 1 << 20), (997, 123_457)])
def test_slabs_fit_their_budget_and_are_equal(count, budget):
    for multiple in (16, 128):
        step = rows_per_slab(budget, 97, 2, count, multiple=multiple)
        assert step % multiple == 0 or step == 1
        assert step == multiple or step * 97 * 2 <= budget or step < count + multiple
        slabs = -(-count // step)
        assert count - (slabs - 1) * step > step - multiple * slabs if slabs > 1 else True


def test_cost_counts_three_products_and_four():
    assert linear_cross_entropy_cost(10, 3, 7).flops == 3 * 2 * 10 * 3 * 7
    assert linear_cross_entropy_cost(10, 3, 7, recompute=True).flops == 4 * 2 * 10 * 3 * 7
    assert linear_cross_entropy_cost(10, 3, 7, backward=False).flops == 2 * 10 * 3 * 7


def test_slabs_of_changing_counts_share_few_sizes():
    """Counts of hidden tokens change from step to step; a buffer of a new size each time would leave holes in a GPU's memory."""
    columns, budget = 50_304, 256 << 20
    hidden = torch.empty(0, 8, dtype=BF16)
    most = most_rows(budget, columns, 2, multiple=128)
    sizes = set()
    for count in (*range(1, 300, 7), *range(300, 9000, 501), most - 1, most, most + 1):
        slab = new_slab(hidden, columns, count, budget, multiple=128)
        step = rows_per_slab(budget, columns, 2, count, multiple=128)
        assert min(step, count) <= len(slab) <= most and slab.numel() * 2 <= budget
        sizes.add(len(slab))
    assert len(sizes) <= 2 + most.bit_length() and max(sizes) == most
    assert new_slab(hidden, columns, 0, budget, multiple=128).shape == (0, columns)


def test_a_slab_is_a_share_of_a_gpus_memory(monkeypatch):
    gpu = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for gib, mib in ((8, 256), (16, 256), (24, 256), (48, 512), (80, 1024), (140, 1024)):
            _budget.cache_clear()
            properties = type("Properties", (), {"total_memory": gib << 30})
            patch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
            assert default_budget(gpu) == mib << 20 and default_budget(CPU) == CHUNK_BYTES_CPU
    _budget.cache_clear()
    assert torch.cuda.is_available() or default_budget(gpu) == CHUNK_BYTES_GPU
    _budget.cache_clear()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_of_any_width_are_ids(dtype):
    given = case(13, 8, 31, r=7, forbidden=30)
    want = linear_cross_entropy(**given)
    got = linear_cross_entropy(**given | {"target": given["target"].to(dtype), "rows": given["rows"].to(dtype)})
    assert torch.equal(got, want)


@every
@reductions
def test_a_row_of_weight_0_may_have_any_target(backend, device, reduction):
    """-100 where there is no label, as torch.nn.functional.cross_entropy has it, goes with a weight of 0."""
    given = case(15, 8, 33, dtype=F32, bias=False)
    labels = given["target"].clone()
    labels[::2] = -100
    inputs = given | {"target": labels, "token_weight": (labels != -100).float()}
    got = linear_cross_entropy(**inputs, reduction=reduction, backend=backend)
    want = F.cross_entropy(given["hidden"] @ given["weight"].T, labels, reduction=reduction)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got.sum(), inputs), gradients(want.sum(), inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_an_upstream_gradient_is_not_rounded_to_bf16(backend):
    """1 / 769 is 0.3 % off in bf16. Rounding to bf16 before and after the upstream is 0.06 % off for that number."""
    hidden, weight, target = torch.randn(512, 64).bfloat16(), torch.randn(211, 64) / 5, torch.randint(0, 211, (512,))
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(linear_cross_entropy_reference(exact, weight.double(), target).sum(), exact)

    def under(upstream):
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend=backend) * upstream, hidden)
        return got.double() / upstream

    whole = under(1.0)
    assert float((whole * want).sum() / want.square().sum()) == pytest.approx(1, abs=1e-3)
    for upstream in (1 / 769, 1 / 3000):
        assert float((under(upstream) * whole).sum() / whole.square().sum()) == pytest.approx(1, abs=2e-4)


def torchs(inputs, **options):
    """torch.nn.functional.cross_entropy of the same rows, the forbidden column left out of the classes."""
    logits, target, forbidden = logits_of(inputs | {"forbidden": None}), inputs["target"], inputs["forbidden"]
    if forbidden is not None:
        logits = torch.cat((logits[:, :forbidden], logits[:, forbidden + 1 :]), 1)
        target = target - (target > forbidden).long()
    return F.cross_entropy(logits, target, **options)


@low_memories
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "d", "v", "r", "forbidden"), [(7, 5, 11, None, None), (31, 3, 6, 17, 2), (1, 1, 2, None, None)])
def test_options_mean_what_torch_means(n, d, v, r, forbidden, smoothing, reduction, low_memory):
    """Exact in fp64, within 1e-4 for the compiled loop in fp32; targets of -100 count for nothing."""
    for backend, dtype in (("torch", F64), ("cpp", F32)):
        if registry.missing(backend, CPU):
            continue
        given = case(n, d, v, r, forbidden=forbidden, bias=d > 1)
        if len(given["target"]) > 1:
            given["target"][:: 3 if n > 7 else 2] = -100
        del given["token_weight"]
        options = {"reduction": reduction, "label_smoothing": smoothing}
        want, low = torchs(given, **options), leaves(given, dtype=dtype)
        got = linear_cross_entropy(**low, **options, low_memory=low_memory, backend=backend, chunk_bytes=1)
        tight = {"rtol": 1e-10, "atol": 1e-10} if dtype is F64 else {"rtol": 1e-4, "atol": 1e-5}
        upstream = [torch.randn_like(want)]
        ours, theirs = results(got, low, upstream), results(want, given, upstream)
        for name, exact in theirs.items():
            torch.testing.assert_close(ours[name].double(), exact, **tight)


@pytest.mark.parametrize("ignored", [-100, 3])
def test_a_weighted_mean_divides_by_the_weights_that_count(ignored):
    """torch's weights are the classes'; given to each row, they are ours."""
    given, classes = case(9, 4, 7), torch.rand(7, dtype=F64) + 0.1
    given["target"][2:5] = ignored
    given["token_weight"] = torch.where(given["target"] == ignored, 5.0, classes[given["target"].clamp(min=0)])
    options = {"reduction": "mean", "ignore_index": ignored}
    got, want = linear_cross_entropy(**given, **options), torchs(given, weight=classes, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(got, given), gradients(want, given))
    given["token_weight"].requires_grad_()  # and the divisor has a gradient too
    (dw,) = torch.autograd.grad(linear_cross_entropy(**given, **options, label_smoothing=0.2), given["token_weight"])
    weight = given["token_weight"].detach().requires_grad_()
    rows = torchs(given, reduction="none", ignore_index=ignored, label_smoothing=0.2)
    keep = given["target"] != ignored
    (want,) = torch.autograd.grad((weight * rows).sum() / weight[keep].sum(), weight)
    torch.testing.assert_close(dw, want)


def test_where_every_row_is_ignored_the_mean_is_nan_and_the_rest_is_zero():
    given = case(5, 4, 7, dtype=F32)
    given["target"].fill_(-100)
    del given["token_weight"]
    for reduction in ("sum", "mean", "none"):
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            got = linear_cross_entropy(**given, **options)
            torch.testing.assert_close(got, torchs(given, **options), equal_nan=True)
            assert reduction == "mean" or not any(g.any() for g in gradients(got.sum(), given))
    assert linear_cross_entropy(**given, reduction="mean").isnan()


def test_ignored_rows_may_hold_anything_and_their_nll_is_zero():
    given = case(6, 4, 7, dtype=F32)
    given["target"][1] = -100
    with torch.no_grad():
        given["hidden"][1] = torch.inf
    loss, nll = linear_cross_entropy(**given, label_smoothing=0.1, return_nll=True)
    assert nll[1] == 0 and (nll[[0, 2, 3, 4, 5]] > 0).all()
    found = gradients(loss, given)
    assert all(g.isfinite().all() for g in found) and not found[0][1].any() and found[-1][1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_options_are_within_torchs_own_error(smoothing):
    given = case(96, 32, 211, bias=False)
    given["target"][::5] = -100
    del given["token_weight"]
    low, options = leaves(given, dtype=BF16), {"reduction": "mean", "label_smoothing": smoothing}
    exact = leaves(low, dtype=F64)
    want, plain, got = torchs(exact, **options), torchs(low, **options), linear_cross_entropy(**low, **options)
    assert rmse(got, want) <= max(rmse(plain, want), 1e-5 * float(want.detach()))
    found = [dict(enumerate(gradients(out, t))) for out, t in ((got, low), (plain, low), (want, exact))]
    assert_no_worse(*found, floor=0)
