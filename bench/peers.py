"""The libraries that ops are compared with: which are installed, on which ops, with which settings.

    python bench/peers.py        a table

    from peers import linear_cross_entropy_peers
    for name, peer in linear_cross_entropy_peers(device).items():
        loss = peer(hidden, weight, target, bias, token_weight)

A comparison is fair if a peer runs with its defaults and with its best settings, in the same process, on the same random data,
forward and backward together (some compute the gradient in the forward pass), with its version beside the figure. A peer is
imported only when it is asked for. Each call says what it was written from: for peers outside torch their published source,
because they run on a GPU only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A project to compare with. `distribution` is its name in pip, `module` the name to import."""

    name: str
    distribution: str
    module: str
    compared: str
    settings: str
    install: str

    @property
    def version(self) -> str | None:
        """The installed version, or None. Imports nothing."""
        found = importlib.util.find_spec(self.module.partition(".")[0]) is not None
        try:
            return metadata.version(self.distribution) if found else None
        except metadata.PackageNotFoundError:
            return "unknown version" if found else None


def torch_has(name: str) -> str | None:
    """torch's version if torch.nn.functional has `name`, else None."""
    return torch.__version__ if hasattr(F, name) else None


@dataclass(frozen=True)
class Apex(Peer):
    """NVIDIA's apex. The distribution called apex on the package index is another project, a web toolkit."""

    @property
    def version(self) -> str | None:
        """The installed version of NVIDIA's apex, which a module that only it has tells from its namesake."""
        found = importlib.util.find_spec("apex")
        places = list(found.submodule_search_locations or ()) if found else []
        return super().version if any((Path(place) / "normalization").is_dir() for place in places) else None


@dataclass(frozen=True)
class Native(Peer):
    """A part of torch itself: `module` is the name in torch.nn.functional, or empty if every torch has it."""

    @property
    def version(self) -> str | None:
        """torch's version, if torch has it."""
        return torch_has(self.module) if self.module else torch.__version__


PEERS = (
    Native(
        "mdlm, eager",
        "torch",
        "",
        "whole training steps",
        "bench/mdlm.py: autocast, SDPA, fused AdamW, foreach average",
        "part of this repository",
    ),
    Native("mdlm, compiled", "torch", "", "whole training steps", "the same under torch.compile", "part of this repository"),
    Native("torch.compile", "torch", "", "every op", "the eager form in default mode, static shapes", "part of torch"),
    Native(
        "F.linear_cross_entropy",
        "torch",
        "linear_cross_entropy",
        "linear_cross_entropy",
        "options=None; LinearCrossEntropyOptions(); chunks of 4096, with acc_policy='balanced' where torch has it (2.13)",
        "pip install 'torch>=2.13'",
    ),
    Peer(
        "liger-kernel",
        "liger-kernel",
        "liger_kernel",
        "linear_cross_entropy, layer norm, rotary",
        "defaults; accum_dtype=fp32; fp32 with chunk_mem_const=16 (0.8.5 and newer)",
        "pip install liger-kernel",
    ),
    Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        "cce; cce_kahan_full_c, its advice for pretraining; cce_exact: filter_eps=None and fp32 accumulation",
        "pip install 'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git'  (the index's 25.1.1 has no bias)",
    ),
    Peer(
        "flash-attn",
        "flash-attn",
        "flash_attn",
        "attention, rotary in place, layer norm",
        "flash_attn_func; its Triton norms",
        "pip install flash-attn --no-build-isolation",
    ),
    Apex(
        "apex (NVIDIA's)",
        "apex",
        "apex",
        "layer norm",
        "FusedLayerNorm, and contrib's fast_layer_norm for width 768",
        "pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex.git  (not `pip install apex`)",
    ),
    Peer(
        "quack",
        "quack-kernels",
        "quack",
        "linear_cross_entropy without bias, layer norm",
        "chunked; scaled_exp; Hopper only",
        "pip install quack-kernels",
    ),
)
"""Every peer, in the table's order."""


def versions() -> dict[str, str | None]:
    """Every peer's version or None, for result files."""
    return {peer.name: peer.version for peer in PEERS}


Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class HeadPeer:
    """A head and its weighted loss: peer(hidden, weight, target, bias, token_weight) is sum_i token_weight[i] * nll[i].

    hidden [N, D] in the compute dtype; weight [V, D] and bias [V] or None, cast to it; target [N] int64; token_weight [N] fp32 or
    None for ones. With `rows` [R], target and token_weight are [R], and only those rows of hidden are gathered and used.

    cannot: what it does not do, and the detour that does it here; empty if it does all. takes_bias: whether a bias can be given.
    read: what the call was written from. Every peer is differentiable in hidden, weight, bias and token_weight.
    """

    name: str
    call: Loss
    cannot: str
    read: str
    takes_bias: bool = True

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The loss, in nats. Raises ValueError for a bias that the peer does not take; it is never silently left out."""
        if bias is not None and not self.takes_bias:
            raise ValueError(f"{self.name} takes no bias here ({self.cannot}); compare it without one, and say so")
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        bias = None if bias is None else bias.to(hidden.dtype)
        return self.call(hidden, weight.to(hidden.dtype), target, bias, token_weight)


def weighted(nll: Tensor, token_weight: Tensor | None) -> Tensor:
    """The weighted sum in fp32, or fp64 for fp64 rows."""
    nll = nll if nll.dtype is torch.float64 else nll.float()
    return nll.sum() if token_weight is None else (nll * token_weight).sum()


def eager(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """The usual code: logits in the compute dtype, log-probabilities in fp32, a gather, a sum."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    nll = -logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    return weighted(nll, token_weight)


@functools.cache
def compiled_eager() -> Loss:
    """`eager` under torch.compile, static shapes."""
    return torch.compile(eager, dynamic=False)


def native(options: Callable[[], Any]) -> Loss:
    """torch's own: with three products if there are no token weights, else by row, which computes the logits twice."""

    def call(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None) -> Tensor:
        how = {"linear_bias": bias, "options": options()}
        if token_weight is None:
            return F.linear_cross_entropy(hidden, weight, target, reduction="sum", **how)
        return weighted(F.linear_cross_entropy(hidden, weight, target, reduction="none", **how), token_weight)

    return call


def liger(accumulate: torch.dtype | None, chunks: int | None) -> Loss:
    """Liger's fused function; with token weights by row losses, so that gradients are right."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    more: dict[str, Any] = {} if accumulate is None else {"accum_dtype": accumulate}
    if chunks is not None:
        more["chunk_mem_const"] = chunks

    def call(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None) -> Tensor:
        how = "sum" if token_weight is None else "none"
        loss = liger_fused_linear_cross_entropy(hidden, weight, target, bias=bias, reduction=how, **more)
        return loss if token_weight is None else weighted(loss, token_weight)

    return call


def cut(settings: dict[str, Any]) -> tuple[Loss, bool]:
    """Apple's cut cross-entropy with those of `settings` that the installed version has, and whether it takes a bias."""
    from cut_cross_entropy import linear_cross_entropy

    known = cut_options()
    chosen = {name: value for name, value in settings.items() if name in known}

    def call(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, token_weight: Tensor | None) -> Tensor:
        more = chosen if bias is None else chosen | {"bias": bias}
        how = "sum" if token_weight is None else "none"
        loss = linear_cross_entropy(hidden, weight, target, reduction=how, impl="cce", **more)
        return loss if token_weight is None else weighted(loss, token_weight)

    return call, "bias" in known


def cut_options() -> set[str]:
    """Names of the installed version's arguments."""
    from cut_cross_entropy import linear_cross_entropy

    return set(inspect.signature(linear_cross_entropy).parameters)


def liger_options() -> set[str]:
    """Names of the installed version's arguments."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return set(inspect.signature(liger_fused_linear_cross_entropy).parameters)


LIGER_READ = "its source, 0.8.5; values and gradients equal the eager ones under Triton's interpreter; on a GPU unverified here"
CUT_READ = "its source, 25.1.1 and later versions in git; unverified here: it runs on a GPU only"
BY_ROW = "token weights only by row losses and a second computation of the logits"
TORCH_READ = "torch's docstring and source, 2.13 and 2.14; checked by tests on a CPU"


def needs(module: str, device: torch.device) -> str | None:
    """Why a Triton library cannot run on `device`, or None."""
    if importlib.util.find_spec(module) is None:
        return "it is not installed"
    if device.type != "cuda":
        return "it runs on CUDA tensors"
    try:
        importlib.import_module(module)
    except Exception as error:  # a foreign package may raise anything while it is imported
        return f"it cannot be imported: {' '.join(str(error).split())[:200]}"
    return None


def chunked_by_4096() -> Any:
    """Options of F.linear_cross_entropy. torch 2.13 can accumulate at a middle precision; later releases choose by device."""
    options = torch.nn.LinearCrossEntropyOptions
    try:
        return options(batch_chunk_size=4096, acc_policy="balanced")
    except ValueError:
        return options(batch_chunk_size=4096)


def linear_cross_entropy_peers(device: torch.device) -> dict[str, HeadPeer]:
    """Every way to compute a weighted head loss that can run on `device`, by name."""
    found = [
        HeadPeer("eager", eager, "", "checked by tests on a CPU"),
        HeadPeer("eager compiled", lambda *a: compiled_eager()(*a), "", "checked by tests on a CPU"),
    ]
    if torch_has("linear_cross_entropy"):
        found += [
            HeadPeer("torch", native(lambda: None), "not chunked without options: the logits are whole", TORCH_READ),
            HeadPeer("torch chunked", native(torch.nn.LinearCrossEntropyOptions), BY_ROW, TORCH_READ),
            HeadPeer("torch chunked 4096", native(chunked_by_4096), BY_ROW, TORCH_READ),
        ]
    if needs("liger_kernel", device) is None:
        known, fp32 = liger_options(), torch.float32
        cannot = f"{BY_ROW}; sums over chunks in the weight's dtype; waits for the device"
        found.append(HeadPeer("liger", liger(None, None), cannot, LIGER_READ))
        cannot = f"{BY_ROW}; waits for the device"
        if "accum_dtype" in known:
            found.append(HeadPeer("liger fp32", liger(fp32, None), cannot, LIGER_READ))
        if {"accum_dtype", "chunk_mem_const"} <= known:
            found.append(HeadPeer("liger fp32, 16x chunks", liger(fp32, 16), cannot, LIGER_READ))
    if needs("cut_cross_entropy", device) is None:
        fp32 = {"accum_e_fp32": True, "accum_c_fp32": True}
        drops = "gradients below eps / 32 are dropped before token weights apply"
        sums = "" if "accum_c_fp32" in cut_options() else "this version sums gradients in the input's dtype"
        for name, settings, cannot in (
            ("cce", {}, drops),
            ("cce_kahan_full_c", fp32 | {"filter_c_grad": False}, f"hidden's {drops}"),  # its advice for pretraining
            ("cce_exact", fp32 | {"filter_eps": None}, sums),
        ):
            if name == "cce_kahan_full_c" and sums:
                continue
            call, takes_bias = cut(settings)
            reasons = [cannot, "token weights by row losses", *([] if takes_bias else ["this version has no bias"])]
            found.append(HeadPeer(name, call, "; ".join(filter(None, reasons)), CUT_READ, takes_bias=takes_bias))
    return {peer.name: peer for peer in found}


def linear_cross_entropy_missing(device: torch.device) -> dict[str, str]:
    """Peers of linear_cross_entropy that cannot run on `device`, each with the reason."""
    reasons = {"liger": needs("liger_kernel", device), "cce": needs("cut_cross_entropy", device)}
    if not torch_has("linear_cross_entropy"):
        reasons["torch"] = f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 and newer have"
    reasons["quack"] = "every head here has a bias and a vocabulary not a multiple of 8, for which quack runs the plain loss"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def main() -> int:
    """Print the table."""
    width = max(len(peer.name) for peer in PEERS)
    for peer in PEERS:
        version = peer.version
        print(f"{peer.name:<{width}}  {version or 'not installed':<16}{peer.compared}")
        print(f"{'':<{width}}  {'':<16}settings: {peer.settings}")
        if version is None:
            print(f"{'':<{width}}  {'':<16}{peer.install}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nlinear_cross_entropy on {device.type}")
    for name, head in linear_cross_entropy_peers(device).items():
        print(f"  {name:<24}{head.cannot or 'does all'} ({head.read})")
    for name, reason in linear_cross_entropy_missing(device).items():
        print(f"  {name:<24}left out: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
