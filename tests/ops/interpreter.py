"""Makes bf16 exact in Triton's interpreter, which keeps it in uint16 and would cut it off, or reckon with its bits; and makes it
quicker.

`exact_bf16()` and `quick()` before the first kernel runs; tests/conftest.py does so under TRITON_INTERPRET=1. Arithmetic is done
in fp32 and rounded to the nearest bf16, ties to even, as GPUs do; matrix products of bf16 are summed in fp32.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 in uint16 to fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """fp32 to the nearest bf16 in uint16, ties to even; what is not a number stays so."""
    value = np.ascontiguousarray(value, dtype=np.float32)
    bits = value.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def exact_bf16() -> None:
    """Patch triton.runtime.interpreter.InterpreterBuilder."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    plain_cast, plain_fp, plain_dot, plain_binary = (
        getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op")
    )

    def is_bf16(handle: TensorHandle) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def widened(handle: TensorHandle) -> TensorHandle:
        return TensorHandle(to_fp32(handle.data), tl.float32) if is_bf16(handle) else handle

    def cast(self, source, target, plain, *more):
        if not is_bf16(source) and target.scalar != tl.bfloat16:
            return plain(self, source, target, *more)
        value = widened(source).data
        if target.scalar == tl.bfloat16:
            return TensorHandle(source.data if is_bf16(source) else to_bf16(value), tl.bfloat16)
        return TensorHandle(value.astype(_get_np_dtype(target)), target.scalar)

    def cast_impl(self, source, target):
        return cast(self, source, target, plain_cast)

    def create_fp_to_fp(self, source, target, rounding):
        return cast(self, source, target, plain_fp, rounding)

    def create_dot(self, a, b, accumulator, *more):
        return plain_dot(self, widened(a), widened(b), accumulator, *more)

    def binary_op(self, left, right, operation):
        if not is_bf16(left):
            return plain_binary(self, left, right, operation)
        with np.errstate(all="ignore"):
            value = operation(to_fp32(left.data), to_fp32(right.data))
        return TensorHandle(value, tl.int1) if value.dtype == np.bool_ else TensorHandle(to_bf16(value), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op


def quick() -> None:
    """Patch triton.runtime.interpreter: at each call of a function, from kernels too, where it has replaced them already, it
    looks through all of triton.language for builtins. Here it finds their names once.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin
