"""What a masking process is: it says which tokens are hidden, what else their loss needs, and what a checkpoint keeps of it.

A new one is a file with a class like `identity.IdentitySchedule` and a line in the table of `processes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig
from atat_fast.ops.attention import Documents


class Scored(NamedTuple):
    """Importance of a batch's tokens: scores [B, L] fp32 in [0, 1], and the estimator's logits [B, L] if it made them."""

    scores: Tensor
    logits: Tensor | None = None


class Tilt(NamedTuple):
    """Logits of hidden row i are lowered by elapsed[i] * rates before the softmax: the vocabulary's rates [V] and the rows' times
    [R], both fp32. A row's loss is then `linear_cross_entropy`'s with rates, not -log p.
    """

    rates: Tensor
    elapsed: Tensor


@dataclass
class MaskedBatch:
    """What the model sees and what it must say.

    noisy: [B, L] ids.   rows: [R] flat indices of hidden tokens.   target: [R] their true ids.   weights: [R] fp32.
    hidden_share: [B] fp32, the share of each sequence that is hidden, which a time-conditioned model is told.
    tokens: B * L, what the loss divides by.   documents: boundaries that attention keeps, or None.
    hidden: how many of the rows are no padding; they come first.   importance: scores that chose the masks, or None.
    tilt: what the process adds to the loss, or None.
    """

    noisy: Tensor
    rows: Tensor
    target: Tensor
    weights: Tensor
    hidden_share: Tensor
    tokens: int
    documents: Documents | None = None
    hidden: int = 0
    importance: Scored | None = None
    tilt: Tilt | None = None

    def tensors(self) -> list[Tensor]:
        """What the model's loss is computed from, in a fixed order."""
        return [self.noisy, self.rows, self.target, self.weights, self.hidden_share, *(self.tilt or ())]

    def clone(self) -> MaskedBatch:
        """With buffers of its own for these tensors."""
        noisy, rows, target, weights, share, *tilt = (tensor.clone() for tensor in self.tensors())
        return replace(
            self, noisy=noisy, rows=rows, target=target, weights=weights, hidden_share=share, tilt=Tilt(*tilt) if tilt else None
        )


class Hide(Protocol):
    """Hides exactly counts[b] (CPU int64) tokens of sequence b of tokens [B, L], which hold no mask_id.

    What is hidden depends on (seed, step, sample id, position) and what the process looks at, and nothing waits for a device.
    weighting: see ops.mask_tokens; `uniform` is (L + 1) / k, or what makes the process's own bound.
    """

    def __call__(
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
        """The masked batch."""


class Process(Protocol):
    """A way to choose what is hidden, given how many."""

    own_bound: bool
    """Whether its weights make a likelihood bound of its own, which is reported beside the uniform one."""

    @classmethod
    def of(cls, config: DiffusionConfig, counts: Callable[[], Tensor]) -> Process:
        """The process of a run. counts(): how often each id occurs in the training text, [V]."""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], vocabulary: int) -> Process:
        """From what `tensors` gave. Raises ValueError or KeyError if they are not of this process and vocabulary."""

    @staticmethod
    def check(config: DiffusionConfig) -> None:
        """Raise UsageError for settings of this process that cannot be trained with."""

    @staticmethod
    def describe(config: DiffusionConfig) -> str:
        """One line for the plan of a run; empty if there is nothing to say."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; {} if settings say all."""

    def to(self, device: torch.device) -> Process:
        """The same on another device."""

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
        """See `Hide`."""


def per_row(per_sequence: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """One number a sequence as one a hidden token: fp32 on the device of rows."""
    values, device = per_sequence.to(rows.device, torch.float32, non_blocking=True), rows.device
    return values.repeat_interleave(counts.to(device, non_blocking=True), output_size=len(rows))
