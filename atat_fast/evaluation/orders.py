"""Likelihood of text revealed in an order: exact if a rule decides the order, a bound if chance does.

A sampler that reveals tokens one after another by a rule F writes a text x, from nothing, with probability

    p(x) = product over passes of  p(x_F(z) | z),          z: what was revealed before, F(z): the tokens this pass reveals.

If F looks at z alone (left to right; most confident first), only one path leads to x. So p(x) is exactly the probability that the
sampler writes x, and it sums to 1 over all texts (DUEL, arXiv 2603.01367). Several tokens a pass are drawn independently, in the
sampler and here, so p(x) stays exact for that faster sampler. F is the sampler's own code (`certainty`, `surest`), ties included.

If chance decides (importance: odds exp(-tilt * score of z)), many paths lead to x. The mean of -log p(x) over drawn orders is
then an upper bound on the negative log-likelihood of the sampler with the same policy. A policy that saw hidden tokens would
give no bound (audit/masks.py), so scores come from z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.data import TokenSplit
from atat_fast.diffusion.bound import Estimate
from atat_fast.errors import UsageError, nearest
from atat_fast.evaluation.likelihood import evaluating, require_whole_texts, spread_sequences
from atat_fast.models.dit import DiT
from atat_fast.models.importance import ImportanceEstimator
from atat_fast.ops.attention import Documents, documents_of
from atat_fast.ops.masking import reveal_keys
from atat_fast.ops.philox import STREAM_SAMPLE, random_words
from atat_fast.sampling.categorical import certainty, likeliest, output_head, slabs
from atat_fast.sampling.reveal import largest, surest

EXACT = {
    "left_to_right": "the first hidden token",
    "confidence": "where the most likely token has the highest probability",
    "margin": "where the most likely token is furthest ahead of the second",
    "entropy": "where the model's distribution has the least entropy",
}
"""Rules that look only at what is revealed: their likelihood is exact."""
BOUNDS = {"importance": "by chance, with odds exp(-tilt * score) of the model's own estimator"}
ORDERS = (*EXACT, *BOUNDS)

Scorer = Callable[[Tensor, Tensor], Tensor]
"""(ids with masks [B, L], hidden share [B]) -> scores in [0, 1], [B, L]."""


def check_orders(orders: list[str], estimator: ImportanceEstimator | None) -> None:
    """Raise UsageError for an unknown order, or one that this model cannot follow."""
    for order in orders:
        if order not in ORDERS:
            raise UsageError(f"there is no order {order!r}{nearest(order, ORDERS)}; orders are {', '.join(ORDERS)}")
        if order == "importance" and estimator is None:
            raise UsageError(
                f"order importance needs a model with an importance estimator, and this one has none; choose {', '.join(EXACT)}"
            )
        if order == "importance" and estimator is not None and estimator.network is None:
            raise UsageError(
                f"order importance needs learned scores, and importance.source {estimator.config.source} knows only the hidden "
                f"tokens themselves; choose {', '.join(EXACT)}"
            )


def evaluate_order(
    model: DiT,
    split: TokenSplit,
    order: str,
    *,
    sequences: int,
    batch: int,
    seed: int,
    autocast: AbstractContextManager[Any],
    per_pass: int = 1,
    estimator: ImportanceEstimator | None = None,
    tilt: float | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Nats a token in this order over up to `sequences` sequences (0: all) spread over the split; se: of the choice of text.

    An importance order is drawn once for each sequence, so its error covers orders too. tilt: by default the model's own.
    on_batch(done, all) is called after each batch. Raises UsageError as `check_orders` does.
    """
    check_orders([order], estimator)
    if per_pass < 1:
        raise UsageError(f"tokens revealed in a pass must be at least 1, got {per_pass}")
    require_whole_texts(model, split)
    tokens, wanted = spread_sequences(split, model.config.length, sequences, model.cos.device)
    score = None if estimator is None else estimator.scorer(model)
    if tilt is None and estimator is not None:
        tilt = estimator.config.tilt
    found = []
    with torch.no_grad(), autocast, evaluating(model):
        for first in range(0, wanted, batch):
            x = tokens(first, min(batch, wanted - first))
            documents = documents_of(x.cpu(), split.eos_id).to(x.device) if model.config.document_mask else None
            ids = torch.arange(first, first + len(x), device=x.device)
            hidden = torch.ones_like(x, dtype=torch.bool)
            nll, _ = order_nll(
                model,
                x,
                hidden,
                order,
                per_pass=per_pass,
                sample_ids=ids,
                seed=seed,
                score=score,
                tilt=tilt or 0.0,
                documents=documents,
            )
            found.append(nll.cpu() / x.shape[1])
            if on_batch is not None:
                on_batch(first + len(x), wanted)
    values = torch.cat(found)
    se = float(values.std() / math.sqrt(wanted)) if wanted > 1 else math.inf
    return Estimate(float(values.mean()), se, wanted, model.config.length, values)


def order_nll(
    model: DiT,
    tokens: Tensor,
    hidden: Tensor,
    order: str,
    *,
    per_pass: int = 1,
    sample_ids: Tensor | None = None,
    seed: int = 0,
    score: Scorer | None = None,
    tilt: float = 0.0,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """-log p of the hidden tokens given the others, revealed in `order`, per_pass tokens at a time.

    tokens [B, L]: clean ids. hidden [B, L] bool: those to score; the others are given, like a prompt. Sequences may hide
    different numbers. seed, sample_ids, score and tilt are for importance only.
    Returns nats a sequence, fp64 [B], and bool [B]: whether each token was the model's most likely one when it was revealed.
    """
    batch, length = tokens.shape
    hidden = hidden.clone()
    total = torch.zeros(batch, dtype=torch.float64, device=tokens.device)
    greedy = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    ids = torch.arange(batch, device=tokens.device) if sample_ids is None else sample_ids
    position = torch.arange(length, device=tokens.device)
    count = torch.full((batch,), per_pass, device=tokens.device)
    head = output_head(model, tokens)
    for step in range(-(-int(hidden.sum(1).max()) // per_pass)):
        z = tokens.masked_fill(hidden, model.mask_id)
        share = hidden.float().mean(1)
        if order in ("left_to_right", "importance"):  # the places are known before the forward pass, which computes only them
            if order == "left_to_right":
                rank = -position.double().expand(batch, length)
            else:
                assert score is not None
                word = random_words(ids[:, None] * length + position, seed, step, STREAM_SAMPLE)[0]
                rank = reveal_keys(word, score(z, share), tilt).double()  # the largest key is revealed first
            chosen = largest(rank.masked_fill(~hidden, -torch.inf), count) & hidden
            rows = chosen.flatten().nonzero().flatten()
            features = model.features(z, share, rows=rows, documents=documents)
        else:
            everywhere = hidden.flatten().nonzero().flatten()
            features = model.features(z, share, rows=everywhere, documents=documents)
            known = torch.zeros(batch * length, device=tokens.device)
            known[everywhere] = certainty(model, features, order, head)
            chosen = surest(known.view(batch, length), hidden, count)
            rows = chosen.flatten().nonzero().flatten()
            features = features[chosen.flatten()[everywhere]]
        nll, best = _read(model, features, tokens.flatten()[rows])
        owner = torch.div(rows, length, rounding_mode="floor")
        total.index_add_(0, owner, nll)
        greedy[owner[~best]] = False
        hidden.view(-1)[rows] = False
    return total, greedy


def _read(model: DiT, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of target [R] at features [R, D], fp64 [R], and whether greedy decoding takes each."""
    nll, best = [], []
    for part in slabs(len(target), model.vocab_size):
        logits = model.logits(features[part]).float()
        nll.append(F.cross_entropy(logits, target[part], reduction="none").double())
        best.append(likeliest(logits) == target[part])
    return torch.cat(nll), torch.cat(best)
