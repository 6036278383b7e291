"""The vocabulary head and its cross-entropy in one op.

`reference.py` is the specification, `op.py` the op, `checks.py` its errors, `slabs.py` its loop, `row_pass.py` a slab's pass.
"""

from atat_fast.ops.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_cost
from atat_fast.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_cost", "linear_cross_entropy_reference"]
