"""The build step of ``prefect.yaml``: what the environment says, checked.

Prefect puts an empty text where a variable of the environment is unset; a deployment would be made that cannot run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flows.server_settings import FLOW_SETTINGS
from mover.errors import ConfigError
from mover.settings_rules import PATH, choice

__all__ = ["PREFECT_FILE", "runtime"]

PREFECT_FILE: Final = "prefect.yaml"

_VARIABLE = re.compile(r"\{\{\s*\$([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_TYPE = choice("docker", "process")
_ORIGIN: Final = "environment"


def runtime(prefect_file: str = PREFECT_FILE, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a flow run is started with, under the names that ``prefect.yaml`` uses.

    Args:
        prefect_file: every variable that it names has to be set.
        environ: None: the process's own environment.

    Raises:
        ConfigError: a variable is unset, empty or not allowed.
    """
    env = os.environ if environ is None else environ
    for name in _VARIABLE.findall(Path(prefect_file).read_text(encoding="utf-8")):
        _required(env, name)
    kind = _TYPE.parse("WORK_POOL_TYPE", env.get("WORK_POOL_TYPE", "docker"), _ORIGIN)
    directory = PATH.parse("FLOWS_DIRECTORY", _required(env, "FLOWS_DIRECTORY"), _ORIGIN)
    outputs: dict[str, Any] = {"directory": str(directory), "env": dict(FLOW_SETTINGS)}
    if kind == "docker":
        outputs["image"] = _required(env, "RUNTIME_IMAGE")
        outputs["volumes"] = _list(env, "RUNTIME_VOLUMES")
        outputs["networks"] = _list(env, "RUNTIME_NETWORKS")
    return outputs


def _required(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise ConfigError(name, environ.get(name), "a value that is not empty; the deployments need it", _ORIGIN)
    return value


def _list(environ: Mapping[str, str], name: str) -> list[str]:
    parts = [part.strip() for part in _required(environ, name).split(",")]
    if not all(parts):
        raise ConfigError(name, environ[name], "texts separated by commas, none of them empty", _ORIGIN)
    return parts
