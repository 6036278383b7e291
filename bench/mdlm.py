"""MDLM's training step in plain PyTorch, as it is usually run: the baseline of every throughput ratio.

Eager modules, SDPA or flash-attn, fp32 LayerNorm and residual stream, logits of every token in fp32, log-probabilities over the
whole vocabulary with visible tokens overwritten (SUBS), Bernoulli masks at stratified times, the 1 / t weights, fused AdamW and
a foreach average. It is written from the published description of the model. Parameters have the names of `atat_fast.models.DiT`,
except for modulation tables, of which each block has its own here (`block_by_block`). So both can hold the same weights and be
compared before either is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atat_fast.config import ModelConfig
from atat_fast.diffusion.noise import LogLinear

NEVER = -1_000_000.0
FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
"""Whether flash-attn, which MDLM's own code calls, is installed."""


def mdlm_network(config: ModelConfig) -> ModelConfig:
    """A preset's sizes with every option beyond MDLM's network turned off, for both sides."""
    return dataclasses.replace(config, tie_embeddings=False, qk_norm=False, activation="gelu")


def block_by_block(named: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors under DiT's names (weights, or their gradients) under the names of PlainMDLM."""
    apart = dict(named)
    for what in ("weight", "bias"):
        whole = apart.pop(f"modulation.{what}")
        size = len(whole) // (6 * layers + 2)
        *blocks, final = whole.split([6 * size] * layers + [2 * size])
        apart |= {f"blocks.{i}.modulation.{what}": part for i, part in enumerate(blocks)} | {f"final_modulation.{what}": final}
    return apart


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) to (-b, a), halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, one row of conditioning a sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, H, L, E] to [B, L, H, E]: by flash-attn if it is installed and can run, else SDPA."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and FLASH_ATTN:
        from flash_attn import flash_attn_func

        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class PlainBlock(nn.Module):
    """A pre-norm block with adaLN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.dim, config.mlp_ratio * config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.modulation = nn.Linear(config.conditioning_dim, 6 * width)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """LayerNorm in fp32, weight and no bias."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:]) * weight

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        batch, length, width = x.shape
        qkv = self.qkv(modulate(self.norm(x, self.norm1), shift1, scale1)).view(batch, length, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q, k = (p * cos.to(p.dtype) + rotate_half(p) * sin.to(p.dtype) for p in (q, k))
        attended = plain_attention(q, k, v).reshape(batch, length, width)
        x = x + gate1[:, None] * F.dropout(self.out(attended), self.dropout, self.training)
        inner = F.gelu(self.up(modulate(self.norm(x, self.norm2), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * F.dropout(self.down(inner), self.dropout, self.training)


class PlainMDLM(nn.Module):
    """The DiT and its SUBS head; `loss` is the training objective in nats a token."""

    def __init__(self, vocab_size: int, mask_id: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.dim
        self.config, self.mask_id, self.vocab_size = config, mask_id, vocab_size
        self.embedding = nn.Embedding(vocab_size, width)
        self.time = nn.ModuleDict(
            {"inner": nn.Linear(256, config.conditioning_dim), "outer": nn.Linear(*(config.conditioning_dim,) * 2)}
        )
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(width))
        self.final_modulation = nn.Linear(config.conditioning_dim, 2 * width)
        self.head = nn.Linear(width, vocab_size)
        size = width // config.heads
        turn = torch.outer(torch.arange(config.length).float(), 10_000 ** (-torch.arange(0, size, 2).float() / size))
        angle = torch.cat((turn, turn), dim=-1)
        self.register_buffer("cos_table", angle.cos(), persistent=False)
        self.register_buffer("sin_table", angle.sin(), persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, L] ids to [B, L, V] in the compute dtype. Time conditioning is off: sigma is 0 and still embedded every step."""
        batch, length = tokens.shape
        frequency = torch.exp(torch.arange(128, device=tokens.device) * (-math.log(10_000) / 128))
        angle = torch.zeros(batch, 1, device=tokens.device) * frequency
        c = torch.cat((angle.cos(), angle.sin()), dim=-1)
        c = F.silu(self.time["outer"](F.silu(self.time["inner"](c))))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, c, self.cos_table[:length], self.sin_table[:length])
        shift, scale = self.final_modulation(c).chunk(2, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(x.float(), x.shape[-1:]) * self.final_norm
        return self.head(modulate(x, shift, scale))

    def loss(self, tokens: Tensor, noisy: Tensor, weight: Tensor) -> Tensor:
        """tokens, noisy [B, L]; weight [B], 1 / t. The mean over all tokens of weight * -log p, visible tokens giving 0."""
        logits = self.logits(noisy).float()
        logits[..., self.mask_id] += NEVER
        logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        visible = noisy != self.mask_id
        logits[visible] = NEVER
        logits[visible, noisy[visible]] = 0
        nll = -logits.gather(-1, tokens[..., None])[..., 0]
        return (nll * weight[:, None]).sum() / tokens.numel()

    def fusible_loss(self, tokens: Tensor, noisy: Tensor, weight: Tensor) -> Tensor:
        """`loss` in the form that compiles best: no assignment under a mask, no size that depends on data."""
        logits = self.logits(noisy).float()
        never = torch.arange(self.vocab_size, device=logits.device) == self.mask_id
        log_p = torch.log_softmax(torch.where(never, NEVER, logits), dim=-1)
        nll = -log_p.gather(-1, tokens[..., None])[..., 0]
        return (torch.where(noisy == self.mask_id, nll, 0.0) * weight[:, None]).sum() / tokens.numel()

    def masks(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy, weight): each token is hidden with chance t; times are stratified over the batch."""
        schedule = LogLinear()
        batch = len(tokens)
        t = (torch.rand(batch, device=tokens.device) / batch + torch.arange(batch, device=tokens.device) / batch) % 1
        hide = torch.rand(tokens.shape, device=tokens.device) < schedule.rate(t)[:, None]
        return torch.where(hide, self.mask_id, tokens), schedule.weight(t).float()
