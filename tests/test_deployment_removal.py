"""Taking the deployment away: the last of its tests, by the names of the modules."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tests.deployment_moves import HELD, Facility, Link
from tests.deployments import Deployment, docker

pytestmark = [pytest.mark.docker]


def left_of(deployment: Deployment) -> dict[str, list[str]]:
    """What the engine still has of a project."""
    label = f"label=com.docker.compose.project={deployment.project}"
    names = {
        "containers": docker("ps", "-aq", "--filter", label),
        "runtime containers": docker("ps", "-aq", "--filter", f"label=org.mover.runtime={deployment.project}"),
        "volumes": docker("volume", "ls", "-q", "--filter", f"name={deployment.project}"),
        "networks": docker("network", "ls", "-q", "--filter", f"name={deployment.project}"),
    }
    return {kind: text.split() for kind, text in names.items()}


def test_down_with_volumes_leaves_nothing_even_while_a_flow_run_works(
    docker_deployment: Deployment, tmp_path: Path
) -> None:
    facility, dataset_id = Facility(docker_deployment), f"20.500.11935/{uuid.uuid4()}"
    link = Link(docker_deployment, tmp_path / "control")
    link.set(held=[f"{dataset_id}/raw_files/{part}" for part in HELD], reply_s=2.0)
    facility.set_variable("MINIO_ENDPOINT", link.url)
    facility.add_dataset(dataset_id)
    container = facility.wait_until_held(facility.order("archive", [dataset_id]), dataset_id)
    link.remove()  # not the deployment's own
    assert all(left_of(docker_deployment).values())
    assert container in docker("ps", "-q", "--no-trunc").split()

    docker_deployment.down("-v")

    assert {kind: names for kind, names in left_of(docker_deployment).items() if names} == {}
