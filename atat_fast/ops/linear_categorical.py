"""linear_categorical: the vocabulary head and a draw from its softmax. The logits of all rows are never in memory at once.

    z_i = W h_i + bias,  z_i[forbidden] = -inf,   id_i = argmax_v (z_i[v] / temperature + G_i[v]),   G_i[v] standard Gumbel

The argmax is a draw from softmax(z_i / temperature) (the Gumbel-max rule). The noise of row i and id v is a function of
(seed, step, index_i, v), made of 64 random bits: an id of chance 1e-12 is drawn that often. Noise of 24 or 32 bits is never large
enough for it (docs/philox.md). A row's draw does not depend on the other rows, or on how many there are.

On a GPU one kernel multiplies, adds the noise and keeps each row's best; no logit reaches memory. On a CPU, rows go in slabs
whose logits fit a byte budget, as in linear_cross_entropy, and a C++ loop makes the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.linear_cross_entropy.slabs import CHUNK_BYTES_CPU, CHUNK_BYTES_GPU, rows_per_slab
from atat_fast.ops.philox import STREAM_TOKEN, gumbel64, random_words
from atat_fast.ops.processor import widens_bf16
from atat_fast.ops.registry import (
    Cost,
    as_ids,
    autocast_dtype,
    autocast_is_on,
    backends,
    choose_backend,
    dispatch,
    register,
    scalar,
)

REFERENCE_BYTES = 16 << 20
"""Bytes of a slab on the torch backend, whose noise needs a dozen fp64 and int64 tensors of the slab's shape."""


def linear_categorical_reference(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    forbidden: int | None = None,
    temperature: float = 1.0,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
) -> Tensor:
    """The specification: forms the whole matrix of logits; sums are fp64."""
    logits = F.linear(hidden, weight, bias)
    return draw_rows(logits, index, -1 if forbidden is None else forbidden, temperature, seed, step)


def draw_rows(
    logits: Tensor, index: Tensor, forbidden: int, temperature: float, seed: int | Tensor, step: int | Tensor
) -> Tensor:
    """[R, V] logits to [R] ids, in fp64. forbidden: an id, or -1."""
    if logits.shape[1] == 0:
        return torch.full_like(index, -1)
    scores = logits.double() / temperature + vocabulary_noise(index, logits.shape[1], seed, step)
    if forbidden >= 0:
        scores[:, forbidden] = -torch.inf
    best = scores.max(1)  # NaN counts as the largest
    return torch.where(best.values > -torch.inf, best.indices, -1)


def vocabulary_noise(index: Tensor, vocabulary: int, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Standard Gumbel of each row named by index [R] and each id below `vocabulary`: fp64 [R, V]."""
    parts = torch.arange((vocabulary + 1) // 2, device=index.device)
    first, second, third, fourth = random_words(index[:, None], seed, step, STREAM_TOKEN + (parts << 8))
    high, low = torch.stack((first, third), dim=-1), torch.stack((second, fourth), dim=-1)
    return gumbel64(high, low).flatten(1)[:, :vocabulary]


def token_noise(index: Tensor, ids: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """`vocabulary_noise` at some ids [R, K] of each row: fp64 [R, K]."""
    words = random_words(index[:, None], seed, step, STREAM_TOKEN + ((ids >> 1) << 8))
    odd = (ids & 1).bool()
    return gumbel64(torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1]))


def linear_categorical(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    forbidden: int | None = None,
    temperature: float = 1.0,
    seed: int | Tensor,
    step: int | Tensor = 0,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draw one id a row from the softmax of a linear head.

    hidden:       [R, D] fp32, bf16 or fp64, rows of the final norm. Under autocast it is cast to autocast's dtype.
    weight:       [V, D] fp32 or hidden's dtype; another dtype is cast inside.   bias: [V] or None.
    index:        [R] integers, each row's number in the random stream; rows of equal numbers and logits draw the same id.
    forbidden:    an id that is never drawn (the mask token).
    temperature:  divides the logits; above 0.
    seed, step:   integers, or int64 tensors of one number on hidden's device (a captured CUDA graph then draws anew each time).
    chunk_bytes:  bytes for a slab of logits, on backends that have slabs; None for 256 MB on a GPU and 64 MB on a CPU.
    backend:      "triton", "cpp" or "torch"; None for the fastest that can run.

    Returns [R] int64. A row gives -1 if its logits hold NaN or are all -inf. Of equal sums the lower id wins. Not differentiable.
    Backends add noise in fp32 (the reference in fp64), so they may disagree if two sums are within a few 1e-6 of each other.
    Raises ValueError when shapes, dtypes or devices disagree, hidden is fp16, weight is a DTensor, forbidden is outside [0, V) or
    temperature is not above 0.
    """
    hidden, index = hidden.detach().to(autocast_dtype(hidden)), as_ids("index", index)
    _check(hidden, weight, index, bias, forbidden, temperature)
    without = _FP64_ONLY if hidden.dtype is torch.float64 else ()
    chosen = choose_backend("linear_categorical", hidden.device, backend, without)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_GPU if hidden.device.type == "cuda" else CHUNK_BYTES_CPU
    return torch.ops.atat_fast.linear_categorical(  # type: ignore[no-any-return]
        hidden,
        weight.detach(),
        index,
        None if bias is None else bias.detach(),
        forbidden,
        float(temperature),
        scalar(seed, hidden),
        scalar(step, hidden),
        chunk_bytes,
        chosen,
    )


_FP64_ONLY = tuple((name, "hidden is float64, which only PyTorch computes") for name in ("triton", "cpp"))


def _check(hidden: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, forbidden: int | None, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [R, D] and weight [V, D]; got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        here = ", which autocast makes it" if autocast_is_on(hidden) else ""
        raise ValueError(f"hidden is {hidden.dtype}{here}; pass bfloat16 or float32 (float16 logits overflow at 65,504)")
    if type(weight).__name__ == "DTensor":
        raise ValueError("weight is a DTensor; pass weight.full_tensor()")
    if tuple(index.shape) != (hidden.shape[0],):
        raise ValueError(f"index must have shape ({hidden.shape[0]},), got {tuple(index.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("index", index), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; move one of them")
    if forbidden is not None and not 0 <= forbidden < weight.shape[0]:
        raise ValueError(f"forbidden is {forbidden}, outside the vocabulary of {weight.shape[0]}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _slabs(row_pass: Callable[..., Tensor], budget: int) -> Callable[..., Tensor]:
    """An implementation that makes the logits slab by slab and calls `row_pass`, which takes draw_rows' arguments."""

    def run(
        hidden: Tensor,
        weight: Tensor,
        index: Tensor,
        bias: Tensor | None,
        forbidden: int | None,
        temperature: float,
        seed: Tensor,
        step: Tensor,
        chunk_bytes: int,
    ) -> Tensor:
        if widens_bf16(hidden):
            with torch.autocast("cpu", enabled=False):
                return run(hidden.float(), weight, index, bias, forbidden, temperature, seed, step, chunk_bytes)
        count, vocabulary = index.shape[0], weight.shape[0]
        weight, bias = _as(weight, hidden), None if bias is None else _as(bias, hidden)
        rows = rows_per_slab(min(chunk_bytes, budget), vocabulary, hidden.element_size(), count, multiple=16)
        out = torch.empty_like(index)
        for start in range(0, count, rows):
            some = slice(start, start + rows)
            logits = F.linear(hidden[some], weight, bias)
            out[some] = row_pass(logits, index[some], -1 if forbidden is None else forbidden, temperature, seed, step)
        return out

    return run


def _as(weight: Tensor, hidden: Tensor) -> Tensor:
    """weight in hidden's dtype. Under autocast the product casts it, and keeps the cast weight for the next call."""
    return weight if autocast_is_on(hidden) else weight.to(hidden.dtype)


def _compiled_rows(logits: Tensor, index: Tensor, forbidden: int, temperature: float, seed: Tensor, step: Tensor) -> Tensor:
    """csrc/linear_categorical/cpu.cpp."""
    return torch.ops.atat_fast_c.linear_categorical(  # type: ignore[no-any-return]
        logits, index.contiguous(), forbidden, 1 / temperature, seed, step
    )


def _triton(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None,
    forbidden: int | None,
    temperature: float,
    seed: Tensor,
    step: Tensor,
    chunk_bytes: int,
) -> Tensor:
    """kernels/linear_categorical.py."""
    from atat_fast.kernels import linear_categorical as kernel  # triton takes a second to import

    weight, hidden = weight.to(hidden.dtype).contiguous(), hidden.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    return kernel.linear_categorical(  # type: ignore[no-any-return]
        hidden, weight, index.contiguous(), bias, -1 if forbidden is None else forbidden, 1 / temperature, seed, step
    )


backends(
    "linear_categorical", triton=_triton, cpp=_slabs(_compiled_rows, CHUNK_BYTES_GPU), torch=_slabs(draw_rows, REFERENCE_BYTES)
)


def _fake(hidden: Tensor, weight: Tensor, index: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(index)


register(
    "linear_categorical(Tensor hidden, Tensor weight, Tensor index, Tensor? bias, int? forbidden, float temperature, "
    "Tensor seed, Tensor step, int chunk_bytes, str backend) -> Tensor",
    dispatch("linear_categorical"),
    _fake,
)


def linear_categorical_cost(rows: int, width: int, vocabulary: int, *, element_size: int = 2) -> Cost:
    """FLOPs of one product. Bytes: the weight once, the rows, index and ids; logits stay on the chip. The noise (five rounds of
    Philox and two logarithms an id) is not counted.
    """
    return Cost(
        flops=2 * rows * width * vocabulary, bytes=(rows * width + vocabulary * width) * element_size + 4 * vocabulary + 16 * rows
    )
