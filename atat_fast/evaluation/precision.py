"""The uniform bound to a precision that was asked for: pairs of antithetic masks until their standard error is small enough.

A pass over the text draws two masks of every sequence. The first hides k tokens, k one of n equal strata of 1..L for each of the
n sequences; the second hides L + 1 - k tokens: all that the first left visible, and one it hid. Each alone is a fair draw of the
bound. Together they see a nearly empty and a nearly full sequence, or two half full ones, and every token at least once, so most
of what a lucky count or a lucky mask would bring cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.masking import MaskedBatch, hide
from atat_fast.diffusion.objective import Estimate, NllFunction, per_sequence
from atat_fast.errors import UsageError
from atat_fast.ops.attention import documents_of
from atat_fast.ops.philox import STREAM_COUNT, random_words, uniform

LEAST_DEGREES = 60
"""Degrees of freedom an error needs before it is believed: its own relative error is about 1 / sqrt(2 * 60), a tenth."""


@dataclass(frozen=True)
class Precise:
    """A bound whose masks were drawn until their error was small.

    estimate: the bound; its se is the error that masks leave in the figure of this text.
    se_text: the standard error with the choice of text in it: how far another text of the same kind and size may lie.
    draws: masks drawn for each sequence.
    met: whether the error asked for was reached.
    """

    estimate: Estimate
    se_text: float
    draws: int
    met: bool


def estimate_to(
    nll: NllFunction,
    tokens: Callable[[int, int], Tensor],
    sequences: int,
    *,
    mask_id: int,
    se: float,
    most_draws: int,
    batch: int,
    seed: int,
    document_end: int | None = None,
    on_pass: Callable[[int, float], None] | None = None,
) -> Precise:
    """The bound over `sequences` sequences until the masks' standard error is at most `se` nats a token, or most_draws are drawn.

    tokens(first, count) gives [count, L] on the model's device. Counts and masks depend on (seed, pass, sequence, position)
    alone. on_pass(draws, se) is called after every pass.

    The error comes from how the pair means of one sequence differ between passes, summed over sequences. What strata bring is not
    taken off. Raises UsageError for an error that is not above 0, or fewer than 4 draws.
    """
    if not (se > 0 and math.isfinite(se)):
        raise UsageError(f"the standard error asked for must be above 0, got {se}")
    if most_draws < 4:
        raise UsageError(f"an error can be told from 4 draws on, so give --max_draws 4 or more, got {most_draws}")
    mean, squares = (torch.zeros(sequences, dtype=torch.float64) for _ in range(2))
    length, error, passes = 0, math.inf, 0
    for step in range(most_draws // 2):
        for first in range(0, sequences, batch):
            count = min(batch, sequences - first)
            x = tokens(first, count)
            length = x.shape[1]
            k = antithetic_counts(sequences, length, seed=seed, step=step)[first : first + count]
            value = _pair(nll, x, k, first, mask_id, seed, step, document_end)
            delta = value - mean[first : first + count]
            mean[first : first + count] += delta / (step + 1)
            squares[first : first + count] += delta * (value - mean[first : first + count])
        passes = step + 1
        if passes > 1:
            error = math.sqrt(float((squares / step).sum()) / passes) / sequences
        if on_pass is not None:
            on_pass(2 * passes, error)
        if error <= se and sequences * step >= LEAST_DEGREES:
            break
    text = float(mean.std()) / math.sqrt(sequences) if sequences > 1 else math.inf
    return Precise(Estimate(float(mean.mean()), error, sequences, length, mean), text, 2 * passes, error <= se)


def antithetic_counts(sequences: int, length: int, *, seed: int, step: int) -> Tensor:
    """How many tokens the first mask of each sequence hides in pass `step`: int64 [sequences], one in each stratum of 1..L.

    The second mask hides L + 1 - k. Pass 0 has the counts that `estimate_nll` draws.
    """
    words = random_words(torch.arange(sequences, dtype=torch.int64), seed, step, STREAM_COUNT)
    rank = torch.empty(sequences, dtype=torch.int64)
    rank[torch.argsort(words[1], stable=True)] = torch.arange(sequences, dtype=torch.int64)
    share = (rank + uniform(words[0])) / sequences
    return 1 + (share * length).long().clamp_(max=length - 1)


def antithetic_pair(x: Tensor, k: Tensor, *, mask_id: int, sample_ids: Tensor, seed: int, step: int) -> list[MaskedBatch]:
    """The two masks of tokens x [B, L]: k[b] hidden tokens, and all others with one of these. k on the CPU, int64 [B]."""
    first = hide(x, k, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)
    fewer = hide(x, k - 1, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)  # the same tokens but for the last
    hidden = fewer.noisy != mask_id
    counts = x.shape[1] + 1 - k
    rows = torch.nonzero_static(hidden.flatten(), size=int(counts.sum()))[:, 0]
    share = (counts / x.shape[1]).to(x.device, torch.float32)
    second = MaskedBatch(
        x.masked_fill(hidden, mask_id), rows, x.flatten()[rows], torch.ones_like(rows, dtype=torch.float32), share, x.numel(),
        hidden=len(rows),
    )  # fmt: skip
    return [first, second]


def _pair(
    nll: NllFunction, x: Tensor, k: Tensor, first: int, mask_id: int, seed: int, step: int, document_end: int | None
) -> Tensor:
    """Each sequence's mean over its two masks, nats a token [B]."""
    ids = torch.arange(first, first + len(x), dtype=torch.int64, device=x.device)
    documents = None if document_end is None else documents_of(x.cpu(), document_end).to(x.device)
    total = torch.zeros(len(x), dtype=torch.float64)
    pair = antithetic_pair(x, k, mask_id=mask_id, sample_ids=ids, seed=seed, step=step)
    for masked, counts in zip(pair, (k, x.shape[1] + 1 - k), strict=True):
        masked.documents = documents
        total += per_sequence(nll(masked), counts)
    return total / 2
