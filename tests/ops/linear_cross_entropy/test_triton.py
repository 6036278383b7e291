"""The Triton kernel of column sums by itself, in Triton's interpreter. The laws of a row are in test_row_pass.py."""

from __future__ import annotations

import pytest
import torch
from op_checks import dtypes, interpreted

pytestmark = interpreted


@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (64, 300), (131, 513), (1000, 7)])
def test_column_sums_with_one_split_of_the_rows_and_with_several(dtype, rows, columns):
    from atat_fast.kernels.cross_entropy import sum_columns

    slab = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    start = torch.randn(columns)
    sums = start.clone()
    sum_columns(slab, sums)
    torch.testing.assert_close(sums.double(), start.double() + slab.double().sum(0), rtol=1e-5, atol=1e-4)
