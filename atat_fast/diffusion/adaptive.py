"""Hide tokens by importance: scores tilt the odds of each token, and may look only at tokens that stay visible.

`hide_by_importance` chooses exactly k tokens of each sequence in two steps, each one launch of mask_tokens:

1. Hide k0 = k + ceil(rho * (L - k)) tokens uniformly (stream STREAM_MASK). Scores are made from the rest.
2. Reveal tokens of those k0 one by one with odds exp(-tilt * score) (stream STREAM_REVEAL), until k are hidden.

The scores see only tokens that are visible in the end. So the pattern of masks adds nothing to what the visible tokens say, and
the posterior a model learns is p(x_i | visible tokens). Scores of the clean text (`sees: clean`, and frequencies) break that;
audit/masks.py measures by how much. With tilt 0 both steps, and their result, are uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from atat_fast.config import CurriculumConfig, DiffusionConfig, ImportanceConfig
from atat_fast.diffusion.curriculum import highest_level
from atat_fast.diffusion.process import MaskedBatch, Scored
from atat_fast.errors import UsageError
from atat_fast.ops.masking import mask_tokens
from atat_fast.ops.philox import STREAM_MASK, STREAM_REVEAL

MOST_TILT = 40.0
"""Largest |tilt * level|. Keys are a Gumbel of 32 random bits, in (-3.2, 22.9), less tilt * score. Up to 40 they stay within 64
of 0, where fp32 numbers are at most 2^-18 apart. Among 1,024 tokens of equal score two then share the k-th key in fewer than
one sequence of 600 (1,024 * 2^-18 / e); position, not chance, decides between those. Odds of e^40 are certainty anyway."""

Scorer = Callable[[Tensor, Tensor, Tensor], Scored]
"""(ids that may be seen [B, L], clean ids [B, L], share that will be hidden [B] fp32) -> scores."""


class BadScores(ValueError):
    """Scores outside [0, 1] or NaN: the network that made them has diverged."""


def context_counts(counts: Tensor, length: int, rho: float) -> Tensor:
    """k0 of each sequence, the number hidden while scores are made: k + ceil(rho * (L - k))."""
    return counts + torch.ceil(rho * (length - counts).double()).long()


def hide_by_importance(
    tokens: Tensor,
    counts: Tensor,
    *,
    score: Scorer,
    sees: str,
    rho: float,
    tilt: float,
    focus: float,
    mask_id: int,
    sample_ids: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    weighting: str = "uniform",
) -> MaskedBatch:
    """Hide exactly counts[b] (CPU int64) tokens of sequence b, chosen by importance. tokens [B, L] without mask_id.

    sees, rho, tilt, focus: as in ImportanceConfig, the last two times the curriculum's level. weighting: see mask_tokens.
    The hidden tokens depend only on (seed, step, sample, position) and the scores; nothing waits for a device. The batch keeps
    the scores, with their gradient. Raises BadScores, on a CPU, for scores outside [0, 1].
    """
    device, length, hidden = tokens.device, tokens.shape[1], int(counts.sum())
    share = (counts / max(1, length)).to(device, torch.float32, non_blocking=True)
    eligible = None
    if sees == "visible":
        outer = context_counts(counts, length, rho)
        seen, _, _ = mask_tokens(
            tokens,
            outer.to(device, non_blocking=True),
            num_rows=int(outer.sum()),
            mask_id=mask_id,
            sample_ids=sample_ids,
            seed=seed,
            step=step,
            stream=STREAM_MASK,
        )
        eligible = seen == mask_id
    else:
        seen = tokens
    scored = score(seen, tokens, share)
    check_scores(scored.scores)
    noisy, rows, weights = mask_tokens(
        tokens,
        counts.to(device, non_blocking=True),
        num_rows=hidden,
        mask_id=mask_id,
        sample_ids=sample_ids,
        seed=seed,
        step=step,
        scores=scored.scores,
        tilt=tilt,
        focus=focus,
        eligible=eligible,
        weighting=weighting,
        stream=STREAM_REVEAL,
    )
    return MaskedBatch(noisy, rows, tokens.flatten()[rows], weights, share, tokens.numel(), hidden=hidden, importance=scored)


def relative_weights(scores: Tensor, hidden: Tensor, exponent: float) -> Tensor:
    """exp(exponent * score) normalised to mean 1 over the hidden tokens of each sequence, and 0 elsewhere: [B, L] fp32.

    scores [B, L] in [0, 1]; hidden [B, L] bool. exponent is focus for `importance` weights and -tilt for `order`. mask_tokens
    multiplies (L + 1) / k by this; here it is differentiable in scores. A sequence that hides nothing gives zeros.
    """
    odds = torch.exp(exponent * scores.float()) * hidden
    total = odds.sum(1, keepdim=True)
    return odds * hidden.sum(1, keepdim=True) / total.clamp(min=torch.finfo(torch.float32).tiny)


def check_scores(scores: Tensor) -> None:
    """Raise BadScores if scores on a CPU are not all in [0, 1]. Scores on a GPU are not checked."""
    if scores.device.type != "cpu" or scores.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(scores.detach()))
    if not (low >= 0 and high <= 1):
        what = "hold NaN" if math.isnan(low) or math.isnan(high) else f"run from {low:g} to {high:g}"
        raise BadScores(f"importance scores {what}, and must lie in 0 to 1; the network that made them has diverged")


def check_importance(importance: ImportanceConfig, diffusion: DiffusionConfig, curriculum: CurriculumConfig) -> None:
    """Raise UsageError for importance settings that cannot be trained with."""
    if importance.source == "none":
        if diffusion.weighting in ("order", "importance"):
            raise UsageError(
                f"diffusion.weighting {diffusion.weighting} needs scores and importance.source is none; "
                "set importance.source learned, or diffusion.weighting uniform"
            )
        if curriculum.kind != "none" and not diffusion.spread:
            raise UsageError(
                f"curriculum.kind {curriculum.kind} has nothing to change if importance.source is none and diffusion.spread 0; "
                "set one of them, such as diffusion.spread 0.5, or curriculum.kind none"
            )
        return
    if diffusion.spread:
        raise UsageError(
            f"diffusion.spread {diffusion.spread} hides tokens wherever they lie, and importance.source {importance.source} "
            "chooses them; set one of them to 0 or none"
        )
    if diffusion.mirror:
        raise UsageError(
            "diffusion.mirror hides two halves of one sequence, which importance cannot both choose; "
            "set importance.source none, or diffusion.mirror false"
        )
    if not 0 < importance.rho <= 1:
        raise UsageError(f"importance.rho must be above 0 and at most 1, got {importance.rho}")
    most = highest_level(curriculum)
    for name in ("tilt", "focus"):
        value = getattr(importance, name)
        if not abs(value) * most <= MOST_TILT:
            raise UsageError(
                f"importance.{name} {value} times the curriculum's level {most:g} is beyond {MOST_TILT:g}, where fp32 keys no "
                f"longer tell tokens apart; use at most {MOST_TILT / max(most, 1e-9):g}"
            )
    if not (importance.loss_weight >= 0 and math.isfinite(importance.loss_weight)):
        raise UsageError(f"importance.loss_weight must be at least 0, got {importance.loss_weight}")
    for name in ("depth", "width", "layers", "heads"):
        if getattr(importance, name) < 1:
            raise UsageError(f"importance.{name} must be at least 1, got {getattr(importance, name)}")
    if importance.width % importance.heads or importance.width // importance.heads % 2:
        raise UsageError(f"importance.width {importance.width} does not divide into {importance.heads} heads of an even size")
    if importance.differentiable_weights:
        if importance.source == "frequency":
            raise UsageError("importance.differentiable_weights needs a learned score, and importance.source is frequency")
        if diffusion.weighting not in ("order", "importance"):
            raise UsageError(
                f"importance.differentiable_weights needs weights that come from scores, and diffusion.weighting is "
                f"{diffusion.weighting}; set diffusion.weighting importance"
            )


def bias(importance: ImportanceConfig) -> str | None:
    """A sentence if these settings train something other than p(x_i | visible), else None."""
    if importance.source == "none":
        return None
    if importance.source == "learned" and importance.sees == "visible":
        return None
    what = "importance.sees clean" if importance.source == "learned" else f"importance.source {importance.source}"
    return (
        f"{what} lets masks depend on the tokens they hide: what is trained is not p(token | visible tokens), and the training "
        "loss bounds nothing (docs/atat.md); val/nll stays what it is"
    )
