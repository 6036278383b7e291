"""DiT: the transformer of MDLM. It sees a text with hidden tokens and predicts them.

Notable features, all of MDLM's so that its published weights fit:
- pre-norm blocks whose LayerNorms have a weight and no bias; shift, scale and gate of every branch come from the time
  embedding (adaLN), zero at the start, so each block begins as the identity;
- without time conditioning (the default) that embedding is one row for all samples, and modulation is free;
- rotary positions, halves paired, base 10,000; qkv and output projections without bias; MLP 4 x D, tanh-GELU, with bias;
- embeddings untied by default; the head has a bias and starts at zero.
Options beyond MDLM: tied embeddings, QK-norm, ReLU squared, attention within documents, blocks recomputed to save memory.
One matrix product makes the shifts, scales and gates of all blocks. `trunk.py` joins the blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atat_fast.config import ModelConfig
from atat_fast.diffusion.process import Tilt
from atat_fast.distributed.tensors import load_parts
from atat_fast.errors import UsageError
from atat_fast.models import start
from atat_fast.models.activation import squared_relu
from atat_fast.models.blocks import FLEX, BlockCache, check_block, flex_branch, flex_two_streams, masked_attention, two_streams
from atat_fast.models.mdlm import TIME_FREQUENCIES, read_mdlm
from atat_fast.models.tables import RotaryTables
from atat_fast.models.trunk import BlockContext, BlockParts, Norm, Randomness, block_context, run_block, run_trunk
from atat_fast.ops.attention import Documents, self_attention
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_cost
from atat_fast.ops.registry import Cost, autocast_dtype, transformed

LEAST_VISIBLE = 2e-9  # keeps the hidden share a model is told below 1 - e^-20, the log-linear schedule's last rate


class TimeEmbedding(nn.Module):
    """sigma [B] to [B, C]: cosines and sines of 256 frequencies, then two linear layers, each followed by SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(TIME_FREQUENCIES, width)
        self.outer = nn.Linear(width, width)

    def forward(self, sigma: Tensor) -> Tensor:
        """[B] fp32 to [B, C]."""
        half = TIME_FREQUENCIES // 2
        frequency = torch.exp(torch.arange(half, device=sigma.device, dtype=torch.float32) * (-math.log(10_000) / half))
        angle = sigma[:, None].float() * frequency
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.inner.weight.dtype)
        return F.silu(self.outer(F.silu(self.inner(waves))))


class Block(nn.Module):
    """The weights of one block. `run_block` is its arithmetic."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.dim, config.mlp_ratio * config.dim
        self.heads, self.qk_norm, self.activation = config.heads, config.qk_norm, config.activation
        self.recompute = False
        self.norm1 = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, branch: Tensor | None, modulation: tuple[Tensor, ...], context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """`run_block`; recomputed in the backward pass if `recompute` is set."""
        # Dropout depends only on its arguments, so keep no random state. Functorch and tangents do not support checkpoints.
        if self.recompute and torch.is_grad_enabled() and not transformed():
            return checkpoint(  # type: ignore[no-any-return]
                self.run, x, branch, modulation, context, use_reentrant=False, preserve_rng_state=False
            )
        return self.run(x, branch, modulation, context)

    def run(
        self, x: Tensor, branch: Tensor | None, modulation: tuple[Tensor, ...], context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """`forward` without the choice of recomputing: the part that is compiled if blocks are compiled one by one."""
        parts = BlockParts(Norm(self.norm1), self.attend, Norm(self.norm2), self.mlp)
        return run_block(parts, x, branch, modulation, context)

    def attend(self, x: Tensor, context: BlockContext) -> Tensor:
        """The attention branch of a normalised x [B, L, D]: [B, L, D], or [R, D] for the context's rows."""
        if context.implementation == FLEX:
            return flex_branch(x, self, context)
        return self_attention(
            x,
            self.qkv.weight,
            self.out.weight,
            context.cos,
            context.sin,
            heads=self.heads,
            qk_norm=self.qk_norm,
            rows=context.rows,
            documents=context.layout,
            implementation=context.implementation,
        )

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP branch of a normalised x [..., D]."""
        inner = self.up(x)
        inner = F.gelu(inner, approximate="tanh") if self.activation == "gelu" else squared_relu(inner)
        return cast(Tensor, self.down(inner))


class Head(nn.Linear):
    """The vocabulary head: logits, or the loss without them.

    The loss is computed inside `forward`, because FSDP gathers the whole weight there and the fused op takes plain tensors.
    """

    def forward(self, input: Tensor, target: Tensor | None = None, **options: Any) -> Any:
        """input [R, D] to logits [R, V]; with target [R], the result of `linear_cross_entropy` with these options."""
        if target is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, target, bias=self.bias, **options)


MODEL_TYPE = "atat_fast"


class DiT(
    RotaryTables,
    PyTorchModelHubMixin,
    library_name="atat_fast",
    tags=["masked-diffusion", "text-generation"],
    license="apache-2.0",
):
    """A masked-diffusion language model: it predicts hidden tokens.

    Args:
        vocab_size: Number of ids, the mask token's included.
        mask_id: The mask token, which the model never predicts.
        model_type: The type in a saved config.json.
        The rest: the fields of `ModelConfig`.

    `forward` gives the training loss, so that one call is one compiled graph; samplers use its two halves, `features` and
    `logits`. `save_pretrained` and `from_pretrained` (safetensors) are the hub's own.
    """

    graph_safe = True
    """`features` and `logits` never wait for the device and may be captured as a CUDA graph."""

    def __init__(self, vocab_size: int, mask_id: int, *, model_type: str = MODEL_TYPE, **settings: Any) -> None:
        super().__init__()
        if model_type != MODEL_TYPE:
            raise UsageError(f"these are the settings of a model of type {model_type!r}, not of {MODEL_TYPE}")
        config = ModelConfig(**settings)
        check_model(config)
        if not 0 <= mask_id < vocab_size:
            raise UsageError(f"mask_id {mask_id} is outside the vocabulary of {vocab_size}")
        self.config, self.vocab_size, self.mask_id = config, vocab_size, mask_id
        self.time_conditioning = config.time_conditioning
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.time = TimeEmbedding(config.conditioning_dim)
        layers = [Block(config) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(layers)
        self.final_norm = nn.Parameter(torch.ones(config.dim))
        # Rows: each block's shift, scale, gate, shift, scale, gate, then the final norm's shift and scale; D of each.
        self.modulation = nn.Linear(config.conditioning_dim, (6 * config.layers + 2) * config.dim)
        self.head = Head(config.dim, vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.make_tables(config.length, config.dim // config.heads)
        load_parts(dict(self.named_parameters()), self._own_start())
        self.register_load_state_dict_pre_hook(_merge)

    def _own_start(self) -> start.Values:
        """MDLM's start where it is not PyTorch's: Kaiming embeddings, normal(0.02) time layers, zero modulation and head."""
        yield "embedding.weight", nn.init.kaiming_uniform_(torch.empty(self.embedding.weight.shape), a=math.sqrt(5))
        for name in ("time.inner.weight", "time.outer.weight"):
            yield name, nn.init.normal_(torch.empty(self.get_parameter(name).shape), std=0.02)
        zeros = ["modulation.weight", "modulation.bias", "head.bias", *([] if self.config.tie_embeddings else ["head.weight"])]
        for name in zeros:
            yield name, torch.zeros(self.get_parameter(name).shape)

    def initial_values(self) -> start.Values:
        """The value that each parameter of a new model starts with, one at a time, on torch's default device: the bits that the
        constructor draws. This model may be on the meta device, or sharded.
        """
        return start.initial_values(self, self._own_start)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:  # `to_empty` makes two parameters of the one
            self.head.weight = self.embedding.weight
        return self

    @classmethod
    def from_mdlm(cls, source: str | Path | Mapping[str, Any], *, ema: bool = True, **overrides: Any) -> DiT:
        """The model of an MDLM checkpoint (a path, a hub id or a state dict), in fp32 on the CPU. See `read_mdlm`."""
        settings, weights = read_mdlm(source, ema=ema, **overrides)
        model = cls(**settings)
        model.load_state_dict(weights)
        return model

    def conditioning(self, hidden_share: Tensor | None) -> Tensor:
        """The time embedding [B, C]; without time conditioning [1, C], with sigma 0 for all sequences."""
        if not self.time_conditioning:
            return cast(Tensor, self.time(torch.zeros(1, device=self.time.inner.weight.device)))
        if hidden_share is None:
            raise ValueError("this model is told the time: pass hidden_share, the share of each sequence that is hidden")
        return cast(Tensor, self.time(-torch.log((1 - hidden_share.float()).clamp(min=LEAST_VISIBLE))))

    def features(
        self,
        tokens: Tensor,
        hidden_share: Tensor | None = None,
        randomness: Randomness | None = None,
        *,
        rows: Tensor | None = None,
        documents: Documents | None = None,
        depth: int | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """The rows that the head reads.

        tokens [B, L] ids; hidden_share [B] in [0, 1], read only with time conditioning; randomness turns dropout on.
        rows [R] integers, flat indices b * L + i, or None for all; what only other rows need is not computed.
        documents: if given, attention stays inside them.   depth: run the first so many blocks only.
        clean: [B, L] ids without a mask, of a model with `block`: blocks of tokens see the blocks before them as they are here.
            Without it such a model takes at most one block of tokens, the first of a text.
        Returns [R, D], or [B * L, D], in the compute dtype. Raises ValueError for sequences longer than the model's length.
        """
        length = tokens.shape[1]
        if length > self.config.length:
            raise ValueError(f"the sequence has {length} tokens, but this model takes at most {self.config.length}")
        modulation = self.modulation(self.conditioning(hidden_share)).unflatten(-1, (-1, self.config.dim)).unbind(1)
        blocks = cast("list[Block]", list(self.blocks)[:depth])
        if 0 < self.config.block < length and depth is None:
            x, context, rows = self._two_streams(tokens, clean, rows)
        else:
            x = self.embedding(tokens)
            context = block_context(x, *self.tables(length), documents)
        return run_trunk(
            x,
            blocks,
            modulation,
            Norm(self.final_norm),
            context,
            rates=[self.config.dropout] * len(blocks),
            randomness=randomness,
            rows=rows,
        )

    def _two_streams(self, tokens: Tensor, clean: Tensor | None, rows: Tensor | None) -> tuple[Tensor, BlockContext, Tensor]:
        """Embeddings of [noised, clean] [B, 2 L, D], what their blocks see, and the noised rows to read in it."""
        if clean is None:
            raise UsageError(
                f"this model predicts {self.config.block} tokens from the finished ones before them, and {tokens.shape[1]} are "
                "given at once: orders, scores and samples of whole texts are for models without blocks"
            )
        batch, length = tokens.shape
        x = self.embedding(torch.cat((tokens, clean), 1))
        cos, sin = (torch.cat((table, table)) for table in self.tables(length))
        implementation = masked_attention(x.device, autocast_dtype(x), 2 * cos.shape[-1])
        if implementation == FLEX:
            layout = flex_two_streams(length, self.config.block, x.device)
        else:
            layout = two_streams(length, self.config.block, x.device).expand(batch, -1, -1, -1)
        if rows is None:
            rows = torch.arange(batch * length, device=tokens.device)
        rows = rows + torch.div(rows, length, rounding_mode="floor") * length
        return x, BlockContext(cos, sin, layout, implementation), rows

    def _clean(self, noisy: Tensor, rows: Tensor, target: Tensor) -> Tensor | None:
        """The text of a noised batch, if a model with blocks needs it. Padding rows name a token that is there anyway."""
        if not 0 < self.config.block < noisy.shape[1]:
            return None
        return noisy.flatten().index_copy(0, rows, target.to(noisy.dtype)).view_as(noisy)

    def cache(self, batch: int) -> BlockCache:
        """An empty cache of finished blocks, for `batch` texts. Raises UsageError for a model without blocks."""
        if not self.config.block:
            raise UsageError("a cache of finished blocks needs a model trained with model.block, and this one has none")
        return BlockCache(self, batch, self.config.length - self.config.block)

    def logits(self, features: Tensor) -> Tensor:
        """[R, D] rows of `features` to [R, V] logits with -inf at the mask token (SUBS)."""
        logits: Tensor = self.head(features).float()
        logits[:, self.mask_id] = -torch.inf
        return logits

    def output_head(self) -> tuple[Tensor, Tensor]:
        """Weight [V, D] and bias [V] from `features` to `logits`, for ops that store no logits."""
        return self.head.weight, self.head.bias

    def nll(
        self,
        noisy: Tensor,
        rows: Tensor,
        target: Tensor,
        hidden_share: Tensor | None = None,
        documents: Documents | None = None,
        tilt: Tilt | None = None,
    ) -> Tensor:
        """-log p of the hidden tokens, [R] fp32 in nats, the terms of the likelihood bound; with a tilt, its loss."""
        rates, elapsed = tilt or (None, None)
        clean = self._clean(noisy, rows, target)
        features = self.features(noisy, hidden_share, rows=rows, documents=documents, clean=clean)
        nll = self.head(features, target, forbidden=self.mask_id, reduction="none", rates=rates, elapsed=elapsed)
        return cast(Tensor, nll)

    def forward(
        self,
        noisy: Tensor,
        rows: Tensor,
        target: Tensor,
        weights: Tensor,
        hidden_share: Tensor | None = None,
        randomness: Randomness | None = None,
        documents: Documents | None = None,
        tilt: Tilt | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of the hidden tokens.

        noisy [B, L] ids; rows [R], target [R], weights [R] and tilt as in `MaskedBatch`; randomness turns dropout on; documents
        keep attention inside them.
        Returns the fp32 scalar sum(weights * loss) and nll [R] detached, in nats. loss is nll or, with a tilt, the tilt's loss.
        """
        rates, elapsed = tilt or (None, None)
        clean = self._clean(noisy, rows, target)
        features = self.features(noisy, hidden_share, randomness, rows=rows, documents=documents, clean=clean)
        loss, nll = self.head(
            features, target, token_weight=weights, forbidden=self.mask_id, rates=rates, elapsed=elapsed, return_nll=True
        )
        return loss, nll

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, each counted once, and their total."""
        size = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
        counts = {
            "embedding": size(self.embedding),
            "blocks": size(self.blocks),
            "conditioning": size(self.modulation, self.time),
            "head": self.final_norm.numel() + (self.head.bias.numel() if self.config.tie_embeddings else size(self.head)),
        }
        counts["total"] = sum(counts.values())
        return counts


def misfit(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """The first tensor, in theirs' order, whose name or shape differs, as 'NAME is SHAPE there, and here SHAPE'; or None."""
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        have = tuple(theirs[name].shape) if name in theirs else "missing"
        need = tuple(ours[name].shape) if name in ours else "not part of this model"
        if have != need:
            return f"{name} is {have} there, and here {need}"
    return None


def _merge(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    merge_modulation(state, prefix)


def merge_modulation(state: dict[str, Any], prefix: str = "") -> None:
    """Join modulation tables kept block by block (MDLM's layout, and earlier checkpoints') into DiT's one table, in place.

    Names are blocks.N.modulation.WHAT and final_modulation.WHAT; WHAT is weight or bias, and more in an optimizer's state.
    """
    final = f"{prefix}final_modulation."
    for name in [key for key in state if key.startswith(final)]:
        what = name.removeprefix(final)
        blocks = (f"{prefix}blocks.{i}.modulation.{what}" for i in itertools.count())
        parts = [state.pop(key) for key in itertools.takewhile(state.__contains__, blocks)] + [state.pop(name)]
        state[f"{prefix}modulation.{what}"] = torch.cat(parts) if parts[0].dim() else parts[0]


def check_model(config: ModelConfig) -> None:
    """Raise UsageError if sizes do not fit together."""
    for name in ("dim", "layers", "heads", "length", "mlp_ratio", "conditioning_dim"):
        if getattr(config, name) < 1:
            raise UsageError(f"model.{name} must be at least 1, got {getattr(config, name)}")
    if config.dim % config.heads or config.dim // config.heads % 2:
        raise UsageError(
            f"model.dim {config.dim} does not divide into {config.heads} heads of an even size; "
            f"try model.heads {_heads_for(config.dim)}"
        )
    check_block(config.block, config.length)
    if config.block and (config.time_conditioning or config.document_mask):
        name = "time_conditioning" if config.time_conditioning else "document_mask"
        raise UsageError(f"model.{name} is not made for blocks (model.block {config.block}); set model.{name} false")
    if not 0 <= config.dropout < 1:
        raise UsageError(f"model.dropout must be in [0, 1), got {config.dropout}")


def _heads_for(dim: int) -> int:
    fitting = [h for h in range(1, dim + 1) if dim % h == 0 and dim // h % 2 == 0]
    return min(fitting, key=lambda h: abs(dim / h - 64), default=1)


def step_cost(config: ModelConfig, vocab_size: int, batch: int, hidden_rows: int, *, backward: bool = True) -> Cost:
    """Floating-point operations and bytes of one pass over `batch` sequences whose head sees `hidden_rows` rows.

    Counts matrix products and attention only, as model-FLOPs utilisation does. After the last attention only hidden rows are
    computed. With blocks there are two streams, of which pairs that see each other count. Bytes are the head's.
    """
    streams = 2 if 0 < config.block < config.length else 1
    rows, width = batch * config.length * streams, config.dim
    after = 1 + 2 * config.mlp_ratio  # out, MLP up and down; qkv is 3 more
    matmul = 2 * width * width * ((3 + after) * rows * config.layers - after * (rows - hidden_rows))
    pairs = config.length**2 if streams == 1 else config.length * (config.length + config.block)
    attention = 2 * 2 * batch * pairs * width * config.layers
    body = (matmul + attention) * (3 if backward else 1)
    return Cost(body, 0) + linear_cross_entropy_cost(hidden_rows, width, vocab_size, backward=backward)
