"""Rotary tables of a module: made from its configuration, kept as buffers, and remade whenever they are lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atat_fast.ops.rotary import rotary_table

CPU = torch.device("cpu")  # tables are always made here, so that they are the same bits everywhere


class RotaryTables(nn.Module):
    """A module with buffers cos and sin, [length, head_dim / 2] fp32, which no state dict holds.

    They keep their values whatever happens to the module: `to_empty` would leave memory that nobody fills,
    `load_state_dict(assign=True)` would leave them on the meta device, and `bfloat16()` would round the angles of late positions.
    """

    cos: Tensor
    sin: Tensor

    def make_tables(self, length: int, head_dim: int) -> None:
        """Register the buffers, on torch's default device."""
        self._table = (length, head_dim)
        for name, table in zip(("cos", "sin"), rotary_table(length, head_dim), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_load_state_dict_post_hook(_remake)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `length` positions, on the parameters' device."""
        if self.cos.is_meta:  # parameters may have been put in one by one
            _remake(self)
        return self.cos[:length], self.sin[:length]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.cos
        super()._apply(fn, recurse)
        if self.cos is not before:
            _remake(self)
        return self


def _remake(module: RotaryTables, *_: Any) -> None:
    """Write the tables in place, or make new ones on the first parameter's device."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    for name, table in zip(("cos", "sin"), rotary_table(*module._table, device=CPU), strict=True):
        now = getattr(module, name)
        if now.device == device and now.dtype is table.dtype:
            now.copy_(table)  # in place: a captured graph reads this memory
        else:
            setattr(module, name, table.to(device))
