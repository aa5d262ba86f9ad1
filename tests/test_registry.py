"""The account for a private registry, on a real Prefect server and up to what a docker worker makes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.system import Secret as SecretBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect_docker.worker import DockerWorkerJobConfiguration

from flows.configuration import REGISTRY_BLOCK, REGISTRY_SECRETS, Item
from flows.configuration_files import OPTIONAL_BLOCKS, POOLS
from flows.configure import configure
from flows.settings import SECRET_BLOCKS
from mover.errors import ConfigError
from tests.prefect_servers import PrefectServer

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,  # a server is set back for each
    # Prefect leaves the connections of its threads to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TEMPLATE = Path(__file__).parent.parent / "docker" / "job-templates" / "production.json"
JOB = {"image": "registry.example.org/mover:1", "networks": ["mover"], "volumes": ["lts:/tmp/LTS"]}
TYPE = "docker-registry-credentials"


@pytest.fixture
async def client(prefect_server: PrefectServer) -> AsyncIterator[PrefectClient]:
    """A client of the server, from which pools and blocks were removed."""
    with prefect_server.client_settings():
        async with get_client() as client:
            await _clear(client)
            yield client
            await _clear(client)


async def _clear(client: PrefectClient) -> None:
    for pool in await client.read_work_pools():
        await client.delete_work_pool(pool.name)
    for document in await client.read_block_documents():
        await client.delete_block_document(document.id)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """What the containers have, with work pools of the template for production."""
    values = {
        "RUNTIME_PROJECT": "mover",
        "RUNTIME_MEMORY": "2g",
        "RUNTIME_USER": "1000:1000",
        "RUNTIME_LTS_VOLUME": "mover_lts-share",
    }
    for name in SECRET_BLOCKS:
        path = tmp_path / name.lower()
        path.write_text("s3cret", encoding="utf-8")
        values[f"{name}_FILE"] = str(path)
    return {**values, **{f"{pool.prefix}_BASE_JOB_TEMPLATE": str(TEMPLATE) for pool in POOLS}}


def _account(folder: Path, username: str = "puller", token: str = "ghp_token") -> dict[str, str]:
    given = {}
    for name, text in zip(OPTIONAL_BLOCKS, (username, token), strict=True):
        path = folder / name.lower()
        path.write_text(f"{text}\n", encoding="utf-8")
        given[f"{name}_FILE"] = str(path)
    return given


def _changed(items: list[Item]) -> dict[str, str]:
    return {item.name: item.detail for item in items if item.state != "unchanged"}


async def _job(client: PrefectClient, values: dict[str, Any]) -> DockerWorkerJobConfiguration:
    """What a worker of the archival pool would start."""
    pool = await client.read_work_pool(POOLS[0].name)
    return await DockerWorkerJobConfiguration.from_template_and_values(pool.base_job_template, values, client=client)


async def test_a_worker_pulls_with_the_account_that_the_configuration_was_given(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path
) -> None:
    given = {**environ, **_account(tmp_path), "REGISTRY_URL": "registry.example.org:5000"}
    assert _changed(await configure([], given))[REGISTRY_BLOCK] == "registry.example.org:5000"
    credentials = (await _job(client, JOB)).registry_credentials
    assert (credentials.username, credentials.password.get_secret_value()) == ("puller", "ghp_token")
    assert credentials.registry_url == "registry.example.org:5000"
    assert _changed(await configure([], given, check=True)) == {}
    template = str((await client.read_work_pool(POOLS[0].name)).base_job_template)
    assert "ghp_token" not in template


async def test_without_an_account_there_is_no_block_and_no_login(
    client: PrefectClient, environ: dict[str, str]
) -> None:
    items = await configure([], {**environ, "REGISTRY_URL": "registry.example.org"})
    assert REGISTRY_BLOCK not in {item.name for item in items}
    assert (await _job(client, JOB)).registry_credentials is None
    with pytest.raises(ObjectNotFound):
        await client.read_block_document_by_name(REGISTRY_BLOCK, TYPE)


async def test_what_is_given_later_changes_its_part_and_what_is_left_out_stays(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path
) -> None:
    await configure([], {**environ, **_account(tmp_path), "REGISTRY_URL": "one.example.org"})
    assert _changed(await configure([], environ)) == {}
    moved = {**environ, "REGISTRY_URL": "two.example.org"}
    assert _changed(await configure([], moved)) == {REGISTRY_BLOCK: "one.example.org -> two.example.org"}
    token = {name: path for name, path in _account(tmp_path, token="ghp_new").items() if "TOKEN" in name}
    assert set(_changed(await configure([], {**environ, **token}))) == {REGISTRY_SECRETS[1], REGISTRY_BLOCK}
    credentials = (await _job(client, JOB)).registry_credentials
    assert (credentials.username, credentials.password.get_secret_value()) == ("puller", "ghp_new")
    assert credentials.registry_url == "two.example.org"


async def test_an_account_without_its_registry_writes_nothing(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="REGISTRY_URL=None"):
        await configure([], {**environ, **_account(tmp_path)})
    assert await client.read_work_pools() == []
    assert await client.read_block_documents() == []


@pytest.mark.parametrize("text", ["https://ghcr.io", "ghcr.io/owner", "-", "ghcr.io:port", "user@ghcr.io"])
async def test_a_registry_is_a_host_as_the_name_of_the_image_begins(
    client: PrefectClient, environ: dict[str, str], tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"REGISTRY_URL=.*host or host:port"):
        await configure([], {**environ, **_account(tmp_path), "REGISTRY_URL": text})
    assert await client.read_work_pools() == []


async def test_blocks_that_somebody_made_by_hand_need_no_registry(
    client: PrefectClient, environ: dict[str, str]
) -> None:
    for name in REGISTRY_SECRETS:
        block: SecretBlock[str] = SecretBlock.model_validate({"value": "of the facility"})
        await block.asave(name, client=client)
    assert REGISTRY_BLOCK not in {item.name for item in await configure([], environ)}
    assert (await _job(client, JOB)).registry_credentials is None
