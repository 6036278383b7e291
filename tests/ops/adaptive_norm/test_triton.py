"""The Triton kernels of the norms by themselves: several tiles a program, and the second stage of sums over rows."""

from __future__ import annotations

import pytest
import torch
from adaptive_norm.test_op import LOW, check, example
from op_checks import BF16, interpreted, on_gpu

pytest.importorskip("triton")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted, id="interpreted"), pytest.param("cuda", marks=on_gpu, id="gpu")]
)


@devices
def test_programs_that_go_over_several_tiles(device, poisoned, monkeypatch):
    from atat_fast.kernels import adaptive_norm as kernels

    monkeypatch.setattr(kernels, "RESIDENT", 5)
    monkeypatch.setattr(kernels, "BRIEF", 4)
    assert kernels.plan(2, 23, 256, 5)[:2] == ((2, 2), 12)  # three tiles of four rows, then two and three quarters
    check("triton", device, example(2, 23, 256, **LOW), BF16, dropout=0.1)


@devices
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
