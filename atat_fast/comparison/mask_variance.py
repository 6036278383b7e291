"""The error that masks leave in a likelihood, for several ways of drawing them, on one trained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atat_fast.config import DiffusionConfig, EvalConfig
from atat_fast.data import TokenSplit
from atat_fast.diffusion.bound import NllFunction, estimate_nll
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.diffusion.process import MaskedBatch
from atat_fast.errors import UsageError
from atat_fast.evaluation.likelihood import evaluating, model_nll, require_whole_texts, spread_sequences
from atat_fast.models.dit import DiT
from atat_fast.ops.attention import documents_of

TRAINING_WAYS = {
    "antithetic": DiffusionConfig(),
    "mirror": DiffusionConfig(mirror=True),
    "mdlm": DiffusionConfig(masking="bernoulli", pairing="stratified"),
    "independent": DiffusionConfig(masking="bernoulli", pairing="independent"),
}
WAYS = {
    "evaluation": "exact counts, one in each stratum of 1..L, less what the text's counts explain: what is reported as val/nll",
    "stratified": "the same without control variates",
    "antithetic": "exact counts in stratified pairs (k, L-k): what training draws",
    "mirror": "the same on half as many sequences, each hidden twice with complementary masks",
    "mdlm": "each token by chance at stratified times, as MDLM draws",
    "independent": "each token by chance at independent times",
}


@dataclass(frozen=True)
class MaskError:
    """For one way: the mean over all replicates, and the standard error that masks alone leave in one estimate."""

    nll: float
    se: float


def mask_errors(
    nll: NllFunction, tokens: Tensor, *, mask_id: int, group: int, replicates: int, seed: int
) -> dict[str, MaskError]:
    """The error, for each of WAYS, of an estimate from `group` masked sequences. tokens [n, L] make n / group separate groups.

    Each replicate draws anew the masks, and the order of the sequences, which decides the stratum of each; the sequences stay.
    Variances are averaged over groups. The error's relative error is about 1 / sqrt(2 groups (replicates - 1)).
    """
    if replicates < 2 or group < 2 or group % 2 or len(tokens) < group:
        raise UsageError(
            f"mask errors need at least 2 replicates and an even group of at most {len(tokens)} sequences, "
            f"got {replicates} and {group}"
        )
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for first in range(0, len(tokens) - group + 1, group):
        x = tokens[first : first + group]
        for way, values in found.items():
            values.append([_estimate(nll, x, way, mask_id, first, seed + r) for r in range(replicates)])
    errors = {}
    for way, values in found.items():
        drawn = torch.tensor(values, dtype=torch.float64)
        errors[way] = MaskError(float(drawn.mean()), math.sqrt(float(drawn.var(dim=1).mean())))
    return errors


def _estimate(nll: NllFunction, x: Tensor, way: str, mask_id: int, first: int, seed: int) -> float:
    """One estimate in nats a token from as many masked sequences as x [group, L] has."""
    seed = (seed * 1_000_003 + first) % (1 << 31)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)]
    if way in ("evaluation", "stratified"):
        found = estimate_nll(
            nll, lambda i, n: x[i : i + n], len(x), mask_id=mask_id, draws=1, batch=len(x), seed=seed, control=way == "evaluation"
        )
        return found.nll
    config = TRAINING_WAYS[way]
    if config.mirror:
        x = x[: len(x) // 2].repeat_interleave(2, 0)
    ids = torch.arange(first, first + len(x), dtype=torch.int64, device=x.device)
    masked = hide_for_training(x, config, first=0, total=len(x), mask_id=mask_id, sample_ids=ids, seed=seed, step=0)
    return float((masked.weights.double() * nll(masked).double()).sum()) / masked.tokens


def model_mask_errors(
    model: DiT, split: TokenSplit, config: EvalConfig, autocast: AbstractContextManager[Any], *, replicates: int
) -> dict[str, MaskError]:
    """`mask_errors` of a model on config.sequences sequences, spread over the split, in groups of config.batch."""
    tokens: Callable[[int, int], Tensor]
    require_whole_texts(model, split)
    tokens, count = spread_sequences(split, model.config.length, config.sequences, model.cos.device)
    group = min(config.batch, count) // 2 * 2
    forward = model_nll(model)

    def nll(masked: MaskedBatch) -> Tensor:
        if model.config.document_mask:
            clean = masked.noisy.flatten().index_copy(0, masked.rows, masked.target).view_as(masked.noisy)
            masked.documents = documents_of(clean.cpu(), split.eos_id).to(clean.device)
        return forward(masked) if len(masked.rows) else torch.zeros(0, device=masked.noisy.device)

    with torch.no_grad(), autocast, evaluating(model):
        return mask_errors(nll, tokens(0, count), mask_id=model.mask_id, group=group, replicates=replicates, seed=config.seed)
