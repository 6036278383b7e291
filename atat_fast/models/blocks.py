"""Block diffusion: which positions see which, and a cache of finished blocks.

A model with `block` K predicts text K tokens at a time. The hidden tokens of a block see its visible ones and all earlier blocks
whole (Arriola et al., Block diffusion, arXiv 2503.09573). Training sees two streams side by side, [noised, clean]:

    noised block b   sees noised block b and clean blocks before b
    clean block b    sees clean blocks up to b

so that one pass gives the losses of all blocks. Sampling keeps the keys and values of finished blocks, so a pass costs what its
block attends to.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.errors import UsageError
from atat_fast.models.trunk import BlockContext, BlockParts, Norm, run_block, run_trunk
from atat_fast.ops.attention import MODULES, Documents, explain_attention
from atat_fast.ops.registry import constant_in_graphs
from atat_fast.ops.rotary import rotary, rotary_table


def check_block(block: int, length: int) -> None:
    """Raise UsageError if blocks of `block` tokens do not fill `length`; 0 is a model without blocks."""
    if block < 0 or block > length or (block and length % block):
        near = [k for k in range(1, length + 1) if length % k == 0]
        closest = min(near, key=lambda k: (abs(k - block), k))
        raise UsageError(f"model.block {block} does not divide model.length {length}; try {closest}, or 0 for no blocks")


@functools.lru_cache(maxsize=8)
def two_streams(length: int, block: int, device: torch.device) -> Tensor:
    """bool [1, 1, 2 L, 2 L]: whether a position of [noised, clean] (a row) sees another (a column)."""
    place = torch.arange(2 * length, device=device)
    clean, number = place >= length, place % length // block
    before, same = number[None, :] < number[:, None], number[None, :] == number[:, None]
    alike = clean[None, :] == clean[:, None]
    return ((before & clean[None, :]) | (same & alike))[None, None]


FLEX = "flex"
SWITCH = "ATAT_FAST_BLOCK_ATTENTION"


@functools.lru_cache(maxsize=8)
def flex_two_streams(length: int, block: int, device: torch.device) -> Any:
    """`two_streams` as FlexAttention takes it: tiles that nothing sees are never computed, and no mask of 2 L x 2 L is stored."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        clean_q, clean_k, own, other = q >= length, k >= length, q % length // block, k % length // block
        return ((own == other) & (clean_q == clean_k)) | (clean_k & (own > other))

    return create_block_mask(sees, None, None, 2 * length, 2 * length, device=device.type)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Any], torch.compile(flex_attention, dynamic=False) if compiled else flex_attention)


def flex_branch(x: Tensor, block: Any, context: BlockContext) -> Tensor:
    """A block's attention branch of a normalised x [B, 2 L, D] by FlexAttention: as it is, or [R, D] for the context's rows."""
    qkv = block.qkv(x).view(*x.shape[:2], 3, block.heads, -1)
    q, k, v = (t.transpose(1, 2) for t in rotary(qkv, context.cos, context.sin, norm=block.qk_norm).unbind(2))
    attended = _flex_attention(x.is_cuda)(q, k, v, block_mask=context.layout).transpose(1, 2).flatten(2)
    if context.rows is not None:
        attended = attended.flatten(0, 1).index_select(0, context.rows)
    return block.out(attended)  # type: ignore[no-any-return]


@constant_in_graphs
def masked_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The attention of two streams: `flex` if $ATAT_FAST_BLOCK_ATTENTION asks for it, else the fastest here that takes a mask.

    Raises UsageError if something else is asked for.
    """
    asked = os.environ.get(SWITCH)
    if asked not in (None, "", "mask", FLEX):
        raise UsageError(f"{SWITCH} is {asked!r}; it is {FLEX}, for FlexAttention, or mask")
    if asked == FLEX:
        return FLEX
    reasons = explain_attention(device, dtype, head_dim, documents=True)
    return next(name for name, reason in reasons.items() if reason is None and name not in MODULES)


class BlockCache:
    """Keys and values of finished blocks, and a denoiser of the next one, in the form samplers take.

    model: a DiT with blocks, in evaluation mode.   batch: sequences.   longest: finished tokens that a block sees, at most; older
    ones are dropped, a block at a time, and positions go on.
    """

    graph_safe = False
    """What it attends to grows, so nothing is captured."""

    def __init__(self, model: Any, batch: int, longest: int) -> None:
        self.model, self.batch, self.longest = model, batch, longest
        self.mask_id, self.vocab_size, self.config = model.mask_id, model.vocab_size, model.config
        self.time_conditioning = False
        self.output_head, self.logits = model.output_head, model.logits
        self.start = 0
        self.filled = 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # each layer's keys and values [B, H, room, E]

    def features(
        self,
        tokens: Tensor,
        hidden_share: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Rows that the head reads, [R, D] or [B * K, D], of the next block, given all finished ones.

        tokens [B, K] ids. rows: flat indices b * K + i. documents: of the block, where texts end inside it.
        """
        model, width = self.model, tokens.shape[1]
        if tokens.shape[0] != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, and {tokens.shape[0]} are given")
        cos, sin = self._angles(width, tokens.device)
        modulation = model.modulation(model.conditioning(None)).unflatten(-1, (-1, model.config.dim)).unbind(1)
        mask = None
        if documents is not None:
            inside = documents.ids[:, :, None] == documents.ids[:, None, :]
            mask = F.pad(inside, (self.filled, 0), value=True)[:, None]
        layers: list[Any] = list(model.blocks)
        blocks = [
            functools.partial(run_block, BlockParts(Norm(b.norm1), self._attend(i, b, mask), Norm(b.norm2), b.mlp))
            for i, b in enumerate(layers)
        ]
        return run_trunk(
            model.embedding(tokens),
            blocks,
            modulation,
            Norm(model.final_norm),
            BlockContext(cos, sin),
            rates=[0.0] * len(blocks),
            rows=rows,
        )

    def append(self, tokens: Tensor) -> None:
        """Take in the finished block: tokens [B, K] without a mask."""
        self.features(tokens, rows=torch.zeros(1, dtype=torch.int64, device=tokens.device))
        self.filled += tokens.shape[1]
        self.start += tokens.shape[1]
        if self.filled > self.longest:
            drop = self.filled - self.longest
            for keys, values in self.kept:
                for kept in (keys, values):
                    kept[:, :, : self.longest] = kept[:, :, drop : self.filled].clone()
            self.filled = self.longest

    def keep(self, which: Tensor) -> None:
        """Go on with these sequences alone: [n] int64, places in the batch."""
        self.batch = len(which)
        self.kept = [(keys[which.to(keys.device)], values[which.to(values.device)]) for keys, values in self.kept]

    def _angles(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        end = self.start + width
        if end <= self.config.length:
            cos, sin = self.model.tables(end)
            return cos[self.start :], sin[self.start :]
        cos, sin = rotary_table(width, self.config.dim // self.config.heads, device=torch.device("cpu"), first=self.start)
        return cos.to(device), sin.to(device)

    def _attend(self, layer: int, block: Any, mask: Tensor | None) -> Callable[[Tensor, BlockContext], Tensor]:
        """A block's attention over finished tokens and its own. The own keys and values lie after the kept ones."""

        def attend(y: Tensor, context: BlockContext) -> Tensor:
            batch, width, _ = y.shape
            qkv = block.qkv(y).view(batch, width, 3, block.heads, -1)
            q, k, v = (t.transpose(1, 2) for t in rotary(qkv, context.cos, context.sin, norm=block.qk_norm).unbind(2))
            if layer == len(self.kept):
                room = (batch, block.heads, self.longest + width, q.shape[-1])
                self.kept.append((q.new_empty(room), q.new_empty(room)))
            keys, values = self.kept[layer]
            end = self.filled + width
            keys[:, :, self.filled : end], values[:, :, self.filled : end] = k, v
            attended = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            attended = attended.transpose(1, 2).flatten(2)
            if context.rows is not None:
                attended = attended.flatten(0, 1).index_select(0, context.rows)
            return block.out(attended)  # type: ignore[no-any-return]

        return attend
