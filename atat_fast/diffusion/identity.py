"""The token-identity schedule: each token of the vocabulary is hidden at its own rate, with a bound that fits.

At time t a token v is hidden with chance t^w_v (alpha_v(t) = 1 - t^w_v, GenMD4's form: Shi et al., "Simplified and Generalized
Masked Diffusion for Discrete Data", 2024). Tokens are revealed one by one with odds w, a race, until a set M of k is left; W is
the sum of w over M. The bound is

    NELBO(x) = E over k uniform on 0..L, M from the race with |M| = k, of
               (L + 1) / W * sum over hidden i of [-w_x_i log mu_i(x_i) + sum_v w_v mu_i(v) - w_x_i],

with mu = softmax(logits - s w) and s the time drawn from its law given M. docs/atat.md ("Rates of tokens") derives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.process import MaskedBatch, Tilt, per_row
from atat_fast.errors import UsageError
from atat_fast.ops.masking import mask_tokens
from atat_fast.ops.philox import STREAM_COUNT, STREAM_MASK, random_words, uniform

MOST_STRENGTH = 5.0
"""Largest |identity_strength|. Rates then differ by up to e^5; times reach about 20 / the least rate, and s w_v a few thousand,
where fp32 logits still have steps below 0.001."""


def log_rank(counts: Tensor) -> Tensor:
    """Importance of each id by frequency, [V] fp32: log(1 + rank) / log V. The commonest has rank 0; ties go by id."""
    counts = counts.flatten()
    order = torch.argsort(-counts.long(), stable=True)
    rank = torch.empty(len(counts), dtype=torch.float64, device=counts.device)
    rank[order] = torch.arange(len(counts), dtype=torch.float64, device=counts.device)
    return (torch.log1p(rank) / math.log(max(2.0, len(counts)))).to(torch.float32)


def identity_rates(scores: Tensor, counts: Tensor, strength: float) -> Tensor:
    """Rates [V] fp32: exp(-strength * score), scaled to mean 1 over the tokens of the text. Bounds depend only on their ratios.

    scores: [V] in [0, 1], 0 for the commonest token and 1 for the rarest.   counts: [V], how often each occurs in the text.
    Raises ValueError if all counts are 0.
    """
    counts = counts.flatten().double()
    if float(counts.sum()) <= 0:
        raise ValueError("rates of tokens need their counts in the training text, and all counts are 0")
    rates = torch.exp(-strength * scores.double())
    return (rates * counts.sum() / (rates * counts).sum()).float()


class IdentitySchedule:
    """The process with given rates.

    Args:
        rates: [V] fp32 above 0.
    """

    own_bound = True

    def __init__(self, rates: Tensor) -> None:
        log_rates = rates.detach().double().log()
        low, high = (float(v) for v in torch.aminmax(log_rates))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("rates must be finite and above 0")
        self.rates = rates.detach().float()
        # mask_tokens reveals with odds exp(-tilt * score): scores in [0, 1] whose odds are the rates. Tilt 0 is uniform.
        self.tilt = high - low
        self.scores = ((high - log_rates) / (self.tilt or 1.0)).clamp(0, 1).float()

    @classmethod
    def of(cls, config: DiffusionConfig, counts: Callable[[], Tensor]) -> IdentitySchedule:
        """Rates exp(-identity_strength * log-rank) of the training text's tokens."""
        found = counts()
        return cls(identity_rates(log_rank(found), found, config.identity_strength))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], vocabulary: int) -> IdentitySchedule:
        """From {"rates": [V]}."""
        if tuple(tensors["rates"].shape) != (vocabulary,):
            raise ValueError(f"rates are {tuple(tensors['rates'].shape)}, and the vocabulary {vocabulary:,}")
        return cls(tensors["rates"])

    def tensors(self) -> dict[str, Tensor]:
        """The rates."""
        return {"rates": self.rates}

    @staticmethod
    def describe(config: DiffusionConfig) -> str:
        """For the plan."""
        return f"token identity: revealed at rates exp(-{config.identity_strength:g} * log-rank of the token)"

    def to(self, device: torch.device) -> IdentitySchedule:
        """The same on another device."""
        moved = IdentitySchedule.__new__(IdentitySchedule)
        moved.rates, moved.scores, moved.tilt = self.rates.to(device), self.scores.to(device), self.tilt
        return moved

    @staticmethod
    def check(config: DiffusionConfig) -> None:
        """Raise UsageError for a strength beyond what fp32 logits resolve."""
        strength = config.identity_strength
        if not abs(strength) <= MOST_STRENGTH:
            raise UsageError(
                f"diffusion.identity_strength {strength} makes rates differ by more than e^{MOST_STRENGTH:g}, beyond what fp32 "
                f"logits resolve; use a number from {-MOST_STRENGTH:g} to {MOST_STRENGTH:g}"
            )

    def hide(
        self,
        tokens: Tensor,
        counts: Tensor,
        *,
        mask_id: int,
        sample_ids: Tensor,
        seed: int | Tensor,
        step: int | Tensor,
        weighting: str = "uniform",
    ) -> MaskedBatch:
        """Hide exactly counts[b] (CPU int64) tokens of sequence b, as the race leaves them. tokens [B, L] without mask_id.

        The batch has weights (L + 1) / W, whatever `weighting`, and as tilt the vocabulary's rates and the time s of every hidden
        token. Nothing waits for a device.
        """
        device, length, number = tokens.device, tokens.shape[1], int(counts.sum())
        noisy, rows, _ = mask_tokens(
            tokens,
            counts.to(device, non_blocking=True),
            num_rows=number,
            mask_id=mask_id,
            sample_ids=sample_ids,
            seed=seed,
            step=step,
            scores=self.scores[tokens],
            tilt=self.tilt,
            stream=STREAM_MASK,
        )
        own, hidden = self.rates[tokens].double(), noisy == mask_id
        total = torch.where(hidden, own, 0.0).sum(1)  # W; 0 if nothing is hidden, but then there is no row
        word = random_words(sample_ids[:, None] * length + torch.arange(length, device=device), seed, step, STREAM_MASK)[0]
        reached = torch.where(hidden, 0.0, -torch.log(uniform(word)) / own).amax(1)
        stay = -torch.log(uniform(random_words(sample_ids, seed, step, STREAM_COUNT)[2]))
        share = (counts / max(1, length)).to(device, torch.float32, non_blocking=True)
        return MaskedBatch(
            noisy,
            rows,
            tokens.flatten()[rows],
            per_row((length + 1) / total, counts, rows),
            share,
            tokens.numel(),
            hidden=number,
            tilt=Tilt(self.rates, per_row(reached + stay / total, counts, rows)),
        )
