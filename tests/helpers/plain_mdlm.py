"""MDLM's network in PyTorch's own modules, under the published names, as a stranger's code base would hold it.

Written from the published description.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from small import filled
from torch import nn

VOCABULARY, WIDTH, HEADS, LAYERS, CONDITIONING = 13, 16, 2, 3, 8
MASK = VOCABULARY - 1


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class Embed(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, width))

    def forward(self, x):
        return self.embedding[x]


class SigmaMap(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):
        angle = sigma[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(self.mlp[0].weight.dtype))


class Rotary(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size))

    def forward(self, x):
        turn = torch.outer(torch.arange(x.shape[1], device=x.device).type_as(self.inv_freq), self.inv_freq)
        return torch.cat((turn, turn), -1).cos()[:, None], torch.cat((turn, turn), -1).sin()[:, None]


class Block(nn.Module):
    def __init__(self, width, heads, conditioning, dropout, qk_norm, activation):
        super().__init__()
        self.n_heads, self.dropout, self.qk_norm = heads, dropout, qk_norm
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(conditioning, 6 * width)

    def forward(self, x, cos, sin, c, sees=None):
        batch, length, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).view(batch, length, 3, self.n_heads, -1)
        q, k, v = qkv.unbind(2)
        if self.qk_norm:
            q, k = (F.rms_norm(u, u.shape[-1:]) for u in (q, k))
        q, k = rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        scores = torch.einsum("blhe,bmhe->bhlm", q, k) / math.sqrt(q.shape[-1])
        if sees is not None:
            scores = scores.masked_fill(~sees, -torch.inf)
        attended = torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v).reshape(batch, length, width)
        x = x + gate1 * F.dropout(self.attn_out(attended), self.dropout, self.training)
        inner = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * F.dropout(inner, self.dropout, self.training)


class Output(nn.Module):
    def __init__(self, width, vocabulary, conditioning):
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, vocabulary)
        self.adaLN_modulation = nn.Linear(conditioning, 2 * width)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SquaredRelu(nn.Module):
    def forward(self, x):
        return F.relu(x) ** 2


class DIT(nn.Module):
    """qk_norm and relu2 are ours, and not MDLM's."""

    def __init__(
        self,
        vocabulary=VOCABULARY,
        width=WIDTH,
        heads=HEADS,
        layers=LAYERS,
        conditioning=CONDITIONING,
        dropout=0.0,
        qk_norm=False,
        activation="gelu",
    ):
        super().__init__()
        act = nn.GELU(approximate="tanh") if activation == "gelu" else SquaredRelu()
        self.vocab_embed = Embed(vocabulary, width)
        self.sigma_map = SigmaMap(conditioning)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, conditioning, dropout, qk_norm, act) for _ in range(layers))
        self.output_layer = Output(width, vocabulary, conditioning)
        for zeroed in (*(block.adaLN_modulation for block in self.blocks), self.output_layer.adaLN_modulation):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        nn.init.zeros_(self.output_layer.linear.weight)
        nn.init.zeros_(self.output_layer.linear.bias)

    def of_blocks(self, noisy, clean, block):
        """BD3-LM's logits: noised blocks see themselves and clean ones before, clean ones those up to themselves."""
        x, c = self.vocab_embed(torch.cat((noisy, clean), 1)), F.silu(self.sigma_map(torch.zeros(1)))
        length = noisy.shape[1]
        cos, sin = (torch.cat((t, t)) for t in self.rotary_emb(x[:, :length]))
        sees = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        for q in range(2 * length):
            for k in range(2 * length):
                own, other = q % length // block, k % length // block
                sees[q, k] = (own == other and (q < length) == (k < length)) or (k >= length and own > other)
        for part in self.blocks:
            x = part(x, cos, sin, c, sees)
        return self.output_layer(x, c)[:, :length]

    def run(self, indices, sigma):
        """Logits, and what each block returns."""
        x, c, states = self.vocab_embed(indices), F.silu(self.sigma_map(sigma)), []
        cos, sin = self.rotary_emb(x)
        for block in self.blocks:
            x = block(x, cos, sin, c)
            states.append(x)
        return self.output_layer(x, c), states

    def forward(self, indices, sigma):
        return self.run(indices, sigma)[0]


class Hub(DIT):
    """As the hub's remote code has it: a pair comes back, and the time is dropped inside."""

    class config:
        time_conditioning = False

    def forward(self, indices, sigma, output_hidden_states=False):
        logits, states = self.run(indices, torch.zeros_like(sigma))
        return logits, states if output_hidden_states else []


class Diffusion(nn.Module):
    """What stands around the network in training: the time is dropped unless it is wanted, and an average follows."""

    def __init__(self, time_conditioning=False, **options):
        super().__init__()
        self.backbone = filled(DIT(**options))
        self.time_conditioning = time_conditioning
        self.shadow_params = [p.detach().clone() for p in self.backbone.parameters() if p.requires_grad]

    def update(self, decay=0.5):
        for shadow, p in zip(self.shadow_params, self.backbone.parameters(), strict=True):
            shadow.sub_((1 - decay) * (shadow - p.detach()))

    def forward(self, x, sigma):
        return self.backbone(x, sigma if self.time_conditioning else torch.zeros_like(sigma))

    def checkpoint(self):
        ema = {"decay": 0.5, "num_updates": 1, "shadow_params": self.shadow_params}
        return {"state_dict": self.state_dict(), "ema": ema, "global_step": 7, "optimizer_states": [{"state": {}}]}


def subs_loss(model, tokens, noisy, weight, sigma, mask_id=MASK):
    """MDLM's objective as it is written: log-probabilities of everything, visible tokens overwritten. weight [B, L]."""
    logits = model(noisy, sigma)
    never = torch.zeros_like(logits)
    never[..., mask_id] = -1e6
    logp = torch.log_softmax(logits + never, -1)
    nll = -logp.gather(-1, tokens[..., None])[..., 0]
    return (nll * weight * (noisy == mask_id)).sum() / tokens.numel()
