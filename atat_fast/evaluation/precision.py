"""The uniform bound to a given precision: pairs of antithetic masks are drawn until the standard error is small enough.

A pass over the text draws two masks of every sequence. The first hides k tokens; the n sequences draw k from n equal
strata of 1..L, one each. The second hides L + 1 - k tokens: all that the first left visible, and one it hid. Each alone is an
unbiased draw of the bound. A pair is a nearly empty and a nearly full sequence, or two half full ones, and hides every token at
least once, so most of the luck in counts and masks cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atat_fast.diffusion.bound import Estimate, NllFunction, per_sequence
from atat_fast.diffusion.control import FEATURES, Surprisals, fit, imbalance
from atat_fast.diffusion.process import MaskedBatch
from atat_fast.diffusion.uniform import hide
from atat_fast.errors import UsageError
from atat_fast.ops.attention import documents_of
from atat_fast.ops.philox import STREAM_COUNT, random_words, uniform

LEAST_DEGREES = 60
"""Degrees of freedom an error needs to count: its own relative error is then about 1 / sqrt(2 * 60), a tenth."""


@dataclass(frozen=True)
class Precise:
    """A bound to a given precision.

    estimate: the bound; its se is the error from masks, for this text.
    se_text: the standard error with the choice of text: how far another text of the same kind and size may lie.
    draws: masks drawn for each sequence.
    met: whether the requested error was reached.
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
    control: bool = True,
) -> Precise:
    """The bound over `sequences` sequences. Draws masks until their standard error is at most `se` nats a token, or most_draws.

    tokens(first, count) gives [count, L] on the model's device. Counts and masks depend on (seed, pass, sequence, position)
    alone. on_pass(draws, se) is called after every pass. control: subtract the noise that counts of the text explain.

    The error is the variation of each sequence's pair means between passes, summed over sequences; the gain from strata is not
    subtracted. Raises UsageError if se is not above 0, or for fewer than 4 draws.
    """
    if not (se > 0 and math.isfinite(se)):
        raise UsageError(f"the standard error asked for must be above 0, got {se}")
    if most_draws < 4:
        raise UsageError(f"an error can be told from 4 draws on, so give --max_draws 4 or more, got {most_draws}")
    seen = _Passes(sequences)
    length, error, passes = 0, math.inf, 0
    mean = torch.zeros(sequences, dtype=torch.float64)
    known = Surprisals(tokens, sequences, batch)
    for step in range(most_draws // 2):
        for first in range(0, sequences, batch):
            count = min(batch, sequences - first)
            x = tokens(first, count)
            length = x.shape[1]
            k = antithetic_counts(sequences, length, seed=seed, step=step)[first : first + count]
            c = known.of(first, x) if control else None
            seen.add(first, step, _pair(nll, x, k, first, mask_id, seed, step, document_end, c))
        passes = step + 1
        mean, squares = seen.adjusted()
        if passes > 1:
            error = math.sqrt(float((squares / step).sum()) / passes) / sequences
        if on_pass is not None:
            on_pass(2 * passes, error)
        if error <= se and sequences * step >= LEAST_DEGREES:
            break
    text = float(mean.std()) / math.sqrt(sequences) if sequences > 1 else math.inf
    return Precise(Estimate(float(mean.mean()), error, sequences, length, mean), text, 2 * passes, error <= se)


class _Passes:
    """Mean and spread over passes of each sequence's value and FEATURES control variates, whose mean is 0.

    A multiple of the variates is subtracted: a least-squares fit on one half of the sequences, applied to the other half, so that
    nothing is biased (atat_fast/diffusion/control.py). Keeps means and sums of products around them: fp64, 20 numbers a sequence.
    """

    def __init__(self, sequences: int) -> None:
        self.mean = torch.zeros(sequences, 1 + FEATURES, dtype=torch.float64)
        self.products = torch.zeros(sequences, 1 + FEATURES, 1 + FEATURES, dtype=torch.float64)

    def add(self, first: int, step: int, found: Tensor) -> None:
        """Add found [B, 1 + FEATURES] of sequences first .. first + B - 1 in pass `step`, from 0 (Welford's update)."""
        rows = slice(first, first + len(found))
        delta = found - self.mean[rows]
        self.mean[rows] += delta / (step + 1)
        self.products[rows] += delta[:, :, None] * (found - self.mean[rows])[:, None, :]

    def adjusted(self) -> tuple[Tensor, Tensor]:
        """Each sequence's mean and sum of squares around it, without what the other half's fit explains: [sequences] each."""
        half = torch.arange(len(self.mean)) % 2
        sums = torch.zeros(2, *self.products.shape[1:], dtype=torch.float64).index_add_(0, half, self.products)
        taken = fit(sums[:, 1:, 1:], sums[:, 1:, 0])
        weights = torch.cat((torch.ones(2, 1, dtype=torch.float64), -taken), dim=1)[1 - half]
        return (self.mean * weights).sum(1), torch.einsum("si,sij,sj->s", weights, self.products, weights)


def antithetic_counts(sequences: int, length: int, *, seed: int, step: int) -> Tensor:
    """Numbers of tokens that first masks hide in pass `step`: int64 [sequences], one in each stratum of 1..L.

    The second mask hides L + 1 - k. Pass 0 has the counts that `estimate_nll` draws.
    """
    words = random_words(torch.arange(sequences, dtype=torch.int64), seed, step, STREAM_COUNT)
    rank = torch.empty(sequences, dtype=torch.int64)
    rank[torch.argsort(words[1], stable=True)] = torch.arange(sequences, dtype=torch.int64)
    share = (rank + uniform(words[0])) / sequences
    return 1 + (share * length).long().clamp_(max=length - 1)


def antithetic_pair(x: Tensor, k: Tensor, *, mask_id: int, sample_ids: Tensor, seed: int, step: int) -> list[MaskedBatch]:
    """Two masks of tokens x [B, L]. The first hides k[b] tokens; the second all others and one of these. k: CPU, int64 [B]."""
    first = hide(x, k, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)
    fewer = hide(x, k - 1, mask_id=mask_id, sample_ids=sample_ids, seed=seed, step=step)  # the same tokens without the last
    hidden = fewer.noisy != mask_id
    counts = x.shape[1] + 1 - k
    rows = torch.nonzero_static(hidden.flatten(), size=int(counts.sum()))[:, 0]
    share = (counts / x.shape[1]).to(x.device, torch.float32)
    second = MaskedBatch(
        x.masked_fill(hidden, mask_id),
        rows,
        x.flatten()[rows],
        torch.ones_like(rows, dtype=torch.float32),
        share,
        x.numel(),
        hidden=len(rows),
    )
    return [first, second]


def _pair(
    nll: NllFunction,
    x: Tensor,
    k: Tensor,
    first: int,
    mask_id: int,
    seed: int,
    step: int,
    document_end: int | None,
    c: Tensor | None,
) -> Tensor:
    """Each sequence's means over its two masks, fp64 [B, 1 + FEATURES]: nats a token, and the imbalance between hidden tokens'
    control variates c [B, L, FEATURES] and the sequence's; 0 without c.
    """
    ids = torch.arange(first, first + len(x), dtype=torch.int64, device=x.device)
    documents = None if document_end is None else documents_of(x.cpu(), document_end).to(x.device)
    total = torch.zeros(len(x), 1 + FEATURES, dtype=torch.float64)
    pair = antithetic_pair(x, k, mask_id=mask_id, sample_ids=ids, seed=seed, step=step)
    for masked, counts in zip(pair, (k, x.shape[1] + 1 - k), strict=True):
        masked.documents = documents
        total[:, 0] += per_sequence(nll(masked), counts)
        if c is not None:
            total[:, 1:] += imbalance(c, masked.rows, counts)
    return total / 2
