"""The trunk: token embeddings through a stack of pre-norm blocks, to the normalised rows that the head reads.

    x = x + gate * dropout(attention(y)),   x = x + gate * dropout(mlp(y)),   y = LN(x) * weight * (1 + scale) + shift

`DiT` runs it over its own blocks, `accelerate` over those of MDLM's classes; `BlockParts` holds a block's weights. A gated sum
and the norm after it are one op. So a block begins by adding the pending branch of the block before it, and leaves its own MLP
branch pending. A block's parameters are read only inside its own call: there FSDP gathers them, and there they are compiled or
recomputed. After the last attention only the rows that the head reads go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.adaptive_norm import EPS, adaptive_layer_norm, gated_residual_norm
from atat_fast.ops.attention import Documents, choose_attention, document_layout
from atat_fast.ops.registry import as_ids, autocast_dtype


class Randomness(NamedTuple):
    """What dropout depends on: seed and step (integers or 0-d int64 tensors), and the number of each sequence, [B] int64."""

    seed: int | Tensor
    step: int | Tensor
    sample_ids: Tensor


class Dropout(NamedTuple):
    """The dropout of a branch: its chance, the branch's number in the network, and the fields of `Randomness`."""

    rate: float
    number: int
    seed: int | Tensor
    step: int | Tensor
    sample_ids: Tensor


class Norm(NamedTuple):
    """A LayerNorm's weight [D], and the eps added to the variance. It has no bias."""

    weight: Tensor
    eps: float = EPS


class BlockContext(NamedTuple):
    """What a block needs beside the stream and its modulation.

    cos, sin: rotary tables [L, head_dim / 2].   before, after: dropout of the pending and of the attention branch, or None.
    layout, implementation: who sees whom, and the attention it is for: a result of `document_layout`, or the two streams of
    blocks.py. None if attention sees whole sequences.
    rows: flat indices [R] of the rows that go on after attention, None for all.   apart: whether they go on as R sequences of
    one token, or as one sequence of R.
    """

    cos: Tensor
    sin: Tensor
    layout: Any = None
    implementation: str | None = None
    before: Dropout | None = None
    after: Dropout | None = None
    rows: Tensor | None = None
    apart: bool = False


class BlockParts(NamedTuple):
    """A block's weights.

    attend: the attention branch of a normalised [B, L, D]; if the context names rows, only of those ([R, D]).
    mlp: the MLP branch of a normalised [..., D].
    """

    norm1: Norm
    attend: Callable[[Tensor, BlockContext], Tensor]
    norm2: Norm
    mlp: Callable[[Tensor], Tensor]


RunBlock = Callable[[Tensor, Tensor | None, tuple[Tensor, ...], BlockContext], tuple[Tensor, Tensor]]
"""A callable block: `run_block` with its parts filled in."""


def run_trunk(
    x: Tensor,
    blocks: Sequence[RunBlock],
    modulation: Sequence[Tensor],
    norm: Norm,
    context: BlockContext,
    *,
    rates: Sequence[float],
    randomness: Randomness | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Embeddings x [B, L, D] to the rows that the head reads: [B * L, D], or [R, D] for `rows`.

    modulation: [B or 1, D] each: every block's shift, scale, gate (attention), shift, scale, gate (MLP), then the last norm's
        shift and scale.
    norm: the last one.   context: `block_context`.   rates: each block's dropout chance, used only with randomness.
    rows: [R] integers, flat indices b * L + i, or None for all. What only other rows need is not computed.
    """
    rows = None if rows is None else as_ids("rows", rows)
    length, last = x.shape[1], modulation[-2:]
    branch, gate, before = None, modulation[2], None  # nothing is pending yet: the first block reads none of these
    for i, block in enumerate(blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[6 * i : 6 * i + 6]
        drawn = randomness if rates[i] > 0 else None
        if rows is not None and i + 1 == len(blocks):
            tail, drawn, apart = _pick(modulation[-6:], rows, length, drawn)
            gate1, shift2, scale2, gate2, *last = tail
            context = context._replace(rows=rows, apart=apart)
        after, own = (None if drawn is None else Dropout(rates[i], number, *drawn) for number in (2 * i, 2 * i + 1))
        context = context._replace(before=before, after=after)
        x, branch = block(x, branch, (gate, shift1, scale1, gate1, shift2, scale2), context)
        gate, before = gate2, own
    _, y = add_and_norm(x, branch, gate, before, norm, *last)
    return y.flatten(0, 1)


def run_block(
    parts: BlockParts, x: Tensor, branch: Tensor | None, modulation: tuple[Tensor, ...], context: BlockContext
) -> tuple[Tensor, Tensor]:
    """One block, from the pending branch of the block before it to its own.

    x: [B, L, D] residual stream.   branch: [B, L, D], not yet added to x; None before the first block.
    modulation: [B or 1, D] each: the gate of that branch, shift, scale and gate of the attention, shift and scale of the MLP.
    Returns the stream before the MLP and the MLP's branch; if the context names rows, only of those.
    """
    gate, shift1, scale1, gate1, shift2, scale2 = modulation
    x, y = add_and_norm(x, branch, gate, context.before, parts.norm1, shift1, scale1)
    branch = parts.attend(y, context)
    if context.rows is not None:
        x = x.flatten(0, 1).index_select(0, context.rows)
        x, branch = (x[:, None], branch[:, None]) if context.apart else (x[None], branch[None])
    x, y = add_and_norm(x, branch, gate1, context.after, parts.norm2, shift2, scale2)
    return x, parts.mlp(y)


def add_and_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor, dropout: Dropout | None, norm: Norm, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate * dropout(branch), or x without a branch; and its adaptive norm."""
    if branch is None:
        return x, adaptive_layer_norm(x, shift, scale, norm.weight, eps=norm.eps)
    if dropout is None:
        return gated_residual_norm(x, branch, gate, shift, scale, norm.weight, eps=norm.eps)
    return gated_residual_norm(
        x,
        branch,
        gate,
        shift,
        scale,
        norm.weight,
        eps=norm.eps,
        dropout=dropout.rate,
        layer=dropout.number,
        seed=dropout.seed,
        step=dropout.step,
        sample_ids=dropout.sample_ids,
    )


def block_context(x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> BlockContext:
    """The context of blocks over x [B, L, D]; attention stays inside the documents, if there are any."""
    if documents is None:
        return BlockContext(cos, sin)
    implementation = choose_attention(x.device, autocast_dtype(x), 2 * cos.shape[-1], True)
    return BlockContext(cos, sin, document_layout(documents, implementation), implementation)


def _pick(
    modulation: Sequence[Tensor], rows: Tensor, length: int, randomness: Randomness | None
) -> tuple[Sequence[Tensor], Randomness | None, bool]:
    """Modulation and randomness of rows that are picked from [B, L, D], and whether each is a sequence of its own.

    With one modulation for all and no dropout they are one sequence. Otherwise each row takes its sample's modulation, and a
    number of its own that drops what would be dropped among all rows. Padding names row 0 again; its gradient is 0.
    """
    if modulation[0].shape[0] == 1 and randomness is None:
        return modulation, None, False
    owner = torch.div(rows, length, rounding_mode="floor")
    if randomness is not None:
        randomness = randomness._replace(sample_ids=randomness.sample_ids[owner] * length + (rows - owner * length))
    if modulation[0].shape[0] > 1:  # an embedding's backward adds up in a fixed order, in fp32
        table = torch.cat(list(modulation), dim=1)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        modulation = F.embedding(owner, table).chunk(len(modulation), dim=1)
    return modulation, randomness, True
