"""Compiles kernels for GPUs that are not here, and reads what they need: registers, spills, shared memory.

`python tests/aot/resources.py` writes what it measures into budgets.json, the table that tests hold kernels to.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = Path(__file__).with_name("budgets.json")


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes of local memory a thread (what spills), bytes of shared memory a CTA."""

    registers: int
    spilled: int
    shared: int


def read_report(report: str) -> dict[str, Resources]:
    """What `ptxas -v` says of each kernel, by its mangled name."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        (stack,) = map(int, re.findall(r"(\d+) bytes stack frame", part))
        (registers,) = map(int, re.findall(r"Used (\d+) registers", part))
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Resources(registers, stack, int(shared[1]) if shared else 0)
    return found


def compile_triton(case, capability: int) -> Resources:
    """`case` of cases.Triton for one capability, as Triton would compile it there. Needs no driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels decorated under TRITON_INTERPRET=1 cannot be compiled"
    function = getattr(importlib.import_module(f"atat_fast.kernels.{case.module}"), case.function)
    signature = {name: case.types.get(name, "constexpr") for name in function.arg_names}
    missing = [name for name, kind in signature.items() if kind == "constexpr" and name not in case.constants]
    assert not missing, f"{case.name} gives neither a type nor a value for {', '.join(missing)}"
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in case.divisible
    }
    source = ASTSource(function, signature, case.constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared)


def compile_cuda(case, capability: int) -> dict[str, Resources]:
    """Every kernel of one source of csrc/, by its name with template arguments; shared memory includes what a launch asks for."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(shutil.which("nvcc")), "-O3", "-std=c++17", "-isystem", str(torch / "include"), "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin",
            str(ROOT / "csrc" / case.source), "-o", str(Path(folder, "kernel.cubin")),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = {}
    for mangled, resources in read_report(done.stderr).items():
        plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
        name = re.sub(r"\(.*|void |\(anonymous namespace\)::|atat_fast::", "", plain.replace("(anonymous namespace)::", ""))
        dynamic = case.dynamic_shared.get(name.split("<")[0], 0)
        found[f"{case.source}/{name}"] = Resources(resources.registers, resources.spilled, resources.shared + dynamic)
    return found


def measure() -> Iterator[tuple[str, int, Resources]]:
    """Everything in cases.py: name, capability, resources."""
    from cases import CUDA, TARGETS, TRITON

    for capability in TARGETS:
        for source in CUDA:
            for name, resources in compile_cuda(source, capability).items():
                yield name, capability, resources
        for group in TRITON:
            for case in group():
                yield case.name, capability, compile_triton(case, capability)


def main() -> None:
    """Write budgets.json."""
    import triton

    table: dict[str, dict[str, int]] = {}
    for name, capability, resources in measure():
        print(f"{name:<55} sm_{capability} {resources}", flush=True)
        table.setdefault(name, {})[f"sm_{capability}"] = resources.registers
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    tools = {"triton": triton.__version__, "nvcc": re.search(r"V([\d.]+)", nvcc)[1]}
    BUDGETS.write_text(json.dumps({"made_with": tools, "registers": dict(sorted(table.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
