"""What is set up for a card."""

from __future__ import annotations

import pytest
import torch

from atat_fast.hardware.devices import ALLOCATOR_SETTINGS, grow_segments


def test_segments_of_memory_grow_unless_the_user_configured_the_allocator(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    grow_segments(torch.device("cpu"))
    assert told == []
    grow_segments(torch.device("cuda"))
    assert told == ["expandable_segments:True"]
    for name in ALLOCATOR_SETTINGS:
        with pytest.MonkeyPatch.context() as inner:
            inner.setenv(name, "max_split_size_mb:64")
            grow_segments(torch.device("cuda"))
    assert len(told) == 1
