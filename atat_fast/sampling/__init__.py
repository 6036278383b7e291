"""Drawing text: `samplers.py` is the loop; choosing positions, drawing tokens and remasking have files of their own."""

from atat_fast.sampling.samplers import sample

__all__ = ["sample"]
