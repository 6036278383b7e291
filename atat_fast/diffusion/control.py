"""Control variates for the held-out bound: less noise from the masks, from the same forward passes, without bias.

A pass measures the mean loss of k tokens drawn from a sequence; much of its noise is which tokens were drawn. Counts of the text
say without a model how surprising every token is, hidden or not. For any c that depends only on the clean text, its mean over
the hidden tokens minus its mean over all tokens is 0 on average. So

    mean over hidden of nll_i  -  gamma . (mean over hidden of c_i - mean over the sequence of c_i)

has the expectation of its first term, and less noise as far as c explains nll. One gamma for all k is fitted by least squares on
half of the sequences and applied to the other half. Given their counts, the halves' masks are independent, so the estimate stays
exactly unbiased. Source: regression estimates, Cochran, Sampling Techniques, chapter 7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_TOKENS = 1 << 22
"""Tokens that are counted together. It bounds memory: about 60 bytes a token."""
PLACES = (0, -1, 1)
"""The neighbour a token is counted with: none, the one before, the one after. Counting with both at once explains no more."""
FEATURES = len(PLACES)
RIDGE = 1e-3


def surprisals(tokens: Tensor) -> Tensor:
    """-log of each token's smoothed frequency, alone and with each neighbour, counted over `tokens` without its own occurrence.

    tokens: [n, L] int64.   Returns [n, L, FEATURES] fp32 in nats. A neighbour beyond the sequence counts as a token of its own.
    """
    length = tokens.shape[1]
    base = int(tokens.max()) + 2 if tokens.numel() else 2
    alone = (_occurrences(tokens) - 1 + 1 / base) / tokens.numel()
    found = [-torch.log(alone).float()]
    for place in PLACES[1:]:
        neighbour = torch.full_like(tokens, base - 1)
        if place < 0:
            neighbour[:, 1:] = tokens[:, : length - 1]
        else:
            neighbour[:, : length - 1] = tokens[:, 1:]
        both, beside = _occurrences(neighbour * base + tokens) - 1, _occurrences(neighbour) - 1
        found.append(-torch.log((both + alone) / (beside + 1)).float())
    return torch.stack(found, dim=-1)


def _occurrences(codes: Tensor) -> Tensor:
    """How often each element occurs among all of them, fp64."""
    _, place, counts = torch.unique(codes, return_inverse=True, return_counts=True)
    often: Tensor = counts.double()[place]
    return often


class Surprisals:
    """`surprisals` of a text read in batches, counted over blocks of whole batches. tokens(first, count): [count, L]."""

    def __init__(self, tokens: Callable[[int, int], Tensor], sequences: int, batch: int) -> None:
        self.tokens, self.sequences, self.batch = tokens, sequences, batch
        self._known, self._first = torch.empty(0, 0, 0), 0

    def of(self, first: int, x: Tensor) -> Tensor:
        """[B, L, FEATURES] of the batch x [B, L], whose first sequence is `first`."""
        if not self._first <= first < self._first + len(self._known):
            block = max(1, BLOCK_TOKENS // (self.batch * x.shape[1])) * self.batch
            self._first = first - first % block
            self._known = surprisals(self.tokens(self._first, min(block, self.sequences - self._first)))
        return self._known[first - self._first : first - self._first + len(x)]


def imbalance(c: Tensor, rows: Tensor, k: Tensor) -> Tensor:
    """How far a mask's tokens are from their sequence: the mean of c [B, L, F] over the k[b] hidden rows (rows [R]: flat indices,
    by sequence) minus its mean over the whole sequence. fp64 [B, F] on the CPU; its mean over masks is 0.
    """
    counts = k.to(c.device)
    mean = _mean_of(c.flatten(0, 1)[rows].double(), _owners(counts, len(rows)), counts)
    return (mean - c.double().mean(1)).cpu()


def fit(gram: Tensor, moment: Tensor) -> Tensor:
    """Least squares with a little ridge: gram [..., F, F] and moment [..., F] to coefficients [..., F]."""
    ridge = torch.diag_embed(RIDGE * torch.diagonal(gram, dim1=-2, dim2=-1) + 1e-12)
    solved: Tensor = torch.linalg.solve(gram + ridge, moment)
    return solved


def _owners(counts: Tensor, rows: int) -> Tensor:
    """The sequence of each hidden row, [R]."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=rows)


def _mean_of(picked: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Means of picked [R, F] over the counts[b] rows of each sequence: [B, F]."""
    return picked.new_zeros(len(counts), picked.shape[1]).index_add_(0, owner, picked) / counts[:, None]


class Control:
    """Collects passes, then adjusts their values. All fp64, on the CPU except the tensors a pass is reduced from."""

    def __init__(self, sequences: int, draws: int) -> None:
        self.gram = torch.zeros(2, FEATURES, FEATURES, dtype=torch.float64)
        self.moment = torch.zeros(2, FEATURES, dtype=torch.float64)
        self.difference = torch.zeros(sequences, draws, FEATURES, dtype=torch.float64)

    def add(self, first: int, draw: int, c: Tensor, rows: Tensor, nll: Tensor, k: Tensor) -> None:
        """A pass over sequences first .. first + B - 1.

        c: [B, L, FEATURES].   rows: [R] flat indices of hidden tokens, by sequence.   nll: [R] their losses.   k: [B] on the CPU,
        their numbers, at least 1.
        """
        batch, length, _ = c.shape
        counts = k.to(c.device)
        owner = _owners(counts, len(rows))
        picked = torch.cat([c.flatten(0, 1)[rows].double(), nll.double()[:, None]], 1)
        mean = _mean_of(picked, owner, counts)
        around = picked - mean[owner]
        products = (around[:, :-1, None] * around[:, None, :]).flatten(1)
        scatter = _mean_of(products, owner, counts)
        # A pass that hides everything has no noise. Apart from that, passes count alike, whatever their number of tokens.
        scatter = scatter.view(batch, FEATURES, FEATURES + 1).cpu() * (1 - k.double() / length)[:, None, None]
        half = torch.arange(first, first + batch) % 2
        self.gram.index_add_(0, half, scatter[..., :-1])
        self.moment.index_add_(0, half, scatter[..., -1])
        self.difference[first : first + batch, draw] = (mean[:, :-1] - c.double().mean(1)).cpu()

    def adjust(self, values: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
        """values [sequences, draws] minus what the other half's fit explains of their masks.

        total: sums a tensor over the processes, each of which saw some of the passes.
        """
        gram, moment, difference = total(self.gram), total(self.moment), total(self.difference)
        gamma = fit(gram, moment)
        half = torch.arange(len(values)) % 2
        explained: Tensor = (difference * gamma[1 - half][:, None]).sum(2)
        return values - explained
