"""The settings of a flow run: environment, Prefect Variables and Secret blocks, TOML file, defaults, in this order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from prefect.blocks.system import Secret as SecretBlock
from prefect.client.orchestration import get_client

from mover.settings import Settings, load_settings, setting_names
from mover.settings_rules import Secret

__all__ = ["SECRET_BLOCKS", "read_settings", "read_variables"]

SECRET_BLOCKS: Final[Mapping[str, str]] = {
    "MINIO_USER": "minio-user",
    "MINIO_PASSWORD": "minio-password",
    "SCICAT_USER": "scicat-user",
    "SCICAT_PASSWORD": "scicat-password",
}
"""Settings whose values are kept in Secret blocks, and the blocks' names."""

_MOST_VARIABLES: Final = 200  # in one request, the server's own bound


async def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The effective settings of this run.

    Raises:
        ConfigError: an unknown name, a value that is not allowed, or a file that cannot be read.
    """
    env = os.environ if environ is None else environ
    variables = await read_variables()
    for name, block in SECRET_BLOCKS.items():
        if name not in env and f"{name}_FILE" not in env:
            value = await _secret(block)
            if value is not None:
                variables[name.lower()] = value
    return load_settings(environ=env, variables=variables)


async def read_variables() -> dict[str, Any]:
    """The Prefect Variables that are settings of ours; others on the server are somebody else's."""
    ours = {name.lower() for name in setting_names()}
    async with get_client() as client:
        found = await client.read_variables(limit=_MOST_VARIABLES)
        if len(found) == _MOST_VARIABLES:  # more than one page: ask for ours by name
            asked = [await client.read_variable_by_name(name) for name in sorted(ours)]
            found = [variable for variable in asked if variable is not None]
    return {variable.name: variable.value for variable in found if variable.name in ours}


async def _secret(block: str) -> Secret | None:
    """What a Secret block holds; None when there is no such block."""
    try:
        loaded: SecretBlock[Any] = await SecretBlock.aload(block)
    except ValueError:
        return None
    return Secret(str(loaded.get()))
