"""MDLM's checkpoints, in and out: the published parameter names beside ours.

MDLM (Sahoo et al., Simple and effective masked diffusion language models, 2024) publishes the network that `DiT` computes, under
other names, and so does BD3-LM (Arriola et al., Block diffusion, 2025) for blocks. `NAMES` is the whole translation, in the order
of MDLM's parameters, which is also that of its moving average. Sizes are read from shapes; nothing is guessed that the file could
contradict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from atat_fast.config import ModelConfig
from atat_fast.errors import UsageError, nearest
from atat_fast.models.mdlm_files import read_checkpoint

NAMES = (
    ("vocab_embed.embedding", "embedding.weight", "V D"),
    ("sigma_map.mlp.0.weight", "time.inner.weight", "C F"),
    ("sigma_map.mlp.0.bias", "time.inner.bias", "C"),
    ("sigma_map.mlp.2.weight", "time.outer.weight", "C C"),
    ("sigma_map.mlp.2.bias", "time.outer.bias", "C"),
    ("blocks.i.norm1.weight", "blocks.i.norm1", "D"),
    ("blocks.i.attn_qkv.weight", "blocks.i.qkv.weight", "3D D"),
    ("blocks.i.attn_out.weight", "blocks.i.out.weight", "D D"),
    ("blocks.i.norm2.weight", "blocks.i.norm2", "D"),
    ("blocks.i.mlp.0.weight", "blocks.i.up.weight", "M D"),
    ("blocks.i.mlp.0.bias", "blocks.i.up.bias", "M"),
    ("blocks.i.mlp.2.weight", "blocks.i.down.weight", "D M"),
    ("blocks.i.mlp.2.bias", "blocks.i.down.bias", "D"),
    ("blocks.i.adaLN_modulation.weight", "blocks.i.modulation.weight", "6D C"),
    ("blocks.i.adaLN_modulation.bias", "blocks.i.modulation.bias", "6D"),
    ("output_layer.norm_final.weight", "final_norm", "D"),
    ("output_layer.linear.weight", "head.weight", "V D"),
    ("output_layer.linear.bias", "head.bias", "V"),
    ("output_layer.adaLN_modulation.weight", "final_modulation.weight", "2D C"),
    ("output_layer.adaLN_modulation.bias", "final_modulation.bias", "2D"),
)
"""Published name, our name, shape; i is the block's number. V vocabulary, D width, C conditioning, M MLP, F time frequencies."""

TIME_FREQUENCIES = 256
ROTARY = "rotary_emb.inv_freq"
ROTARY_BASE = 10_000.0
PREFIXES = ("_orig_mod.", "module.", "backbone.", "model.")
OVERRIDES = ("heads", "length", "mask_id", "time_conditioning", "dropout", "block")
HEAD_SIZE = 64
LENGTH = 1024
BERT = (30_522, 103)  # size of BERT's vocabulary, which has a mask token of its own, and that token
LISTED = 4


def read_mdlm(
    source: str | Path | Mapping[str, Any], *, ema: bool = True, **overrides: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An MDLM checkpoint as the arguments of a DiT and its state dict, on the CPU.

    source: a .safetensors file, a Lightning .ckpt or another file of torch.save, a folder or hub id that holds model.safetensors
            or pytorch_model.bin, or the loaded dictionary. Names may have the prefixes backbone., model., module. or _orig_mod.
    ema:    take the moving average if the checkpoint has one (a Lightning file's ema.shadow_params); False takes the weights.
    heads:  attention heads. By default those of rotary_emb.inv_freq, else config.json's, else one for each 64 of the width.
    length: longest sequence the model takes. By default config.json's, else 1024; the weights do not depend on it.
    mask_id: the mask token. By default the one row of the head that training never touched, else BERT's own in a vocabulary of
            30,522, else the last id.
    time_conditioning: whether the model is told the time. By default config.json's, else no, as in MDLM's published ones.
    dropout: for further training; 0.1 by default.
    block: tokens of a block, of BD3-LM's checkpoints, which have the same names. By default config.json's block_size, else 0; a
            block as long as the model is one without blocks.

    Raises UsageError if the file cannot be read or is not MDLM's; the error lists what is missing, unexpected or of another
    shape.
    """
    for name in overrides:
        if name not in OVERRIDES:
            raise UsageError(
                f"{name} is not yours to choose for a checkpoint{nearest(name, OVERRIDES)}: its sizes are read from the weights; "
                f"what can be given is {', '.join(OVERRIDES)} and ema"
            )
    if isinstance(source, Mapping):
        where, content, facts = "the state dict", source, dict[str, Any]()
    else:
        where, (content, facts) = str(source), read_checkpoint(source)
    tensors = published_tensors(content, where, ema=ema)
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = _settings(tensors, {**facts, **given}, given, where)
    return settings, {ours: tensors[published] for published, ours in names(settings["layers"]).items()}


def to_mdlm_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A DiT's weights under MDLM's names, in its order, with the rotary buffer that MDLM's loading expects. Copies.

    Raises UsageError for QK-norm and ReLU squared, which MDLM's network does not have.
    """
    config = cast(ModelConfig, model.config)
    for option, value, plain in (("qk_norm", config.qk_norm, False), ("activation", config.activation, "gelu")):
        if value != plain:
            raise UsageError(
                f"this model has {option} {value}, which MDLM's network does not; only {option} {plain} can go there"
            )
    state = by_block(model.state_dict(), config.layers, config.dim)
    tensors = {published: state[ours].detach().clone().contiguous() for published, ours in names(config.layers).items()}
    tensors[ROTARY] = rotary_frequencies(config.dim // config.heads)
    return tensors


def names(layers: int) -> dict[str, str]:
    """Published name to our name, for a model of `layers` blocks, in the order of MDLM's parameters."""
    return {published: ours for published, ours, _ in _rows(layers)}


def by_block(state: Mapping[str, Tensor], layers: int, width: int) -> dict[str, Tensor]:
    """A state dict with one modulation table for each block and one for the final norm, as in NAMES.

    The rows of a single table, `modulation`, are those of the blocks in order, then those of the final norm.
    """
    named = dict(state)
    for what in ("weight", "bias"):
        packed = named.pop(f"modulation.{what}", None)
        if packed is not None:
            *blocks, final = packed.split([6 * width] * layers + [2 * width])
            named |= {f"blocks.{i}.modulation.{what}": table for i, table in enumerate(blocks)}
            named[f"final_modulation.{what}"] = final
    return named


def rotary_frequencies(head_size: int) -> Tensor:
    """MDLM's buffer: 10,000^(-2 j / head_size), fp32."""
    return 1.0 / ROTARY_BASE ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)


def published_tensors(content: Mapping[str, Any], where: str, *, ema: bool = True) -> dict[str, Tensor]:
    """MDLM's parameters by published names without prefixes, and the rotary buffer if there is one, each of the right shape.

    content: a state dict, or a Lightning checkpoint with state_dict and perhaps ema. Raises UsageError, naming `where`.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{where} is no checkpoint: it holds no state dict of tensors")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        bare = _bare(str(name))
        if bare in tensors:
            raise UsageError(f"{where} has {bare} twice, under different prefixes; keep one of them")
        if not bare.startswith("noise."):  # buffers of the noise schedule are not part of the network
            tensors[bare] = value
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    _check(tensors, layers, where)
    average = content.get("ema") if state is not content else None
    if ema and average is not None:
        tensors |= _average(average, tensors, layers, where)
    return tensors


def _rows(layers: int) -> list[tuple[str, str, str]]:
    """NAMES with the rows of a block repeated for each block."""
    block = [row for row in NAMES if row[0].startswith("blocks.i.")]
    first = NAMES.index(block[0])
    blocks = [(p.replace(".i.", f".{i}."), o.replace(".i.", f".{i}."), s) for i in range(layers) for p, o, s in block]
    return [*NAMES[:first], *blocks, *NAMES[first + len(block) :]]


def _bare(name: str) -> str:
    while True:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def _check(tensors: dict[str, Tensor], layers: int, where: str) -> None:
    needed = {published: shape for published, _, shape in _rows(max(1, layers))}
    missing = sorted(needed.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - needed.keys() - {ROTARY})
    wrong = [] if missing else _wrong_shapes(tensors, needed)
    faults = [f"{word} {_listed(found)}" for word, found in (("missing", missing), ("unexpected", unexpected)) if found]
    if wrong:
        faults.append(f"of another shape {_listed(wrong)}")
    if faults:
        raise UsageError(f"{where} is not an MDLM checkpoint: {'; '.join(faults)}")


def _wrong_shapes(tensors: Mapping[str, Tensor], needed: Mapping[str, str]) -> list[str]:
    """Tensors that do not fit the sizes of the embedding, the time layers and the first MLP."""
    stated = {"vocab_embed.embedding": 2, "sigma_map.mlp.2.weight": 2, "blocks.0.mlp.0.weight": 2}
    flat = [f"{name} {tuple(tensors[name].shape)}, not a matrix" for name, rank in stated.items() if tensors[name].dim() != rank]
    if flat:
        return flat
    sizes = _sizes(tensors)
    wrong = []
    for name in sorted(needed):
        have, need = tuple(tensors[name].shape), tuple(sizes[letter] for letter in needed[name].split())
        if have != need:
            wrong.append(f"{name} {have}, not {need}")
        elif not tensors[name].is_floating_point():
            wrong.append(f"{name} of {tensors[name].dtype}, not of floating-point numbers")
    if not wrong and sizes["M"] % sizes["D"]:
        wrong.append(f"blocks.0.mlp.0.weight {(sizes['M'], sizes['D'])}, not a multiple of {sizes['D']} rows")
    return wrong


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    (vocabulary, width), inner = tensors["vocab_embed.embedding"].shape, tensors["blocks.0.mlp.0.weight"].shape[0]
    conditioning = tensors["sigma_map.mlp.2.weight"].shape[0]
    multiples = {"D": width, "2D": 2 * width, "3D": 3 * width, "6D": 6 * width}
    return {"V": vocabulary, "M": inner, "C": conditioning, "F": TIME_FREQUENCIES, **multiples}


def _average(average: Any, tensors: Mapping[str, Tensor], layers: int, where: str) -> dict[str, Tensor]:
    """The shadow parameters by name; the file has a list in the order of the parameters."""
    shadow = average.get("shadow_params") if isinstance(average, Mapping) else None
    raw = "; take the weights themselves with --no_ema (ema=False)"
    if not isinstance(shadow, list | tuple) or not all(isinstance(value, Tensor) for value in shadow):
        raise UsageError(f"{where} has an ema without a list shadow_params of tensors{raw}")
    order = list(names(layers))
    if len(shadow) != len(order):
        raise UsageError(f"{where} averages {len(shadow)} parameters (ema.shadow_params) and has {len(order)}{raw}")
    named = dict(zip(order, shadow, strict=True))
    wrong = [
        f"{name} {tuple(named[name].shape)}, not {tuple(tensors[name].shape)}"
        for name in sorted(order)
        if named[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UsageError(f"{where}: ema.shadow_params do not have the parameters' shapes: {_listed(wrong)}{raw}")
    return named


def _settings(tensors: Mapping[str, Tensor], asked: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of DiT: sizes from shapes, the rest from `asked`. `given` is the part of `asked` that the caller chose."""
    sizes = _sizes(tensors)
    width, vocabulary = sizes["D"], sizes["V"]
    settings = {
        "vocab_size": vocabulary,
        "mask_id": asked["mask_id"] if "mask_id" in asked else _mask_id(tensors),
        "dim": width,
        "layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "heads": _heads(width, asked.get("heads"), given.get("heads"), tensors.get(ROTARY), where),
        "length": asked.get("length", LENGTH),
        "mlp_ratio": sizes["M"] // width,
        "conditioning_dim": sizes["C"],
        "time_conditioning": asked.get("time_conditioning", False),
    }
    block = asked.get("block", 0)
    settings["block"] = block if block != settings["length"] else 0
    return settings | ({"dropout": asked["dropout"]} if "dropout" in asked else {})


def _mask_id(tensors: Mapping[str, Tensor]) -> int:
    """The mask's id. SUBS never predicts the mask, so its row of a head that began at zero stays zero through training."""
    untouched = ((tensors["output_layer.linear.weight"] == 0).all(1) & (tensors["output_layer.linear.bias"] == 0)).nonzero()
    if len(untouched) == 1:
        return int(untouched)
    vocabulary = len(tensors["vocab_embed.embedding"])
    return BERT[1] if vocabulary == BERT[0] else vocabulary - 1


def _heads(width: int, asked: int | None, given: int | None, frequencies: Tensor | None, where: str) -> int:
    """The number of heads. No weight's shape tells it, but the rotary buffer does, if it was saved."""
    told = None
    if frequencies is not None:
        size = 2 * frequencies.numel()
        told = width // size if size and width % size == 0 else None
        if told is None or not torch.allclose(frequencies.float().flatten(), rotary_frequencies(size), rtol=1e-2):
            raise UsageError(
                f"{where}: {ROTARY} {tuple(frequencies.shape)} is not base {ROTARY_BASE:,.0f} for heads that divide {width}; "
                "this model rotates in another way"
            )
        if given is not None and given != told:
            raise UsageError(f"heads {given} contradicts {where}, whose {ROTARY} is that of {told} heads; leave heads out")
    heads = asked if told is None else told
    if heads is None:
        if width % HEAD_SIZE:
            raise UsageError(f"width {width} does not divide into heads of {HEAD_SIZE}; say how many there are with --heads")
        return width // HEAD_SIZE
    if heads < 1 or width % heads or width // heads % 2:
        fitting = [str(h) for h in range(1, width + 1) if width % h == 0 and width // h % 2 == 0]
        ways = f"; try {', '.join(fitting[:12])}" if fitting else ""
        raise UsageError(f"width {width} does not divide into {heads} heads of an even size{ways}")
    return heads


def _listed(found: Iterable[str]) -> str:
    every = list(found)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more
