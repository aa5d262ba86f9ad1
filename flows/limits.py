"""The documented limits as Prefect keeps them: limits of the tags that the tasks of limited stages carry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from prefect.client.orchestration import get_client

from mover.errors import ConfigError

__all__ = ["LIMIT_TAGS", "limit_name", "read_limits"]

LIMIT_TAGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "LTS_FREE_LIMIT": "wait-for-free-space-in-lts",
        "MOVE_TO_LTS_LIMIT": "move-to-lts",
        "VERIFY_LTS_LIMIT": "verify-lts",
        "LTS_TO_RETRIEVAL_LIMIT": "lts-to-retrieval",
    }
)
"""Tag of the tasks that each documented limit guards."""

_MOST_LIMITS: Final = 200


def limit_name(tag: str) -> str:
    """Name of a tag's limit among the server's global concurrency limits."""
    return f"tag:{tag}"


async def read_limits() -> dict[str, int]:
    """Slots of the four limits on the server, by the documented names.

    Raises:
        ConfigError: one of them does not exist.
    """
    async with get_client() as client:
        found = {limit.name: limit.limit for limit in await client.read_global_concurrency_limits(limit=_MOST_LIMITS)}
    for name, tag in LIMIT_TAGS.items():
        if limit_name(tag) not in found:
            raise ConfigError(name, None, "a limit on the Prefect server; `python -m flows.configure` creates it")
    return {name: found[limit_name(tag)] for name, tag in LIMIT_TAGS.items()}
