"""One library serves torch 2.11 and newer: it asks of torch only what 2.11's stable C interface provides.

torch-2.11-symbols.txt lists the names beginning with aoti_torch_ or torch_ that torch 2.11.0's own libraries define (nm -D).
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atat_fast.ops import library

PROVIDED = set((Path(__file__).parent / "torch-2.11-symbols.txt").read_text().split())


def asked(*command):
    """What a program says of the built library."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on PATH")
    path = Path(library.__file__).resolve().parents[1] / "libatat_fast.so"
    if not path.is_file():
        pytest.skip("the compiled library is not built here")
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


def test_it_names_libtorch_as_needed():
    """Through it the CUDA half of torch is found, which says what stream to launch on; beside a CPU torch a linker drops it."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", asked("readelf", "-d"))
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libpython", "libtorch_cuda"))]


def test_it_asks_torch_for_what_2_11_provides_and_for_nothing_in_cplusplus_or_python():
    names = {line.split()[-1].split("@")[0] for line in asked("nm", "-D", "--undefined-only").splitlines()}
    found = {name for name in names if re.match(r"(aoti_)?torch_", name)}
    assert len(found) > 20, "the library should speak to torch through its stable interface"
    assert found <= PROVIDED, f"torch 2.11 does not provide {sorted(found - PROVIDED)}"
    assert not [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)|_?Py", name)]


def test_loops_of_every_cpu_op_are_compiled_for_avx2_and_avx512():
    """Without ATAT_FAST_VECTORISED's clones a loop still works, and no other test sees that it is slower."""
    cloned = {level: re.findall(rf"(\S+)\.arch_x86_64_{level}$", asked("nm"), re.MULTILINE) for level in ("v3", "v4")}
    if not any(cloned.values()):
        pytest.skip("the library is stripped, or was not built by g++ for x86-64 with glibc")
    for loop in ("fill_words", "exponentials", "forward_rows", "turn_row", "fill_noise"):
        assert all(any(loop in name for name in names) for names in cloned.values()), f"{loop} has no clones"
