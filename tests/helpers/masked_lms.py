"""Small masked language models of transformers, without dropout, and the decoders of plain_decoders."""

from __future__ import annotations

import torch
import transformers
from plain_decoders import Dream, LLaDA, decoder

VOCABULARY = 97
PAD, MASK = 0, 3
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": MASK}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}

MAKERS = {
    "BERT": lambda **more: _of("Bert", **SIZES, **NO_DROPOUT, **more),
    "BERT, untied": lambda **more: _of("Bert", tie_word_embeddings=False, **SIZES, **NO_DROPOUT, **more),
    "RoBERTa": lambda **more: _of("Roberta", **SIZES, **NO_DROPOUT, **more),
    "DistilBERT": lambda **more: _of("DistilBert", **DISTIL, **more),
    "ModernBERT": lambda **more: _of("ModernBert", **SIZES, **more),
    "EuroBERT": lambda **more: _of("EuroBert", **SIZES, num_key_value_heads=2, **more),
    "LLaDA": lambda **more: decoder(LLaDA, **more),
    "LLaDA, tied": lambda **more: decoder(LLaDA, tie=True, **more),
    "Dream": lambda **more: decoder(Dream, **more),
    "Dream, tied": lambda **more: decoder(Dream, tie=True, **more),
}


def _of(family, **settings):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")
    config = kind(vocab_size=VOCABULARY, initializer_range=0.2, **SPECIAL, **settings)
    return getattr(transformers, f"{family}ForMaskedLM")(config)


def make(name, **settings):
    """A model in training mode, biases and norms not at their zeros and ones."""
    model = MAKERS[name](**settings).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def batch(rows=3, length=11, share=0.3, pads=True):
    """ids, labels and attention mask; the second row ends in padding."""
    ids = torch.randint(4, VOCABULARY, (rows, length))
    labels = torch.where(torch.rand(rows, length) < share, ids, -100)
    mask = torch.ones_like(ids)
    if pads and rows > 1:
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :], labels[1, length // 2 :] = PAD, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
