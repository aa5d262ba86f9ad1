"""Where flow runs of the deployment work: on a second worker host, and with the mounts of production."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deployment_moves import MIB, Facility
from tests.deployment_witness import Witness
from tests.deployments import Deployment, docker

pytestmark = [pytest.mark.docker]

_SIZES = {"frames/1.tif": MIB, "frames/2.tif": 3}
_USER = 1000  # MOVER_UID, MOVER_GID
_FILES = (".env", ".development.env", "compose.yaml", "docker", ".secrets/prefectauth.txt")
_WORKERS = ("prefect-archival-worker", "prefect-retrieval-worker")
# Both are projects of one engine: what a second engine has under the same names is the first project's here.
_SHARED = """
volumes:
  lts-mock-volume: !override {{ external: true, name: {project}_lts-mock-volume }}
  scratch: !override {{ external: true, name: {project}_scratch }}
  runtime-secrets: !override {{ external: true, name: {project}_runtime-secrets }}
"""


@contextmanager
def second_host(first: Deployment, folder: Path) -> Iterator[Deployment]:
    """A host with the files that the README names, whose workers reach the first one through its reverse proxy."""
    (folder / ".secrets").mkdir(parents=True)
    for name in _FILES:
        source, target = first.folder / name, folder / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    os.chown(folder / ".secrets" / "prefectauth.txt", _USER, _USER)
    (folder / "compose.override.yaml").write_text(_SHARED.format(project=first.project), encoding="utf-8")
    second = Deployment(folder, f"{first.project}-second")
    second.environ |= {
        "MOVER_TAG": first.project,
        "PREFECT_API_URL": "http://reverse-proxy:8080/prefect-ui/api",
    }
    proxy = first.container("reverse-proxy")
    try:
        second.compose("up", "-d", *_WORKERS)
        docker("network", "connect", "--alias", "reverse-proxy", second.network, proxy)
        second.wait_until_healthy(*_WORKERS)
        yield second
    finally:
        docker("network", "disconnect", second.network, proxy, check=False)
        second.down("-v")  # not those of the first


def test_a_second_worker_host_takes_the_runs_while_the_first_ones_worker_is_away(
    docker_deployment: Deployment, tmp_path: Path
) -> None:
    facility, dataset_id = Facility(docker_deployment), f"20.500.11935/{uuid.uuid4()}"
    with second_host(docker_deployment, tmp_path / "second") as second:
        docker_deployment.compose("stop", _WORKERS[0])
        try:
            files = facility.add_dataset(dataset_id, _SIZES)
            job_id = facility.order("archive", [dataset_id])
            facility.wait_for_end(job_id)
        finally:
            docker_deployment.compose("start", _WORKERS[0])
        said = docker("logs", second.container(_WORKERS[0]))
    assert facility.states(job_id) == ["Completed"]
    facility.expect_archived(job_id, files, dataset_id)
    assert facility.runs(job_id)[0]["id"] in said
    docker_deployment.wait_until_healthy(_WORKERS[0])


@contextmanager
def production(deployment: Deployment, scratch: Path) -> Iterator[None]:
    """Flow runs that begin in this block are started as in production, but for the share, which is no NFS mount."""
    scratch.mkdir()
    os.chown(scratch, _USER, _USER)
    values = {"JOB_TEMPLATE": "production", "LTS_VOLUME_MODE": ":nocopy", "SCRATCH_FOLDER": str(scratch)}
    try:
        for service in ("prefect-config", "prefect-flows-deployment"):
            deployment.compose("run", "--rm", service, environ=values)
        yield
    finally:
        for service in ("prefect-config", "prefect-flows-deployment"):
            deployment.compose("run", "--rm", service)


def test_in_production_a_runtime_container_mounts_the_share_and_the_hosts_folder_and_nothing_else(
    docker_deployment: Deployment, tmp_path: Path
) -> None:
    facility, dataset_id = Facility(docker_deployment), f"20.500.11935/{uuid.uuid4()}"
    scratch, project = tmp_path / "scratch", docker_deployment.project
    with production(docker_deployment, scratch), Witness(docker_deployment) as witness:
        files = facility.add_dataset(dataset_id, _SIZES)
        job_id = facility.order("archive", [dataset_id])
        facility.wait_for_end(job_id)
    run_id = facility.runs(job_id)[0]["id"]
    labels = {runtime.facts["Config"]["Labels"]["io.prefect.flow-run-id"]: runtime.facts for runtime in witness.found}
    mounts = {
        (mount["Destination"], mount.get("Name") or mount["Source"], mount["RW"]) for mount in labels[run_id]["Mounts"]
    }
    assert mounts == {
        ("/tmp/LTS", f"{project}_lts-mock-volume", True),
        ("/tmp/scratch", str(scratch), True),
        ("/run/mover", f"{project}_runtime-secrets", False),
    }
    assert [mount["VolumeOptions"] for mount in labels[run_id]["HostConfig"]["Mounts"]] == [{"NoCopy": True}]
    facility.expect_archived(job_id, files, dataset_id)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in scratch.rglob("*")} == {(_USER, _USER)}
