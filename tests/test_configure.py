"""Configuring a real Prefect server: written once, compared afterwards, and nothing written when anything is wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_type_hints
from uuid import UUID

import anyio
import pytest
from prefect.blocks.system import Secret as SecretBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.events import Event, Resource
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending, Running
from prefect.variables import Variable

from flows.configuration import Item
from flows.configuration_files import OPTIONAL_BLOCKS, RECONCILER_QUEUE
from flows.configuration_server import ZOMBIES, PrefectServerError, wanted_automations
from flows.configure import configure, main
from flows.limits import read_limits
from flows.settings import SECRET_BLOCKS, read_settings
from mover.errors import ConfigError
from mover.settings import Settings
from tests.prefect_servers import PrefectServer, free_port

pytestmark = [
    pytest.mark.anyio,
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ARCHIVAL, RETRIEVAL = "archival-docker-workpool", "retrieval-docker-workpool"
SAMPLE = Path(__file__).parent.parent / "docker" / "vars.toml"
TOML = (
    '[archiver]\nARCHIVER_TARGET_SIZE_MB = 300\n[lts]\nLTS_STORAGE_ROOT = "/mnt/lts"\n[limits]\nMOVE_TO_LTS_LIMIT = 3\n'
)
TEMPLATE = {
    "job_configuration": {"command": "{{ command }}", "env": "{{ env }}"},
    "variables": {"type": "object", "properties": {"command": {"type": "string"}, "env": {"type": "object"}}},
}


@pytest.fixture
async def client(prefect_server: PrefectServer) -> AsyncIterator[PrefectClient]:
    """A client of the server, from which everything was removed that the configuration makes."""
    with prefect_server.client_settings():
        async with get_client() as client:
            await _clear(client)
            yield client
            await _clear(client)


async def _clear(client: PrefectClient) -> None:
    for kind, documents in (await _everything(client)).items():
        for document in documents:
            key = document["name"] if kind == "work_pools" else document["id"]
            await client._client.delete(f"/{kind}/{key}")  # noqa: SLF001 - any kind of document


async def _everything(client: PrefectClient) -> dict[str, list[dict[str, Any]]]:
    """All documents of the kinds that the configuration writes, secrets in clear."""
    kinds = ("variables", "v2/concurrency_limits", "work_pools", "automations", "block_documents")
    found = {}
    for kind in kinds:
        body = {"include_secrets": True} if kind == "block_documents" else {}
        answer = (await client._client.post(f"/{kind}/filter", json=body)).json()  # noqa: SLF001
        found[kind] = [{k: v for k, v in document.items() if k != "status"} for document in answer]
    return found


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    values = {}
    for name in SECRET_BLOCKS:
        path = tmp_path / name.lower()
        path.write_text(f"s3cret-of-{name}\n", encoding="utf-8")
        values[f"{name}_FILE"] = str(path)
    return {**values, "WORK_POOL_TYPE": "process"}


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / f"vars-{len(list(tmp_path.iterdir()))}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def _states(items: Sequence[Item]) -> dict[str, str]:
    return {item.name: item.state for item in items}


def _changed(items: Sequence[Item]) -> dict[str, str]:
    return {item.name: item.detail for item in items if item.state != "unchanged"}


async def test_a_fresh_server_gets_everything_that_the_flows_read(
    client: PrefectClient, environ: dict[str, str], toml: Callable[[str], Path]
) -> None:
    items = await configure([toml(TOML)], environ)
    assert {name for name, state in _states(items).items() if state == "unchanged"} == set(OPTIONAL_BLOCKS.values())
    assert await read_limits() == {
        "LTS_FREE_LIMIT": 1,
        "MOVE_TO_LTS_LIMIT": 3,
        "VERIFY_LTS_LIMIT": 1,
        "LTS_TO_RETRIEVAL_LIMIT": 1,
    }
    settings = await read_settings({})
    assert settings.archiver_target_size_mb == 300
    assert settings.lts_storage_root == Path("/mnt/lts")
    assert settings.minio_user == "s3cret-of-MINIO_USER"
    assert settings.scicat_password is not None
    assert settings.scicat_password.reveal() == "s3cret-of-SCICAT_PASSWORD"
    assert await Variable.aget("archiver_target_size_mb") == 300
    assert len(await client.read_variables()) == 2
    pools = {pool.name: (pool.type, pool.concurrency_limit) for pool in await client.read_work_pools()}
    assert pools == {ARCHIVAL: ("process", 4), RETRIEVAL: ("process", 4)}
    assert await _queues(client, RETRIEVAL) == {"default": 3, RECONCILER_QUEUE: 1}
    assert await _queues(client, ARCHIVAL) == {"default": None}


async def _queues(client: PrefectClient, pool: str) -> dict[str, int | None]:
    return {queue.name: queue.concurrency_limit for queue in await client.read_work_queues(pool)}


@pytest.mark.slow
async def test_a_place_is_kept_for_the_reconciler_however_many_runs_wait(
    client: PrefectClient, environ: dict[str, str]
) -> None:
    await configure([], environ)
    flow_id = await client.create_flow_from_name("of-the-queue-test")

    async def order(name: str, queue: str | None) -> FlowRun:
        deployment_id = await client.create_deployment(
            flow_id, name=name, work_pool_name=RETRIEVAL, work_queue_name=queue
        )
        return await client.create_flow_run_from_deployment(deployment_id)

    waiting = [await order(f"retrieval {index}", None) for index in range(5)]
    reconciler = await order("reconciler", RECONCILER_QUEUE)

    async def handed_out() -> list[UUID]:
        """What a worker is given, which begins none of it."""
        soon = datetime.now(UTC) + timedelta(seconds=10)
        given = await client.get_scheduled_flow_runs_for_work_pool(RETRIEVAL, scheduled_before=soon)
        for item in given:
            await client.set_flow_run_state(item.flow_run.id, Pending(), force=True)
        return [item.flow_run.id for item in given]

    first = await handed_out()
    assert reconciler.id in first
    assert len(set(first) & {run.id for run in waiting}) == 3
    assert await handed_out() == []
    again = await order("reconciler", RECONCILER_QUEUE)
    assert again.id not in await handed_out()  # one at a time
    await client.set_flow_run_state(reconciler.id, Completed(), force=True)
    assert await handed_out() == [again.id]


@pytest.mark.usefixtures("client")
async def test_a_variable_that_no_file_names_any_more_is_told_of_and_kept(
    environ: dict[str, str], toml: Callable[[str], Path]
) -> None:
    await configure([toml(TOML)], environ)
    await Variable.aset("somebody_elses", 1)
    items = await configure([toml("[limits]\nMOVE_TO_LTS_LIMIT = 3\n")], environ, check=True)
    assert _changed(items) == {}
    details = {item.name: item.detail for item in items if item.kind == "variable"}
    assert set(details) == {"archiver_target_size_mb", "lts_storage_root"}
    assert "in force: 300; in no file" in details["archiver_target_size_mb"]


async def test_a_second_run_changes_nothing(
    client: PrefectClient, environ: dict[str, str], toml: Callable[[str], Path]
) -> None:
    await configure([SAMPLE, toml(TOML)], environ)
    before = await _everything(client)
    assert set(_states(await configure([SAMPLE, toml(TOML)], environ)).values()) == {"unchanged"}
    assert await _everything(client) == before


async def _drift(client: PrefectClient) -> None:
    """What people do in the UI."""
    await Variable.aset("archiver_target_size_mb", "300", overwrite=True)
    limit = GlobalConcurrencyLimitUpdate(limit=9, active=False, slot_decay_per_second=0.5)
    await client.update_global_concurrency_limit("tag:move-to-lts", limit)
    other: SecretBlock[str] = SecretBlock.model_validate({"value": "other"})
    await other.asave("minio-password", overwrite=True)
    await client.update_work_pool(ARCHIVAL, WorkPoolUpdate(concurrency_limit=None))
    await client.update_work_pool(RETRIEVAL, WorkPoolUpdate(concurrency_limit=7, description="of the facility"))
    (default,) = [queue for queue in await client.read_work_queues(RETRIEVAL) if queue.name == "default"]
    await client.update_work_queue(default.id, concurrency_limit=9)
    zombies = (await client.read_automations_by_name(ZOMBIES))[0]
    await client.pause_automation(zombies.id)
    await client.create_automation(AutomationCore.model_validate(wanted_automations()[ZOMBIES].fields))


@pytest.mark.slow
async def test_drift_is_found_by_a_check_and_mended_by_a_run(
    client: PrefectClient, environ: dict[str, str], toml: Callable[[str], Path]
) -> None:
    config = toml(TOML)
    await configure([config], environ)
    await _drift(client)
    drifted = await _everything(client)
    expected = {
        "archiver_target_size_mb": "'300' -> 300",
        "tag:move-to-lts": "9 -> 3, active False -> True, slot decay 0.5 -> 0.0",
        "minio-password": "",
        ARCHIVAL: "limit None -> 4",
        RETRIEVAL: "limit 7 -> 4, limit of queue default 9 -> 3",
    }
    found = _changed(await configure([config], environ, check=True))
    assert "2 of the name" in found.pop(ZOMBIES)
    assert found == expected
    assert await _everything(client) == drifted
    await configure([config], environ)
    assert _changed(await configure([config], environ, check=True)) == {}
    pool = await client.read_work_pool(RETRIEVAL)
    assert (pool.concurrency_limit, pool.description) == (4, "of the facility")


@pytest.mark.slow
async def test_a_new_template_leaves_the_limit_and_no_template_leaves_the_template(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path
) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps(TEMPLATE), encoding="utf-8")
    await configure([], {**environ, "ARCHIVAL_WORK_POOL_LIMIT": "6"})
    given = {**environ, "ARCHIVAL_WORK_POOL_LIMIT": "6", "ARCHIVAL_BASE_JOB_TEMPLATE": str(template)}
    assert _changed(await configure([], given)) == {ARCHIVAL: "base job template"}
    assert _changed(await configure([], {**environ, "ARCHIVAL_WORK_POOL_LIMIT": "5"})) == {ARCHIVAL: "limit 6 -> 5"}
    pool = await client.read_work_pool(ARCHIVAL)
    assert (pool.concurrency_limit, pool.base_job_template) == (5, TEMPLATE)


@pytest.mark.slow
async def test_a_later_file_counts_and_the_limits_may_stand_without_a_heading(
    client: PrefectClient, environ: dict[str, str], toml: Callable[[str], Path]
) -> None:
    await configure([toml(TOML), toml("MOVE_TO_LTS_LIMIT = 5\n[archiver]\nARCHIVER_TARGET_SIZE_MB = 10\n")], environ)
    assert (await read_limits())["MOVE_TO_LTS_LIMIT"] == 5
    assert {variable.name: variable.value for variable in await client.read_variables()} == {
        "archiver_target_size_mb": 10,
        "lts_storage_root": "/mnt/lts",
    }


async def test_a_secret_that_exists_needs_no_file_and_optional_ones_are_written_when_given(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path
) -> None:
    await configure([], environ)
    token = tmp_path / "token"
    token.write_text("ghp_token", encoding="utf-8")
    given = {"WORK_POOL_TYPE": "process", "GITHUB_OPENEM_ACCESS_TOKEN_FILE": str(token)}
    assert _changed(await configure([], given)) == {"github-openem-access-token": ""}
    block: SecretBlock[str] = await SecretBlock.aload("github-openem-access-token")
    assert block.get() == "ghp_token"
    assert (await client.read_work_pool(ARCHIVAL)).type == "process"


def test_every_setting_that_may_be_a_file_has_a_secret_block() -> None:
    hints = get_type_hints(Settings, include_extras=True)
    from_file = {n.upper() for n, hint in hints.items() if n != "origins" and hint.__metadata__[0].from_file}
    assert from_file == set(SECRET_BLOCKS)


# ------------------------------------------------------------------------------------------------------- refusals
WRONG_TOML = {
    "unknown": ("[lts]\nLTS_ROOT = '/x'\n", "LTS_ROOT"),
    "lower case": ("[lts]\nlts_storage_root = '/x'\n", "lts_storage_root"),
    "section": ("[minio]\nLTS_STORAGE_ROOT = '/x'\n", r"LTS_STORAGE_ROOT.*\[lts\]"),
    "type": ("[archiver]\nARCHIVER_TARGET_SIZE_MB = 1.5\n", "ARCHIVER_TARGET_SIZE_MB=1.5.*whole number"),
    "boolean": ("[limits]\nMOVE_TO_LTS_LIMIT = true\n", "MOVE_TO_LTS_LIMIT=True.*whole number"),
    "range": ("[lts]\nLTS_FREE_SPACE_PERCENTAGE = 100\n", "LTS_FREE_SPACE_PERCENTAGE=100.*vars-.*0 to 99"),
    "limit": ("VERIFY_LTS_LIMIT = 0\n", "VERIFY_LTS_LIMIT=0"),
    "secret": ("[minio]\nMINIO_PASSWORD = 'hunter2'\n", "MINIO_PASSWORD=.*minio-password"),
    "user": ("[scicat]\nSCICAT_USER = 'hunter2'\n", "SCICAT_USER=.*scicat-user"),
    "misspelt": ("[minio]\nMINIO_PASWORD = 'hunter2'\n", "MINIO_PASWORD.*did you mean MINIO_PASSWORD"),
    "syntax": ("[minio\n", "readable TOML"),
}
WRONG_ENVIRONMENT: dict[str, tuple[dict[str, str | None], str]] = {
    "relative": ({"MINIO_USER_FILE": "user.txt"}, "MINIO_USER_FILE='user.txt'.*absolute"),
    "missing": ({"MINIO_USER_FILE": "/nowhere/user.txt"}, "MINIO_USER_FILE='/nowhere/user.txt'.*No such file"),
    "folder": ({"SCICAT_PASSWORD_FILE": "/"}, "SCICAT_PASSWORD_FILE='/'.*directory"),
    "empty": ({"GITHUB_OPENEM_USERNAME_FILE": "/dev/null"}, "GITHUB_OPENEM_USERNAME_FILE.*not empty"),
    "pool limit": ({"RETRIEVAL_WORK_POOL_LIMIT": "0"}, "RETRIEVAL_WORK_POOL_LIMIT='0'.*1 or more"),
    "pool type": ({"WORK_POOL_TYPE": "kubernetes"}, "WORK_POOL_TYPE='kubernetes'.*docker or process"),
    "pool names": ({"RETRIEVAL_WORK_POOL": ARCHIVAL}, "RETRIEVAL_WORK_POOL"),
    "template": ({"ARCHIVAL_BASE_JOB_TEMPLATE": "/dev/null"}, "ARCHIVAL_BASE_JOB_TEMPLATE.*JSON"),
    "not there": ({"SCICAT_USER_FILE": None}, "SCICAT_USER_FILE=None.*scicat-user"),
}


@pytest.mark.parametrize("case", WRONG_TOML)
@pytest.mark.slow
async def test_a_wrong_file_writes_nothing(
    client: PrefectClient, environ: dict[str, str], toml: Callable[[str], Path], case: str
) -> None:
    text, pattern = WRONG_TOML[case]
    before = await _everything(client)
    with pytest.raises(ConfigError, match=f"(?s){pattern}") as caught:
        await configure([toml(TOML), toml(text)], environ)
    assert await _everything(client) == before
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("case", WRONG_ENVIRONMENT)
@pytest.mark.slow
async def test_a_wrong_environment_writes_nothing(client: PrefectClient, environ: dict[str, str], case: str) -> None:
    given, pattern = WRONG_ENVIRONMENT[case]
    before = await _everything(client)
    both: dict[str, str | None] = {**environ, **given}
    merged = {name: value for name, value in both.items() if value is not None}
    with pytest.raises(ConfigError, match=f"(?s){pattern}"):
        await configure([], merged)
    assert await _everything(client) == before


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ([], "JSON object"),
        ({"job_configuration": {}}, "variables"),
        (TEMPLATE | {"variables": {"properties": {}}}, "env"),
    ],
)
@pytest.mark.slow
async def test_a_wrong_template_writes_nothing(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path, template: object, pattern: str
) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps(template), encoding="utf-8")
    before = await _everything(client)
    with pytest.raises(ConfigError, match=pattern):
        await configure([], {**environ, "ARCHIVAL_BASE_JOB_TEMPLATE": str(path)})
    assert await _everything(client) == before


async def test_a_work_pool_of_another_type_writes_nothing(client: PrefectClient, environ: dict[str, str]) -> None:
    await client.create_work_pool(WorkPoolCreate(name=RETRIEVAL, type="docker", concurrency_limit=9))
    before = await _everything(client)
    with pytest.raises(ConfigError, match=rf"WORK_POOL_TYPE='process'.*docker.*{RETRIEVAL}"):
        await configure([], environ)
    assert await _everything(client) == before


async def test_without_an_address_no_server_is_started(prefect_server: PrefectServer, environ: dict[str, str]) -> None:
    with (
        prefect_server.client_settings(),
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigError, match="PREFECT_API_URL"),
    ):
        await configure([], environ)


@pytest.mark.slow
async def test_a_server_that_is_away_is_waited_for_until_the_deadline(environ: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectServerError, match=f"{url}: no answer"):
        await configure([], environ, deadline_s=1.5)


# ---------------------------------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_the_command_tells_by_its_exit_code_and_shows_no_secret(
    prefect_server: PrefectServer,
    environ: dict[str, str],
    toml: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    config = ["--config", str(toml(TOML))]
    said: list[str] = []

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        shown = capsys.readouterr()
        said.extend(shown)
        return code, shown.out, shown.err

    async def clear() -> None:
        async with get_client() as client:
            await _clear(client)

    with prefect_server.client_settings():
        anyio.run(clear)
        assert run(*config, "--check")[0] == 1
        code, out, _ = run(*config)
        assert code == 0
        assert "limit       tag:move-to-lts" in out
        assert out.endswith("\n13 changed, 2 unchanged\n")
        code, out, _ = run(*config, "--check", "--json")
        assert (code, json.loads(out)["differs"]) == (0, False)
        code, out, err = run("--json", "--config", str(toml(WRONG_TOML["range"][0])))
        assert code == json.loads(out)["error"]["exit_code"] == 2
        assert "LTS_FREE_SPACE_PERCENTAGE" in err
        Path(environ["MINIO_PASSWORD_FILE"]).write_text("s3cret-new", encoding="utf-8")
        assert "secret      minio-password                            updated" in run(*config)[1]
        anyio.run(clear)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        assert run("--wait-s", "0.5")[0] == 1
    assert "s3cret" not in "".join(said)


@pytest.mark.slow
async def test_a_run_without_heartbeat_is_crashed_and_one_that_ended_under_a_name_of_ours_is_not_looked_at(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setattr("flows.configure.wanted_automations", lambda: wanted_automations(10))
    await configure([], environ)
    flow_id = await client.create_flow_from_name("silent")
    runs = []
    for _ in range(2):
        body = {"flow_id": str(flow_id), "state": {"type": "PENDING"}}
        runs.append((await client.request("POST", "/flow_runs/", json=body)).json()["id"])
    for run in runs:
        await client.set_flow_run_state(run, Running(), force=True)
        resource = {"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.name": "silent"}
        event = Event(event="prefect.flow-run.heartbeat", resource=Resource(resource))
        await client.request("POST", "/events", json=[event.model_dump(mode="json")])
    await client.set_flow_run_state(runs[1], Completed(name="CompletedWithDatasetErrors"), force=True)
    silent = await client.read_flow_run(runs[0])
    with anyio.fail_after(90):
        while silent.state_type != StateType.CRASHED:
            await anyio.sleep(0.5)
            silent = await client.read_flow_run(runs[0])
    assert silent.state is not None
    assert "No heartbeat for 10 s" in str(silent.state.message)
    assert (await client.read_flow_run(runs[1])).state_name == "CompletedWithDatasetErrors"
    for run in runs:
        await client.delete_flow_run(run)
