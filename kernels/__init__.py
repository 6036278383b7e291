"""Triton kernels, one file per op, installed as ``atat_fast.kernels``.

A file here holds ``@triton.jit`` functions and the few lines that launch them. It imports triton and nothing of ours
but ``philox``: no autograd, no ``nn.Module``, no choice of backend. Those live in ``atat_fast.ops``.
"""
