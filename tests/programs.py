"""Programs of the system that some tests ask: without one they fail in CI, and are skipped by its name elsewhere."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["needed_program"]


def needed_program(name: str, package: str = "") -> str:
    """Path of a program; ``package``: Debian's, if it has another name."""
    if found := shutil.which(name):
        return found
    missing = f"{name} is not installed (Debian: apt-get install {package or name})"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
