"""The importance estimator: how likely the backbone is to get each token wrong, judged from the visible tokens.

- `reads: embedding`: its input are the backbone's own token embeddings of the noised sequence, normalised and projected to 256,
  plus an embedding of k / L. Two pre-norm transformer layers of 4 heads with rotary positions, a last norm, one number a token,
  a sigmoid.
- `reads: hidden`: its input are the backbone's hidden states after `depth` blocks, and a linear map makes the number.
- Target: 1 - p(x_i | z) of the backbone at the tokens that end up hidden, by binary cross-entropy. The head starts at zero, so
  the first masks are uniform.
`frequency` needs no network: a token's importance is the log-rank of its count in the training text, 0 for the commonest, 1 for
the rarest. `full` is 0.7 learned + 0.3 frequency.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atat_fast.config import Config, ImportanceConfig, ModelConfig
from atat_fast.diffusion.identity import log_rank
from atat_fast.diffusion.process import Scored
from atat_fast.distributed.tensors import load_parts
from atat_fast.errors import UsageError
from atat_fast.models import start
from atat_fast.models.dit import DiT, TimeEmbedding, step_cost
from atat_fast.models.tables import RotaryTables
from atat_fast.models.trunk import BlockContext, block_context
from atat_fast.ops.attention import Documents, self_attention
from atat_fast.ops.registry import Cost

LEARNED_SHARE = 0.7  # of `full`
TIME_SCALE = 1_000.0  # multiplies k / L for the cosines, whose slowest has a wavelength of about 60,000
MLP_RATIO = 4


class Layer(nn.Module):
    """A pre-norm transformer layer: norms have a weight only, attention's projections no bias, the GELU MLP a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, MLP_RATIO * width)
        self.down = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[B, L, W] to [B, L, W]."""
        x = x + self_attention(
            self.norm1(x),
            self.qkv.weight,
            self.out.weight,
            context.cos,
            context.sin,
            heads=self.heads,
            documents=context.layout,
            implementation=context.implementation,
        )
        return cast(Tensor, x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))


class Network(RotaryTables):
    """The learned part: embeddings [B, L, D] to one logit a token."""

    def __init__(self, config: ImportanceConfig, dim: int, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.project = nn.Linear(dim, config.width)
        self.time = TimeEmbedding(config.width)
        self.layers = nn.ModuleList([Layer(config.width, config.heads) for _ in range(config.layers)])
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, 1)
        load_parts(dict(self.named_parameters()), self._own_start())
        self.make_tables(length, config.width // config.heads)

    def _own_start(self) -> start.Values:
        yield "head.weight", torch.zeros(self.head.weight.shape)
        yield "head.bias", torch.zeros(self.head.bias.shape)

    def initial_values(self) -> start.Values:
        """`DiT.initial_values`, of this network."""
        return start.initial_values(self, self._own_start)

    def forward(self, embedded: Tensor, hidden_share: Tensor, documents: Documents | None = None) -> Tensor:
        """embedded [B, L, D], hidden_share [B] in [0, 1]; documents keep attention inside them. Returns logits [B, L] fp32."""
        x = self.project(self.norm(embedded)) + self.time(TIME_SCALE * hidden_share)[:, None]
        context = block_context(x, *self.tables(x.shape[1]), documents)
        for layer in self.layers:
            x = layer(x, context)
        return cast(Tensor, self.head(self.final_norm(x))[..., 0].float())


class LinearNetwork(nn.Module):
    """The learned part that reads hidden states: normalised [B, L, D] and k / L to one logit a token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, 1)
        self.share = nn.Linear(2, 1, bias=False)
        load_parts(dict(self.named_parameters()), self._own_start())

    def _own_start(self) -> start.Values:
        for name in ("head.weight", "head.bias", "share.weight"):
            yield name, torch.zeros(self.get_parameter(name).shape)

    def initial_values(self) -> start.Values:
        """`DiT.initial_values`, of this network."""
        return start.initial_values(self, self._own_start)

    def forward(self, states: Tensor, hidden_share: Tensor, documents: Documents | None = None) -> Tensor:
        """states [B, L, D], hidden_share [B] in [0, 1]. Returns logits [B, L] fp32."""
        share = torch.stack((hidden_share, hidden_share.square()), dim=1)
        return cast(Tensor, self.head(states)[..., 0].float() + self.share(share).float())


class ImportanceEstimator(nn.Module):
    """Scores in [0, 1] for every token of a batch, as `config.source` says.

    Args:
        config: source, reads, depth, width, layers and heads are read.
        dim: Width D of the backbone's token embeddings.
        length: Longest sequence L.
        counts: [V] how often each id occurs in the training text; needed for the sources frequency and full.

    Raises ValueError for source none, or if counts are needed and missing.
    """

    frequency: Tensor

    def __init__(self, config: ImportanceConfig, dim: int, length: int, counts: Tensor | None = None) -> None:
        super().__init__()
        if config.source == "none":
            raise ValueError("importance.source is none, which has no estimator; choose learned, frequency or full")
        self.config = config
        self.network: Network | LinearNetwork | None = None
        if config.source in ("learned", "full"):
            self.network = Network(config, dim, length) if config.reads == "embedding" else LinearNetwork(dim)
        if config.source in ("frequency", "full"):
            if counts is None:
                raise ValueError(f"importance.source {config.source} needs the counts of every id in the training text")
            self.register_buffer("frequency", log_rank(counts))

    @classmethod
    def of(cls, config: Config, counts: Tensor | None = None) -> ImportanceEstimator | None:
        """The estimator of a run with these settings, or None."""
        if config.importance.source == "none":
            return None
        return cls(config.importance, config.model.dim, config.model.length, counts)

    def read(self, model: DiT, tokens: Tensor, hidden_share: Tensor, documents: Documents | None = None) -> Tensor:
        """What the network reads of tokens [B, L]: the model's embeddings, or its detached hidden states; [B, L, D]."""
        if self.config.reads == "embedding":
            return cast(Tensor, model.embedding(tokens))
        with torch.no_grad():
            states = model.features(tokens, hidden_share, documents=documents, depth=self.config.depth)
        return states.view(*tokens.shape, -1)

    def combine(self, logits: Tensor | None, clean: Tensor) -> Scored:
        """Scores from the network's logits [B, L] and clean ids [B, L], together with those logits."""
        learned = None if logits is None else torch.sigmoid(logits)
        if self.config.source == "learned":
            assert learned is not None
            return Scored(learned, logits)
        known = self.frequency[clean]
        if learned is None:
            return Scored(known)
        return Scored(LEARNED_SHARE * learned + (1 - LEARNED_SHARE) * known, logits)

    def scorer(self, model: DiT) -> Callable[[Tensor, Tensor], Tensor]:
        """For a sampler: (noised tokens [B, L], hidden share [B]) to scores [B, L] in [0, 1], by the learned part alone.

        A frequency belongs to the hidden token, which a sampler does not know, so `full` samples by its learned part. Raises
        UsageError for source frequency, which has no learned part.
        """
        network = self.network
        if network is None:
            raise UsageError("importance.source frequency scores tokens that are known; a sampler needs learned scores (or full)")

        def scores(tokens: Tensor, hidden_share: Tensor) -> Tensor:
            return torch.sigmoid(network(self.read(model, tokens, hidden_share), hidden_share))

        return scores

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())


def importance_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each logit [R] with target [R] in [0, 1], the backbone's chance of error; [R] fp32 in nats."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")


def error_chance(nll: Tensor) -> Tensor:
    """1 - p of the true token from its -log p, detached, in [0, 1]."""
    return (-torch.expm1(-nll.detach())).clamp(0.0, 1.0)


def importance_cost(config: ImportanceConfig, model: ModelConfig, batch: int, *, backward: bool = True) -> Cost:
    """Floating-point operations of scoring `batch` sequences: matrix products and attention, as `step_cost` counts them."""
    if config.source not in ("learned", "full"):
        return Cost(0, 0)
    if config.reads == "hidden":
        part = ModelConfig(**{**vars(model), "layers": min(config.depth, model.layers)})
        return step_cost(part, 0, batch, batch * model.length, backward=False)
    rows, width = batch * model.length, config.width
    per_row = model.dim * width + (4 + 2 * MLP_RATIO) * width * width * config.layers
    attention = 2 * 2 * batch * model.length**2 * width * config.layers
    return Cost((2 * rows * per_row + attention) * (3 if backward else 1), 0)
