"""Fused ops for masked-diffusion models. Each computes what a few lines of plain PyTorch would; see its docstring.

Each op is one file or folder here: its contract, its specification (`*_reference`), its registration as
`torch.ops.atat_fast.*`, and its cost in bytes and floating-point operations (`*_cost`).
"""

from atat_fast.ops.adaptive_norm import (
    adaptive_layer_norm,
    adaptive_layer_norm_cost,
    adaptive_layer_norm_reference,
    gated_residual_norm,
    gated_residual_norm_cost,
    gated_residual_norm_reference,
)
from atat_fast.ops.attention import (
    Documents,
    adaptive_attention,
    attention,
    attention_cost,
    attention_reference,
    document_layout,
    documents_of,
    explain_attention,
    self_attention,
)
from atat_fast.ops.linear_categorical import linear_categorical, linear_categorical_cost, linear_categorical_reference
from atat_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_cost, linear_cross_entropy_reference
from atat_fast.ops.masking import mask_tokens, mask_tokens_cost
from atat_fast.ops.registry import Cost
from atat_fast.ops.rotary import rotary, rotary_cost, rotary_reference, rotary_split, rotary_table

__all__ = [
    "Cost",
    "Documents",
    "adaptive_attention",
    "adaptive_layer_norm",
    "adaptive_layer_norm_cost",
    "adaptive_layer_norm_reference",
    "attention",
    "attention_cost",
    "attention_reference",
    "document_layout",
    "documents_of",
    "explain_attention",
    "gated_residual_norm",
    "gated_residual_norm_cost",
    "gated_residual_norm_reference",
    "linear_categorical",
    "linear_categorical_cost",
    "linear_categorical_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_cost",
    "linear_cross_entropy_reference",
    "mask_tokens",
    "mask_tokens_cost",
    "rotary",
    "rotary_cost",
    "rotary_reference",
    "rotary_split",
    "rotary_table",
    "self_attention",
]
