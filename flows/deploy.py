"""Deploys the flows: ``python -m flows.deploy [--prefect-file FILE]``.

Checks the environment, deploys what ``prefect.yaml`` lists, reads the deployments back and starts one reconciliation.
The work pools have to exist: see ``flows.configure``. Exit codes: 0 done; 1 the server does not answer or has something
else than was deployed; 2 the environment is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import anyio
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from flows.configuration_server import connect
from flows.deploy_steps import PREFECT_FILE, runtime
from mover.cli_errors import record_of
from mover.errors import ConfigError, ExitCode, MoverError

__all__ = ["RECONCILIATION", "DeploymentError", "deploy", "main"]

RECONCILIATION: Final = "reconciliation"
"""The deployment that is run once when it is made."""

_TAG: Final = "at-deployment"
_WAITING: Final = [StateType.SCHEDULED, StateType.PENDING]


class DeploymentError(MoverError):
    """Prefect did not deploy, or has another deployment than was meant."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"deployment {name}: {reason}")


async def deploy(prefect_file: Path, *, deadline_s: float = 120.0) -> list[str]:
    """Deploys everything that the file lists; a second time changes nothing.

    Returns:
        Lines that say what is deployed and started.

    Raises:
        ConfigError: the environment or the file is wrong; nothing was deployed.
        DeploymentError: Prefect refuses, or has something else than was deployed.
        PrefectServerError: the server does not answer within ``deadline_s``, or fails.
    """
    file = Path(await anyio.Path(prefect_file).absolute())
    expected = await anyio.to_thread.run_sync(runtime, str(file))
    listed = await anyio.to_thread.run_sync(_deployments, file)
    async with connect(deadline_s) as client:
        await _run_prefect(file)
        lines, deployed = [], {}
        for entry in listed:
            found = await _read_back(client, entry["name"], entry["entrypoint"], expected)
            deployed[entry["name"]] = found.id
            lines.append(f"deployed   {entry['name']}  on {found.work_pool_name}  ({found.entrypoint})")
        if RECONCILIATION in deployed:
            lines.append(await _reconcile_once(client, deployed[RECONCILIATION]))
    return lines


def _deployments(file: Path) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError("--prefect-file", str(file), "a YAML file") from error
    listed = document.get("deployments") if isinstance(document, dict) else None
    if not listed:
        raise ConfigError("--prefect-file", str(file), "a file that lists deployments")
    return list(listed)


async def _run_prefect(file: Path) -> None:
    options = ["--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    command = [sys.executable, "-m", "prefect", *options]
    done = await anyio.run_process(command, check=False, cwd=file.parent, stderr=subprocess.STDOUT)
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip()
        raise DeploymentError("--all", reason)


async def _read_back(client: PrefectClient, name: str, entrypoint: str, expected: dict[str, Any]) -> DeploymentResponse:
    found = [item for item in await client.read_deployments() if item.name == name and item.entrypoint == entrypoint]
    if len(found) != 1:
        reason = f"{len(found)} of {entrypoint} on the server, 1 expected"
        raise DeploymentError(name, reason)
    deployment = found[0]
    pulled = [step for steps in deployment.pull_steps or [] for step in steps.values()]
    facts = {
        "directory": next((step.get("directory") for step in pulled), None),
        **{key: deployment.job_variables.get(key) for key in ("env", "image", "volumes", "networks")},
    }
    for key, value in facts.items():
        if value != expected.get(key):
            reason = f"{key} is {value!r} on the server, {expected.get(key)!r} was deployed"
            raise DeploymentError(name, reason)
    try:
        await client.read_work_pool(deployment.work_pool_name or "")
    except ObjectNotFound as error:
        reason = "has no work pool"
        raise DeploymentError(name, reason) from error
    return deployment


async def _reconcile_once(client: PrefectClient, deployment_id: UUID) -> str:
    """Starts a reconciliation, unless an earlier one of here has not begun yet."""
    waiting = FlowRunFilter.model_validate(
        {
            "deployment_id": {"any_": [deployment_id]},
            "tags": {"all_": [_TAG]},
            "state": {"type": {"any_": _WAITING}},
        }
    )
    runs = await client.read_flow_runs(flow_run_filter=waiting, limit=1)
    if runs:
        return f"unchanged  flow run {runs[0].name} waits for a worker of the work pool"
    run = await client.create_flow_run_from_deployment(deployment_id, name="reconcile at deployment", tags=[_TAG])
    return f"started    flow run {run.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description="Deploys the flows.")
    parser.add_argument("--prefect-file", type=Path, default=Path(PREFECT_FILE), metavar="FILE")
    parser.add_argument("--wait-s", type=float, default=120.0, metavar="S", help="how long to wait for the server")
    options = parser.parse_args(arguments)
    try:
        lines = anyio.run(_deploy, options)
    except OSError as error:
        sys.stderr.write(f"{options.prefect_file}: {error.strerror}\n")
        return int(ExitCode.USAGE)
    except MoverError as error:
        sys.stderr.write(f"{error}\n")
        return record_of(error).exit_code
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return int(ExitCode.DONE)


async def _deploy(options: argparse.Namespace) -> list[str]:
    return await deploy(options.prefect_file, deadline_s=options.wait_s)


if __name__ == "__main__":
    sys.exit(main())
