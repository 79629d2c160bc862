"""Skipping what only older packages lack, so that a test can never leave itself out with the tested ones."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version

# The versions that these tests were written with (`.ci/constraints.txt`): from them on nothing may be skipped.
TESTED = {"safetensors": "0.8.0", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"}


def skip_as_older(package: str, lacks: str) -> None:
    """Skip the test, or the file, because the installed package is older; fail if it is not."""
    installed = Version(importlib.metadata.version(package))
    assert installed < Version(TESTED[package]), (
        f"{package} {installed} {lacks}, expected only of versions before {TESTED[package]}: did it change this?"
    )
    pytest.skip(f"{package} {installed} {lacks}", allow_module_level=True)
