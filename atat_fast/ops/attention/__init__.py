"""Attention: which implementation runs and why (`op.py`); our own backward for short sequences on a CPU (`products.py`)."""

from atat_fast.ops.attention.op import (
    IMPLEMENTATIONS,
    MODULES,
    Documents,
    adaptive_attention,
    attention,
    attention_cost,
    attention_reference,
    choose_attention,
    document_layout,
    documents_of,
    explain_attention,
    self_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "MODULES",
    "Documents",
    "adaptive_attention",
    "attention",
    "attention_cost",
    "attention_reference",
    "choose_attention",
    "document_layout",
    "documents_of",
    "explain_attention",
    "self_attention",
]
