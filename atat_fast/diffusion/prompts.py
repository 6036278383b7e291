"""Rows of a prompt and a response: which tokens may be hidden, and the settings they go with.

A row is a sequence of its own: prompt, response, an end of document, then ends of document as padding. Attention stays inside
documents, so padding is not seen. Only tokens of the response and its end are hidden, and counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atat_fast.config import Config
from atat_fast.errors import UsageError


def frozen_of(extents: Tensor, length: int) -> Tensor:
    """[B, L] bool: tokens that are never hidden. extents [B, 2] int64: where the responses begin and end."""
    place = torch.arange(length)
    return (place < extents[:, :1]) | (place >= extents[:, 1:])


def check_prompts(config: Config) -> None:
    """Raise UsageError for settings that rows of prompts and responses do not go with."""
    if config.data.prompt_column is None:
        return
    diffusion, column = config.diffusion, config.data.prompt_column
    if not config.model.document_mask:
        raise UsageError(
            f"data.prompt_column {column!r} makes sequences that are padded, and attention must not see the padding; "
            "set model.document_mask true"
        )
    for name, value, needed in (
        ("importance.source", config.importance.source, "none"),
        ("diffusion.schedule", diffusion.schedule, "log_linear"),
        ("diffusion.mirror", str(diffusion.mirror).lower(), "false"),
    ):
        if value != needed:
            raise UsageError(f"{name} {value} is not made for prompts and responses (data.prompt_column); set {name} {needed}")
    if diffusion.counts == "learned":
        raise UsageError(
            "diffusion.counts learned follows one length, and responses have many (data.prompt_column); use uniform or bell"
        )
