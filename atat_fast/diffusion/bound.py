"""The likelihood bound that is reported.

For a fixed count k the bound of a sequence x of L tokens is

    NELBO(x) = E_{k ~ U{0..L}}  (L + 1) / k  *  sum over the k hidden tokens of -log p(x_i | visible)        (0 at k = 0)
             = E_{k ~ U{1..L}}  L / k        *  the same sum.

This is MDLM's continuous bound with time integrated out exactly: the integral of t^(k-1) (1-t)^(L-k) C(L, k) is 1 / k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atat_fast.diffusion.control import Control, Surprisals
from atat_fast.diffusion.process import Hide, MaskedBatch
from atat_fast.diffusion.prompts import frozen_of
from atat_fast.diffusion.uniform import hide
from atat_fast.ops.attention import documents_of
from atat_fast.ops.philox import STREAM_COUNT, random_words, uniform

NllFunction = Callable[[MaskedBatch], Tensor]
"""A model for the bound: -log p of each hidden token, [R] fp32, in nats."""


@dataclass(frozen=True)
class Spread:
    """How processes share an evaluation: process i mod ranks does batch i, and every process takes every turn.

    total: sums a CPU tensor over the processes. run: calls the model where its weights are whole.
    """

    rank: int = 0
    ranks: int = 1
    total: Callable[[Tensor], Tensor] = lambda values: values
    run: Callable[[Callable[[], Tensor]], Tensor] = lambda function: function()


@dataclass(frozen=True)
class Estimate:
    """A mean in nats a token with its standard error, over `sequences` sequences of `length` tokens.

    values: [sequences] fp64, each sequence's own mean. Their differences compare two models on the same masks.
    """

    nll: float
    se: float
    sequences: int
    length: int
    values: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(nll), or inf if a float cannot hold it."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def bits_per_token(self) -> float:
        """nll in bits."""
        return self.nll / math.log(2)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """nll in bits per byte, given the bytes a token stands for."""
        return self.bits_per_token() / bytes_per_token


def evaluation_strata(sequences: int, draws: int, *, seed: int) -> Tensor:
    """The stratum of each draw of each sequence, out of sequences * draws equal strata of 1..L: int64 [sequences, draws].

    Every stratum is used once, in the order of a seeded permutation of the sequences. Draw d turns that permutation by d / draws
    of a circle, so that one sequence's draws are spread over the whole range.
    """
    index = torch.arange(sequences, dtype=torch.int64)
    order = torch.argsort(random_words(index, seed, 0, STREAM_COUNT)[1], stable=True)
    rank = torch.empty_like(order).scatter_(0, order, index)
    turned = [(rank + draw * sequences // draws) % max(1, sequences) * draws + draw for draw in range(draws)]
    return torch.stack(turned, dim=1)


def estimate_nll(
    nll: NllFunction,
    tokens: Callable[[int, int], Tensor],
    sequences: int,
    *,
    mask_id: int,
    draws: int,
    batch: int,
    seed: int,
    document_end: int | None = None,
    spread: Spread = Spread(),
    process: Hide | None = None,
    control: bool = True,
    extents: Callable[[int, int], Tensor] | None = None,
    block: int = 0,
) -> Estimate:
    """The bound over `sequences` sequences.

    tokens(first, count): [count, L] ids on the model's device.
    document_end: the id that closes a document. With it masked batches say where documents lie, and the bound is that of text
        whose ends are known.
    spread: how processes share the work. Batches, sums and result are those of one process.
    process: estimate this process's own bound, with its masks instead of uniform ones and without control.
    control: subtract from each sequence's value the part of its mask's noise that counts of the text explain
    (diffusion/control.py).
    extents(first, count): [count, 2] int64 on a CPU: only tokens from the first number to before the second may be hidden. The
        bound is then theirs alone, given the others, in nats a token of theirs. Not with a process.
    block: K, if the model predicts K tokens at a time from all before them. The bound is then the sum of the blocks' own: each
        has its count, from 1 to K, and its masks. The error is the spread of the sequences' means.

    Counts are stratified over 1..L. Masks and counts depend only on (seed, draw, sequence, position), so two models are compared
    on the same masks. The standard error covers the choice of sequences and of masks. With several draws it is the spread of the
    sequences' own means. With one draw it is that of stratified sampling with neighbouring strata collapsed in pairs: each pair's
    difference is its own estimate of noise, slightly generous.
    """
    length = tokens(0, 1).shape[1] if sequences else 0
    parts = length // block if block else 1
    units = sequences * parts  # what is masked by itself: sequences, or their blocks
    strata = evaluation_strata(units, draws, seed=seed)
    values = torch.zeros(units, draws, dtype=torch.float64)
    known = Surprisals(tokens, sequences, batch)
    controls = Control(sequences, draws) if control and process is None and extents is None and parts == 1 else None
    counted = torch.ones(sequences, dtype=torch.float64)
    batches = [(first, draw) for first in range(0, sequences, batch) for draw in range(draws)]
    for turn in range(-(-len(batches) // spread.ranks)):
        mine = turn * spread.ranks + spread.rank
        first, draw = batches[min(mine, len(batches) - 1)]  # a rank without a batch repeats the last one, uncounted
        count = min(batch, sequences - first)
        x = tokens(first, count)
        ids = torch.arange(first * parts, (first + count) * parts, dtype=torch.int64)
        jitter = uniform(random_words(ids, seed, draw, STREAM_COUNT)[0])
        share = (strata[ids, draw] + jitter) / (units * draws)
        place: dict[str, Any] = {"mask_id": mask_id, "sample_ids": ids.to(x.device), "seed": seed, "step": draw}
        most: Any = length // parts
        if extents is not None:
            ours = extents(first, count)
            most = ours[:, 1] - ours[:, 0]
            counted[first : first + count] = most
            place["frozen"] = frozen_of(ours, length).to(x.device)
        k = torch.minimum(1 + (share * most).long(), torch.as_tensor(most))
        masked: MaskedBatch = (process or hide)(x.view(len(ids), -1), k, **place)
        masked.noisy = masked.noisy.view_as(x)
        if document_end is not None:
            masked.documents = documents_of(x.cpu(), document_end).to(x.device)
        losses = spread.run(functools.partial(nll, masked))
        if mine >= len(batches):
            continue
        if process is None:
            values[ids, draw] = per_sequence(losses, k)
        else:  # weights are (L + 1) / W, for counts from 0 to L; counts here start at 1
            values[ids, draw] = per_sequence(losses * masked.weights, k) * k / (most + 1)
        if controls is not None:
            controls.add(first, draw, known.of(first, x), masked.rows, losses, k)
    values = spread.total(values)
    if controls is not None:
        values = controls.adjust(values, spread.total)
    means = values.view(sequences, -1).mean(1)
    if extents is not None:  # a mean over tokens, and each sequence's share of its error
        counted = counted / counted.mean()
        mean = (means * counted).mean()
        means = mean + counted * (means - mean)
    error = standard_error(means, strata) if parts == 1 else _plain_standard_error(means)
    return Estimate(float(means.mean()), error, sequences, length, means)


def per_sequence(nll: Tensor, k: Tensor) -> Tensor:
    """Each sequence's draw of the bound in nats a token: (L / k) * sum / L = the mean of nll [R] over its k[b] hidden tokens."""
    owner = torch.repeat_interleave(torch.arange(len(k)), k)
    sums = torch.zeros(len(k), dtype=torch.float64).index_add_(0, owner, nll.double().cpu())
    return sums / k


def standard_error(values: Tensor, strata: Tensor) -> float:
    """Standard error of the mean of values [sequences], whose masks came from strata [sequences, draws] (evaluation_strata)."""
    return collapsed_standard_error(values, strata[:, 0]) if strata.shape[1] == 1 else _plain_standard_error(values)


def collapsed_standard_error(values: Tensor, strata: Tensor) -> float:
    """Standard error of the mean of one value per stratum; inf for a single value.

    Neighbours are paired (the last three form one group if the number is odd) and each group's own variance counts (Cochran,
    Sampling Techniques, 5A.12).
    """
    n = len(values)
    if n < 2:
        return math.inf
    ordered = values[torch.argsort(strata)]
    pairs = ordered[: n - n % 2].view(-1, 2)
    groups = [pairs] if n % 2 == 0 else [pairs[:-1], ordered[n - 3 :].view(1, 3)]
    total = sum(float(g.shape[1] * g.var(dim=1).sum()) for g in groups if g.numel())
    return math.sqrt(total) / n


def _plain_standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
