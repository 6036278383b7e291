"""Looks for circles of imports between files of atat_fast and kernels, and fails if there is one.

    python tests/packaging/import_circles.py

Every import counts: at the top of a file, inside a function, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"atat_fast": "atat_fast", "kernels": "atat_fast.kernels"}
"""Folders of the repository and the packages they are installed as."""


def modules(root: Path) -> dict[str, Path]:
    """Every module's name and file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + (path.name == "__init__.py")]
            source = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:  # a.b.function is of module a.b
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def circle(root: Path) -> list[str]:
    """The modules of one circle, in order; empty if there is none."""
    known = modules(root)
    try:
        TopologicalSorter({name: set(imported(name, path, known)) for name, path in known.items()}).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


if __name__ == "__main__":
    found = circle(ROOT)
    print(f"a circle of imports: {' -> '.join(found)}" if found else f"no circle of imports among {len(modules(ROOT))} files")
    sys.exit(bool(found))
