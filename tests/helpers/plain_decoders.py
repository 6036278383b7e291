"""Bidirectional decoders in the shapes of LLaDA and Dream as their own code has them, small, for transformers' machinery.

LLaDA: the head is a part of the backbone, and the class has no loss of its own. Dream: the head follows the backbone, and the
class's loss is that of the next position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast


class DecoderConfig(PretrainedConfig):
    model_type = "plain_decoder"

    def __init__(self, vocab_size=97, hidden_size=32, layers=2, heads=4, tie=False, scale_logits=False, **more):
        super().__init__(**more)
        self.vocab_size, self.hidden_size, self.layers, self.heads = vocab_size, hidden_size, layers, heads
        self.tie, self.scale_logits = tie, scale_logits


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.att_proj, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up_proj, self.ff_proj = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.ff_out = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.att_proj(self.attn_norm(x)).chunk(3, -1))
        x = x + self.attn_out(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


def seen(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()[:, None, None]


class Start(PreTrainedModel):
    config_class = DecoderConfig

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.hidden_size),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.layers)),
                "ln_f": nn.RMSNorm(config.hidden_size),
            }
        )
        if not config.tie:
            self.transformer["ff_out"] = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.transformer.wte(input_ids)
        for block in self.transformer.blocks:
            x = block(x, seen(attention_mask))
        x = self.transformer.ln_f(x)
        logits = F.linear(x, self.transformer.wte.weight) if self.config.tie else self.transformer.ff_out(x)
        if self.config.scale_logits:
            logits.mul_(self.config.hidden_size**-0.5)
        return CausalLMOutputWithPast(logits=logits)


class LLaDA(Start):
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        outputs = self.model.forward(input_ids, attention_mask)
        return CausalLMOutputWithPast(logits=outputs.logits) if return_dict is not False else (outputs.logits,)

    def get_output_embeddings(self):
        return self.model.transformer.wte if self.config.tie else self.model.transformer.ff_out


class DreamModel(Start):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, seen(attention_mask))
        return BaseModelOutput(last_hidden_state=self.norm(x))


class Dream(Start):
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        config.tie_word_embeddings = config.tie
        super().__init__(config)
        self.model = DreamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **loss_kwargs):
        outputs = self.model(input_ids, attention_mask=attention_mask)
        logits = self.lm_head(outputs[0])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **loss_kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def get_output_embeddings(self):
        return self.lm_head

    def get_input_embeddings(self):
        return self.model.embed_tokens


def decoder(kind, seed=0, **options):
    """A LLaDA or Dream with seeded weights."""
    torch.manual_seed(seed)
    return kind(DecoderConfig(**options))
