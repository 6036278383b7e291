"""The specification of linear_cross_entropy: the whole matrix of logits, in PyTorch's own steps.

Second derivatives, forward mode and torch.func run it too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.linear_cross_entropy.slabs import LossArguments, accumulation_dtype
from atat_fast.ops.registry import without_autocast


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    forbidden: int | None = None,
    rates: Tensor | None = None,
    elapsed: Tensor | None = None,
) -> Tensor:
    """w_i loss_i of each row, [R]. Arguments are those of linear_cross_entropy."""
    logits = F.linear(hidden if rows is None else hidden[rows], weight, bias)
    loss = losses_of(logits, target, forbidden, rates, elapsed)[0]
    return loss if token_weight is None else token_weight * loss


def losses_of(
    logits: Tensor, target: Tensor, forbidden: int | None, rates: Tensor | None, elapsed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and nll of each row, and log p."""
    if forbidden is not None:
        logits = logits.index_fill(1, torch.tensor([forbidden], device=logits.device), -torch.inf)
    if rates is not None and elapsed is not None:
        logits = logits - elapsed[:, None] * rates
    log_p = torch.log_softmax(logits, dim=1)
    loss = nll = -log_p.gather(1, target[:, None])[:, 0]
    if rates is not None:
        loss = rates[target] * nll + (log_p.exp() * rates).sum(1) - rates[target]
    return loss, nll, log_p


def plain_rows(given: LossArguments, statistics: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the op linear_cross_entropy_rows: the product in hidden's dtype, the rest in fp32 or fp64."""
    hidden, weight = given.hidden, given.weight
    wide = accumulation_dtype(hidden)
    with without_autocast(hidden):
        x = hidden if given.rows is None else hidden.index_select(0, given.rows)
        logits = F.linear(x, weight.to(x.dtype), None if given.bias is None else given.bias.to(x.dtype)).to(wide)
        rates, elapsed = (None if t is None else t.to(wide) for t in (given.rates, given.elapsed))
        # A target of -100 has weight 0: the caller masks its loss.
        target = given.target.clamp(0, weight.shape[0] - 1)
        losses, nll, log_p = losses_of(logits, target, given.forbidden, rates, elapsed)
        largest, entropy = (log_p.amax(1).exp(), torch.special.entr(log_p.exp()).sum(1)) if statistics else (nll[:0], nll[:0])
    return losses, nll if rates is not None else nll[:0], largest, entropy


def plain_sum(given: LossArguments) -> Tensor:
    """The weighted sum."""
    x, weight = counting(given.hidden, given.rows, given.token_weight), given.token_weight
    losses = plain_rows(given._replace(hidden=x, rows=None))[0]
    return losses.sum() if weight is None else (weight * losses.masked_fill(weight == 0, 0.0)).sum()


def counting(hidden: Tensor, rows: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """The rows of hidden that count, with zeros for those of weight 0, whose values must not reach a gradient."""
    x = hidden if rows is None else hidden.index_select(0, rows)
    return x if token_weight is None else x.masked_fill((token_weight == 0)[:, None], 0.0)
