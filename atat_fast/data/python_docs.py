"""The embedded corpus: the prose that comes with every Python, so that a first run needs no download.

It has two sources: the topics of `help()` (pydoc_data.topics), and the docstrings of the standard library's modules, classes and
functions, read from the sources with `ast` without importing them. A Python that lacks a part gives fewer documents, never an
error. Each Python version has other text, so compare numbers on this corpus only between runs of one Python; the provenance
holds a digest to tell.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 40  # shorter ones are stubs such as "Return self."
SKIPPED_FOLDERS = {
    *("__pycache__", "lib-dynload", "site-packages", "dist-packages"),  # no sources, or not the standard library's
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"),  # little prose
    *("encodings", "pydoc_data"),  # tables; the topics are read by _topics
}


@functools.lru_cache(maxsize=1)
def documents() -> tuple[str, ...]:
    """Every document, each text once, in an order that depends only on the Python installation. Takes a few seconds."""
    texts: dict[str, None] = {}
    for text in _topics():
        texts[text] = None
    # Syntax trees are many small objects and leave no cycles behind: garbage collection would cost as much as parsing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in _sources(Path(sysconfig.get_paths()["stdlib"])):
            for text in _docstrings(path):
                texts[text] = None
    finally:
        if collecting:
            gc.enable()
    return tuple(text for text in texts if len(text) >= MIN_CHARACTERS)


def fingerprint() -> dict[str, str]:
    """What the documents depend on, without reading them."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "stdlib": sysconfig.get_paths()["stdlib"],
    }


def provenance() -> dict[str, str]:
    """Where the documents came from, and the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for text in documents():
        digest.update(text.encode() + b"\0")
    return {
        "source": "pydoc topics and standard-library docstrings",
        "python": fingerprint()["python"],
        "sha256": digest.hexdigest(),
    }


def _topics() -> Iterator[str]:
    try:
        topics = dict(importlib.import_module("pydoc_data.topics").topics)
    except (ImportError, AttributeError):
        return
    for name in sorted(topics):
        yield _printable(inspect.cleandoc(topics[name]))


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources warn about escapes such as "\d"
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    # Only statements hold definitions: leaving expressions out makes this several times faster than ast.walk.
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield _printable(text)
        inner = [child for name in ("body", "orelse", "handlers", "finalbody") for child in getattr(node, name, ())]
        waiting.extend(child for child in reversed(inner) if hasattr(child, "body"))


def _printable(text: str) -> str:
    """`text` without lone surrogates: a few docstrings show them as examples, and UTF-8 cannot hold them."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()
