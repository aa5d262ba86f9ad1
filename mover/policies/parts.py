"""How large the parts of a multipart upload are: few enough for S3, small enough for the memory. No I/O."""

from __future__ import annotations

from typing import Final

from mover.errors import ConfigError

__all__ = ["MAX_PARTS", "MIN_PART_BYTES", "SINGLE_PUT_BYTES", "part_bytes", "require_memory"]

MAX_PARTS: Final = 10_000
"""S3's limit of parts in one upload."""

MIN_PART_BYTES: Final = 8 << 20
"""Every part but the last has at least this; S3 asks for 5 MiB."""

SINGLE_PUT_BYTES: Final = MIN_PART_BYTES
"""Objects up to this size are written in one request."""

_STEP_BYTES: Final = 1 << 20


def part_bytes(size_bytes: int) -> int:
    """The smallest size of parts, in whole MiB, with which an object of ``size_bytes`` has at most ``MAX_PARTS``.

    It follows from the object alone, so that an upload is continued with the parts that it was begun with.
    """
    needed_bytes = -(-size_bytes // MAX_PARTS)
    return max(MIN_PART_BYTES, -(-needed_bytes // _STEP_BYTES) * _STEP_BYTES)


def require_memory(needed_bytes: int, pool_bytes: int) -> None:
    """Refuses an upload whose parts do not fit into the memory that is configured.

    Raises:
        ConfigError: of MOVER_BUFFER_MB, with the least value that would do.
    """
    if needed_bytes > pool_bytes:
        raise ConfigError("MOVER_BUFFER_MB", pool_bytes >> 20, f"at least {-(-needed_bytes // (1 << 20))}")
