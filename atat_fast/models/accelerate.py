"""accelerate: an existing MDLM model, its own classes and parameters, with this package's ops under its forward.

    model = atat_fast.accelerate(model)            # in place; restore(model) takes it back
    loss = masked_diffusion_loss(model, tokens, mask_id=50_257, seed=1, step=step)

A model is recognised by what it has (`TRUNK`, `BLOCK` below), not by where it comes from, and is then run once as it was and
once as it is now to see that both give the same logits. Only `forward` is replaced, on that one object: parameters are the same
objects under the same names, so optimizers, averages and checkpoints do not notice. Between the matrix products there is one op
where there were several; the loss forms no logits of visible tokens, and those of hidden ones a slab at a time.

Embeddings and linear layers are still called as modules (their hooks and adapters work); blocks and norms are not, so hooks on
those would be lost, and are refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atat_fast.config import DiffusionConfig
from atat_fast.diffusion.masking import hide_for_training
from atat_fast.ops.adaptive_norm import EPS, adaptive_layer_norm, gated_residual_norm
from atat_fast.ops.attention import attention
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy
from atat_fast.ops.rotary import rotary

TRUNK = (
    "vocab_embed.embedding", "sigma_map", "rotary_emb.inv_freq", "blocks", "output_layer.norm_final.weight",
    "output_layer.linear", "output_layer.adaLN_modulation",
)  # fmt: skip
BLOCK = ("n_heads", "norm1.weight", "attn_qkv", "attn_out", "norm2.weight", "mlp", "adaLN_modulation")
ARGUMENTS = ("indices", "sigma")
STATES = "output_hidden_states"  # the hub's classes have this argument too, and return a pair
MOST_HIDDEN = 0.999  # the greatest rate of MDLM's schedule: the largest time such a model was told is that of 1 - 0.001

_SETTINGS = "_atat_fast_accelerated"
_PROBE_LENGTH = 7


@dataclass(frozen=True)
class _Settings:
    """How a model's forward was replaced: autocast is the dtype on a GPU; pair says whether hidden states come back too."""

    time_conditioning: bool
    autocast: torch.dtype | None
    pair: bool


def accelerate(
    model: nn.Module, *, time_conditioning: bool | None = None, autocast: torch.dtype | None = torch.bfloat16, check: bool = True
) -> nn.Module:
    """Replace the forward of an MDLM network by one made of fused ops, in place.

    model: the network, or a module that holds it as `backbone` (MDLM's Lightning module, the hub's class). Not a compiled or
        wrapped one: accelerate first, then compile or wrap.
    time_conditioning: whether sigma is read. False takes every sigma as 0, and modulation then costs nothing. By default what
        the module around the network says (MDLM's zeroes sigma itself when it has time_conditioning False), else True.
    autocast: on a GPU the blocks and the head run under autocast to this dtype, as MDLM's own forward does; None leaves the
        precision to the caller. On a CPU it is always the caller's.
    check: run the network as it was and as it is now on two short sequences, without dropout, with small random numbers in
        place of parameters that are all zero, and refuse where logits differ. Needs a model that can run where it is.

    forward(indices [B, L], sigma [B]) gives logits [B, L, V] as before. Dropout is the block's own rate where the block is in
    training mode: the mask is drawn anew in each forward from a seed that torch's generator gives, so torch.manual_seed repeats
    it, but the elements dropped are others than torch's dropout would. Under activation checkpointing it is the same mask twice.

    Returns model. Raises ValueError, and changes nothing, where the model is not one of MDLM's, saying what is missing.
    """
    outer, trunk = model, _trunk(model)
    if _SETTINGS in trunk.__dict__:
        restore(model)
    _recognise(trunk)
    extra = _extra_arguments(trunk)
    if time_conditioning is None:
        told = getattr(outer, "time_conditioning", None) if outer is not trunk else None
        if told is None and STATES in extra:
            told = getattr(getattr(trunk, "config", None), "time_conditioning", None)
        time_conditioning = told if isinstance(told, bool) else True
    settings = _Settings(time_conditioning, autocast, STATES in extra)
    probe = _Probe(trunk, settings) if check else None
    trunk.__dict__[_SETTINGS] = settings
    trunk.__dict__["forward"] = MethodType(forward, trunk)
    if probe is not None:
        try:
            probe.compare()
        except Exception:
            restore(model)
            raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give an accelerated model its own forward back. Returns model. Raises ValueError for one that is not accelerated."""
    trunk = _accelerated(model)
    del trunk.__dict__["forward"], trunk.__dict__[_SETTINGS]
    return model


def forward(self: nn.Module, indices: Tensor, sigma: Tensor, output_hidden_states: bool = False) -> Any:
    """What an accelerated network runs: indices [B, L], sigma [B] to logits [B, L, V] in the compute dtype."""
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
    """Rows the head reads: [B * L, D], or with `rows` ([R] flat indices) those rows, [R, D].

    indices [B, L]; sigma [B], or None for zeros. Where everyone has the same conditioning, the last block's projection, MLP and
    norms are computed for `rows` alone. Raises ValueError for a model that is not accelerated.
    """
    trunk: Any = _accelerated(model)
    settings = _settings(trunk)
    batch, length = indices.shape
    x = trunk.vocab_embed(indices)
    if sigma is None or not settings.time_conditioning:
        sigma = torch.zeros(1, device=indices.device)
    c = F.silu(trunk.sigma_map(sigma))
    frequency = trunk.rotary_emb.inv_freq
    angle = torch.outer(torch.arange(length, device=indices.device).type_as(frequency), frequency)
    cos, sin = angle.cos(), angle.sin()
    blocks = list(trunk.blocks)
    seed = _dropout_seed(blocks, x)

    with _precision(settings, x):
        tables = [block.adaLN_modulation(c).chunk(6, dim=-1) for block in blocks]
        shift, scale = trunk.output_layer.adaLN_modulation(c).chunk(2, dim=-1)
        # Each branch is followed by the next one's norm: the attention norms of blocks 1, 2, ... and the last norm of all.
        following: list[Any] = [(block.norm1, *table[:2]) for block, table in zip(blocks[1:], tables[1:], strict=True)]
        following.append((trunk.output_layer.norm_final, shift, scale))
        y = _norm(x, blocks[0].norm1, *tables[0][:2])
        for i, (block, table, after) in enumerate(zip(blocks, tables, following, strict=True)):
            _, _, gate1, shift2, scale2, gate2 = table
            qkv = block.attn_qkv(y).view(batch, length, 3, block.n_heads, -1)
            a = attention(rotary(qkv, cos, sin))
            if i + 1 == len(blocks) and rows is not None and c.shape[0] == 1:
                a, x, rows = _pick(a, rows), _pick(x, rows), None
            x, y = _join(x, block.attn_out(a), gate1, block.norm2, shift2, scale2, _rate(block), seed, 2 * i)
            norm, shift, scale = after
            x, y = _join(x, block.mlp(y), gate2, norm, shift, scale, _rate(block), seed, 2 * i + 1)
    y = y.flatten(0, 1)
    return y if rows is None else y.index_select(0, rows)


def weighted_loss(
    model: nn.Module, noisy: Tensor, rows: Tensor, target: Tensor, weights: Tensor, sigma: Tensor | None = None, *, mask_id: int
) -> Tensor:
    """sum(weights * -log p(target)) over the hidden tokens, an fp32 scalar in nats.

    noisy [B, L] ids; rows [R] flat indices of hidden tokens, target [R] their true ids, weights [R] fp32, as `mask_tokens` gives
    them; sigma [B], or None for zeros; mask_id is never predicted. Differentiable in the parameters; one graph under
    torch.compile.
    """
    y = features(model, noisy, sigma, rows)
    linear = cast(nn.Linear, cast(Any, _trunk(model)).output_layer.linear)
    return linear_cross_entropy(  # type: ignore[no-any-return]
        y, linear.weight, target, bias=linear.bias, token_weight=weights, forbidden=mask_id
    )


def masked_diffusion_loss(
    model: nn.Module,
    tokens: Tensor,
    *,
    mask_id: int,
    seed: int,
    step: int,
    sample_ids: Tensor | None = None,
    weighting: str = "uniform",
    masking: str = "exact",
    first: int = 0,
    total: int | None = None,
) -> Tensor:
    """The training loss of an accelerated model on clean tokens, in nats a token: hide, run, and weigh what was hidden.

    tokens:      [B, L] ids without mask_id.
    seed, step:  what the masks depend on, with sample_ids [B] (int64, by default first + 0 .. B - 1) and the position.
    weighting:   "uniform" is the likelihood bound's own weight; "ce" the plain mean over hidden tokens (docs/training.md).
    masking:     "exact" hides exactly k tokens, k stratified over the global batch; "bernoulli" is MDLM's process.
    first, total: this call's sequences are first .. first + B - 1 of a global batch of `total`, B by default.

    A model that is told the time gets -log(1 - share hidden), at most that of a share of 0.999 as in MDLM's own schedule.
    Returns a scalar to call backward on. Under DDP, call it inside the wrapped module's forward.
    Raises ValueError for a model that is not accelerated, an unknown masking or weighting, and bad ids.
    """
    trunk = _accelerated(model)
    for name, value, known in (("masking", masking, ("exact", "bernoulli")), ("weighting", weighting, ("uniform", "ce"))):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(known)}")
    batch, vocabulary = tokens.shape[0], cast(Any, trunk).vocab_embed.embedding.shape[0]
    if not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id {mask_id} is outside the vocabulary of {vocabulary}")
    if sample_ids is None:
        sample_ids = torch.arange(first, first + batch, device=tokens.device)
    config = DiffusionConfig(masking=masking, weighting=weighting)  # type: ignore[arg-type]
    masked = hide_for_training(
        tokens, config, first=first, total=batch if total is None else total, mask_id=mask_id, sample_ids=sample_ids, seed=seed,
        step=step,
    )  # fmt: skip
    sigma = -torch.log1p(-masked.hidden_share.clamp(max=MOST_HIDDEN)) if _settings(trunk).time_conditioning else None
    return weighted_loss(trunk, masked.noisy, masked.rows, masked.target, masked.weights, sigma, mask_id=mask_id) / masked.tokens


def _norm(x: Tensor, norm: Any, shift: Tensor, scale: Tensor) -> Tensor:
    return adaptive_layer_norm(x, shift, scale, norm.weight, eps=getattr(norm, "eps", EPS))


def _join(
    x: Tensor, branch: Tensor, gate: Tensor, norm: Any, shift: Tensor, scale: Tensor, rate: float, seed: Tensor | None, layer: int
) -> tuple[Tensor, Tensor]:
    eps = getattr(norm, "eps", EPS)
    if seed is None or rate == 0:
        return gated_residual_norm(x, branch, gate, shift, scale, norm.weight, eps=eps)
    ids = torch.arange(x.shape[0], device=x.device)
    return gated_residual_norm(
        x, branch, gate, shift, scale, norm.weight, dropout=rate, seed=seed, sample_ids=ids, layer=layer, eps=eps
    )


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """[B, L, D] to its rows, [1, R, D]."""
    return x.flatten(0, 1).index_select(0, rows)[None]


def _rate(block: Any) -> float:
    """The block's dropout now: a number (MDLM's), or a Dropout module under that name or dropout1."""
    rate: Any = getattr(block, "dropout", None)
    if rate is None:
        rate = getattr(block, "dropout1", 0.0)
    return float(rate.p if isinstance(rate, nn.Dropout) else rate) if block.training else 0.0


def _dropout_seed(blocks: list[Any], x: Tensor) -> Tensor | None:
    """A seed from torch's generator of x's device, on that device; None, and nothing drawn, where no block drops anything."""
    if all(_rate(block) == 0 for block in blocks):
        return None
    return torch.randint(2**62, (), device=x.device)


def _precision(settings: _Settings, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if settings.autocast is None or x.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=settings.autocast)


def _settings(trunk: nn.Module) -> _Settings:
    return cast(_Settings, trunk.__dict__[_SETTINGS])


def _trunk(model: nn.Module) -> nn.Module:
    """The network itself: model, or what it holds as backbone."""
    inner = getattr(model, "backbone", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "vocab_embed") else model


def _accelerated(model: nn.Module) -> nn.Module:
    trunk = _trunk(model)
    if _SETTINGS not in trunk.__dict__:
        raise ValueError(f"this {type(model).__name__} is not accelerated; call accelerate(model) first")
    return trunk


def _recognise(trunk: nn.Module) -> None:
    """Raise ValueError where the network is not MDLM's, naming all that is missing or otherwise."""
    name = type(trunk).__name__
    if "_orig_mod" in trunk._modules:
        raise ValueError("this model is already compiled; accelerate it first, then call torch.compile on it")
    if "forward" in trunk.__dict__:
        raise ValueError(f"the forward of this {name} has been replaced by something else; undo that first")
    missing = [path for path in TRUNK if not _has(trunk, path)]
    blocks = list(trunk.blocks) if isinstance(getattr(trunk, "blocks", None), nn.ModuleList) else []  # type: ignore[arg-type]
    if not blocks and "blocks" not in missing:
        missing.append("blocks[0]")
    missing += [f"blocks[{i}].{path}" for i, block in enumerate(blocks) for path in BLOCK if not _has(block, path)]
    if missing:
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise ValueError(f"{name} is not built as MDLM's network: it has no {', '.join(missing[:6])}{more}")
    faults = _faults(trunk, blocks)
    if faults:
        raise ValueError(f"{name} is not built as MDLM's network: {'; '.join(faults)}")


def _faults(trunk: Any, blocks: list[Any]) -> list[str]:
    faults = []
    arguments = [p.name for p in inspect.signature(type(trunk).forward).parameters.values()][1:]
    if tuple(arguments[:2]) != ARGUMENTS or set(arguments[2:]) - {STATES}:
        faults.append(f"its forward takes ({', '.join(arguments)}), not ({', '.join(ARGUMENTS)})")
    width = trunk.vocab_embed.embedding.shape[-1]
    size = 2 * trunk.rotary_emb.inv_freq.numel()
    heads = {block.n_heads for block in blocks}
    if any(head * size != width for head in heads):
        faults.append(f"its width {width} is not n_heads {sorted(heads)} times twice the {size // 2} rotary frequencies")
    norms = {f"blocks[{i}].{name}": getattr(block, name) for i, block in enumerate(blocks) for name in ("norm1", "norm2")}
    norms["output_layer.norm_final"] = trunk.output_layer.norm_final
    faults += [f"{name} has a bias" for name, norm in norms.items() if getattr(norm, "bias", None) is not None]
    skipped = norms | {f"blocks[{i}]": block for i, block in enumerate(blocks)} | {"output_layer": trunk.output_layer}
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


def _extra_arguments(trunk: nn.Module) -> list[str]:
    return list(inspect.signature(type(trunk).forward).parameters)[3:]


class _Probe:
    """A network's own logits on two short sequences, taken before its forward is replaced, to compare with those after."""

    def __init__(self, trunk: nn.Module, settings: _Settings) -> None:
        self.trunk, self.settings = trunk, settings
        generator = torch.Generator().manual_seed(0)
        embedding = cast(Tensor, cast(Any, trunk).vocab_embed.embedding)
        device = embedding.device
        if embedding.is_meta:
            raise ValueError("a network on the meta device has no logits to compare with those of the ops; pass check=False")
        self.indices = torch.randint(embedding.shape[0], (2, _PROBE_LENGTH), generator=generator).to(device)
        self.sigma = torch.tensor([0.3, 1.7] if settings.time_conditioning else [0.0, 0.0], device=device)
        self.stand_ins = {
            name: (0.1 * torch.randn(p.shape, generator=generator)).to(p)
            for name, p in trunk.named_parameters()
            if not p.is_meta and not bool(p.detach().any())
        }
        try:
            self.want = self._logits()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the network cannot be run on {device} to compare its logits with those of the ops ({reason}); move it to "
                "where it runs first, or pass check=False"
            ) from error

    def compare(self) -> None:
        """Raise ValueError where the forward that is there now gives other logits."""
        got = self._logits()
        exact = got.dtype is self.want.dtype and got.dtype in (torch.float32, torch.float64)
        allowed = 0.01 if exact else 0.1  # of the logits' norm: another network is off by the whole of it
        error = float((got.double() - self.want.double()).norm() / self.want.double().norm().clamp(min=1e-30))
        if not error <= allowed:
            raise ValueError(
                f"{type(self.trunk).__name__} has the parts of MDLM's network but computes something else: its logits differ by "
                f"{error:.3g} of their norm from those of the ops; it keeps its own forward"
            )

    @torch.no_grad()  # not inference mode: the network may keep its rotary tables, which training then reads
    def _logits(self) -> Tensor:
        with _evaluating(self.trunk):
            out = torch.func.functional_call(self.trunk, self.stand_ins, (self.indices, self.sigma))
        return cast(Tensor, out[0] if self.settings.pair else out)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and as it was after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
