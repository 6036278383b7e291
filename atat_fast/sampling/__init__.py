"""Drawing text: `samplers.py` is the loop; which positions, which tokens and what is masked again are files of their own."""

from atat_fast.sampling.samplers import sample

__all__ = ["sample"]
