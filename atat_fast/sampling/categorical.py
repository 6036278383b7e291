"""The token of a revealed position: a draw from the model's distribution there, cut and sharpened as the caller asks.

The draw is linear_categorical's Gumbel-max rule with 64-bit noise named by (seed, sample, position, step, id). If nothing is cut
off and the model has `output_head`, logits are never stored. Top-k and top-p need logits, and take rows in slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atat_fast.errors import UsageError
from atat_fast.ops.linear_categorical import draw_rows, linear_categorical, token_noise
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy
from atat_fast.ops.registry import autocast_dtype

SLAB_BYTES = 64 << 20
"""Budget of a slab of fp32 logits."""
COLDEST = 1e-6
"""Below this temperature the likeliest token is taken, since dividing logits by less would leave the range of fp32."""

Drawer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(features [R, D], names [R] in the random stream, step as a 0-d tensor) -> ids [R]; -1 if a row's logits are invalid."""


@dataclass(frozen=True)
class Cut:
    """Which tokens may be drawn, and how sharply.

    temperature: divides the logits; 0 takes the likeliest token (of equals the lowest id) whatever is cut off.
    top_k: only the k most likely tokens; 0 is all of them.
    top_p: only the fewest most likely tokens whose chances, after temperature and top_k, add up to p or more; 1 is all of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raise UsageError for invalid settings."""
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature must be at least 0 and finite, got {self.temperature}; 0 takes the likeliest token, 1 draws as the "
                "model says"
            )
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 1, or 0 for all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def cuts(self) -> bool:
        """Whether any token is excluded."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature < COLDEST


def shortlist(logits: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, most likely first: logits over temperature [R, K], -inf after the last, and ids [R, K]."""
    scaled = logits / cut.temperature
    if 0 < cut.top_k < scaled.shape[1]:
        values, ids = scaled.topk(cut.top_k, dim=1)
    else:
        values, ids = scaled.sort(dim=1, descending=True, stable=True)
    if cut.top_p < 1:
        shares = torch.softmax(values.double(), dim=1)
        values = values.masked_fill(shares.cumsum(1) - shares >= cut.top_p, -torch.inf)
        if values.device.type == "cpu" and len(values):  # no noise for tokens cut in every row; on a GPU this would wait
            most = int((values > -torch.inf).sum(1).max())
            values, ids = values[:, : max(1, most)], ids[:, : max(1, most)]
    return values, ids


def draw_shortlisted(logits: Tensor, names: Tensor, cut: Cut, seed: Tensor, step: Tensor) -> Tensor:
    """[R, V] logits to [R] ids. An id's noise is the same whatever is cut off."""
    values, ids = shortlist(logits, cut)
    scores = values.double() + token_noise(names, ids, seed, step)
    best = scores.max(1)
    drawn = ids.gather(1, best.indices[:, None])[:, 0]
    return torch.where(best.values > -torch.inf, drawn, -1).where(~best.values.isnan(), -1)


def likeliest(logits: Tensor) -> Tensor:
    """[R, V] logits to the [R] ids of the largest, of equals the lowest id; -1 if a row has NaN or only -inf."""
    best = logits.max(1)  # NaN counts as the largest
    return torch.where(best.values > -torch.inf, best.indices, -1)


def slabs(count: int, vocabulary: int) -> Iterator[slice]:
    """Ranges of rows whose fp32 logits fit SLAB_BYTES."""
    rows = max(16, SLAB_BYTES // (4 * max(1, vocabulary)))
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def output_head(model: Any, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The model's `output_head()`, cast once to the dtype of its products; None if it has none."""
    shown = getattr(model, "output_head", None)
    if shown is None:
        return None
    weight, bias = shown()
    dtype = autocast_dtype(weight)
    return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def make_drawer(model: Any, cut: Cut, seed: Tensor) -> Drawer:
    """A function from rows of features to tokens. The head is cast once, for all steps."""
    head = None if cut.cuts or cut.greedy else output_head(model, seed)

    def fused(features: Tensor, names: Tensor, step: Tensor) -> Tensor:
        assert head is not None
        return linear_categorical(
            features, head[0], names, bias=head[1], forbidden=model.mask_id, temperature=cut.temperature, seed=seed, step=step
        )

    def seen(features: Tensor, names: Tensor, step: Tensor) -> Tensor:
        parts = []
        for some in _row_slabs(model, features):
            logits = model.logits(features[some])
            if cut.greedy:
                parts.append(likeliest(logits))
            elif cut.cuts:
                parts.append(draw_shortlisted(logits, names[some], cut, seed, step))
            else:
                parts.append(draw_rows(logits, names[some], -1, cut.temperature, seed, step))
        return torch.cat(parts)

    return seen if head is None else fused


def _row_slabs(model: Any, features: Tensor) -> list[slice]:
    return list(slabs(len(features), getattr(model, "vocab_size", 1 << 16))) or [slice(0, 0)]


def certainty(model: Any, features: Tensor, order: str, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """How sure the model is of each row, [R] fp32, larger being surer; the orders by certainty sort by this.

    confidence: log of the largest probability.   entropy: minus the entropy, in nats.   margin: the largest probability less the
    next. All at temperature 1, over the whole vocabulary without the mask token. With a head the first two store no logits.
    """
    if head is not None and order in ("confidence", "entropy"):
        target = torch.full((len(features),), int(model.mask_id == 0), dtype=torch.int64, device=features.device)
        _, known = linear_cross_entropy(
            features, head[0], target, bias=head[1], forbidden=model.mask_id, reduction="none", return_statistics=True
        )
        sure: Tensor = known.max_probability.log() if order == "confidence" else -known.entropy
        return sure.float()
    parts = [certainty_of(model.logits(features[some]), order) for some in _row_slabs(model, features)]
    return torch.cat(parts)


def certainty_of(logits: Tensor, order: str) -> Tensor:
    """`certainty` from logits [R, V]."""
    log_p = torch.log_softmax(logits.double() if logits.dtype is torch.float64 else logits.float(), dim=1)
    if order == "confidence":
        return log_p.amax(1).float()
    if order == "entropy":
        return (log_p.exp() * log_p.clamp(min=-1e4)).sum(1).float()
    two = log_p.topk(min(2, log_p.shape[1]), dim=1).values.exp()
    return (two[:, 0] - (two[:, 1] if two.shape[1] > 1 else 0)).float()


def log_chance(model: Any, features: Tensor, ids: Tensor) -> Tensor:
    """log p of the drawn tokens, [R] fp32, at temperature 1."""
    parts = []
    for some in _row_slabs(model, features):
        log_p = torch.log_softmax(model.logits(features[some]).float(), dim=1)
        parts.append(log_p.gather(1, ids[some].clamp(min=0)[:, None])[:, 0])
    return torch.cat(parts)
