"""The choice of backends, and the table of it."""

from __future__ import annotations

import inspect

import pytest
import torch

import atat_fast.ops.__main__ as table
from atat_fast.ops import gated_residual_norm, library, linear_categorical, mask_tokens, registry, rotary_table, self_attention
from atat_fast.ops.attention.op import _choose, choose_attention
from atat_fast.ops.linear_cross_entropy import row_pass

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class Answers:
    """A compiled library of sm_89, sm_90 and PTX of compute_90 under a driver that serves its CUDA."""

    runtime, driver, reaches, targets = 13000, 13010, True, (89, 90, -90)

    def build_flags(self):
        return library.CPU_OPS | library.CUDA_KERNELS

    def cuda_target(self, index):
        return (*self.targets, 0)[index]

    def cuda_runtime(self):
        return self.runtime

    def cuda_driver(self):
        return self.driver

    def reaches_stream(self):
        return self.reaches


@pytest.fixture
def answers(monkeypatch):
    """The library as somebody else built it, beside a CUDA torch that sees a GPU."""
    found = Answers()
    monkeypatch.setattr(library, "problem", lambda: None)
    monkeypatch.setattr(torch.ops, "atat_fast_c", found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    library.cuda_targets.cache_clear()
    yield found
    library.cuda_targets.cache_clear()


def test_every_op_runs_its_specification_anywhere():
    for op in registry.ops():
        assert registry.choose_backend(op, CPU, "torch") == "torch"
        assert registry.explain(op, torch.device("meta"))["torch"] is None


def test_a_backend_that_cannot_run_says_why():
    reasons = registry.explain("mask_tokens", CPU)
    assert list(reasons) == ["cpp", "torch", "triton", "cuda"]
    assert reasons["cuda"] == "it runs on CUDA tensors"
    assert (reasons["cpp"] is None) == library.load()
    without = (("cpp", "the batch is too odd"),)
    assert registry.choose_backend("mask_tokens", CPU, None, without) == "torch"
    with pytest.raises(ValueError, match="cannot use backend 'cpp' here: the batch is too odd; what can run is torch"):
        registry.choose_backend("mask_tokens", CPU, "cpp", without)


def test_without_the_library_the_specification_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(library, "problem", lambda: "the compiled library was not built")
    registry._choose.cache_clear()
    assert registry.choose_backend("mask_tokens", CPU) == "torch"
    with pytest.raises(ValueError, match="cannot use backend 'cpp' here: the compiled library was not built"):
        registry.choose_backend("mask_tokens", CPU, "cpp")
    registry._choose.cache_clear()


def test_the_table_names_every_op_and_says_what_attention_calls(capsys, monkeypatch):
    table.main()
    printed = capsys.readouterr().out
    assert all(op in printed for op in registry.ops())
    for words in (
        "not cuda: it runs on CUDA tensors",
        "tensors on cpu: first of cpp > torch > triton",
        "within documents, float32: sdpa_flash",
        "attention              head dimension 64, float32: sdpa_flash, also products, sdpa_math",
        "not flash_attn: it runs on CUDA tensors",
    ):
        assert words in printed
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "cudnn")
    table.main()
    assert "none: attention cannot use 'cudnn' here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library_is", "capability", "reason"),
    [
        ({}, (8, 9), None),
        ({}, (9, 0), None),
        ({}, (12, 0), None),  # by PTX
        ({}, (8, 6), 'holds sm_89, sm_90 and PTX of compute_90, and this device is sm_86; ATAT_FAST_CUDA_ARCHS="8.6" `pip'),
        ({}, (7, 5), 'and this device is sm_75; ATAT_FAST_CUDA_ARCHS="7.5"'),
        ({"targets": (89,)}, (8, 9), None),
        ({"targets": (89,)}, (9, 0), "holds sm_89, and this device is sm_90"),
        ({"driver": 12080}, (9, 0), "needs CUDA 13.0, and the driver supports CUDA up to 12.8; install a newer driver, or build"),
        ({"driver": 13000, "runtime": 13020}, (9, 0), None),  # within a major version an older driver serves a newer runtime
        ({"reaches": False}, (9, 0), "was linked without libtorch.so"),
        ({"reaches": False, "torch": None}, (9, 0), "was built without CUDA"),
    ],
)
def test_a_library_claims_the_cards_it_was_built_for_if_its_torch_and_driver_serve_it(
    answers, monkeypatch, library_is, capability, reason
):
    vars(answers).update(library_is)
    if "torch" in library_is:
        monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for found in (registry.missing("cuda", GPU), library.cuda_problem(capability)):
        assert found is None if reason is None else found and reason in found and "\n" not in found


def test_an_older_library_is_told_in_one_sentence(monkeypatch):
    if not library.load():
        pytest.skip("the compiled library is not built here")
    monkeypatch.setattr(library, "NEWEST", "no_such_op")
    library.problem.cache_clear()
    try:
        assert "was built from older sources than this package's" in library.problem() and library.build_flags() == 0
    finally:
        library.problem.cache_clear()


def test_every_triton_launch_is_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device: whatever a backend `triton` does happens with the first tensor's made current."""
    now = []

    class Entered:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            now.append(self.tensor)

        def __exit__(self, *_):
            now.pop()

    def launch(*arguments, **named):
        first = next(a for a in arguments if isinstance(a, torch.Tensor))
        assert now and now[-1] is first, "a launch outside of its device"
        raise Done

    class Done(Exception):
        pass

    monkeypatch.setattr(registry, "on_device", Entered)
    monkeypatch.setattr(row_pass, "on_device", Entered)
    x = torch.zeros(2, 2)
    for name, implementations in registry._table.items():
        if "triton" not in implementations or name == "linear_cross_entropy":  # whose launches are its row pass's, below
            continue
        monkeypatch.setitem(implementations, "triton", launch)
        with pytest.raises(Done):
            registry.dispatch(name)(None, x, "triton")
    kernels = pytest.importorskip("atat_fast.kernels.cross_entropy", exc_type=ImportError)
    monkeypatch.setattr(kernels, "cross_entropy_", launch)
    names = inspect.signature(row_pass.cross_entropy_).parameters
    with pytest.raises(Done):
        row_pass.cross_entropy_(**dict.fromkeys(names) | {"logits": x, "backend": "triton"})


def test_attention_under_deterministic_algorithms_has_a_kernel(monkeypatch):
    """torch has no cuDNN attention in that mode, and a choice made in the other is not kept for it."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _choose.cache_clear()
    try:
        for deterministic, kernel in ((False, "cudnn"), (True, "sdpa_flash"), (False, "cudnn")):
            torch.use_deterministic_algorithms(deterministic)
            assert choose_attention(GPU, torch.bfloat16, 64) == kernel
            if deterministic:
                with pytest.raises(ValueError, match="cannot use 'cudnn' here: torch refuses it under use_deterministic_algor"):
                    choose_attention(GPU, torch.bfloat16, 64, asked="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)
        _choose.cache_clear()


def test_names_and_rows_may_be_integers_of_any_width():
    tokens, ids = torch.randint(0, 9, (2, 5)), torch.tensor([3, 8])
    x, row, qkv, out = torch.randn(2, 5, 8), torch.randn(1, 8), torch.randn(24, 8), torch.randn(8, 8)
    hide = lambda ids: mask_tokens(tokens, ids.clamp(max=5), mask_id=9, seed=1, step=2, sample_ids=ids)[0]  # noqa: E731
    drop = lambda ids: gated_residual_norm(x, x, row, row, row, dropout=0.5, sample_ids=ids)[0]  # noqa: E731
    draw = lambda ids: linear_categorical(x[:, 0], torch.eye(8), ids, seed=3)  # noqa: E731
    some = lambda rows: self_attention(x, qkv, out, *rotary_table(5, 4), heads=2, rows=rows)  # noqa: E731
    for op in (hide, drop, draw, some):
        assert all(torch.equal(op(ids.to(kind)), op(ids)) for kind in (torch.uint8, torch.int16, torch.int32))
    with pytest.raises(ValueError, match=r"rows is a bool mask; pass row numbers, rows.nonzero\(\).flatten\(\)"):
        some(torch.ones(10, dtype=torch.bool))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=r"hidden is torch.float16, which autocast makes it"),
    ):
        draw(ids)


def test_ops_are_imported_without_the_compiler(python):
    """It takes longer than everything else that they need."""
    done = python("-c", "import sys, atat_fast.ops; print('torch._dynamo' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_graphs_keep_an_answer_by_the_mark_of_torchs_own_decorator():
    def ours(): ...
    def theirs(): ...

    assert vars(registry.constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs))
