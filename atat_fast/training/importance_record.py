"""Quality of importance scores on held-out text: their reliability, and the scores of two passages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atat_fast.config import EvalConfig
from atat_fast.data import Tokenizer, TokenSplit
from atat_fast.diffusion.uniform import hide
from atat_fast.evaluation.likelihood import evaluating, spread_sequences
from atat_fast.evaluation.pieces import Pieces
from atat_fast.models.importance import error_chance
from atat_fast.ops.attention import documents_of

if TYPE_CHECKING:
    from atat_fast.training.loss import Objective

BINS = 10
MOST_SEQUENCES = 64
PASSAGES, PASSAGE_TOKENS = 2, 256


def reliability(objective: Objective, split: TokenSplit, config: EvalConfig, *, progress: float) -> dict[str, Any]:
    """Predicted against observed chance of error, in ten bins of equal width, under training's masks at `progress`.

    Up to 64 sequences spread over the split; masks depend on config.seed alone. predicted is the estimator's probability (the
    score, if nothing is learned); observed is the mean of 1 - p(x_i | z) under the model's present weights.
    Returns lists of BINS: count, and the means predicted and observed (0 for an empty bin).
    """
    model = objective.model
    tokens, wanted = spread_sequences(
        split, model.config.length, min(config.sequences or MOST_SEQUENCES, MOST_SEQUENCES), model.cos.device
    )
    same = objective.alike(seed=config.seed, total=wanted)
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for first in range(0, wanted, config.batch):
            x = tokens(first, min(config.batch, wanted - first))
            ids = torch.arange(first, first + len(x), device=x.device)
            documents = documents_of(x.cpu(), split.eos_id).to(x.device) if model.config.document_mask else None
            masked = same.hide(x, ids, first=first, step=0, progress=progress, documents=documents)
            assert masked.importance is not None
            with objective.compute.autocast():
                nll = model.nll(masked.noisy, masked.rows, masked.target, masked.hidden_share, documents)
            scores, logits = masked.importance
            predicted = (scores if logits is None else torch.sigmoid(logits)).flatten()[masked.rows]
            rows = [value[: masked.hidden].double().cpu() for value in (torch.ones_like(nll), predicted, error_chance(nll))]
            place = (rows[1] * BINS).long().clamp(0, BINS - 1)
            sums += torch.stack([torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, row) for row in rows])
    means = sums[1:] / sums[0].clamp(min=1)
    return {"count": sums[0].long().tolist(), "predicted": means[0].tolist(), "observed": means[1].tolist()}


def text_importance(objective: Objective, split: TokenSplit, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Two held-out passages of up to 256 tokens, each token with its score: [{"tokens": texts, "scores": numbers}].

    Tokens of one character are one text, with their greatest score. If scores see only visible tokens, half of the passage is
    hidden, then the other half: a token is scored while it is hidden.
    """
    objective = objective.alike(seed=objective.seed, total=objective.total)  # eager: compiling does not pay for two passages
    model, available = objective.model, split.num_sequences(objective.model.config.length)
    length = model.config.length
    which = [min(available - 1, (2 * i + 1) * available // (2 * PASSAGES)) for i in range(min(PASSAGES, available))]
    x = torch.stack([torch.from_numpy(split.sequence(i, length).astype("int64")) for i in which]).to(model.cos.device)
    with torch.no_grad():
        scores = _scores(objective, x).cpu()
    passages, split_up = [], Pieces(tokenizer.decode, model.mask_id)
    for row, values in zip(x[:, :PASSAGE_TOKENS].tolist(), scores.tolist(), strict=True):
        pieces = split_up(row)
        greatest = [round(max(values[piece.first : piece.end]), 4) for piece in pieces]
        passages.append({"tokens": [piece.text for piece in pieces], "scores": greatest})
    return passages


def _scores(objective: Objective, x: Tensor) -> Tensor:
    share = torch.full((len(x),), 0.5, device=x.device)
    if objective.config.importance.sees == "clean":
        return objective.scores(x, x, share).scores
    half = torch.full((len(x),), x.shape[1] // 2)
    ids = torch.arange(len(x), device=x.device)
    mask_id = objective.model.mask_id
    first = hide(x, half, mask_id=mask_id, sample_ids=ids, seed=objective.config.eval.seed, step=0).noisy
    hidden = first == mask_id
    second = torch.where(hidden, x, mask_id)
    return torch.where(hidden, objective.scores(first, x, share).scores, objective.scores(second, x, share).scores)
