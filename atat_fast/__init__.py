"""Masked-diffusion language models, trained, evaluated and sampled fast on the GPUs people own.

``atat_fast.ops`` holds the fused ops with plain PyTorch semantics; ``python -m atat_fast.train`` trains a model.
Importing this package does not import torch; the modules that need it do.
``atat_fast.accelerate(model)`` runs an existing model, MDLM's or transformers', on these ops.
"""

from typing import Any

from atat_fast.moved import install
from atat_fast.version import __version__

__all__ = ["__version__", "accelerate"]
install()


def __getattr__(name: str) -> Any:
    if name == "accelerate":
        from atat_fast.models.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
