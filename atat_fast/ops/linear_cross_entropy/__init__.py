"""The vocabulary head and its cross-entropy in one op: `op.py`, with its loop in `slabs.py` and the kernel in `row_pass.py`."""

from atat_fast.ops.linear_cross_entropy.op import (
    linear_cross_entropy,
    linear_cross_entropy_cost,
    linear_cross_entropy_reference,
)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_cost", "linear_cross_entropy_reference"]
