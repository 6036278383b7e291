"""The norm chains of a DiT block: `reference.py` is their specification, `op.py` the ops, `norm.py` and `gated.py` what runs."""

from atat_fast.ops.adaptive_norm.gated import gated_residual_norm_cost
from atat_fast.ops.adaptive_norm.norm import adaptive_layer_norm_cost
from atat_fast.ops.adaptive_norm.op import WIDEST, adaptive_layer_norm, gated_residual_norm
from atat_fast.ops.adaptive_norm.reference import EPS, adaptive_layer_norm_reference, dropout_scale, gated_residual_norm_reference

__all__ = [
    "EPS",
    "WIDEST",
    "adaptive_layer_norm",
    "adaptive_layer_norm_cost",
    "adaptive_layer_norm_reference",
    "dropout_scale",
    "gated_residual_norm",
    "gated_residual_norm_cost",
    "gated_residual_norm_reference",
]
