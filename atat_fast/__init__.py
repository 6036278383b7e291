"""Masked-diffusion language models, trained, evaluated and sampled fast on the GPUs people own.

``atat_fast.ops`` holds the fused ops with plain PyTorch semantics; ``python -m atat_fast.train`` trains a model.
Importing this package imports nothing else: torch comes with the module that needs it.
"""

__version__ = "0.1.0"
