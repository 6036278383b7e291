"""Initial values of a model's parameters one at a time, so that a model can be sharded before it takes memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Values = Iterator[tuple[str, Tensor]]
"""Parameters' names and values."""


def initial_values(module: nn.Module, own: Callable[[], Values]) -> Values:
    """What constructing the module draws: each layer as PyTorch starts it, then the module's own choices, from `own`.

    Layers are drawn in the order in which the module names them, which is the order of its constructor. Parameters of no layer
    start at one.
    """
    shapes = {name: p.shape for name, p in module.named_parameters()}
    with torch.device("meta"):
        chosen = {name for name, _ in own()}
    drawn = set()
    for place, layer in module.named_modules():
        for name, value in _as_started(layer):
            drawn.add(full := f"{place}.{name}")
            if full in shapes and full not in chosen:
                yield full, value
    yield from own()
    yield from ((name, torch.ones(shape)) for name, shape in shapes.items() if name not in drawn | chosen)


def _as_started(layer: nn.Module) -> Values:
    """Parameters of a new layer like this one, which may be on the meta device or sharded; none if it is a container."""
    fresh: nn.Module
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    elif isinstance(layer, nn.Embedding):
        fresh = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    elif isinstance(layer, nn.LayerNorm):
        fresh = nn.LayerNorm(layer.normalized_shape, bias=layer.bias is not None)
    else:
        return
    yield from ((name, p.detach()) for name, p in fresh.named_parameters())
