"""Deploying to a real Prefect server: from the project's own ``prefect.yaml``, and to a worker that runs the flow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment

from flows.deploy import RECONCILIATION, DeploymentError, deploy
from flows.deploy_steps import PREFECT_FILE, runtime
from flows.server_settings import FLOW_SETTINGS
from mover.errors import ConfigError
from tests.prefect_servers import PrefectServer, PrefectWorker

pytestmark = [
    pytest.mark.anyio,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parent.parent
FILE = ROOT / PREFECT_FILE
POOLS = {"ARCHIVAL_WORK_POOL": "deploy-archival", "RETRIEVAL_WORK_POOL": "deploy-retrieval"}
PROCESS = {**POOLS, "WORK_POOL_TYPE": "process", "FLOWS_DIRECTORY": str(ROOT)}
DOCKER = {
    **POOLS,
    "FLOWS_DIRECTORY": "/opt/mover",
    "RUNTIME_IMAGE": "mover-runtime:1",
    "RUNTIME_VOLUMES": "lts:/mnt/lts, /srv/secrets:/run/secrets:ro",
    "RUNTIME_NETWORKS": "mover",
}
ENTRYPOINTS = {
    "datasets_archival": ("flows/archive.py:archive_datasetlist", "deploy-archival"),
    "datasets_retrieval": ("flows/retrieve.py:retrieve_datasetlist", "deploy-retrieval"),
    "dataset_creation": ("flows/create_test_dataset.py:create_test_dataset", "deploy-archival"),
    "end_to_end_test": ("flows/end_to_end_test.py:end_to_end_test", "deploy-archival"),
    "reconciliation": ("flows/reconcile.py:reconcile", "deploy-retrieval"),
}
STUB = """
import os
from prefect import flow

@flow
def told(path: str) -> None:
    with open(path, "w") as out:
        out.write(os.getcwd() + " " + os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
"""
STUB_FILE = """
build: [{flows.deploy_steps.runtime: {id: runtime}}]
pull: [{prefect.deployments.steps.set_working_directory: {directory: "{{ runtime.directory }}"}}]
deployments:
  - name: stub
    entrypoint: stub.py:told
    work_pool:
      name: "{{ $ARCHIVAL_WORK_POOL }}"
      job_variables: {env: "{{ runtime.env }}", image: "{{ runtime.image }}", volumes: "{{ runtime.volumes }}"}
"""


@pytest.fixture
async def client(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PrefectClient]:
    """A client of the server, which has the two work pools; what was deployed is gone afterwards."""
    for name, value in {**prefect_server.environ, **PROCESS, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    with prefect_server.client_settings():
        async with get_client() as client:
            for pool in POOLS.values():
                await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            yield client
            for deployment in await client.read_deployments():
                if deployment.work_pool_name in POOLS.values():
                    await client.delete_deployment(deployment.id)
            for pool in POOLS.values():
                await client.delete_work_pool(pool)


@pytest.mark.slow
async def test_the_project_deploys_all_flows_and_a_second_time_changes_nothing(client: PrefectClient) -> None:
    lines = await deploy(FILE)
    assert lines[-1] == "started    flow run reconcile at deployment"
    first = {item.name: item for item in await client.read_deployments() if item.name in ENTRYPOINTS}
    assert {name: (item.entrypoint, item.work_pool_name) for name, item in first.items()} == ENTRYPOINTS
    for item in first.values():
        assert item.job_variables == {"env": dict(FLOW_SETTINGS)}
        assert item.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    schedule = first["reconciliation"].schedules[0].schedule
    assert schedule.model_dump()["interval"].total_seconds() == 300
    lines = await deploy(FILE)
    assert lines[-1].startswith("unchanged")
    second = {item.name: item.id for item in await client.read_deployments() if item.name in ENTRYPOINTS}
    assert second == {name: item.id for name, item in first.items()}


@pytest.mark.slow
async def test_the_server_makes_runs_of_the_schedule(client: PrefectClient) -> None:
    await deploy(FILE)
    reconciliation = next(item for item in await client.read_deployments() if item.name == RECONCILIATION)
    theirs = DeploymentFilter(id=DeploymentFilterId(any_=[reconciliation.id]))
    runs: list[FlowRun] = []
    with anyio.fail_after(90):  # the server looks at new schedules every few seconds
        while not runs:
            await anyio.sleep(0.5)
            runs = [run for run in await client.read_flow_runs(deployment_filter=theirs) if run.auto_scheduled]
    times = sorted(run.expected_start_time for run in runs if run.expected_start_time is not None)
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(times)} == {300}


@pytest.mark.parametrize("name", ["ARCHIVAL_WORK_POOL", "FLOWS_DIRECTORY"])
@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.slow
async def test_prefect_itself_deploys_nothing_while_a_variable_is_unset(
    client: PrefectClient,
    prefect_server: PrefectServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str | None,
) -> None:
    monkeypatch.delenv(name)
    environ = {key: text for key, text in {**PROCESS, name: value}.items() if text is not None}
    options = ("--no-prompt", "deploy", "--all", "--prefect-file", PREFECT_FILE)
    done = await anyio.to_thread.run_sync(lambda: prefect_server.run("-m", "prefect", *options, environ=environ))
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert name in said or "work pool is required" in said or "references work pool ''" in said, said
    assert [item.name for item in await client.read_deployments() if item.name in ENTRYPOINTS] == []


@pytest.mark.slow
async def test_a_pool_that_does_not_exist_is_told(client: PrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIVAL_WORK_POOL", "nowhere")
    with pytest.raises(DeploymentError, match=r"(?s)nowhere.*does not\s+exist"):
        await deploy(FILE)
    assert [item.name for item in await client.read_deployments() if item.name in ENTRYPOINTS] == []


@pytest.mark.slow
async def test_a_worker_runs_what_was_deployed_in_its_folder_and_environment(
    client: PrefectClient, prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    (tmp_path / PREFECT_FILE).write_text(STUB_FILE, encoding="utf-8")
    monkeypatch.setenv("FLOWS_DIRECTORY", str(tmp_path))
    await deploy(tmp_path / PREFECT_FILE)
    worker = PrefectWorker(prefect_server, "deploy-archival")
    await anyio.to_thread.run_sync(worker.start)
    try:
        run = await arun_deployment(
            "told/stub", parameters={"path": str(tmp_path / "told")}, timeout=90, poll_interval=1
        )
    finally:
        await anyio.to_thread.run_sync(worker.stop)
    assert run.state is not None
    assert run.state.is_completed(), worker.log.read_text(encoding="utf-8")[-3000:]
    assert (tmp_path / "told").read_text(encoding="utf-8") == f"{tmp_path} 30"
    assert len(await client.read_deployments()) >= 1


# ------------------------------------------------------------------------------------------------- the build step
def test_runtime_containers_get_image_volumes_and_networks() -> None:
    assert runtime(str(FILE), DOCKER) == {
        "directory": "/opt/mover",
        "env": dict(FLOW_SETTINGS),
        "image": "mover-runtime:1",
        "volumes": ["lts:/mnt/lts", "/srv/secrets:/run/secrets:ro"],
        "networks": ["mover"],
    }


@pytest.mark.parametrize("name", DOCKER)
@pytest.mark.parametrize("value", [None, "", "  "])
def test_the_build_step_refuses_what_is_unset_or_empty(name: str, value: str | None) -> None:
    environ = {key: text for key, text in {**DOCKER, name: value}.items() if text is not None}
    with pytest.raises(ConfigError, match=name):
        runtime(str(FILE), environ)


def test_the_build_step_refuses_every_variable_that_the_file_names(tmp_path: Path) -> None:
    file = tmp_path / PREFECT_FILE
    file.write_text('deployments: [{name: "{{ $OF_THE_FACILITY }}"}]', encoding="utf-8")
    with pytest.raises(ConfigError, match="OF_THE_FACILITY=None"):
        runtime(str(file), DOCKER)


@pytest.mark.parametrize(
    ("name", "value"),
    [("FLOWS_DIRECTORY", "flows"), ("WORK_POOL_TYPE", "kubernetes"), ("RUNTIME_VOLUMES", "a:/a,,b:/b")],
)
def test_the_build_step_refuses_what_is_not_allowed(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        runtime(str(FILE), {**DOCKER, name: value})
