"""Digests of windows and datablocks: xxh3_128, fast enough to hash every byte twice; both calls release the GIL."""

from __future__ import annotations

import xxhash

from mover.streams.interfaces import Buffer

__all__ = ["ALGORITHM", "WindowHash", "digest_of", "labelled"]

ALGORITHM = "xxh3_128"
"""Name of the digest in manifests; https://xxhash.com, the 128-bit variant of XXH3, as lower-case big-endian hex."""

WindowHash = xxhash.xxh3_128
"""An incremental hash: ``update(buffer)``, ``hexdigest()``."""


def digest_of(buffer: Buffer) -> str:
    """Digest of one buffer, lower-case hex."""
    return xxhash.xxh3_128_hexdigest(buffer)


def labelled(hexdigest: str) -> str:
    """The digest as manifests spell it: ``xxh3_128:<hex>``."""
    return f"{ALGORITHM}:{hexdigest}"
