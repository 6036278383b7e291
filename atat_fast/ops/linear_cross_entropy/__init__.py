"""The vocabulary head and its cross-entropy in one op.

`reference.py` is its specification, `op.py` the op, `slabs.py` its loop, and `row_pass.py` what happens to one slab of logits.
"""

from atat_fast.ops.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_cost
from atat_fast.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_cost", "linear_cross_entropy_reference"]
