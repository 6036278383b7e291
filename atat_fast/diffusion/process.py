"""The interface of a masking process: which tokens are hidden, what else their loss needs, and what a checkpoint keeps.

To add one, write a file with a class like `identity.IdentitySchedule` and add a line to the table of `processes.py`.
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
    """Importance of a batch's tokens: scores [B, L] fp32 in [0, 1], and the estimator's logits [B, L], if it made them."""

    scores: Tensor
    logits: Tensor | None = None


class Tilt(NamedTuple):
    """Lowers the logits of hidden row i by elapsed[i] * rates before the softmax; the loss is `linear_cross_entropy`'s with
    rates.

    rates: [V] fp32, of the vocabulary.   elapsed: [R] fp32, the rows' times.
    """

    rates: Tensor
    elapsed: Tensor


@dataclass
class MaskedBatch:
    """What the model sees and what it must say.

    noisy: [B, L] ids.   rows: [R] flat indices of hidden tokens.   target: [R] their true ids.   weights: [R] fp32.
    hidden_share: [B] fp32, the share of each sequence that is hidden; the time of a time-conditioned model.
    tokens: what the loss is divided by: B * L, or this call's share of the global batch's tokens that are not frozen.
    documents: boundaries that attention keeps, or None.
    hidden: number of rows that are not padding; they come first.   importance: scores that chose the masks, or None.
    tilt: what the process adds to the loss, or None.   gaps: [R] the rows' cells of `gaps.cells_of`, or None.
    """

    noisy: Tensor
    rows: Tensor
    target: Tensor
    weights: Tensor
    hidden_share: Tensor
    tokens: float
    documents: Documents | None = None
    hidden: int = 0
    importance: Scored | None = None
    tilt: Tilt | None = None
    gaps: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors of the loss, in a fixed order."""
        return [self.noisy, self.rows, self.target, self.weights, self.hidden_share, *(self.tilt or ())]

    def clone(self) -> MaskedBatch:
        """A copy with its own buffers for these tensors."""
        noisy, rows, target, weights, share, *tilt = (tensor.clone() for tensor in self.tensors())
        return replace(
            self, noisy=noisy, rows=rows, target=target, weights=weights, hidden_share=share, tilt=Tilt(*tilt) if tilt else None
        )


class Hide(Protocol):
    """Hides exactly counts[b] (CPU int64) tokens of sequence b of tokens [B, L], which hold no mask_id.

    The choice depends on (seed, step, sample id, position) and what the process looks at; nothing waits for a device.
    weighting: see ops.mask_tokens; `uniform` is (L + 1) / k, or the weight of the process's own bound.
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
    """A way to choose which tokens are hidden, given how many."""

    own_bound: bool
    """Whether its weights make a likelihood bound of its own, to report beside the uniform one."""

    @classmethod
    def of(cls, config: DiffusionConfig, counts: Callable[[], Tensor]) -> Process:
        """The process of a run. counts(): how often each id occurs in the training text, [V]."""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], vocabulary: int) -> Process:
        """The process whose `tensors` gave these. Raises ValueError or KeyError if they do not fit it or the vocabulary."""

    @staticmethod
    def check(config: DiffusionConfig) -> None:
        """Raise UsageError for invalid settings of this process."""

    @staticmethod
    def describe(config: DiffusionConfig) -> str:
        """One line for the plan of a run; empty if there is nothing to say."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; {} if the settings say everything."""

    def to(self, device: torch.device) -> Process:
        """The same on another device."""

    @property
    def hide(self) -> Hide:
        """Usually a method: see `Hide`."""


def per_row(per_sequence: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """Spread one number per sequence over its hidden tokens: fp32 on the device of rows."""
    values, device = per_sequence.to(rows.device, torch.float32, non_blocking=True), rows.device
    return values.repeat_interleave(counts.to(device, non_blocking=True), output_size=len(rows))
