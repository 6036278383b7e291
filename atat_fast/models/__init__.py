"""The model."""

from atat_fast.models.dit import DiT

__all__ = ["DiT"]
