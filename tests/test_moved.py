"""Old module names import until the next release."""

from __future__ import annotations

import importlib

import pytest

ALL = """
import importlib, warnings
from atat_fast.moved import MOVED

for old, new in MOVED.items():
    module = importlib.import_module(f"atat_fast.{new}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        package, _, name = f"atat_fast.{old}".rpartition(".")
        exec(f"from {package} import {name} as found")
    assert found is module and module.__spec__.name == module.__name__ == f"atat_fast.{new}", old
    assert [str(w.message).split(";")[0] for w in caught] == [f"atat_fast.{old} is now atat_fast.{new}"], old
"""


def test_every_old_name_is_the_new_module_and_warns(python):
    done = python("-c", ALL)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_still_an_error():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("atat_fast.training.nothing")
