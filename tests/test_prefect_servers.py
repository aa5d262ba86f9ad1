"""The Prefect server of the tests: it has the deployment's settings and keeps its state over a kill."""

from __future__ import annotations

import pytest
from prefect.client.orchestration import get_client

from flows import server_settings
from tests.prefect_servers import PrefectServer

pytestmark = pytest.mark.anyio


@pytest.mark.slow
async def test_state_survives_a_kill_of_the_server(prefect_server: PrefectServer) -> None:
    name = "of-the-restart-test"
    with prefect_server.client_settings():
        async with get_client() as client:
            await client.upsert_global_concurrency_limit_by_name(name, 3)
        prefect_server.kill()
        assert not prefect_server.healthy()
        prefect_server.start()
        async with get_client() as client:
            limit = await client.read_global_concurrency_limit_by_name(name)
            await client.delete_global_concurrency_limit_by_name(name)
    assert limit.limit == 3


async def test_the_server_applies_the_settings_of_the_deployment(prefect_server: PrefectServer) -> None:
    with prefect_server.client_settings():
        async with get_client() as client:
            server = (await client.request("GET", "/admin/settings")).json()["server"]
    assert server["concurrency"]["lease_storage"].endswith(".filesystem")
    assert server["concurrency"]["maximum_concurrency_slot_wait_seconds"] == 0.5
    assert server["tasks"]["tag_concurrency_slot_wait_seconds"] == 0.5
    assert server["analytics_enabled"] is False
    assert server["ui"]["show_promotional_content"] is False


def test_settings_print_as_lines_that_a_shell_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert server_settings.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert dict(line.split("=", 1) for line in lines) == server_settings.SERVER_SETTINGS
    assert server_settings.main(["--flows"]) == 0
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30" in capsys.readouterr().out.splitlines()
