"""MDLM's networks: DiT's trunk over their weights, with one op between two matrix products.

A network is recognised by its parts (`NETWORK`, `BLOCK` below), wherever it comes from. It is then run once before and once
after, and both must give the same logits. Only `forward` of that one object is replaced. Parameters stay the same objects under
the same names, so optimizers, averages and checkpoints do not notice. The loss forms no logits of visible tokens, and those of
hidden tokens a slab at a time.

Embeddings and linear layers are still called as modules, so their hooks and adapters work. Blocks and norms are not called, so
hooks on them are refused.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atat_fast.models.accelerate.probe import allowed_error, evaluating, first_line, stand_ins
from atat_fast.models.trunk import BlockContext, BlockParts, Norm, Randomness, run_block, run_trunk
from atat_fast.ops.adaptive_norm import EPS
from atat_fast.ops.attention import attention
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy
from atat_fast.ops.rotary import rotary

NETWORK = (
    "vocab_embed.embedding",
    "sigma_map",
    "rotary_emb.inv_freq",
    "blocks",
    "output_layer.norm_final.weight",
    "output_layer.linear",
    "output_layer.adaLN_modulation",
)
BLOCK = ("n_heads", "norm1.weight", "attn_qkv", "attn_out", "norm2.weight", "mlp", "adaLN_modulation")
ARGUMENTS = ("indices", "sigma")
STATES = "output_hidden_states"  # the hub's classes have this argument too, and return a pair
MOST_HIDDEN = 0.999  # the greatest rate of MDLM's schedule, so the largest that such a model was trained with

_SETTINGS = "_atat_fast_accelerated"
_PROBE_LENGTH = 7


@dataclass(frozen=True)
class _Settings:
    """How a model's forward was replaced: autocast is the dtype on a GPU; pair says whether hidden states come back too."""

    time_conditioning: bool
    autocast: torch.dtype | None
    pair: bool


def looks_alike(model: nn.Module) -> bool:
    """Whether it, or its `backbone`, has a part that only MDLM's networks have."""
    network = network_of(model)
    return any(hasattr(network, path.split(".")[0]) for path in ("vocab_embed", "sigma_map", "rotary_emb"))


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` changed this model."""
    return _SETTINGS in network_of(model).__dict__


def accelerate(model: nn.Module, *, time_conditioning: bool | None, autocast: torch.dtype | None, check: bool) -> None:
    """Change the network in place. Raises ValueError, and changes nothing, if it is not one of MDLM's."""
    outer, network = model, network_of(model)
    _recognise(network)
    extra = _extra_arguments(network)
    if time_conditioning is None:
        told = getattr(outer, "time_conditioning", None) if outer is not network else None
        if told is None and STATES in extra:
            told = getattr(getattr(network, "config", None), "time_conditioning", None)
        time_conditioning = told if isinstance(told, bool) else True
    settings = _Settings(time_conditioning, autocast, STATES in extra)
    probe = _Probe(network, settings) if check else None
    network.__dict__[_SETTINGS] = settings
    network.__dict__["forward"] = MethodType(forward, network)
    if probe is not None:
        try:
            probe.compare()
        except Exception:
            restore(model)
            raise


def restore(model: nn.Module) -> None:
    """Give the network its own forward back."""
    network = accelerated(model)
    del network.__dict__["forward"], network.__dict__[_SETTINGS]


def forward(self: nn.Module, indices: Tensor, sigma: Tensor, output_hidden_states: bool = False) -> Any:
    """The forward of an accelerated network: indices [B, L], sigma [B] to logits [B, L, V] in the compute dtype."""
    settings = _settings(self)
    if output_hidden_states:
        if not settings.pair:
            raise ValueError("this network's own forward returns no hidden states")
        return type(self).forward(self, indices, sigma, output_hidden_states=True)
    y = features(self, indices, sigma)
    with _precision(settings, y):
        logits = self.output_layer.linear(y.view(*indices.shape, -1))  # type: ignore[operator, union-attr]
    return (logits, []) if settings.pair else logits


def features(model: nn.Module, indices: Tensor, sigma: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """The rows that the head reads: [B * L, D], or [R, D] for `rows` ([R] flat indices).

    indices [B, L]; sigma [B], or None for zeros. After the last attention only `rows` are computed. Raises ValueError if the
    model is not accelerated.
    """
    network: Any = accelerated(model)
    settings = _settings(network)
    x = network.vocab_embed(indices)
    if sigma is None or not settings.time_conditioning:
        sigma = torch.zeros(1, device=indices.device)
    c = F.silu(network.sigma_map(sigma))
    frequency = network.rotary_emb.inv_freq
    angle = torch.outer(torch.arange(indices.shape[1], device=indices.device).type_as(frequency), frequency)
    blocks, last = list(network.blocks), network.output_layer
    rates = [_rate(block) for block in blocks]
    with _precision(settings, x):
        modulation = [part for block in blocks for part in block.adaLN_modulation(c).chunk(6, dim=-1)]
        modulation += last.adaLN_modulation(c).chunk(2, dim=-1)
        return run_trunk(
            x,
            [partial(_run, block) for block in blocks],
            modulation,
            _norm(last.norm_final),
            BlockContext(angle.cos(), angle.sin()),
            rates=rates,
            randomness=_randomness(x) if any(rates) else None,
            rows=rows,
        )


def _run(
    block: Any, x: Tensor, branch: Tensor | None, modulation: tuple[Tensor, ...], context: BlockContext
) -> tuple[Tensor, Tensor]:
    """A block of MDLM's in the form `run_trunk` calls. Linear layers are called as modules, so hooks and adapters work."""

    def attend(y: Tensor, context: BlockContext) -> Tensor:
        qkv = block.attn_qkv(y).view(*y.shape[:2], 3, block.n_heads, -1)
        a = attention(rotary(qkv, context.cos, context.sin))
        return block.attn_out(a if context.rows is None else a.flatten(0, 1).index_select(0, context.rows))  # type: ignore[no-any-return]

    return run_block(BlockParts(_norm(block.norm1), attend, _norm(block.norm2), block.mlp), x, branch, modulation, context)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, getattr(norm, "eps", EPS))


def _rate(block: Any) -> float:
    """The block's dropout now. MDLM has a number `dropout`; others have a Dropout module, `dropout` or `dropout1`."""
    rate: Any = getattr(block, "dropout", None)
    if rate is None:
        rate = getattr(block, "dropout1", 0.0)
    return float(rate.p if isinstance(rate, nn.Dropout) else rate) if block.training else 0.0


def _randomness(x: Tensor) -> Randomness:
    """One forward's randomness: the seed is drawn from the generator of x's device, on that device."""
    return Randomness(torch.randint(2**62, (), device=x.device), 0, torch.arange(len(x), device=x.device))


def weighted_loss(
    model: nn.Module, noisy: Tensor, rows: Tensor, target: Tensor, weights: Tensor, sigma: Tensor | None = None, *, mask_id: int
) -> Tensor:
    """sum(weights * -log p(target)) over the hidden tokens, an fp32 scalar in nats.

    noisy [B, L] ids; rows [R] flat indices of hidden tokens, target [R] their true ids, weights [R] fp32, all as `mask_tokens`
    gives them; sigma [B], or None for zeros; mask_id is never predicted. Differentiable in the parameters; one graph under
    torch.compile.
    """
    y = features(model, noisy, sigma, rows)
    linear = cast(nn.Linear, cast(Any, network_of(model)).output_layer.linear)
    return linear_cross_entropy(  # type: ignore[no-any-return]
        y, linear.weight, target, bias=linear.bias, token_weight=weights, forbidden=mask_id
    )


def vocabulary_of(model: nn.Module) -> int:
    """Number of ids that the head predicts."""
    return int(cast(Any, network_of(model)).vocab_embed.embedding.shape[0])


def sigma_of(model: nn.Module, hidden_share: Tensor) -> Tensor | None:
    """What a network with time conditioning reads, -log(1 - share) with a share of at most 0.999; None without."""
    conditioned = _settings(accelerated(model)).time_conditioning
    return -torch.log1p(-hidden_share.clamp(max=MOST_HIDDEN)) if conditioned else None


def _precision(settings: _Settings, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if settings.autocast is None or x.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=settings.autocast)


def _settings(network: nn.Module) -> _Settings:
    return cast(_Settings, network.__dict__[_SETTINGS])


def network_of(model: nn.Module) -> nn.Module:
    """The network itself: model, or its `backbone`."""
    inner = getattr(model, "backbone", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "vocab_embed") else model


def accelerated(model: nn.Module) -> nn.Module:
    """The network of an accelerated model. Raises ValueError if it is not accelerated."""
    network = network_of(model)
    if _SETTINGS not in network.__dict__:
        raise ValueError(f"this {type(model).__name__} is not accelerated; call accelerate(model) first")
    return network


def _recognise(network: nn.Module) -> None:
    """Raise ValueError if the network is not MDLM's, with everything that is missing or different."""
    name = type(network).__name__
    if "_orig_mod" in network._modules:
        raise ValueError("this model is already compiled; accelerate it first, then call torch.compile on it")
    if "forward" in network.__dict__:
        raise ValueError(f"the forward of this {name} has been replaced by something else; undo that first")
    missing = [path for path in NETWORK if not _has(network, path)]
    blocks = list(network.blocks) if isinstance(getattr(network, "blocks", None), nn.ModuleList) else []  # type: ignore[arg-type]
    if not blocks and "blocks" not in missing:
        missing.append("blocks[0]")
    missing += [f"blocks[{i}].{path}" for i, block in enumerate(blocks) for path in BLOCK if not _has(block, path)]
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise ValueError(f"{name} is not built as MDLM's network: it has no {', '.join(missing[:6])}{more}")
    faults = _faults(network, blocks)
    if faults:
        raise ValueError(f"{name} is not built as MDLM's network: {'; '.join(faults)}")


def _faults(network: Any, blocks: list[Any]) -> list[str]:
    faults = []
    arguments = [p.name for p in inspect.signature(type(network).forward).parameters.values()][1:]
    if tuple(arguments[:2]) != ARGUMENTS or set(arguments[2:]) - {STATES}:
        faults.append(f"its forward takes ({', '.join(arguments)}), not ({', '.join(ARGUMENTS)})")
    width = network.vocab_embed.embedding.shape[-1]
    size = 2 * network.rotary_emb.inv_freq.numel()
    heads = {block.n_heads for block in blocks}
    if any(head * size != width for head in heads):
        faults.append(f"its width {width} is not n_heads {sorted(heads)} times twice the {size // 2} rotary frequencies")
    norms = {f"blocks[{i}].{name}": getattr(block, name) for i, block in enumerate(blocks) for name in ("norm1", "norm2")}
    norms["output_layer.norm_final"] = network.output_layer.norm_final
    faults += [f"{name} has a bias" for name, norm in norms.items() if getattr(norm, "bias", None) is not None]
    skipped = norms | {f"blocks[{i}]": block for i, block in enumerate(blocks)} | {"output_layer": network.output_layer}
    faults += [f"{name} has hooks, which would not be called" for name, module in skipped.items() if _hooked(module)]
    return faults


def _hooked(module: nn.Module) -> bool:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, store, None) for store in stores)


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        if getattr(module, name, None) is None:
            return False
        module = getattr(module, name)
    return True


def _extra_arguments(network: nn.Module) -> list[str]:
    return list(inspect.signature(type(network).forward).parameters)[3:]


class _Probe:
    """A network's own logits on two short sequences, taken before its forward is replaced, to compare with those after."""

    def __init__(self, network: nn.Module, settings: _Settings) -> None:
        self.network, self.settings = network, settings
        generator = torch.Generator().manual_seed(0)
        embedding = cast(Tensor, cast(Any, network).vocab_embed.embedding)
        device = embedding.device
        if embedding.is_meta:
            raise ValueError("a network on the meta device has no logits to compare with those of the ops; pass check=False")
        self.indices = torch.randint(embedding.shape[0], (2, _PROBE_LENGTH), generator=generator).to(device)
        self.sigma = torch.tensor([0.3, 1.7] if settings.time_conditioning else [0.0, 0.0], device=device)
        self.stand_ins = stand_ins(network, generator)
        try:
            self.want = self._logits()
        except Exception as error:
            raise ValueError(
                f"the network cannot be run on {device} to compare its logits with those of the ops ({first_line(error)}); move "
                "it to where it runs first, or pass check=False"
            ) from error

    def compare(self) -> None:
        """Raise ValueError if the present forward gives other logits."""
        got = self._logits()
        allowed = allowed_error(got.dtype if got.dtype is self.want.dtype else torch.bfloat16)
        error = float((got.double() - self.want.double()).norm() / self.want.double().norm().clamp(min=1e-30))
        if not error <= allowed:
            raise ValueError(
                f"{type(self.network).__name__} has the parts of MDLM's network but computes something else: its logits differ "
                f"by {error:.3g} of their norm from those of the ops; it keeps its own forward"
            )

    @torch.no_grad()  # not inference mode: the network may keep its rotary tables, which training then reads
    def _logits(self) -> Tensor:
        with evaluating(self.network):
            out = torch.func.functional_call(self.network, self.stand_ins, (self.indices, self.sigma))
        return cast(Tensor, out[0] if self.settings.pair else out)
