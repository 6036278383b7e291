"""Block diffusion by enumeration: is the sum of the blocks' bounds the likelihood?

A block of K tokens sees its own visible tokens and all earlier blocks whole. At the best model its bound is the entropy of the
block given those before it, and the sum is the joint's. At K = 1 every mask hides the one token, and the bound is the chain rule
itself; at K = L there is one block, and it is the bound of docs/training.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.audit.masks import JOINTS, HideLaw, Joint, masked_cross_entropy, number, spread_law, uniform_law
from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.counts import bound_weights, count_chances

SIZES = (1, 2, 4)
BELL = DiffusionConfig(counts="bell")
LAWS: tuple[tuple[str, HideLaw, DiffusionConfig | None], ...] = (
    ("uniform counts", uniform_law, None),
    ("evenly spread in a block", spread_law(1.0), None),
    ("bell counts, the bound's weights", uniform_law, BELL),
)
"""Masks in words, their law, and settings of the counts, or None for uniform ones."""


def beginning(joint: Joint, length: int) -> Joint:
    """The joint of its first `length` tokens."""
    sequences, place = torch.unique(joint.sequences[:, :length], dim=0, return_inverse=True)
    chance = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, place, joint.chance)
    return Joint(sequences, chance)


def block_value(joint: Joint, block: int, law: HideLaw = uniform_law, counts: DiffusionConfig | None = None) -> float:
    """The training objective of blocks of `block` tokens at the best model, in nats a sequence."""
    factors = [1 / k if k else 0.0 for k in range(block + 1)]  # the chance of k, 1 / (K + 1), times its weight
    chances: Tensor | None = None if counts is None else count_chances(counts, block, 0.0)
    if chances is not None:
        factors = (chances * bound_weights(chances)).tolist()
    total = 0.0
    for end in range(block, joint.length + 1, block):
        seen = beginning(joint, end)
        for k in range(1, block + 1):
            for hidden, chance in law(seen.sequences[:, end - block :], k).items():
                place = tuple(end - block + i for i in hidden)
                total += factors[k] * masked_cross_entropy(seen, place, chance)
    return total


def block_table() -> str:
    """Blocks and masks, as a table for docs/blocks.md."""
    lines = ["| block | masks | value - entropy |", "|---|---|---|"]
    for block in SIZES:
        for masks, law, counts in LAWS:
            above = []
            for vocabulary, length, seed in JOINTS:
                joint = Joint.random(vocabulary, length, seed=seed)
                above.append(block_value(joint, block, law, counts) - joint.entropy())
            lines.append(f"| {block if block < length else f'{block}, the whole'} | {masks} | {number(max(above, key=abs))} |")
    return "\n".join(lines)
