"""Moves research datasets between S3 and long-term storage: planned to the byte, hashed on the way, read back."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
