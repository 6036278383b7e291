"""`python -m atat_fast.ops`: print the backend that each op uses on this machine, and why."""

from __future__ import annotations

import os

import torch

import atat_fast.ops  # noqa: F401  (states every op's backends)
from atat_fast.ops import library, processor, registry
from atat_fast.ops.attention import choose_attention, explain_attention


def table(device: torch.device) -> list[str]:
    """For each op, one line with the backend that runs and those that could, then a line for each that cannot, and why."""
    lines: list[str] = []
    for op in registry.ops():
        reasons = registry.explain(op, device)
        chosen = registry.choose_backend(op, device)
        ready = [name for name, reason in reasons.items() if reason is None and name != chosen]
        lines.append(f"  {op:<22} {chosen:<7} {('also ' + ', '.join(ready)) if ready else ''}".rstrip())
        lines += [f"  {'':<22} {'not ' + name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return lines


def attention_lines(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> list[str]:
    """The implementation that attention calls, without and with document boundaries, and why each other one cannot run."""
    lines: list[str] = []
    for documents in (False, True):
        reasons = explain_attention(device, dtype, head_dim, documents=documents)
        try:
            chosen = choose_attention(device, dtype, head_dim, documents)
        except ValueError as error:  # $ATAT_FAST_ATTENTION names one that cannot run
            return [*lines, f"  {'attention':<22} none: {error}"]
        ready = [name for name, reason in reasons.items() if reason is None and name != chosen]
        what = "within documents" if documents else f"head dimension {head_dim}"
        title = f"{what}, {str(dtype).removeprefix('torch.')}: {chosen}"
        lines.append(f"  {'' if documents else 'attention':<22} {title}{', also ' + ', '.join(ready) if ready else ''}")
        lines += [f"  {'':<22} {'not ' + name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return lines


def main() -> None:
    """Print the table of the CPU and of the current GPU."""
    flags = library.build_flags()
    built = ["CPU ops"] * bool(flags & library.CPU_OPS)
    built += [f"CUDA kernels for {library.describe_targets()}"] * bool(flags & library.CUDA_KERNELS)
    print(f"compiled library: {library.problem() or '; '.join(built)}")
    print(f"bf16 products on this CPU: {processor.bf16_products()}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    else:
        print("GPU: torch finds none; backends for a GPU are not shown")
    for device in devices:
        wanted = os.environ.get("ATAT_FAST_BACKEND")
        first = f"{wanted} if it can run (ATAT_FAST_BACKEND), else first" if wanted else "first"
        print(f"\ntensors on {device}: {first} of {' > '.join(registry.PREFERENCE[device.type])}")
        print("\n".join(table(device)))
        plain, half = device.type == "cpu", processor.multiplies_bf16(device)
        for dtype in (*((torch.float32,) if plain else ()), *((torch.bfloat16,) if half else ())):
            print("\n".join(attention_lines(device, dtype)))


if __name__ == "__main__":
    main()
