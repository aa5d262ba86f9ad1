"""Base job templates of the work pools: how a worker starts a runtime container. ``python -m flows.job_templates``.

The one source of the files in ``docker/job-templates``. What a facility decides is left to variables of the
environment, ``${NAME}``, which ``flows.configure`` fills in; what a deployment of flows decides is left to its job
variables. The rest is fixed, so that no deployment and no run can ask for more: no root, no privileges, no file system
to write to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from flows.server_settings import FLOW_SETTINGS

__all__ = ["FOLDER", "TEMPLATES", "TemplateName", "job_template", "main", "template_text"]

TemplateName = Literal["production", "development"]

FOLDER: Final = Path("docker/job-templates")
TEMPLATES: Final[tuple[TemplateName, ...]] = ("production", "development")

_TMPFS_OPTIONS: Final = "mode=1777,size=512m"
_AUTH_FILE: Final = "/run/mover/prefectauth"  # flows/worker.py writes it


def job_template(name: TemplateName) -> dict[str, Any]:
    """The template: which fields a job may set (``variables``), and all that it is started with."""
    return {
        "job_configuration": {
            **{field: f"{{{{ {field} }}}}" for field in _VARIABLES},
            "env": {
                **FLOW_SETTINGS,
                "PREFECT_HOME": "/tmp/prefect",  # noqa: S108 - in memory, of the container alone
                "PREFECT_API_AUTH_STRING_FILE": _AUTH_FILE,
                # The worker hands its own environment on; the engine would list the secret.
                "PREFECT_API_AUTH_STRING": "",
            },
            "labels": _LABELS,
            "image_pull_policy": _PULL_POLICY[name],
            "auto_remove": True,
            "stream_output": True,  # into the worker's log
            "privileged": False,
            "mem_limit": "${RUNTIME_MEMORY}",
            "memswap_limit": "${RUNTIME_MEMORY}",
            "container_create_kwargs": _CONTAINER,
        },
        "variables": {
            "type": "object",
            "properties": _VARIABLES,
            "required": ["image", "networks", "volumes"],
        },
    }


_LABELS: Final = {
    # To compose a runtime container is a one-off container of a service: `down --remove-orphans` takes it away.
    "com.docker.compose.project": "${RUNTIME_PROJECT}",
    "com.docker.compose.service": "prefect-archival-worker",
    "com.docker.compose.oneoff": "True",
    "com.docker.compose.config-hash": "none",  # without one, compose does not see the container
    "org.mover.runtime": "${RUNTIME_PROJECT}",
}
_CONTAINER: Final = {
    "user": "${RUNTIME_USER}",
    "read_only": True,
    "tmpfs": {"/tmp": _TMPFS_OPTIONS},  # noqa: S108
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    # Not among the volumes, where the mode "nocopy" would be taken for a part of the path. The worker mounts it first,
    # and so decides whether it takes over what the image has there.
    "mounts": [
        {
            "Type": "volume",
            "Source": "${RUNTIME_LTS_VOLUME}",
            "Target": "/tmp/LTS",  # noqa: S108
            "VolumeOptions": {"NoCopy": True},
        },
    ],
    "init": True,
    "pids_limit": 512,
    "log_config": {"type": "json-file", "config": {"max-size": "10m", "max-file": "2"}},
}

# A registry is asked only for what is not there: tags of a release never change. Development images are in no registry.
_PULL_POLICY: Final[dict[TemplateName, str]] = {"production": "IfNotPresent", "development": "Never"}

_TEXTS: Final = {"type": "array", "items": {"type": "string"}}
_VARIABLES: Final[dict[str, Any]] = {
    "command": {
        "title": "Command",
        "type": "string",
        "description": "Runs a flow; best left empty.",
    },
    "env": {
        "title": "Environment",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "More variables for the container. Everybody who may look at the server sees them.",
    },
    "name": {"title": "Name", "type": "string", "description": "Name of the container."},
    "image": {"title": "Image", "type": "string", "description": "Image of the container."},
    "networks": {**_TEXTS, "title": "Networks", "description": "Networks that the container joins."},
    "volumes": {**_TEXTS, "title": "Volumes", "description": "Volumes beside the LTS, as name:/path[:ro]."},
}


def template_text(name: TemplateName) -> str:
    """The file of a template."""
    return json.dumps(job_template(name), indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: writes the files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.job_templates", description="Writes the base job templates.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder: Path = parser.parse_args(arguments).folder
    for name in TEMPLATES:
        path = folder / f"{name}.json"
        path.write_text(template_text(name), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
