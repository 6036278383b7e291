"""mask_tokens: hide exactly k tokens of each sequence, and list the rows that the loss needs.

Reveal key of token i (DESIGN: the tilted Gumbel key):   kappa_i = -tilt * score_i + G_i,   G_i standard Gumbel.
The k smallest keys are hidden; of equal keys the lower position goes first. Without a tilt the key is the random word itself: a
Gumbel grows with its word, so the same tokens are hidden, and an integer is the same on every backend.
Revealing from the largest key down is Plackett-Luce: the chance that i is next is softmax over hidden tokens of -tilt * score.

With `spread` some sequences hide tokens that lie evenly, one in each of k cells of (nearly) equal length at a random turn, or,
below 0, one span. Both are blind to the tokens, and every position is still hidden with chance k / L. Their keys are those of
uniform masks after a first bit that says whether a position is drawn.

Tilted keys are fp64 here and fp32 in the kernels, which may therefore swap tokens whose keys are within 1e-6 of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atat_fast.errors import nearest
from atat_fast.ops.philox import STREAM_MASK, STREAM_SPREAD, random_words, uniform
from atat_fast.ops.registry import Cost, as_ids, backends, choose_backend, dispatch, readable, register, scalar

WEIGHTINGS = ("uniform", "order", "importance", "ce")
"""Kernels take a weighting as its index here."""
LONGEST = 16_384
"""Longest sequence on a GPU, in tokens: its keys stay in one multiprocessor's shared memory or registers."""
LONGEST_SPREAD = 8_192
"""Longest sequence whose hidden tokens the Triton kernel spreads: for more it lacks registers."""


def mask_tokens_reference(
    tokens: Tensor,
    num_masked: Tensor,
    num_rows: int,
    mask_id: int,
    scores: Tensor | None,
    tilt: float,
    focus: float,
    spread: int,
    eligible: Tensor | None,
    frozen: Tensor | None,
    weighting: str,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of mask_tokens, in plain PyTorch; spread is in units of 2^-32. No step waits for the device."""
    length = tokens.shape[1]
    position = torch.arange(length, device=tokens.device)
    word = random_words(sample_ids[:, None] * length + position, seed, step, stream)[0]

    keys = reveal_keys(word, scores, tilt)
    may_hide = _may_hide(eligible, frozen)
    num_masked = num_masked.clamp(0, length)
    if spread and length:
        keys = _spread_keys(keys, num_masked, spread, seed, step, sample_ids)
    if may_hide is not None:
        keys = torch.where(may_hide, keys, torch.inf if keys.is_floating_point() else 2**32)
        num_masked = num_masked.minimum(may_hide.sum(1))
    order = torch.argsort(keys, dim=1, stable=True)  # stable: equal keys go by position
    hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, order, position < num_masked[:, None])

    noisy = torch.where(hidden, mask_id, tokens).to(tokens.dtype)
    rows = torch.nonzero_static(hidden.flatten(), size=num_rows, fill_value=0).flatten()
    weights = _weights(rows, num_masked, hidden, scores, tilt, focus, frozen, weighting)
    return noisy, rows, weights


def reveal_keys(word: Tensor, scores: Tensor | None, tilt: float) -> Tensor:
    """Sort keys from random words [B, L]: the word itself, or the tilted Gumbel in fp64. Small keys are hidden first."""
    if scores is None or tilt == 0:
        return word
    keys = -torch.log(-torch.log(uniform(word))) - tilt * scores.to(torch.float64)
    return keys.nan_to_num(nan=torch.finfo(torch.float64).max)  # finite: tokens that may not be hidden sort after every key


def _spread_keys(word: Tensor, num_masked: Tensor, spread: int, seed: Tensor, step: Tensor, sample_ids: Tensor) -> Tensor:
    """Keys of which num_masked[b] evenly spread positions (spread below 0: one span) are the smallest, in chosen sequences."""
    length = word.shape[1]
    first = sample_ids[:, None] * length
    _, choice, turn, _ = random_words(first, seed, step, STREAM_SPREAD)
    place = (torch.arange(length, device=word.device) + (turn * length >> 32)) % length
    k = num_masked.clamp(min=1)[:, None]
    if spread < 0:
        drawn = place < k
    else:
        cell = place * k // length
        begin, end = (((cell + more) * length + k - 1) // k for more in (0, 1))
        within = random_words(first + cell, seed, step, STREAM_SPREAD)[0] * (end - begin) >> 32
        drawn = place - begin == within
    return torch.where(choice < abs(spread), (word >> 1) + torch.where(drawn, 0, 1 << 31), word)


def _weights(
    rows: Tensor,
    num_masked: Tensor,
    hidden: Tensor,
    scores: Tensor | None,
    tilt: float,
    focus: float,
    frozen: Tensor | None,
    weighting: str,
) -> Tensor:
    batch, length = hidden.shape
    free = torch.full_like(num_masked, length) if frozen is None else (~frozen).sum(1)
    total = num_masked.sum()
    if weighting == "ce":
        dense = (free.sum() / total.clamp(min=1)).expand(batch, length)
    else:
        dense = ((free + 1) / num_masked.clamp(min=1))[:, None].expand(batch, length)
    if weighting in ("order", "importance"):
        assert scores is not None
        exponent = scores.to(torch.float64) * (-tilt if weighting == "order" else focus)
        share = torch.softmax(exponent.masked_fill(~hidden, -torch.inf), dim=1)  # NaN if nothing is hidden: not gathered
        dense = dense * share * num_masked[:, None]
    weights = dense.flatten()[rows] if batch and length else rows.to(torch.float32)
    padding = torch.arange(len(rows), device=rows.device) >= total
    return weights.to(torch.float32).masked_fill(padding, 0.0)


def mask_tokens(
    tokens: Tensor,
    num_masked: Tensor | Sequence[int],
    *,
    mask_id: int,
    seed: int | Tensor,
    step: int | Tensor,
    sample_ids: Tensor,
    num_rows: int | None = None,
    scores: Tensor | None = None,
    tilt: float = 0.0,
    focus: float = 0.0,
    spread: float = 0.0,
    eligible: Tensor | None = None,
    frozen: Tensor | None = None,
    weighting: str = "uniform",
    stream: int = STREAM_MASK,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hide exactly num_masked[b] tokens of sequence b.

    tokens:      [B, L] int32 or int64, on a CPU or a GPU; L at most 16,384 for the GPU kernels.
    num_masked:  [B] integers, k of each sequence, at most the number of tokens that may be hidden there.
    mask_id:     the id written over hidden tokens.
    seed, step:  integers, or 0-d int64 tensors on tokens' device (a captured CUDA graph then draws anew on each replay).
    sample_ids:  [B] integers, the number of each sequence in the run. Masks depend on (seed, step, sample, position) only.
    num_rows:    length of the row outputs; None for sum(num_masked). Required if num_masked is on a GPU, where reading it would
                 wait for the device. Rows past the sum are padding: row 0 with weight 0.
    scores:      [B, L] importance in [0, 1], or None for uniform masks.
    tilt:        beta; above 0 hard tokens stay hidden longer, at 0 masks are uniform.
    spread:      s in [-1, 1], without scores: a sequence's hidden tokens are evenly spread with chance s, or one span (around the
                 end, if it is there) with chance -s; otherwise every set of k is equally likely. Frozen tokens make holes.
    eligible:    [B, L] bool: only these may be hidden now (they were hidden by an earlier, uniform call).
    frozen:      [B, L] bool: never hidden and not counted (prompt, padding).
    weighting:   with n tokens not frozen and k hidden in a sequence,
                 uniform      (n + 1) / k, the weight of the likelihood bound;
                 order        (n + 1) * softmax over hidden of -tilt * score, the chance of being revealed next;
                 importance   uniform * exp(focus * score), the exponential normalised to mean 1 over the hidden tokens;
                 ce           one number for the batch that makes the loss a plain mean over hidden tokens.
                 A loss is sum(weight * nll) / (tokens not frozen in the batch), in nats a token.
    backend:     "cuda", "triton", "cpp" or "torch"; None for the fastest that can run.

    Returns noisy [B, L] (dtype of tokens); rows [num_rows] int64, flat indices b * L + i of hidden tokens, by sequence and then
    position; weights [num_rows] fp32. Not differentiable.
    Raises ValueError if shapes, dtypes or devices disagree, the weighting is unknown, the backend cannot run, or, on a CPU, k is
    out of range or a score is NaN. On a GPU k is clamped to the tokens that may be hidden, and rows left over are padding.
    """
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be [batch, length] of int32 or int64, got shape {tuple(tokens.shape)} of {tokens.dtype}")
    batch, length = tokens.shape
    counts = torch.as_tensor(num_masked)
    counts = as_ids("num_masked", counts) if counts.numel() else counts.long()  # torch makes floats of an empty list
    sample_ids = as_ids("sample_ids", sample_ids)
    for name, tensor, shape in (
        ("num_masked", counts, (batch,)),
        ("sample_ids", sample_ids, (batch,)),
        ("scores", scores, (batch, length)),
        ("eligible", eligible, (batch, length)),
        ("frozen", frozen, (batch, length)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for tokens of shape {(batch, length)}, got {tuple(tensor.shape)}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is unknown{nearest(weighting, WEIGHTINGS)}; choose {', '.join(WEIGHTINGS)}")
    if not -1.0 <= spread <= 1.0:
        raise ValueError(f"spread must be in [-1, 1], got {spread}")
    if spread and scores is not None:
        raise ValueError(f"spread {spread} is blind and scores choose tokens by what they are; leave one of them out")
    if scores is None and (weighting in ("order", "importance") or tilt):
        raise ValueError(f"weighting {weighting!r} with tilt {tilt} needs scores")
    seed, step = scalar(seed, tokens), scalar(step, tokens)
    _check_inputs(tokens.device, seed=seed, step=step, sample_ids=sample_ids, scores=scores, eligible=eligible, frozen=frozen)
    if readable(counts):
        num_rows = _check_counts(counts, num_rows, length, eligible, frozen)
    elif num_rows is None:
        raise ValueError("num_rows is needed when num_masked is on a GPU: reading the counts back would wait for the device")
    if scores is not None:
        scores = scores.detach()
        if readable(scores) and scores.isnan().any():
            raise ValueError("scores hold NaN; the network that made them has diverged")
    without = _TOO_LARGE if length > LONGEST or batch * length >= 2**31 else ()
    if spread and length > LONGEST_SPREAD:
        without += (("triton", f"it spreads hidden tokens of at most {LONGEST_SPREAD:,}"),)
    return torch.ops.atat_fast.mask_tokens(  # type: ignore[no-any-return]
        tokens,
        counts.to(tokens.device),
        num_rows,
        mask_id,
        scores,
        tilt,
        focus,
        round(spread * 2**32),
        eligible,
        frozen,
        weighting,
        seed,
        step,
        sample_ids,
        stream,
        choose_backend("mask_tokens", tokens.device, backend, without),
    )


_TOO_LARGE = tuple(
    (name, f"a sequence has more than {LONGEST:,} tokens, or the batch 2^31 or more") for name in ("cuda", "triton")
)


def _check_inputs(device: torch.device, **inputs: Tensor | None) -> None:
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and tokens on {device}; move one of them")
        if name in ("seed", "step") and tensor.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(tensor.shape)}")
        if name in ("seed", "step", "sample_ids") and tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
        if name in ("eligible", "frozen") and tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {tensor.dtype}")


def _check_counts(counts: Tensor, num_rows: int | None, length: int, eligible: Tensor | None, frozen: Tensor | None) -> int:
    may_hide = _may_hide(eligible, frozen)
    on_cpu = may_hide is not None and may_hide.device.type == "cpu"
    limits = may_hide.sum(1) if may_hide is not None and on_cpu else torch.full_like(counts, length)
    bad = ((counts < 0) | (counts > limits)).nonzero()
    if len(bad):
        b = int(bad[0])
        raise ValueError(f"num_masked[{b}] is {int(counts[b])}, but sequence {b} has {int(limits[b])} tokens that may be hidden")
    total = int(counts.sum())
    if num_rows is not None and num_rows < total:
        raise ValueError(f"num_rows is {num_rows}, but num_masked adds up to {total}")
    return total if num_rows is None else num_rows


def _may_hide(eligible: Tensor | None, frozen: Tensor | None) -> Tensor | None:
    if frozen is None:
        return eligible
    return ~frozen if eligible is None else eligible & ~frozen


def _fake(tokens: Tensor, num_masked: Tensor, num_rows: int, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
        tokens.new_empty(num_rows, dtype=torch.int64),
        tokens.new_empty(num_rows, dtype=torch.float32),
    )


def _compiled(*arguments: Any) -> Any:
    """cpu.cpp and launch.cu in csrc/masking/, by the device of the tokens."""
    *before, scores, tilt, focus, spread, eligible, frozen, weighting, seed, step, ids, stream = arguments
    scores = None if scores is None else scores.to(torch.float32)
    own = (WEIGHTINGS.index(weighting), seed, step, ids, stream)
    return torch.ops.atat_fast_c.mask_tokens(*before, scores, tilt, focus, spread, eligible, frozen, *own)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """kernels/masking.py."""
    from atat_fast.kernels import masking  # triton takes a second to import

    packed: list[Any] = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    tokens, num_masked, num_rows, mask_id, scores, tilt, focus, spread, *rest = packed
    eligible, frozen, weighting, *place = rest
    scores = None if scores is None else scores.to(torch.float32)
    outputs = _fake(tokens, num_masked, num_rows)
    rest = [eligible, frozen, WEIGHTINGS.index(weighting), *place, *outputs]
    masking.mask_tokens(tokens, num_masked, num_rows, mask_id, scores, tilt, focus, spread, *rest)
    return outputs


backends("mask_tokens", cuda=_compiled, triton=_triton, cpp=_compiled, torch=mask_tokens_reference)
register(
    "mask_tokens(Tensor tokens, Tensor num_masked, SymInt num_rows, SymInt mask_id, Tensor? scores, float tilt, float focus, "
    "int spread, Tensor? eligible, Tensor? frozen, str weighting, Tensor seed, Tensor step, Tensor sample_ids, int stream, "
    "str backend) "
    "-> (Tensor noisy, Tensor rows, Tensor weights)",
    dispatch("mask_tokens"),
    _fake,
)


def mask_tokens_cost(batch: int, length: int, num_rows: int, *, id_bytes: int = 8, scored: bool = False) -> Cost:
    """Bytes: ids in and out, scores in, rows (8) and weights (4) out. No FLOPs: the random words are integer work."""
    tokens = batch * length
    return Cost(flops=0, bytes=tokens * (2 * id_bytes + 4 * scored) + num_rows * 12)
