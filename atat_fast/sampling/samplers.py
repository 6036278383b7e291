"""From masks to text: the reverse process, with any tokens held fixed. The interface and the loop.

A sampler is a policy (sampling/reveal.py, sampling/remask.py) that says which positions each step reveals. Their tokens are drawn
from the model's distribution there (sampling/categorical.py); the mask token has chance 0. The host knows before the first step
how many rows every step touches, so nothing waits for the device, and after the last attention the model runs on those rows
alone. docs/sampling.md gives each sampler's law and source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from atat_fast.errors import UsageError, check_seed, nearest
from atat_fast.ops.attention import Documents
from atat_fast.sampling.categorical import Cut, make_drawer
from atat_fast.sampling.graphs import Replay, rounded_up
from atat_fast.sampling.remask import REMASKING, Remasked, RemaskedByConfidence
from atat_fast.sampling.reveal import (
    POSITIONS,
    ByCertainty,
    ByImportance,
    Canvas,
    ImportanceScores,
    Planned,
    Policy,
    StepRows,
    ancestral_times,
    first_hitting_times,
)

BY_CERTAINTY = ("confidence", "entropy", "margin")
SAMPLERS = ("ddpm_cache", "ancestral", "first_hitting", *BY_CERTAINTY, "importance", *REMASKING)
"""Every sampler's name."""

MOST_STEPS = 1_000_000

OnStep = Callable[[int, Tensor], None]


class Denoiser(Protocol):
    """What a sampler needs of a model.

    A DiT has more: `output_head()`, which saves the logits of drawn rows; `time_conditioning`, `vocab_size` and `config.length`,
    read if they exist; and `documents=` of `features`, needed if sequences have different lengths.
    """

    mask_id: int

    def features(self, tokens: Tensor, hidden_share: Tensor | None = None, *, rows: Tensor | None = None) -> Tensor:
        """[B, L] ids to the rows the head reads: [R, D] at rows, flat indices b * L + i, or [B * L, D]."""

    def logits(self, features: Tensor) -> Tensor:
        """[R, D] rows to [R, V] logits, -inf at the mask token."""


@torch.no_grad()
def sample(
    model: Denoiser,
    tokens: Tensor,
    *,
    steps: int = 128,
    sampler: str = "ddpm_cache",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    block: int = 0,
    importance: ImportanceScores | None = None,
    tilt: float = 2.0,
    eta: float | None = None,
    stop_at: int | None = None,
    graphs: bool | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill every mask token of `tokens`; all other tokens stay as they are.

    tokens:      [B, L] int64 on the model's device, with the model's mask_id at every position to fill.
    steps:       denoising steps, of each block if there are blocks. A step that reveals nothing costs nothing.
    sampler:     a name of SAMPLERS. ddpm_cache and ancestral are one law; ddpm_cache is refused for a model that is told the
                 time.
    temperature, top_k, top_p: see `Cut`. They decide what a position becomes. The sampler's law decides when it is revealed, and
    at
                 temperature 0 nothing else is random.
    sample_ids:  [B] int64 names of the samples in the random stream; 0 .. B - 1 by default. A sample depends only on the model,
                 seed, its name and its own tokens, not on its batch (up to how the model's products round).
    lengths:     [B] tokens of each sequence; the rest is padding, which is returned unchanged and not attended to.
    block:       fill this many positions at a time, from left to right, each block given all before it; text may then be longer
                 than the model's length L, and a block sees the L tokens that end with it. 0 fills everything at once, or with
                 a model trained on blocks (`model.block`) fills those. Such a model keeps the keys and values of finished
                 blocks, so a pass computes one block; texts that are finished leave the batch.
    importance:  (tokens [B, L], hidden share [B]) -> scores [B, L] in [0, 1], for sampler importance;   tilt: its odds are
                 exp(-tilt * score). `ImportanceEstimator.scorer(model)` makes one.
    eta:         how much the remasking samplers hide again; see sampling/remask.py. None is the sampler's default.
    stop_at:     the id that ends a text (tokenizer.eos_id). After a sequence's last given token, all that follows its first
                 stop_at becomes stop_at too, and blocks with nothing else to fill are left out. The text before it is the same as
                 without stop_at; `cut_at_end` removes the rest.
    graphs:      replay steps as CUDA graphs. None: on a GPU, if the model allows it (`graph_safe`).
    on_step:     called with (step, tokens) after each step that changed something, and after a change by stop_at, to show
                 progress. The next step changes the tensor, so clone what is to be kept. It has padding if blocks are shorter
                 than the text.

    Returns [B, L] with no mask token before each sequence's length. Raises UsageError for invalid options, ids outside the
    vocabulary, text longer than the model takes, and a model whose logits are invalid.
    """
    cut = Cut(temperature, top_k, top_p)
    own = _own_block(model, block)
    block = own or block
    _check(model, tokens, steps, sampler, cut, block, importance, eta, lengths, stop_at, seed)
    batch, length = tokens.shape
    ids = torch.arange(batch) if sample_ids is None else sample_ids.cpu()
    names = ids[:, None] * POSITIONS + torch.arange(length)
    inside = torch.arange(length) < (torch.full((batch,), length) if lengths is None else lengths.cpu())[:, None]
    host = tokens.cpu()
    fill = (host == model.mask_id) & inside
    _check_ids(model, host)
    given = ((~fill & inside) * torch.arange(1, length + 1)).amax(1) if length else torch.zeros(batch)  # ends of given tokens
    settings = {"steps": steps, "sampler": sampler, "importance": importance, "tilt": tilt, "eta": eta}
    if graphs is None:
        graphs = tokens.device.type == "cuda" and bool(getattr(model, "graph_safe", False))

    out = tokens.clone()
    longest = _longest(model) or length
    cache: Any = cast(Any, model).cache(batch) if own else None
    rows: Any = slice(None) if cache is None else torch.arange(batch)  # with a cache those that have something left to fill
    for number, start in enumerate(range(0, length, block) if block else (0,)):
        end = min(start + block, length) if block else length
        if cache is not None:
            left = fill[rows, start:].any(1)
            if not left.any():
                break
            if not left.all():
                rows = rows[left]
                cache.keep(left.nonzero()[:, 0])
        first = start if cache is not None else max(0, end - longest)
        window = slice(first, end if cache is not None else min(first + longest, length)) if block else slice(0, length)
        here = fill[rows, window].clone()
        here[:, : start - first] = False
        here[:, end - first :] = False
        if here.any():
            canvas = Canvas(out[rows, window], here, names[rows, window], model.mask_id, seed)

            def tell(step: int, canvas: Canvas = canvas, place: Any = (rows, window), offset: int = number * steps) -> None:
                out[place] = canvas.tokens
                if on_step is not None:
                    on_step(offset + step, out)

            sizes = inside[rows, window].sum(1) if lengths is not None else None
            _fill(model if cache is None else cache, canvas, sizes, cut, settings, graphs, tell)
            out[rows, window] = canvas.tokens
        if cache is not None and end < length:
            cache.append(out[rows, window])
        if not here.any():
            continue
        if bool(canvas.failed):
            raise UsageError("the model's logits are not numbers (NaN, or all of them -inf); its weights have diverged")
        if stop_at is not None:
            rest = _after_the_end(out[:, :end].cpu() == stop_at, given, fill)
            fill &= ~rest  # later blocks leave what follows an end
            if rest.any():
                out.masked_fill_(rest.to(out.device), stop_at)
                if on_step is not None:
                    on_step(number * steps + steps - 1, out)
    return out


def _own_block(model: Any, asked: int) -> int:
    """The size of the model's own blocks; 0 if it has none. Raises UsageError if another size is asked for."""
    own = int(getattr(getattr(model, "config", None), "block", 0) or 0)
    if own and asked not in (0, own):
        raise UsageError(f"block is {asked}, but this model was trained on blocks of {own}; leave block out")
    return own


def _after_the_end(ends: Tensor, given: Tensor, fill: Tensor) -> Tensor:
    """[B, L] bool: positions still to be filled after each sequence's first end past its last given token.

    ends: [B, E] where an end is, as far as the text is finished.   given: [B] ends of what is given.   fill: [B, L].
    """
    places = torch.arange(ends.shape[1])
    past = ends & (places >= given[:, None])
    first = torch.where(past, places, fill.shape[1]).amin(1)
    return fill & (torch.arange(fill.shape[1]) > first[:, None])


def cut_at_end(ids: Sequence[int], prompt_length: int, eos_id: int) -> list[int]:
    """The ids before the first eos_id at or after `prompt_length`; all of them if there is none.

    prompt_length: how many ids belong to the prompt, whose own ends do not count. For a text filled in between given tokens, pass
    the place after the last of them, so that nothing given is lost.
    """
    ids = list(ids)
    return ids[: ids.index(eos_id, prompt_length)] if eos_id in ids[prompt_length:] else ids


def check_steps(name: str, steps: int) -> None:
    """Raise UsageError for an invalid number of denoising steps. name: of the setting."""
    if steps < 1:
        raise UsageError(f"{name} must be at least 1, got {steps}")
    if steps > MOST_STEPS:
        raise UsageError(f"{name} is {steps:,}, and a text needs no more than it has tokens; give at most {MOST_STEPS:,}")


def _fill(
    model: Any,
    canvas: Canvas,
    lengths: Tensor | None,
    cut: Cut,
    settings: dict[str, Any],
    graphs: bool,
    tell: Callable[[int], None],
) -> None:
    """Run one canvas to its end."""
    told_the_time = bool(getattr(model, "time_conditioning", False))
    more: dict[str, Any] = {}
    inside = None
    if lengths is not None and bool((lengths < canvas.shape[1]).any()):
        inside = lengths.to(canvas.device)
        padding = torch.arange(canvas.shape[1], device=canvas.device) >= inside[:, None]
        more["documents"] = Documents(padding.to(torch.int32), -(-2 * canvas.shape[0] // 64) * 64)
    policy = make_policy(model, canvas, inside=inside, **settings)
    draw = make_drawer(model, cut, canvas.seed)
    last = canvas.bin - 1

    def advance(sizes: StepRows) -> None:
        again = policy.again(canvas, sizes) if sizes.hidden_again else None
        if sizes.revealed:
            share = policy.clock(canvas) if told_the_time else None
            rows = policy.before(canvas, sizes)
            if rows is None:
                looked_at = canvas.rows_of(canvas.hidden(), sizes.looked_at)
                features = model.features(canvas.tokens, share, rows=looked_at.clamp(max=last), **more)
                rows = policy.after(canvas, features, looked_at, sizes)
                place = torch.zeros(canvas.bin + 1, dtype=torch.int64, device=canvas.device)
                place.index_copy_(0, looked_at, torch.arange(sizes.looked_at, device=canvas.device))
                features = features[place[rows]]
            else:
                features = model.features(canvas.tokens, share, rows=rows.clamp(max=last), **more)
            drawn = draw(features, canvas.names[rows], canvas.step)
            canvas.failed.logical_or_((drawn < 0).any())
            drawn = drawn.clamp(min=0)
            canvas.write(rows, drawn)
            policy.wrote(canvas, rows, features, drawn)
        if again is not None:
            canvas.flat.index_fill_(0, again, canvas.mask_id)

    run = Replay(advance) if graphs else advance
    for step, sizes in enumerate(policy.sizes):
        if not (sizes.revealed or sizes.hidden_again):
            continue
        canvas.step.fill_(step)
        run(StepRows(*map(rounded_up, sizes)) if graphs else sizes)
        tell(step)


def make_policy(
    model: Any,
    canvas: Canvas,
    *,
    sampler: str,
    steps: int,
    importance: ImportanceScores | None = None,
    tilt: float = 2.0,
    eta: float | None = None,
    inside: Tensor | None = None,
) -> Policy:
    """The policy with a sampler's name."""
    fill, names, seed = canvas.host_fill, canvas.host_names, canvas.host_seed
    if sampler in ("ddpm_cache", "ancestral"):
        return Planned(canvas, ancestral_times(fill, names, steps, seed), steps, inside=inside)
    if sampler == "first_hitting":
        times, clocks, calls = first_hitting_times(fill, names, steps, seed)
        return Planned(canvas, times, calls, clocks, inside)
    if sampler in BY_CERTAINTY:
        return ByCertainty(canvas, model, sampler, steps, inside)
    if sampler == "importance":
        assert importance is not None
        return ByImportance(canvas, importance, tilt, steps, inside)
    strength = REMASKING[sampler] if eta is None else eta
    if sampler == "remdm_confidence":
        return RemaskedByConfidence(canvas, model, strength, steps, seed, inside)
    return Remasked(canvas, sampler, strength, steps, seed, inside)


def _longest(model: Any) -> int | None:
    """The model's length, or None if it has none."""
    found = getattr(getattr(model, "config", None), "length", None)
    return found if isinstance(found, int) else None


def _check(
    model: Any,
    tokens: Tensor,
    steps: int,
    sampler: str,
    cut: Cut,
    block: int,
    importance: ImportanceScores | None,
    eta: float | None,
    lengths: Tensor | None,
    stop_at: int | None,
    seed: int,
) -> None:
    if sampler not in SAMPLERS:
        raise UsageError(f"there is no sampler {sampler!r}{nearest(sampler, SAMPLERS)}; choose one of {', '.join(SAMPLERS)}")
    check_steps("steps", steps)
    check_seed("seed", seed)
    cut.check()
    if sampler == "ddpm_cache" and getattr(model, "time_conditioning", False):
        raise UsageError("ddpm_cache reuses a prediction across times, but this model is told the time; use sampler ancestral")
    if sampler == "importance" and importance is None:
        raise UsageError("sampler importance needs an importance estimator, and there is none; use another sampler")
    if eta is not None and not 0 <= eta <= 1:
        raise UsageError(f"eta must be in 0..1, got {eta}")
    if tokens.dim() != 2 or tokens.dtype is not torch.int64:
        raise ValueError(f"tokens must be [batch, length] of int64, got shape {tuple(tokens.shape)} of {tokens.dtype}")
    batch, length = tokens.shape
    longest = _longest(model)
    if block < 0 or (longest is not None and block > longest):
        raise UsageError(f"block must be in 1..{longest}, the model's length, or 0 for no blocks; got {block}")
    if longest is not None and length > longest and not block:
        raise UsageError(
            f"the text has {length} tokens, but this model takes at most {longest}; shorten it, or fill it in blocks "
            f"(block={longest})"
        )
    if length > POSITIONS:
        raise UsageError(f"the text has {length:,} tokens, and the random stream has numbers for {POSITIONS:,}; split it")
    if lengths is not None and (tuple(lengths.shape) != (batch,) or bool(((lengths < 0) | (lengths > length)).any())):
        raise ValueError(f"lengths must be {batch} numbers in 0..{length}, got {lengths.tolist()}")
    if stop_at is not None and (stop_at == model.mask_id or not 0 <= stop_at < getattr(model, "vocab_size", stop_at + 1)):
        raise ValueError(f"stop_at must be a token of the model's vocabulary other than its mask, got {stop_at}")


def _check_ids(model: Any, tokens: Tensor) -> None:
    vocabulary = getattr(model, "vocab_size", None)
    if not isinstance(vocabulary, int) or not tokens.numel():
        return
    low, high = (int(v) for v in torch.aminmax(tokens))
    if low < 0 or high >= vocabulary:
        raise UsageError(f"the text has token id {low if low < 0 else high}, outside the model's vocabulary of {vocabulary:,}")
