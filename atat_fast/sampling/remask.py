"""Remasking samplers: revealed tokens may be hidden again, and are drawn anew with more context.

ReMDM (Wang, Schiff, Sahoo, Kuleshov: Remasking Discrete Diffusion Models with Inference-Time Scaling, 2025). With a = s / S and
a' = (s + 1) / S, the visible shares before and after step s of S,

    a visible token is hidden again with chance sigma <= sigma_max = min(1, (1 - a') / a),
    a hidden token is revealed with chance (a' - (1 - sigma) a) / (1 - a).

For any sigma each position is then hidden with chance 1 - a', as in the plain sampler, which is sigma = 0.

    remdm_cap          sigma = min(eta, sigma_max)
    remdm_rescale      sigma = eta sigma_max
    remdm_confidence   a token drawn with chance p is hidden again with chance eta sigma_max exp(-p) / sum of exp(-p) over the
                       visible ones: at most one token a step, the least certain most often

The first two do not look at tokens, so all is drawn before the first step. For the third, the numbers that each step reveals and
hides are drawn at the start, and the positions in their step. Its hidden tokens use the mean chance of the visible ones as sigma,
which keeps the expected hidden share on schedule. The last step hides nothing, and given tokens are never hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atat_fast.ops.philox import STREAM_ORDER, STREAM_REMASK, gumbel64, random_words, uniform
from atat_fast.sampling.categorical import log_chance
from atat_fast.sampling.reveal import POSITIONS, Basic, Canvas, StepRows, Table, largest

REMASKING = {"remdm_cap": 0.02, "remdm_rescale": 0.02, "remdm_confidence": 1.0}
"""Each sampler's default eta."""


def most_sigma(step: int, steps: int) -> float:
    """The largest chance of hiding a visible token again at step s of S: min(1, (S - s - 1) / s), 0 at the last step."""
    return min(1.0, (steps - step - 1) / step) if step else 0.0


def reveal_chance(step: int, steps: int, sigma: float) -> float:
    """The chance that a hidden token is revealed at step s of S."""
    before, after = step / steps, (step + 1) / steps
    return min(1.0, (after - (1 - sigma) * before) / (1 - before))


class Remasked(Basic):
    """remdm_cap and remdm_rescale: a chain of coins, drawn on the host, says which tokens are hidden when."""

    def __init__(self, canvas: Canvas, kind: str, eta: float, steps: int, seed: int, inside: Tensor | None = None) -> None:
        super().__init__(canvas, inside)
        fill = canvas.host_fill.flatten()
        rows = fill.nonzero()[:, 0]
        names = canvas.host_names.flatten()[rows]
        hidden = torch.ones(len(rows), dtype=torch.bool)
        shown: list[tuple[int, Tensor]] = []
        again: list[tuple[int, Tensor]] = []
        for step in range(steps):
            sigma = min(eta, most_sigma(step, steps)) if kind == "remdm_cap" else eta * most_sigma(step, steps)
            coin = uniform(random_words(names, seed, step, STREAM_REMASK)[0])
            reveal = hidden & (coin < reveal_chance(step, steps, sigma)) if step + 1 < steps else hidden
            hide = ~hidden & (coin < sigma)
            shown.append((step, rows[reveal]))
            again.append((step, rows[hide]))
            hidden = (hidden & ~reveal) | hide
        self.shown, self.hiding = (_table(events, steps, canvas) for events in (shown, again))
        self.sizes = [StepRows(0, *both) for both in zip(self.shown.counts, self.hiding.counts, strict=True)]

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """See Policy."""
        return self.shown.at(canvas.step, sizes.revealed)

    def again(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """See Policy."""
        return self.hiding.at(canvas.step, sizes.hidden_again)


def _table(events: list[tuple[int, Tensor]], steps: int, canvas: Canvas) -> Table:
    when = torch.cat([torch.full((len(rows),), step) for step, rows in events])
    return Table(when, torch.cat([rows for _, rows in events]), steps, canvas)


class RemaskedByConfidence(Basic):
    """remdm_confidence: numbers are drawn on the host, positions on the device, from the chances with which tokens were drawn."""

    def __init__(self, canvas: Canvas, model: Any, eta: float, steps: int, seed: int, inside: Tensor | None = None) -> None:
        super().__init__(canvas, inside)
        self.model = model
        total = canvas.host_fill.sum(1)
        first = canvas.host_names[:, :1] // POSITIONS * POSITIONS  # position 0 of the sample, whatever the window
        places = first + torch.arange(canvas.shape[1])
        hidden = total.clone()
        shown, again = torch.zeros(steps, len(total), dtype=torch.int64), torch.zeros(steps, len(total), dtype=torch.int64)
        block = canvas.host_names[:, :1] - first  # the window's start: other blocks draw other coins
        for step in range(steps):
            words = random_words(places + (block << 32), seed, step, STREAM_REMASK)
            visible = total - hidden
            sigma = eta * most_sigma(step, steps)
            mean = torch.where(visible > 0, sigma / visible.clamp(min=1), 0.0).double()
            chance = torch.tensor([reveal_chance(step, steps, float(m)) for m in mean], dtype=torch.float64)
            of_hidden = torch.arange(canvas.shape[1]) < hidden[:, None]
            reveal = ((uniform(words[1]) < chance[:, None]) & of_hidden).sum(1) if step + 1 < steps else hidden
            hide = ((uniform(words[2])[:, 0] < sigma) & (visible > 0)).long()
            shown[step], again[step] = reveal, hide
            hidden = hidden - reveal + hide
        self.shown, self.hiding = shown.to(canvas.device), again.to(canvas.device)
        self.sizes = [StepRows(0, r, h) for r, h in zip(shown.sum(1).tolist(), again.sum(1).tolist(), strict=True)]
        self.chance = torch.zeros(canvas.bin + 1, dtype=torch.float64, device=canvas.device)

    def before(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """Any of the hidden positions, with equal chances."""
        hidden = canvas.hidden()
        keys = torch.where(hidden, self._noise(canvas, 0), -torch.inf)
        return canvas.rows_of(largest(keys, self._now(self.shown, canvas)) & hidden, sizes.revealed)

    def again(self, canvas: Canvas, sizes: StepRows) -> Tensor:
        """One of the visible positions with odds exp(-p), by Gumbel keys."""
        visible = canvas.fill & ~canvas.hidden()
        keys = self._noise(canvas, 2) - self.chance[: canvas.bin].view(canvas.shape)
        chosen = largest(torch.where(visible, keys, -torch.inf), self._now(self.hiding, canvas)) & visible
        return canvas.rows_of(chosen, sizes.hidden_again)

    def wrote(self, canvas: Canvas, rows: Tensor, features: Tensor, ids: Tensor) -> None:
        """Keep the chance of each token drawn."""
        self.chance.index_copy_(0, rows, log_chance(self.model, features, ids).double().exp())

    def _noise(self, canvas: Canvas, word: int) -> Tensor:
        words = random_words(canvas.names[: canvas.bin].view(canvas.shape), canvas.seed, canvas.step, STREAM_ORDER)
        return gumbel64(words[word], words[word + 1])

    def _now(self, counts: Tensor, canvas: Canvas) -> Tensor:
        return counts.index_select(0, canvas.step[None])[0]
