"""attention and adaptive_attention: bidirectional attention from a packed projection, and the whole branch around it.

The fastest attention kernel that is installed runs, with no copy before or after it. On a CPU in bf16 the backward of short
sequences is our own, made of matrix products (products.py). The choice depends on device, dtype, head dimension and installed
packages; `explain_attention` gives a reason for each one that cannot run, and `python -m atat_fast.ops` prints them.
`implementation=` or $ATAT_FAST_ATTENTION asks for one by name; if that cannot run, it is a ValueError. The orders below follow
what the libraries' authors publish; bench/bench_attention.py measures them on a device.

Packed training rows hold several documents. With document ids a token attends inside its own document only: by flash-attn's
variable-length form if flash-attn runs, else by a boolean mask.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.errors import UsageError, nearest
from atat_fast.ops.adaptive_norm import EPS, adaptive_layer_norm
from atat_fast.ops.attention import products as attention_products
from atat_fast.ops.processor import multiplies_bf16, widens_bf16
from atat_fast.ops.registry import Cost, as_ids, autocast_dtype, constant_in_graphs, intercepted, register_composite, transformed
from atat_fast.ops.rotary import rotary, rotary_split, splits

MODULES = {"flash_attn_3": "flash_attn_interface", "flash_attn": "flash_attn"}
"""Packages, and their modules, that take the packed projection as it is; they have a variable-length form too."""
SWITCHES = {
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "sdpa_flash": torch.backends.cuda.enable_flash_sdp,
    "sdpa_efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "sdpa_math": torch.backends.cuda.enable_math_sdp,
}
"""Kernels behind torch's scaled_dot_product_attention (SDPA), each with its switch."""
_ALLOWED = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "sdpa_flash": torch.backends.cuda.flash_sdp_enabled,
    "sdpa_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "sdpa_math": torch.backends.cuda.math_sdp_enabled,
}
PRODUCTS = "products"
"""SDPA with our own backward on a CPU (products.py) for short sequences; longer ones are SDPA's."""
IMPLEMENTATIONS = (*MODULES, *SWITCHES, PRODUCTS)
"""Every name that `implementation` takes."""
DIFFERENTIABLE = "sdpa_math"
"""The implementation under forward-mode differentiation and torch.func. It and `products` have second derivatives."""
HALF_DTYPES = (torch.float16, torch.bfloat16)


class Documents(NamedTuple):
    """Which document each token of a packed batch belongs to.

    ids:   [B, L] int32; a document is a run of equal ids in one row.
    most:  an upper bound on the documents in the batch, known on the host; None makes variable-length kernels assume B * L,
           which is correct but slow.
    """

    ids: Tensor
    most: int | None = None

    def to(self, device: torch.device) -> Documents:
        """A copy on another device, without waiting for it."""
        pinned = device.type == "cuda" and self.ids.device.type == "cpu"  # a copy from pageable memory waits
        return Documents((self.ids.pin_memory() if pinned else self.ids).to(device, non_blocking=True), self.most)


def attention_reference(qkv: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The specification: softmax(q k^T / sqrt(E)) v, written out; document_ids [B, L] are compared within a row only."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if document_ids is not None:
        scores = scores.masked_fill(document_ids[:, None, :, None] != document_ids[:, None, None, :], -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def documents_of(tokens: Tensor, end_id: int) -> Documents:
    """The documents of tokens [B, L]; each ends with an end token, which belongs to it. `most` is set for CPU tokens only."""
    ends = tokens == end_id
    ids = (ends.cumsum(1) - ends.long()).to(torch.int32)
    most = int(ends.sum()) + len(tokens) if tokens.device.type == "cpu" else None
    return Documents(ids, None if most is None else -(-most // 64) * 64)  # few sizes: few graphs to compile


def attention(
    qkv: Tensor, *, document_ids: Tensor | None = None, most_documents: int | None = None, implementation: str | None = None
) -> Tensor:
    """Softmax attention of every position over every position, or over those of its own document, scale 1 / sqrt(E).

    qkv:            [B, L, 3, H, E]; under autocast it is cast to autocast's dtype.
    document_ids:   [B, L] integers, or None; a document is a run of equal ids in one row. See `Documents` for most_documents.
    implementation: a name of IMPLEMENTATIONS; None for $ATAT_FAST_ATTENTION, or without that the fastest that can run.

    Returns [B, L, H * E] in qkv's dtype. Differentiable; twice with "sdpa_math", and with "products" on short sequences. Forward
    mode and torch.func hold the L x L scores. With torch.use_deterministic_algorithms gradients are repeatable bit for bit, and
    as slow as the libraries make them. Raises ValueError when shapes disagree or the implementation cannot run.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [batch, length, 3, heads, head dimension], got shape {tuple(qkv.shape)}")
    qkv = qkv.to(autocast_dtype(qkv))
    chosen = choose_attention(qkv.device, qkv.dtype, qkv.shape[-1], document_ids is not None, implementation)
    layout = None
    if document_ids is not None:
        if document_ids.shape != qkv.shape[:2]:
            raise ValueError(f"document_ids must have shape {tuple(qkv.shape[:2])}, got {tuple(document_ids.shape)}")
        layout = document_layout(Documents(document_ids, most_documents), chosen)
    call = _attention if transformed() else torch.ops.atat_fast.attention
    return call(qkv, layout, chosen)


def document_layout(documents: Documents, implementation: str) -> Tensor:
    """Document boundaries in the form an implementation takes. Make it once a batch, for every layer. Never waits for a device.

    flash-attn: int32 [most + 1], where each document begins in the B * L tokens; places left over hold B * L.
    Others: bool [B, 1, L, L], true where a position may look.
    """
    ids = documents.ids
    batch, length = ids.shape
    first = torch.cat((torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]), dim=1)
    if implementation in MODULES:
        size = batch * length if documents.most is None else min(documents.most, batch * length)
        starts = torch.nonzero_static(first.flatten(), size=size, fill_value=batch * length).flatten()
        return F.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    run = first.cumsum(1)
    return (run[:, :, None] == run[:, None, :])[:, None]


def explain_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, documents: bool = False, capability: tuple[int, int] | None = None
) -> dict[str, str | None]:
    """For each implementation, fastest first on this device: why it cannot run, or None if it can.

    documents: whether tokens attend within documents only. capability: a GPU's, to ask about another than this machine's.
    """
    if device.type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability(device)
    if capability is not None and capability[0] in (9, 10):  # cuDNN's kernel is tuned for these, flash-attn 2 for Ampere
        order = ("flash_attn_3", "cudnn", "flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_math", PRODUCTS)
    elif device.type == "cuda":
        order = ("flash_attn", "sdpa_flash", "cudnn", "sdpa_efficient", "sdpa_math", "flash_attn_3", PRODUCTS)
    else:
        first = (PRODUCTS, "sdpa_flash") if dtype is torch.bfloat16 and multiplies_bf16(device) else ("sdpa_flash", PRODUCTS)
        order = (*first, "sdpa_math", "sdpa_efficient", "cudnn", "flash_attn", "flash_attn_3")
    return {name: _missing(name, device.type, dtype, head_dim, documents, capability) for name in order}


def _missing(
    name: str, kind: str, dtype: torch.dtype, head_dim: int, documents: bool, capability: tuple[int, int] | None
) -> str | None:
    """Why `name` cannot run, or None."""
    if name == "sdpa_math":
        return None
    if name in ("sdpa_flash", PRODUCTS) and kind == "cpu":
        return None
    if name == PRODUCTS:
        return "it runs on CPU tensors"
    if kind != "cuda" or capability is None:
        return "it runs on CUDA tensors"
    if name != "sdpa_efficient" and dtype not in HALF_DTYPES:
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if dtype is torch.float64:
        return "it has no kernel for float64"
    if name == "flash_attn_3" and capability != (9, 0):
        return f"it is made for capability (9, 0), and this device has {capability}"
    if name != "sdpa_efficient" and capability < (8, 0):
        return f"it needs capability (8, 0), and this device has {capability}"
    if documents and name in ("cudnn", "sdpa_flash"):
        return "it takes no document mask"
    limit = 128 if name == "cudnn" else 256 if capability[1] == 0 and capability[0] < 12 else 192  # 8.6, 8.9, 12.x: less memory
    if name != "sdpa_efficient" and head_dim > limit:
        return f"its backward takes head dimensions up to {limit}, not {head_dim}"
    if head_dim % 8:
        return f"head dimension {head_dim} is not a multiple of 8"
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "torch refuses it under use_deterministic_algorithms"
    if name == "cudnn" and (torch.version.hip or not torch.backends.cudnn.is_available()):
        return "torch finds no cuDNN"
    return _import_problem(MODULES[name]) if name in MODULES else None


@functools.cache
def _import_problem(module: str) -> str | None:
    """Why a package cannot be used, or None. Asked last, since it imports the package."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension built for another torch may raise anything
        return f"{module} does not import ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


@constant_in_graphs
def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, documents: bool = False, asked: str | None = None
) -> str:
    """The implementation that runs: `asked`, else $ATAT_FAST_ATTENTION, else the fastest that can.

    Raises UsageError, a ValueError, if the one asked for by name cannot run. A compiled graph keeps its first answer.
    """
    if transformed():  # kernels handle neither tangents nor functorch; sdpa_math is made of ops that PyTorch differentiates
        if asked not in (None, DIFFERENTIABLE):
            raise UsageError(
                f"attention by {asked!r} has no forward-mode derivative and no rule for torch.func; leave implementation out "
                f"there, or ask for {DIFFERENTIABLE!r}"
            )
        return DIFFERENTIABLE
    wanted = asked or os.environ.get("ATAT_FAST_ATTENTION") or None
    return _choose(device, dtype, head_dim, documents, wanted, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, documents: bool, asked: str | None, deterministic: bool
) -> str:
    """`deterministic` is torch's mode, which explain_attention reads: the cache keeps an answer for each."""
    reasons = explain_attention(device, dtype, head_dim, documents=documents)
    ready = [name for name, reason in reasons.items() if reason is None]
    if asked is None:
        return ready[0]
    if asked not in reasons:
        raise UsageError(f"there is no attention {asked!r}{nearest(asked, reasons)}; it is one of {', '.join(IMPLEMENTATIONS)}")
    if reasons[asked] is not None:
        raise UsageError(f"attention cannot use {asked!r} here: {reasons[asked]}; what can run is {', '.join(ready)}")
    return asked


def self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    qk_norm: bool = False,
    rows: Tensor | None = None,
    documents: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """qkv projection, rotation, attention and output projection of an already normalised x: [B, L, D] to [B, L, D].

    qkv_weight: [3 * D, D], packed (three, heads, head dimension).   out_weight: [D, D].   cos, sin: [L, D / heads / 2].
    qk_norm:    scale queries and keys to unit root-mean-square, without weights, in the rotation's pass (`rotary`'s norm).
    rows:       [R] integers, flat indices b * L + i: project these rows only, and return [R, D].
    documents:  `document_layout`'s result for this implementation, or None if every position looks everywhere.
    """
    width = x.shape[-1]
    if heads < 1 or width % heads or width // heads % 2:
        raise ValueError(f"width {width} does not divide into {heads} heads of an even size")
    if tuple(qkv_weight.shape) != (3 * width, width) or tuple(out_weight.shape) != (width, width):
        raise ValueError(
            f"qkv_weight must be {(3 * width, width)} and out_weight {(width, width)}, "
            f"got {tuple(qkv_weight.shape)} and {tuple(out_weight.shape)}"
        )
    rows = None if rows is None else as_ids("rows", rows)
    chosen = choose_attention(x.device, autocast_dtype(x), width // heads, documents is not None, implementation)
    call = _self_attention if transformed() else torch.ops.atat_fast.self_attention
    return call(x, qkv_weight, out_weight, cos, sin, heads, qk_norm, rows, documents, chosen)


def adaptive_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    qk_norm: bool = False,
    eps: float = EPS,
    rows: Tensor | None = None,
    documents: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """A DiT block's attention branch in one call: norm, modulate, project, rotate, attend, project. [B, L, D] to [B, L, D].

    Arguments are those of `adaptive_layer_norm` and `self_attention`. The gate and the residual sum are not part of it:
    `gated_residual_norm` fuses them with the next norm.
    """
    normed = adaptive_layer_norm(x, shift, scale, norm_weight, eps=eps)
    return self_attention(
        normed,
        qkv_weight,
        out_weight,
        cos,
        sin,
        heads=heads,
        qk_norm=qk_norm,
        rows=rows,
        documents=documents,
        implementation=implementation,
    )


def _attention(qkv: Tensor, documents: Tensor | None, implementation: str) -> Tensor:
    if qkv.numel() == 0:
        return qkv[:, :, 0].flatten(2)
    if implementation in MODULES:
        return _packed(qkv, documents, implementation).flatten(2)
    if implementation == PRODUCTS and qkv.shape[1] <= attention_products.LONGEST:
        return attention_products.attend(qkv, documents)  # type: ignore[no-any-return]
    q, k, v = qkv.unbind(2)
    return _attend(q, k, v, documents, implementation)


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, implementation: str) -> Tensor:
    """Run one kernel of SDPA on q, k, v [B, L, H, E] each: [B, L, H * E]."""
    if widens_bf16(q):
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), documents, implementation).to(q.dtype)
    if transformed():
        return attention_products.written_out(q, k, v, documents).to(q.dtype)
    if implementation != DIFFERENTIABLE:
        _refuse_second_derivatives(v)
    with _only(implementation):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=documents)
    return out.transpose(1, 2).flatten(2)


def _refuse_second_derivatives(x: Tensor) -> None:
    """Raise in a second derivative and name a way out. PyTorch's kernels refuse without one; flash-attn's drop terms."""
    if x.requires_grad and torch.is_grad_enabled() and not (torch.compiler.is_compiling() or intercepted()):
        x.register_hook(_once)


def _once(gradient: Tensor) -> Tensor | None:
    return _Once.apply(gradient) if torch.is_grad_enabled() else None


class _Once(torch.autograd.Function):
    """Identity whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"the kernel that computed attention has no second derivative; ask for implementation={DIFFERENTIABLE!r}, or set "
            f"ATAT_FAST_ATTENTION={DIFFERENTIABLE} for a whole model"
        )


def _attend_from(qkv: Tensor, rows: Tensor, implementation: str) -> Tensor:
    """Attention of positions `rows` [R] of one sequence over all of it: [R, H * E]. qkv is [1, L, 3, H, E]."""
    if rows.numel() == 0:
        return qkv.new_empty((0, qkv.shape[3] * qkv.shape[4]))
    if widens_bf16(qkv):
        with torch.autocast("cpu", enabled=False):
            return _attend_from(qkv.float(), rows, implementation).to(qkv.dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    with _only(implementation):
        out = F.scaled_dot_product_attention(q.index_select(2, rows), k, v)
    return out.transpose(1, 2).flatten(2)[0]


def _packed(qkv: Tensor, starts: Tensor | None, implementation: str) -> Tensor:
    """flash-attn on the packed projection: [B, L, H, E]. Its gradient is packed too; SDPA's three gradients need a copy."""
    _refuse_second_derivatives(qkv)
    module: Any = importlib.import_module(MODULES[implementation])
    batch, length, _, heads, size = qkv.shape
    repeatable = torch.are_deterministic_algorithms_enabled()
    if starts is None:
        out = module.flash_attn_qkvpacked_func(qkv, deterministic=repeatable)
    elif implementation == "flash_attn":
        out = module.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), starts, length, deterministic=repeatable)
    else:
        q, k, v = qkv.flatten(0, 1).unbind(1)
        out = module.flash_attn_varlen_func(q, k, v, starts, starts, length, length, deterministic=repeatable)
    first: Tensor = out[0] if isinstance(out, tuple) else out  # early flash-attn 3 also returns the softmax's normaliser
    return first.view(batch, length, heads, size)


_SWITCHED = threading.RLock()
"""Held while SDPA's switches, which all threads share, are not as they were found. A mode that sees SDPA may attend in turn."""


@contextlib.contextmanager
def _only(implementation: str) -> Iterator[None]:
    """Let SDPA use this kernel alone, for one thread at a time. Takes 2 microseconds; torch.nn.attention.sdpa_kernel takes 25."""
    implementation = "sdpa_flash" if implementation == PRODUCTS else implementation
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _SWITCHED:  # dynamo takes no lock
        before = {name: allowed() for name, allowed in _ALLOWED.items()}
        try:
            for name, switch in SWITCHES.items():
                switch(name == implementation)
            yield
        finally:
            for name, switch in SWITCHES.items():
                switch(before[name])


def _self_attention(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    qk_norm: bool,
    rows: Tensor | None,
    documents: Tensor | None,
    implementation: str,
) -> Tensor:
    batch, length, width = x.shape
    qkv = F.linear(x, qkv_weight).view(batch, length, 3, heads, width // heads)
    tracked = transformed() or (torch.is_grad_enabled() and qkv.requires_grad)
    if tracked and implementation in SWITCHES and qkv.numel() and splits():  # its backward reads SDPA's three gradients unpacked
        attended = _attend(*rotary_split(qkv, cos, sin, norm=qk_norm), documents, implementation)
        return F.linear(attended if rows is None else attended.view(batch * length, width).index_select(0, rows), out_weight)
    qkv = rotary(qkv, cos, sin, norm=qk_norm, inplace=not tracked)
    if rows is not None and batch == 1 and documents is None and not tracked and implementation not in MODULES:
        # One sequence and no gradient: rows are positions, and only their queries need attention.
        return F.linear(_attend_from(qkv, rows, implementation), out_weight)
    attended = _attention(qkv, documents, implementation)
    if rows is not None:
        attended = attended.view(batch * length, width).index_select(0, rows)
    return F.linear(attended, out_weight)


register_composite("attention(Tensor qkv, Tensor? documents, str implementation) -> Tensor", _attention)
register_composite(
    "self_attention(Tensor x, Tensor qkv_weight, Tensor out_weight, Tensor cos, Tensor sin, int heads, bool qk_norm, "
    "Tensor? rows, Tensor? documents, str implementation) -> Tensor",
    _self_attention,
)


def attention_cost(batch: int, length: int, width: int, *, element_size: int = 2, backward: bool = False) -> Cost:
    """Two products of L x L x D a sequence forward, five backward; each [B, L, D] tensor is read or written once."""
    products, tensors = (5, 8) if backward else (2, 4)
    return Cost(flops=2 * products * batch * length * length * width, bytes=tensors * batch * length * width * element_size)
