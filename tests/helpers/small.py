"""Small models whose weights are random everywhere: no gradient or logit is hidden behind a zero that training starts with."""

from __future__ import annotations

import torch

from atat_fast.models import DiT

SIZE = {"dim": 16, "layers": 2, "heads": 2, "length": 12, "conditioning_dim": 8, "dropout": 0.0}


def filled(model, scale=0.2):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


def small_dit(vocabulary=11, mask_id=None, *, scale=0.2, seed=0, **changes):
    """The same model each time. mask_id: the last one."""
    torch.manual_seed(seed)
    return filled(DiT(vocabulary, vocabulary - 1 if mask_id is None else mask_id, **SIZE | changes), scale)
