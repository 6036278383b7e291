"""Which positions a step reveals, and how many.

The host knows before the first step how many positions every step reveals:

- planned     Ancestral and first-hitting sampling reveal a position at a time that depends on no token. At step s of S each
              hidden token is revealed with chance 1 / (S - s), so its step is uniform on 0 .. S - 1 and is drawn at the start.
- ordered     A model's certainty, or the importance estimator's scores, choose the positions; an even schedule gives their
              number: of n hidden tokens, step s of g = min(S, n) reveals floor((s + 1) n / g) - floor(s n / g).
- remasking   See sampling/remask.py.

So nothing waits for the device, shapes are static, and a step that reveals nothing does not call the model. Randomness is named
by (seed, sample, position, step); see docs/philox.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atat_fast.ops.philox import STREAM_ORDER, STREAM_SAMPLE, gumbel64, random_words
from atat_fast.sampling.categorical import certainty, output_head

POSITIONS = 1 << 20
"""Position p of sample i is number i * 2^20 + p in the random streams, so its noise does not depend on the batch's length."""

TIE = 1e-5
"""Certainties closer than this are equal, in nats or, for a margin, in probability. Rounding alone makes about 2e-6."""

ImportanceScores = Callable[[Tensor, Tensor], Tensor]
"""(noised tokens [B, L], share of each sequence that is hidden [B] fp32) -> importance [B, L] in [0, 1]."""


class StepRows(NamedTuple):
    """What the host knows of a step: rows whose features the choice looks at (0 if it needs none), rows revealed, rows hidden
    again. On a GPU they are rounded up, and the surplus is padding.
    """

    looked_at: int
    revealed: int
    hidden_again: int = 0


class Canvas:
    """The tokens being filled, and what is fixed about them.

    tokens:  [B, L] int64, copied.   fill: [B, L] bool on the host: mask tokens that are to be filled. Nothing else changes.
    names:   [B, L] int64, each position's number in the random streams.   seed: an integer.
    """

    def __init__(self, tokens: Tensor, fill: Tensor, names: Tensor, mask_id: int, seed: int) -> None:
        self.shape, self.mask_id = tuple(tokens.shape), mask_id
        self.device, self.bin = tokens.device, tokens.numel()
        # One element more than there are positions: padding is written there.
        self.flat = torch.cat((tokens.flatten(), tokens.new_full((1,), mask_id)))
        self.names = torch.cat((names.flatten().to(self.device), torch.zeros(1, dtype=torch.int64, device=self.device)))
        self.host_fill, self.host_names, self.host_seed = fill, names, seed
        self.fill = fill.to(self.device)
        self.seed = torch.full((), seed, dtype=torch.int64, device=self.device)
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.failed = torch.zeros((), dtype=torch.bool, device=self.device)  # whether a row's logits were invalid

    @property
    def tokens(self) -> Tensor:
        """[B, L], the state itself."""
        return self.flat[: self.bin].view(self.shape)

    def hidden(self) -> Tensor:
        """[B, L] bool: positions still to be filled."""
        return (self.tokens == self.mask_id) & self.fill

    def write(self, rows: Tensor, ids: Tensor) -> None:
        """Put ids [R] at flat rows [R]; rows past the end are padding."""
        self.flat.index_copy_(0, rows, ids)

    def rows_of(self, chosen: Tensor, size: int) -> Tensor:
        """Flat indices of a [B, L] bool, padded to `size`."""
        return torch.nonzero_static(chosen.flatten(), size=size, fill_value=self.bin)[:, 0]


class Policy(Protocol):
    """Chooses rows. Its methods run on the device and read the step from canvas.step, so a captured graph may hold them."""

    sizes: list[StepRows]
    """One entry a step."""

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor | None:
        """Flat rows to reveal, [sizes.revealed]; None if features must be looked at first."""

    def after(self, canvas: Canvas, features: Tensor, rows: Tensor, sizes: StepRows) -> Tensor:
        """Flat rows to reveal, chosen by the features [H, D] of all hidden rows [H]."""

    def again(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """Flat rows to hide again, [sizes.hidden_again], chosen before this step's tokens are written."""

    def wrote(self, canvas: Canvas, rows: Tensor, features: Tensor, ids: Tensor) -> None:
        """Called with the rows and tokens just drawn."""

    def clock(self, canvas: Canvas) -> Tensor:
        """The hidden share of each sequence, [B] fp32, for a model that is told the time."""


class Basic:
    """Defaults of most policies: nothing is hidden again, and the clock is the hidden share."""

    def __init__(self, canvas: Canvas, inside: Tensor | None = None) -> None:
        """inside: [B] tokens of each sequence that are not padding, on the device; None if all are."""
        self.sizes: list[StepRows] = []
        self.inside = inside

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor | None:
        """See Policy."""
        return None

    def after(self, canvas: Canvas, features: Tensor, rows: Tensor, sizes: StepRows) -> Tensor:
        """See Policy."""
        raise NotImplementedError

    def again(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """See Policy."""
        raise NotImplementedError

    def wrote(self, canvas: Canvas, rows: Tensor, features: Tensor, ids: Tensor) -> None:
        """See Policy."""

    def clock(self, canvas: Canvas) -> Tensor:
        """See Policy. Mask tokens that later blocks will fill are hidden too."""
        hidden = (canvas.tokens == canvas.mask_id).sum(1)
        return hidden.float() / (canvas.shape[1] if self.inside is None else self.inside.clamp(min=1))


class Table:
    """Rows by step, on the device: rows [N] sorted by step, and where each step begins."""

    def __init__(self, steps: Tensor, rows: Tensor, count: int, canvas: Canvas) -> None:
        """steps, rows: [N] on the host; count: how many steps there are."""
        order = torch.argsort(steps, stable=True)
        each = torch.bincount(steps, minlength=count)
        self.counts: list[int] = each.tolist()
        ends = each.cumsum(0)
        self.bounds = torch.cat((ends.new_zeros(1), ends)).to(canvas.device)
        self.rows = torch.cat((rows[order], rows.new_full((1,), canvas.bin))).to(canvas.device)
        self.bin = canvas.bin

    def at(self, step: Tensor, size: int) -> Tensor:
        """[size] rows of a step (0-d tensor), then padding."""
        place = self.bounds.index_select(0, step[None]) + torch.arange(size, device=self.rows.device)
        inside = place < self.bounds.index_select(0, step[None] + 1)
        return torch.where(inside, self.rows[place.clamp(max=len(self.rows) - 1)], self.bin)


class Planned(Basic):
    """Every position's step is known at the start: times [B, L] on the host, -1 for positions that are not filled.

    clocks: [S, B], the time each step tells a time-conditioned model; None is the hidden share.
    """

    def __init__(
        self, canvas: Canvas, times: Tensor, steps: int, clocks: Tensor | None = None, inside: Tensor | None = None
    ) -> None:
        super().__init__(canvas, inside)
        rows = (times.flatten() >= 0).nonzero()[:, 0]
        self.table = Table(times.flatten()[rows], rows, steps, canvas)
        self.sizes = [StepRows(0, count) for count in self.table.counts]
        self.clocks = None if clocks is None else clocks.to(canvas.device, torch.float32)

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """The step's own rows."""
        return self.table.at(canvas.step, sizes.revealed)

    def clock(self, canvas: Canvas) -> Tensor:
        """See Policy."""
        return super().clock(canvas) if self.clocks is None else self.clocks.index_select(0, canvas.step[None])[0]


def reveal_words(names: Tensor, seed: int) -> Tensor:
    """The random word [B, L] of a position's reveal: the smaller, the sooner."""
    return random_words(names, seed, 0, STREAM_SAMPLE)[0]


def ancestral_times(fill: Tensor, names: Tensor, steps: int, seed: int) -> Tensor:
    """[B, L] the step that reveals each position, uniform on 0 .. S - 1 to 2^-32; -1 for positions that are not filled."""
    return torch.where(fill, reveal_words(names, seed) * steps >> 32, -1)


def first_hitting_times(fill: Tensor, names: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """[B, L] the model call that reveals each position, -1 elsewhere; the clocks [calls, B]; and the number of calls.

    A position's hitting time is 1 - u of its random word. It is uniform, so the order is too, and a sequence's n-th time has the
    law of the first-hitting sampler. Call j of a sequence is at its j-th time. With fewer steps than hidden tokens the order is
    cut into `steps` even groups, each revealed at the time of its first position.
    """
    words = reveal_words(names, seed)
    keys = torch.where(fill, words, 1 << 33)
    rank = keys.argsort(dim=1, stable=True).argsort(dim=1)
    hidden = fill.sum(1)
    groups = hidden.clamp(max=steps)
    times = torch.where(fill, ((rank + 1) * groups[:, None] - 1) // hidden[:, None].clamp(min=1), -1)
    calls = int(groups.max()) if len(groups) else 0
    clocks = torch.zeros(calls, len(fill), dtype=torch.float64)
    share = 1 - (words.double() + 0.5) * 2.0**-32
    for b in range(len(fill)):  # the latest time in each group is its first position's
        of = times[b][fill[b]]
        clocks[:, b].scatter_reduce_(0, of, share[b][fill[b]], "amax")
    return times, clocks * (hidden / max(1, fill.shape[1])), calls


def even_counts(hidden: Tensor, steps: int) -> Tensor:
    """[S, B] how many of hidden [B] tokens each step reveals: as even as whole numbers allow, in min(S, hidden) steps."""
    groups = hidden.clamp(min=1, max=steps)
    step = torch.arange(steps)[:, None].clamp(max=groups)
    after = (torch.arange(steps)[:, None] + 1).clamp(max=groups)
    return after * hidden // groups - step * hidden // groups


def largest(keys: Tensor, counts: Tensor) -> Tensor:
    """[B, L] bool: the counts[b] largest keys of each sequence, of equals the first."""
    rank = torch.empty_like(keys, dtype=torch.int64)
    order = keys.argsort(dim=1, descending=True, stable=True)
    rank.scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return rank < counts[:, None]


def surest(certainties: Tensor, hidden: Tensor, counts: Tensor) -> Tensor:
    """[B, L] bool: the counts[b] hidden positions of each sequence (or all, if fewer) that orders by certainty reveal next.

    certainties: [B, L] fp32 as from `categorical.certainty`, anything outside hidden [B, L].   counts: [B].
    Positions go by how many whole TIEs they lie below the surest one, and among equals from left to right. If everything is
    hidden, a model without absolute positions says the same everywhere, and rounding must not decide. Samplers and likelihoods in
    an order (evaluation/orders.py) both use this function, so that one is the law of the other.
    """
    known = certainties.masked_fill(~hidden, -torch.inf)
    below = ((known.amax(1, keepdim=True) - known) / TIE).floor().nan_to_num(nan=0.0)
    return largest((-below).masked_fill(~hidden, -torch.inf), counts) & hidden


class Ordered(Basic):
    """An even schedule of counts; subclasses choose the positions."""

    def __init__(self, canvas: Canvas, steps: int, inside: Tensor | None = None) -> None:
        super().__init__(canvas, inside)
        hidden = canvas.host_fill.sum(1)
        counts = even_counts(hidden, steps)
        left = hidden.sum() - torch.cat((torch.zeros(1, dtype=torch.int64), counts.sum(1).cumsum(0)[:-1]))
        self.counts = counts.to(canvas.device)
        self.totals: Sequence[tuple[int, int]] = list(zip(left.tolist(), counts.sum(1).tolist(), strict=True))
        self.sizes = [StepRows(0, revealed) for _, revealed in self.totals]

    def now(self, canvas: Canvas) -> Tensor:
        """[B] how many positions this step reveals."""
        return self.counts.index_select(0, canvas.step[None])[0]


class ByCertainty(Ordered):
    """The model's surest positions come first: order is confidence, entropy or margin. The choice does not depend on the draw.

    Every hidden position's distribution is needed, so the head runs on all of them at each step.
    """

    def __init__(self, canvas: Canvas, model: Any, order: str, steps: int, inside: Tensor | None = None) -> None:
        super().__init__(canvas, steps, inside)
        self.model, self.order = model, order
        self.head = output_head(model, canvas.flat)
        self.sizes = [StepRows(left if revealed else 0, revealed) for left, revealed in self.totals]

    def after(self, canvas: Canvas, features: Tensor, rows: Tensor, sizes: StepRows) -> Tensor:
        """See Policy."""
        known = torch.zeros(canvas.bin + 1, device=canvas.device)
        known.index_copy_(0, rows, certainty(self.model, features, self.order, self.head))
        chosen = surest(known[: canvas.bin].view(canvas.shape), canvas.hidden(), self.now(canvas))
        return canvas.rows_of(chosen, sizes.revealed)


class ByImportance(Ordered):
    """The order of the importance estimator: a position is next with odds exp(-tilt * score), as in training by `order`
    (docs/atat.md).

    A step that reveals r positions draws them one by one without replacement (Plackett-Luce, by Gumbel keys), all from the scores
    at its beginning.
    """

    def __init__(self, canvas: Canvas, scores: ImportanceScores, tilt: float, steps: int, inside: Tensor | None = None) -> None:
        super().__init__(canvas, steps, inside)
        self.scores, self.tilt = scores, tilt

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """See Policy."""
        words = random_words(canvas.names[: canvas.bin].view(canvas.shape), canvas.seed, canvas.step, STREAM_ORDER)
        keys = gumbel64(words[0], words[1]) - self.tilt * self.scores(canvas.tokens, self.clock(canvas)).double()
        hidden = canvas.hidden()
        chosen = largest(torch.where(hidden, keys, -torch.inf), self.now(canvas))
        return canvas.rows_of(chosen & hidden, sizes.revealed)
