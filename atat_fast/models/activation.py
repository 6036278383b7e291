"""squared_relu: relu(x)^2 (So et al., Primer, arXiv 2109.08668), with fewer passes over memory than autograd's.

PyTorch's own steps differentiate a power and a ReLU in turn: six passes over memory, each into new memory. Here are three: two
forward, and one for the gradient 2 relu(x) g, which is 0 where relu(x) is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atat_fast.ops.registry import intercepted, transformed


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 of a floating-point x, in its shape and dtype. Value and gradient are those of `F.relu(x).square()`,
    for a finite upstream gradient.

    Differentiable in every mode and order. torch.compile gets PyTorch's steps, which it fuses with their neighbours.
    """
    if torch.compiler.is_compiling() or intercepted() or transformed():
        return F.relu(x).square()
    return _SquaredReLU.apply(x)[0]  # type: ignore[no-any-return]


class _SquaredReLU(torch.autograd.Function):
    """x to relu(x)^2 and relu(x). The second is an output so that the gradient, which is made of it, can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        root = F.relu(x)
        ctx.save_for_backward(root)
        ctx.set_materialize_grads(False)
        return root * root, root

    @staticmethod
    def backward(ctx: Any, of_square: Tensor | None, of_root: Tensor | None) -> Tensor | None:
        (root,) = ctx.saved_tensors
        gradient = None if of_square is None else torch.addcmul(root.new_zeros(()), of_square, root, value=2)
        if of_root is not None:  # in a second derivative
            masked = of_root * (root > 0)
            gradient = masked if gradient is None else gradient + masked
        return gradient
