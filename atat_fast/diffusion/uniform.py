"""Masks that are blind to the text: every set of k tokens is equally likely, or the k lie evenly. Also mirrored pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.process import MaskedBatch, per_row
from atat_fast.ops.masking import mask_tokens


def hide(
    tokens: Tensor,
    counts: Tensor,
    *,
    mask_id: int,
    sample_ids: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    weighting: str = "uniform",
    spread: float = 0.0,
    frozen: Tensor | None = None,
) -> MaskedBatch:
    """Hide exactly counts[b] (CPU int64) tokens of sequence b. The loss is sum(weights * nll) / batch.tokens, nats a token.

    spread, frozen: as in ops.mask_tokens.
    """
    device, hidden = tokens.device, int(counts.sum())
    noisy, rows, weights = mask_tokens(
        tokens,
        counts.to(device, non_blocking=True),
        num_rows=hidden,
        mask_id=mask_id,
        sample_ids=sample_ids,
        seed=seed,
        step=step,
        weighting=weighting,
        spread=spread,
        frozen=frozen,
    )
    share = (counts / max(1, tokens.shape[1])).to(device, torch.float32, non_blocking=True)
    return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, share, tokens.numel(), hidden=hidden)


def hide_mirrored(
    tokens: Tensor, counts: Tensor, *, first: int, mask_id: int, sample_ids: Tensor, seed: int, step: int
) -> MaskedBatch:
    """Hide counts[b] tokens of sequence b. An odd slot hides exactly what the even slot before it leaves visible.

    Slots are first .. first + B - 1. An odd slot draws its partner's mask and takes the complement, so a pair may be cut apart.
    Each slot alone hides every set of its size with equal chance, so each alone, and their mean, estimates the bound.
    """
    batch, length = tokens.shape
    second = torch.arange(first, first + batch) % 2 == 1
    drawn = torch.where(second, length - counts, counts)
    turned = second.to(tokens.device, non_blocking=True)
    ids = sample_ids - turned.to(sample_ids.dtype)
    partner = hide(tokens, drawn, mask_id=mask_id, sample_ids=ids, seed=seed, step=step)
    hidden = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device).index_fill_(0, partner.rows, True)
    hidden = hidden.view(batch, length) ^ turned[:, None]
    rows = torch.nonzero_static(hidden.flatten(), size=int(counts.sum()))[:, 0]
    weights = per_row((length + 1) / counts.clamp(min=1).double(), counts, rows)
    share = (counts / max(1, length)).to(tokens.device, torch.float32, non_blocking=True)
    noisy, target = tokens.masked_fill(hidden, mask_id), tokens.flatten()[rows]
    return MaskedBatch(noisy, rows, target, weights, share, tokens.numel(), hidden=len(rows))


class Uniform:
    """The process of MDLM's log-linear schedule. It has no state."""

    own_bound = False
    hide = staticmethod(hide)

    @classmethod
    def of(cls, config: DiffusionConfig, counts: Callable[[], Tensor]) -> Uniform:
        """Needs no counts."""
        return cls()

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], vocabulary: int) -> Uniform:
        """Nothing is restored."""
        return cls()

    @staticmethod
    def check(config: DiffusionConfig) -> None:
        """Every setting is valid."""

    @staticmethod
    def describe(config: DiffusionConfig) -> str:
        """Nothing to say."""
        return ""

    def tensors(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def to(self, device: torch.device) -> Uniform:
        """Itself: it has no state."""
        return self


UNIFORM = Uniform()
