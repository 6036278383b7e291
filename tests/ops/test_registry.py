"""The choice of backends, and the table of it."""

from __future__ import annotations

import pytest
import torch

import atat_fast.ops.__main__ as table
from atat_fast.ops import library, registry

CPU = torch.device("cpu")


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


def test_the_table_names_every_op(capsys):
    table.main()
    printed = capsys.readouterr().out
    assert all(op in printed for op in registry.ops())
    assert "not cuda: it runs on CUDA tensors" in printed and "tensors on cpu: first of cpp > torch > triton" in printed


def test_the_table_says_what_attention_calls(capsys, monkeypatch):
    table.main()
    printed = capsys.readouterr().out
    assert "attention              head dimension 64, float32: sdpa_flash, also products, sdpa_math" in printed
    assert "within documents, float32: sdpa_flash" in printed and "not flash_attn: it runs on CUDA tensors" in printed
    monkeypatch.setenv("ATAT_FAST_ATTENTION", "cudnn")
    table.main()
    assert "none: attention cannot use 'cudnn' here" in capsys.readouterr().out
