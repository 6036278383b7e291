"""linear_cross_entropy against its specification in fp64, and against PyTorch's own bf16 error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

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

CPU = torch.device("cpu")
BACKENDS = [
    pytest.param(name, marks=[] if why is None else pytest.mark.skip(reason=why))
    for name, why in ((name, registry.missing(name, CPU)) for name in ("cpp", "torch", "triton"))
]


def case(n, d, v, r=None, dtype=torch.float64, forbidden=None, bias=True):
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


def gradients(loss, inputs):
    wanted = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(loss, wanted)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 61),
    d=st.sampled_from([1, 3, 16, 37]),
    v=st.sampled_from([2, 7, 131]),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    forbid=st.booleans(),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 5_000, 10**9]),
)
def test_fp64_matches_the_specification(n, d, v, share, forbid, bias, chunk):
    inputs = case(n, d, v, None if share is None else round(share * n), forbidden=v - 1 if forbid else None, bias=bias)
    for reduction in ("sum", "none"):
        reference = linear_cross_entropy_reference(**inputs)
        loss = linear_cross_entropy(**inputs, reduction=reduction, chunk_bytes=chunk)
        if reduction == "none":
            torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-11)
            upstream = torch.randn_like(loss) * (torch.rand_like(loss) > 0.3)  # signed, some exactly zero
            loss, want = (loss * upstream).sum(), (reference * upstream).sum()
        else:
            want = reference.sum()
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-11)
        for got, expected in zip(gradients(loss * -1.7, inputs), gradients(want * -1.7, inputs), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.sampled_from([1, 16, 37]),
    v=st.sampled_from([2, 7, 131]),
    share=st.sampled_from([None, 0.5]),
    forbid=st.booleans(),
    aged=st.booleans(),
    chunk=st.sampled_from([1, 5_000, 10**9]),
    form=st.sampled_from(["sum", "none", "low_memory"]),
)
def test_fp64_rates_match_the_specification(n, d, v, share, forbid, aged, chunk, form):
    inputs = case(n, d, v, None if share is None else round(share * n), forbidden=v - 1 if forbid else None)
    count = len(inputs["target"])
    given = {"rates": 0.1 + 3 * torch.rand(v).double(), "elapsed": 4 * torch.rand(count).double() if aged else None}
    want = linear_cross_entropy_reference(**inputs, **given)
    options = {"reduction": "none"} if form == "none" else {"low_memory": form == "low_memory"}
    got, nll = linear_cross_entropy(**inputs, **given, chunk_bytes=chunk, return_nll=True, **options)
    upstream = torch.randn(count).double() if form == "none" else torch.tensor(-1.7).double()
    want = want if form == "none" else want.sum()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    if aged:
        logits = torch.nn.functional.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
        logits = logits if inputs["rows"] is None else logits[inputs["rows"]]
        if forbid:
            logits = logits.masked_fill(torch.arange(v) == v - 1, -torch.inf)
        tilted = logits - given["elapsed"][:, None] * given["rates"]
        torch.testing.assert_close(nll, -tilted.log_softmax(1).gather(1, inputs["target"][:, None])[:, 0].detach())
    for a, b in zip(gradients((got * upstream).sum(), inputs), gradients((want * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["sum", "none"])
def test_rates_of_one_are_the_plain_loss(backend, form):
    inputs = case(30, 8, 57, 21, dtype=torch.float32, forbidden=4)
    plain = linear_cross_entropy(**inputs, reduction=form, backend=backend)
    rated = linear_cross_entropy(
        **inputs, reduction=form, backend=backend, rates=torch.ones(57), elapsed=5 * torch.rand(21)
    )  # fmt: skip
    torch.testing.assert_close(rated, plain, rtol=2e-6, atol=4e-6)
    for a, b in zip(gradients(rated.sum(), inputs), gradients(plain.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elapsed": torch.ones(9)}, "elapsed is given without rates"),
        ({"rates": torch.ones(6)}, "rates must have shape"),
        ({"rates": torch.ones(7), "elapsed": torch.ones(3)}, "elapsed must have shape"),
        ({"rates": torch.ones(7, requires_grad=True)}, "rates requires a gradient"),
    ],
)
def test_rates_that_cannot_be_used(given, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**case(9, 4, 7), **given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_forbidden_column_is_exactly_zero(poisoned, backend, low_memory):
    inputs = case(50, 8, 11, 30, dtype=torch.float32, forbidden=4)
    loss = linear_cross_entropy(**inputs, chunk_bytes=1, backend=backend, low_memory=low_memory)
    _, dweight, dbias, _ = gradients(loss, inputs)
    assert dweight[4].abs().max() == 0 and dbias[4] == 0
    assert dweight.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_rows_of_weight_zero_give_zeros_whatever_they_hold(poisoned, backend, dtype, low_memory):
    inputs = case(20, 8, 11, dtype=torch.float32)
    inputs["hidden"] = inputs["hidden"].detach().to(dtype).requires_grad_()
    with torch.no_grad():
        inputs["token_weight"][::2] = 0
        inputs["hidden"][0] = torch.inf
        inputs["hidden"][2] = torch.nan
    loss, nll, known = linear_cross_entropy(
        **inputs, return_nll=True, return_statistics=True, backend=backend, low_memory=low_memory
    )
    dhidden, dweight, dbias, dtoken = gradients(loss, inputs)
    assert loss.isfinite() and dweight.isfinite().all() and dbias.isfinite().all() and dtoken.isfinite().all()
    assert (dhidden[::2] == 0).all() and (nll[::2] == 0).all() and dhidden.isfinite().all() and (dtoken[::2] == 0).all()
    assert all((s[::2] == 0).all() and s.isfinite().all() for s in known)
    rows = linear_cross_entropy(**inputs, reduction="none", backend=backend)
    assert (rows[::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_statistics_are_those_of_the_softmax(backend, reduction):
    inputs = case(57, 8, 1031, 31, dtype=torch.float32, forbidden=1030)
    exact = {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in inputs.items()}
    logits = torch.nn.functional.linear(exact["hidden"][inputs["rows"]], exact["weight"], exact["bias"])
    logits[:, 1030] = -torch.inf
    p = torch.softmax(logits, 1)
    *_, known = linear_cross_entropy(**inputs, return_statistics=True, reduction=reduction, backend=backend)
    torch.testing.assert_close(known.max_probability.double(), p.amax(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(known.entropy.double(), torch.special.entr(p).sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(known.nll.double(), -p.gather(1, inputs["target"][:, None])[:, 0].log(), rtol=1e-5, atol=1e-6)
    assert not any(s.requires_grad for s in known)


def test_only_listed_rows_are_read(poisoned):
    inputs = case(30, 8, 11, 9, dtype=torch.float32)
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
    full = dict(zip(("hidden", "weight", "bias", "token_weight"), gradients(linear_cross_entropy(**inputs), inputs), strict=True))
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_(name == wanted)
    for form in ({}, {"reduction": "none"}, {"low_memory": True}):
        (got,) = gradients(linear_cross_entropy(**inputs, **form).sum(), inputs)
        torch.testing.assert_close(got, full[wanted], rtol=1e-12, atol=1e-12)


def floats_to(inputs, dtype):
    """Inputs with hidden and weight in dtype; the rest, in fp32, holds values that dtype has."""
    kept = {k: t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in inputs.items()}
    kept |= {k: kept[k].float() for k in ("bias", "token_weight", "weight") if kept[k] is not None}
    for t in kept.values():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_size_of_a_slab_moves_no_more_than_one_last_place(dtype, backend):
    inputs = floats_to(case(257, 16, 101, 200) if backend != "triton" else case(67, 16, 101, 50), dtype)
    results = [linear_cross_entropy(**inputs, chunk_bytes=c, backend=backend) for c in (1, 101 * 4 * 64, 10**9)]
    grads = [gradients(r, inputs) for r in results]
    for loss, grad in zip(results[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, results[0], rtol=1e-5, atol=1e-3)
        for a, b in zip(grad, grads[0], strict=True):
            if dtype is torch.bfloat16:
                assert (a.double() - b.double()).abs().max() <= torch.finfo(dtype).eps * float(b.abs().max())
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_the_same_bits(dtype):
    inputs = floats_to(case(129, 32, 503, 64, forbidden=502), dtype)
    for form in ({}, {"low_memory": True}):
        first, second = (gradients(linear_cross_entropy(**inputs, chunk_bytes=50_000, **form), inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_may_be_taken_twice():
    inputs = case(20, 8, 11, 13)
    loss = linear_cross_entropy(**inputs)
    wanted = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    first = torch.autograd.grad(loss, wanted, grad_outputs=torch.tensor(-2.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(loss, wanted, grad_outputs=torch.tensor(-2.0, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_listed_twice_gets_both_gradients():
    inputs = case(5, 4, 7)
    inputs["rows"] = torch.tensor([3, 1, 3, 3, 0])
    got = gradients(linear_cross_entropy(**inputs), inputs)
    want = gradients(linear_cross_entropy_reference(**inputs).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def rmse(a, b):
    return float((a.detach().double() - b.detach().double()).pow(2).mean().sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "d", "v"), [(512, 64, 997), (512, 64, 4096), (331, 96, 2), (331, 96, 7)])
def test_bf16_errs_no_more_than_pytorchs_own_bf16(n, d, v, backend):
    n = n if backend != "triton" else n // 5  # its interpreter takes milliseconds a row
    check_bf16(n, d, v, round(0.6 * n), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "v"), [(701, 30_522), (701, 50_257), (701, 50_258), (211, 131_072)])
def test_bf16_at_full_vocabularies(n, v, backend):
    check_bf16(n, 64, v, round(0.6 * n), backend)


def check_bf16(n, d, v, r, backend):
    """Errors as ratios to those of PyTorch's bf16 path, both against fp64 of the same bf16 inputs."""
    low = floats_to(case(n, d, v, r, forbidden=v - 1 if v > 2 else None), torch.bfloat16)
    truth = {
        k: t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in low.items()
    }
    want_losses = linear_cross_entropy_reference(**truth)
    want = gradients(want_losses.sum(), truth)
    peer = dict(low)
    with torch.autocast("cpu", torch.bfloat16):
        peer_losses = linear_cross_entropy_reference(**peer)
    peer_grads = gradients(peer_losses.sum(), peer)
    loss, nll = linear_cross_entropy(**low, backend=backend, chunk_bytes=v * 2 * 160, return_nll=True)
    ours = gradients(loss, low)
    assert rmse(nll * low["token_weight"], want_losses) <= rmse(peer_losses, want_losses)
    if v >= 30_000:  # the rounding of so many logits averages out in their sum, and the target's own is not rounded
        size = float(want_losses.detach().abs().sum())  # weights are signed: the loss itself may cancel to nothing
        assert abs(float(loss.detach()) - float(want_losses.detach().sum())) <= 1e-6 * size
    for name, got, theirs, exact_grad, limit in zip(
        ("hidden", "weight", "bias", "token_weight"), ours, peer_grads, want, (1.5, 1.1, 1.5, 1.5), strict=True
    ):
        few = 2**-9 * float(exact_grad.abs().max()) if exact_grad.numel() < 16 else 0  # two numbers have no typical error
        assert rmse(got, exact_grad) <= max(limit * rmse(theirs, exact_grad), few) + 1e-9, name
    assert ours[1].dtype is torch.float32


@pytest.mark.slow
def test_a_slab_of_more_than_two_to_the_31_elements():
    torch.manual_seed(1)
    n, d, v = 65_539, 4, 32_771
    hidden, weight, target = torch.randn(n, d).bfloat16(), torch.randn(v, d).bfloat16(), torch.randint(0, v, (n,))
    nll = linear_cross_entropy(hidden, weight, target, reduction="none", chunk_bytes=1 << 33)
    last = linear_cross_entropy(hidden[-9:], weight, target[-9:], reduction="none")
    torch.testing.assert_close(nll[-9:], last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_certain_rows_keep_their_small_loss(backend):
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
        inputs = case(9, 4, 7, dtype=torch.float32)
        with torch.no_grad():
            inputs[name].view(-1)[5] = torch.nan
        for form in ({}, {"low_memory": True}):
            assert linear_cross_entropy(**inputs, **form).isnan()
    inputs = case(3, 4, 7, dtype=torch.float32)
    with torch.no_grad():
        inputs["hidden"].fill_(1e30)
        inputs["weight"].fill_(1e30)
    assert linear_cross_entropy(**inputs).isnan()  # logits beyond fp32


def test_a_sharded_weight_is_refused_with_the_way_out():
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        inputs = case(6, 4, 5, dtype=torch.float32)
        whole = inputs["weight"].detach()
        inputs["weight"] = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(ValueError, match=r"weight is a DTensor; pass weight.full_tensor\(\)"):
            linear_cross_entropy(**inputs)
        want = linear_cross_entropy(**inputs | {"weight": whole})
        assert torch.equal(linear_cross_entropy(**inputs | {"weight": inputs["weight"].full_tensor()}), want)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_takes_fp32_activations_in_bf16():
    inputs = case(64, 16, 31, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**inputs)
    half = dict(inputs, hidden=inputs["hidden"].detach().bfloat16().requires_grad_())
    assert torch.equal(loss, linear_cross_entropy(**half))
    assert all(g.dtype is torch.float32 for g in gradients(loss, inputs))


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
        ({"backend": "cuda"}, "cannot use backend 'cuda' here: it runs on CUDA tensors"),
        ({"backend": "cudnn"}, "has no backend 'cudnn'"),
        ({"backend": "cpp", "hidden": torch.zeros(3, 4).double()}, "cannot use backend 'cpp' here: hidden is float64"),
        ({"rows": torch.tensor([0, 3, 1])}, "rows has 3, outside hidden's rows, of which there are 3"),
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
    args = (
        c["hidden"],
        c["weight"],
        c["target"],
        c["bias"],
        c["token_weight"],
        c["rows"],
        6,
        *given,
        100,
        True,
        True,
        True,
        True,
        "torch",
    )
    torch.library.opcheck(torch.ops.atat_fast.linear_cross_entropy_sum.default, args)
    args = (c["hidden"], c["weight"], c["target"], c["bias"], c["rows"], 6, *given, 100, True, "torch")
    torch.library.opcheck(torch.ops.atat_fast.linear_cross_entropy_rows.default, args)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("rated", [False, True])
def test_compiles_whole(low_memory, rated):
    inputs = case(40, 8, 13, 21, dtype=torch.float32)
    if rated:
        inputs |= {"rates": torch.rand(13) + 0.1, "elapsed": torch.rand(21)}

    def f(hidden, weight, bias):
        return linear_cross_entropy(**dict(inputs, hidden=hidden, weight=weight, bias=bias), low_memory=low_memory)

    args = (inputs["hidden"], inputs["weight"], inputs["bias"])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(*args), f(*args)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, args), torch.autograd.grad(want, args), strict=True):
        assert torch.equal(a, b)


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
    hidden = torch.empty(0, 8, dtype=torch.bfloat16)
    most = most_rows(budget, columns, 2, multiple=128)
    sizes = set()
    for count in (*range(1, 300, 7), *range(300, 9000, 501), most - 1, most, most + 1):
        slab = new_slab(hidden, columns, count, budget, multiple=128)
        step = rows_per_slab(budget, columns, 2, count, multiple=128)
        assert min(step, count) <= len(slab) <= most and slab.numel() * 2 <= budget
        sizes.add(len(slab))
    assert len(sizes) <= 2 + most.bit_length() and max(sizes) == most
    assert new_slab(hidden, columns, 0, budget, multiple=128).shape == (0, columns)


@pytest.mark.parametrize(("gib", "mib"), [(8, 256), (16, 256), (24, 256), (48, 512), (80, 1024), (140, 1024)])
def test_a_slab_is_a_share_of_a_gpus_memory(monkeypatch, gib, mib):
    class Properties:
        total_memory = gib << 30

    _budget.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    try:
        assert default_budget(torch.device("cuda", 0)) == mib << 20
        assert default_budget(CPU) == CHUNK_BYTES_CPU
    finally:
        _budget.cache_clear()
    monkeypatch.undo()
    assert torch.cuda.is_available() or default_budget(torch.device("cuda", 0)) == CHUNK_BYTES_GPU
    _budget.cache_clear()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_of_any_width_are_ids(dtype):
    given = case(13, 8, 31, r=7, forbidden=30)
    want = linear_cross_entropy(**given)
    got = linear_cross_entropy(**given | {"target": given["target"].to(dtype), "rows": given["rows"].to(dtype)})
    assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_weight_0_may_have_any_target(backend, reduction):
    """-100 where there is no label, as torch.nn.functional.cross_entropy has it, goes with a weight of 0."""
    given = case(15, 8, 33, dtype=torch.float32, bias=False)
    labels = given["target"].clone()
    labels[::2] = -100
    weight = (labels != -100).float()
    got = linear_cross_entropy(
        given["hidden"], given["weight"], labels, token_weight=weight, reduction=reduction, backend=backend
    )  # fmt: skip
    want = torch.nn.functional.cross_entropy(given["hidden"] @ given["weight"].T, labels, reduction=reduction)
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(x.sum(), (given["hidden"], given["weight"])) for x in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_upstream_gradient_is_not_rounded_to_bf16():
    """1 / 769 is 0.3 % off in bf16; what is left is the rounding of each number."""
    hidden, weight, target = (
        torch.randn(512, 64).bfloat16().requires_grad_(),
        torch.randn(211, 64) / 5,
        torch.randint(0, 211, (512,)),
    )
    exact = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(linear_cross_entropy_reference(exact, weight.double(), target).sum(), exact)
    for scale in (1.0, 1 / 769, 1 / 3000):
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target) * scale, hidden)
        along = float((got.double() / scale * want).sum() / want.square().sum())
        assert along == pytest.approx(1, abs=1e-3)


def torchs(inputs, **options):
    """torch.nn.functional.cross_entropy of the same rows, the forbidden column left out of the classes."""
    hidden = inputs["hidden"] if inputs["rows"] is None else inputs["hidden"][inputs["rows"]]
    logits, target, forbidden = F.linear(hidden, inputs["weight"], inputs["bias"]), inputs["target"], inputs["forbidden"]
    if forbidden is not None:
        logits = torch.cat((logits[:, :forbidden], logits[:, forbidden + 1 :]), 1)
        target = target - (target > forbidden).long()
    return F.cross_entropy(logits, target, **options)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("n", "d", "v", "r", "forbidden"), [(7, 5, 11, None, None), (31, 3, 6, 17, 2), (1, 1, 2, None, None)])
def test_options_mean_what_torch_means(n, d, v, r, forbidden, smoothing, reduction, low_memory):
    """Exact in fp64, within 1e-4 for the compiled loop in fp32; targets of -100 count for nothing."""
    for backend, dtype in (("torch", torch.float64), ("cpp", torch.float32)):
        if registry.missing(backend, CPU):
            continue
        given = case(n, d, v, r, forbidden=forbidden, bias=d > 1)
        if len(given["target"]) > 1:
            given["target"][:: 3 if n > 7 else 2] = -100
        del given["token_weight"]
        options = {"reduction": reduction, "label_smoothing": smoothing}
        want = torchs(given, **options)
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in given.items() if t is not None and k in GIVEN}
        got = linear_cross_entropy(**given | leaves, **options, low_memory=low_memory, backend=backend, chunk_bytes=1)
        tight = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got.double(), want, **tight)
        upstream = torch.randn_like(want)
        ours = torch.autograd.grad(got, list(leaves.values()), upstream.to(dtype))
        theirs = gradients((want * upstream).sum(), given)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, **tight)


GIVEN = ("hidden", "weight", "bias")


@pytest.mark.parametrize("ignored", [-100, 3])
def test_a_weighted_mean_divides_by_the_weights_that_count(ignored):
    """torch's weights are the classes'; given to each row, they are ours."""
    given, classes = case(9, 4, 7), torch.rand(7, dtype=torch.float64) + 0.1
    given["target"][2:5] = ignored
    given["token_weight"] = torch.where(given["target"] == ignored, 5.0, classes[given["target"].clamp(min=0)])
    options = {"reduction": "mean", "ignore_index": ignored}
    got, want = linear_cross_entropy(**given, **options), torchs(given, weight=classes, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(gradients(got, given), gradients(want, given), strict=True):
        torch.testing.assert_close(a, b)
    given["token_weight"].requires_grad_()  # and the divisor has a gradient too
    (dw,) = torch.autograd.grad(linear_cross_entropy(**given, **options, label_smoothing=0.2), given["token_weight"])
    weight = given["token_weight"].detach().requires_grad_()
    rows = torchs(given, reduction="none", ignore_index=ignored, label_smoothing=0.2)
    keep = given["target"] != ignored
    (want,) = torch.autograd.grad((weight * rows).sum() / weight[keep].sum(), weight)
    torch.testing.assert_close(dw, want)


def test_where_every_row_is_ignored_the_mean_is_nan_and_the_rest_is_zero():
    given = case(5, 4, 7, dtype=torch.float32)
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
    given = case(6, 4, 7, dtype=torch.float32)
    given["target"][1] = -100
    with torch.no_grad():
        given["hidden"][1] = torch.inf
    loss, nll = linear_cross_entropy(**given, label_smoothing=0.1, return_nll=True)
    assert nll[1] == 0 and (nll[[0, 2, 3, 4, 5]] > 0).all()
    found = gradients(loss, given)
    assert all(g.isfinite().all() for g in found) and not found[0][1].any() and found[-1][1] == 0


def test_smoothing_never_moves_the_forbidden_row():
    given = case(20, 8, 9, forbidden=4, dtype=torch.float32)
    _, dweight, dbias, _ = gradients(linear_cross_entropy(**given, label_smoothing=0.3), given)
    assert not dweight[4].any() and dbias[4] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_options_are_within_torchs_own_error(smoothing):
    given = case(96, 32, 211, dtype=torch.float64, bias=False)
    given["target"][::5] = -100
    del given["token_weight"]
    leaves = {k: given[k].detach().bfloat16().requires_grad_() for k in ("hidden", "weight")}
    truth = {k: t.detach().double().requires_grad_() for k, t in leaves.items()}
    options = {"reduction": "mean", "label_smoothing": smoothing}
    want, plain = torchs(given | truth, **options), torchs(given | leaves, **options)
    got = linear_cross_entropy(**given | leaves, **options)
    assert abs(float(got) - float(want)) <= max(abs(float(plain) - float(want)), 1e-5 * float(want))
    for a, b, w in zip(gradients(got, leaves), gradients(plain, leaves), gradients(want, truth), strict=True):
        assert (a.double() - w).norm() <= 1.5 * (b.double() - w).norm()


def test_options_compile_whole_and_run_under_autocast():
    given = case(40, 8, 13, 21, dtype=torch.float32, forbidden=12)
    given["target"][::4] = -100

    def f(hidden, weight, bias):
        inputs = dict(given, hidden=hidden, weight=weight, bias=bias)
        return linear_cross_entropy(**inputs, label_smoothing=0.1, reduction="mean")

    args = (given["hidden"], given["weight"], given["bias"])
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want = f(*args)
    torch.testing.assert_close(compiled(*args), want)
    torch.testing.assert_close(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(want, args))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(f(*args), want, rtol=1e-2, atol=1e-2)
