"""The way to SciCat: tokens, retries, answers that are none, and the list of a dataset's files."""

from __future__ import annotations

import hashlib
import logging
import socket

import anyio
import pytest

from mover.catalogue import JobCatalogue
from mover.errors import CatalogueAccessError, CatalogueTransientError, ConfigError, DatasetNotFoundError, MoverError
from mover.model import CatalogueFile, SourceChecksum
from mover.scicat import SciCat, SciCatAccess
from mover.settings import load_settings
from mover.settings_rules import Secret
from mover.wiring import scicat_access
from tests.scicat_clients import DATASET, Clock, Sleeper, access_to, open_client
from tests.scicat_fake.seeding import SeedFile
from tests.scicat_fake.server import ScicatServer

pytestmark = pytest.mark.anyio

HTML = "<html><body>Bad gateway</body></html>"


async def files_of(client: SciCat, dataset_id: str = DATASET) -> list[CatalogueFile]:
    return [entry async for entry in await client.listed_files(dataset_id)]


def logins(server: ScicatServer) -> int:
    return len(server.control.requests("POST", "/auth/login"))


def test_it_is_a_catalogue_of_jobs() -> None:
    implements: type[JobCatalogue] = SciCat
    assert implements is SciCat


# ------------------------------------------------------------------------------------------------------------ settings
def test_the_access_is_made_from_the_settings() -> None:
    environ = {"SCICAT_ENDPOINT": "scicat:3000", "SCICAT_USER": "mover", "SCICAT_PASSWORD": "geheim"}
    access = scicat_access(load_settings(environ=environ))
    assert (access.endpoint_url, access.api_prefix, access.user) == ("http://scicat:3000", "/api/v3/", "mover")
    assert access.password.reveal() == "geheim"
    assert "geheim" not in repr(access)


@pytest.mark.parametrize("missing", ["SCICAT_ENDPOINT", "SCICAT_USER", "SCICAT_PASSWORD"])
def test_a_missing_setting_is_named(missing: str) -> None:
    environ = {"SCICAT_ENDPOINT": "scicat:3000", "SCICAT_USER": "mover", "SCICAT_PASSWORD": "geheim"}
    del environ[missing]
    with pytest.raises(ConfigError, match=missing):
        scicat_access(load_settings(environ=environ))


# -------------------------------------------------------------------------------------------------------------- tokens
async def test_a_check_says_who_the_account_is(scicat_server: ScicatServer) -> None:
    async with open_client(scicat_server) as client:
        found = await client.check()
    assert (found.health, found.username, found.jobs_api) == ("ok", scicat_server.user, "v4")
    assert "archivemanager" in found.groups


async def test_a_wrong_password_is_refused_at_once_and_not_shown(scicat_server: ScicatServer) -> None:
    access = access_to(scicat_server, password=Secret("wrong-password"))
    async with open_client(scicat_server, access) as client:
        with pytest.raises(CatalogueAccessError, match="401") as caught:
            await client.check()
    assert "wrong-password" not in f"{caught.value!r}"
    assert logins(scicat_server) == 1


async def test_a_token_is_renewed_after_four_fifths_of_its_life(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    clock = Clock()
    async with open_client(scicat_server, clock=clock) as client:
        for now_s, expected in ((0.0, 1), (2879.0, 1), (2881.0, 2), (2882.0, 2)):
            clock.now_s = 1000.0 + now_s
            await client.lifecycle(DATASET)
            assert logins(scicat_server) == expected


async def test_a_renewal_that_fails_does_not_stop_a_token_that_still_holds(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    clock = Clock()
    async with open_client(scicat_server, clock=clock) as client:
        await client.lifecycle(DATASET)
        scicat_server.control.fail("POST", "/auth/login", 503, times=-1)
        clock.now_s += 2900.0
        await client.lifecycle(DATASET)
        clock.now_s += 701.0
        with pytest.raises(CatalogueTransientError, match="503"):
            await client.lifecycle(DATASET)


@pytest.mark.parametrize("anonymous", [False, True])
async def test_an_expired_token_is_renewed_once_for_all_callers(
    scicat_server: ScicatServer, *, anonymous: bool
) -> None:
    scicat_server.control.switches.expired_is_anonymous = anonymous
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    async with open_client(scicat_server) as client:
        await client.lifecycle(DATASET)
        scicat_server.control.expire_tokens()
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(client.lifecycle, DATASET)
    assert logins(scicat_server) == 2


async def test_a_second_refusal_is_a_lack_of_rights(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    scicat_server.control.account("nobody", password="nobody")
    access = access_to(scicat_server, user="nobody", password=Secret("nobody"))
    async with open_client(scicat_server, access) as client:
        with pytest.raises(CatalogueAccessError, match="403"):
            await client.lifecycle(DATASET)
    assert len(scicat_server.control.requests("GET", "/datasetlifecycle")) == 2


@pytest.mark.parametrize("body", ["", HTML, "null", "{}", '{"access_token": null}', '{"access_token": "a\\nb"}'])
async def test_a_login_without_a_token_is_an_error_of_its_own(scicat_server: ScicatServer, body: str) -> None:
    scicat_server.control.fail("POST", "/auth/login", 201, body=body, times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="not what SciCat sends"):
            await client.lifecycle(DATASET)


async def test_neither_password_nor_token_is_in_errors_and_logs(
    scicat_server: ScicatServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    password = scicat_server.password
    scicat_server.control.fail("POST", "/auth/login", 400, body=f'{{"message": "no {password} here"}}')
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match=r"no \*\*\* here") as caught:
            await client.lifecycle(DATASET)
        scicat_server.control.seed_dataset(DATASET, {"a": 1})
        await client.lifecycle(DATASET)
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert password not in shown
    assert "eyJ" not in shown


# ------------------------------------------------------------------------------------------------------------- failures
async def test_what_passes_is_repeated_and_retry_after_is_waited_out(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    scicat_server.control.fail("GET", "lifecycle", 503, body=HTML, headers={"Retry-After": "7"})
    scicat_server.control.fail("GET", "lifecycle", 500, body='"Internal server error"', after=0)
    scicat_server.control.lose_reply("GET", "lifecycle")
    sleeper = Sleeper()
    async with open_client(scicat_server, sleep=sleeper) as client:
        await client.lifecycle(DATASET)
    assert len(sleeper.pauses_s) == 3
    assert [pause_s >= 7.0 for pause_s in sleeper.pauses_s] == [True, False, False]


async def test_what_does_not_pass_ends_with_the_server_s_reason(scicat_server: ScicatServer) -> None:
    scicat_server.control.fail("GET", "lifecycle", 500, body='{"message": ["first", "second"]}', times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueTransientError, match="status 500: first; second"):
            await client.lifecycle(DATASET)
    assert len(scicat_server.control.requests("GET", "lifecycle")) == 4


async def test_a_server_that_is_not_there_passes(scicat_server: ScicatServer) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        access = SciCatAccess(f"http://127.0.0.1:{bound.getsockname()[1]}", "mover", Secret("x"))
        async with open_client(scicat_server, access) as client:
            with pytest.raises(CatalogueTransientError, match="ConnectError"):
                await client.lifecycle(DATASET)


async def test_an_answer_that_does_not_come_passes(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    scicat_server.control.hold("GET", "lifecycle")
    async with open_client(scicat_server, access_to(scicat_server, read_timeout_s=2.0)) as client:
        assert (await client.lifecycle(DATASET)).archivable is True
    assert len(scicat_server.control.requests("GET", "lifecycle")) == 1  # the one that was held is not answered yet


@pytest.mark.parametrize("body", ["", HTML, "null", "[]", "[1]"])
async def test_a_success_that_is_no_answer_is_an_error_of_its_own(scicat_server: ScicatServer, body: str) -> None:
    scicat_server.control.fail("GET", "lifecycle", 200, body=body)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="not what SciCat sends"):
            await client.lifecycle(DATASET)


async def test_a_redirect_is_not_followed(scicat_server: ScicatServer) -> None:
    scicat_server.control.fail("GET", "lifecycle", 302, headers={"Location": f"{scicat_server.url}/elsewhere"})
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="redirected"):
            await client.lifecycle(DATASET)
    assert not scicat_server.control.requests("GET", "elsewhere")


async def test_a_proxy_s_own_404_passes_and_does_not_mean_that_the_dataset_is_missing(
    scicat_server: ScicatServer,
) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    scicat_server.control.fail("GET", "lifecycle", 404, body="404 page not found", content_type="text/plain")
    async with open_client(scicat_server) as client:
        assert (await client.lifecycle(DATASET)).archivable is True


async def test_a_proxy_that_decodes_the_slash_of_a_pid_is_not_a_missing_dataset(scicat_server: ScicatServer) -> None:
    body = f'{{"statusCode": 404, "message": "Cannot GET /api/v3/datasets/{DATASET}", "error": "Not Found"}}'
    scicat_server.control.fail("GET", "/datasets/", 404, body=body, times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="%2F"):
            await client.lifecycle(DATASET)


@pytest.mark.parametrize("dataset_id", ["20.500/a b", "20.500/a%zz", "20.500/ä?&#+;=", "plain", "a/b/c"])
async def test_odd_ids_reach_the_server_as_they_are(scicat_server: ScicatServer, dataset_id: str) -> None:
    scicat_server.control.seed_dataset(dataset_id, {"a": 1})
    async with open_client(scicat_server) as client:
        assert [entry.path for entry in await files_of(client, dataset_id)] == ["a"]


@pytest.mark.parametrize("dataset_id", ["", ".", "..", "a/../b"])
async def test_ids_that_would_change_the_path_are_refused(scicat_server: ScicatServer, dataset_id: str) -> None:
    async with open_client(scicat_server) as client:
        with pytest.raises(MoverError, match="refused"):
            await client.unregister_all(dataset_id)
    assert not scicat_server.control.requests()


# --------------------------------------------------------------------------------------------------------------- files
async def test_every_one_of_many_entries_and_blocks_is_listed(scicat_server: ScicatServer) -> None:
    paths = [f"folder/{number:05}" for number in range(25_000)]
    scicat_server.control.switches.unstable_order = True
    scicat_server.control.seed_dataset(DATASET, dict.fromkeys(paths, 3), files_per_block=167)
    async with open_client(scicat_server) as client:
        found = [entry.path for entry in await files_of(client) if entry.kind == "file"]
    assert len(scicat_server.control.requests("GET", r"/origdatablocks\Z")) == 31  # of 5 blocks, and 150 are there
    assert sorted(found) == paths


async def test_entries_keep_kind_time_and_known_checksums(scicat_server: ScicatServer) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    files = [
        SeedFile("folder/file", 5, 1_700_000_000, chk=digest.upper()),
        SeedFile("link", 9, kind="symlink", chk=digest),
        SeedFile("empty", 0, chk="no digest"),
        SeedFile("none", 1),
    ]
    scicat_server.control.seed_dataset(DATASET, files, chk_alg="sha2")
    async with open_client(scicat_server) as client:
        found = {entry.path: entry for entry in await files_of(client)}
    claim = SourceChecksum("sha256", digest, "catalogue")
    assert found["folder/file"] == CatalogueFile("folder/file", 5, 1_700_000_000, "file", claim)
    assert (found["link"].kind, found["link"].checksum) == ("symlink", None)
    assert found["folder"].kind == "directory"
    assert (found["empty"].size_bytes, found["empty"].checksum, found["none"].checksum) == (0, None, None)


async def test_a_dataset_that_is_not_there_is_a_user_error(scicat_server: ScicatServer) -> None:
    async with open_client(scicat_server) as client:
        with pytest.raises(DatasetNotFoundError):
            await client.listed_files(DATASET)


async def test_an_empty_dataset_has_an_empty_list(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {})
    async with open_client(scicat_server) as client:
        assert await files_of(client) == []


async def test_a_list_that_hides_its_blocks_is_an_error(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1, "b": 1}, files_per_block=1)
    scicat_server.control.fail("GET", r"/origdatablocks\Z", 200, body="[]")
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="0 of 2 origdatablocks"):
            await files_of(client)


async def test_no_blocks_at_all_of_a_dataset_with_files_is_an_error(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    scicat_server.control.fail("GET", r"/origdatablocks\Z", 200, body="[]")
    scicat_server.control.fail("GET", r"/origdatablocks/count\Z", 200, body='{"count": 0}')
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="groups"):
            await files_of(client)


async def test_a_list_that_changes_while_it_is_read_is_read_again_later(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1, "b": 1}, files_per_block=1)
    scicat_server.control.fail("GET", r"/origdatablocks/count\Z", 200, body='{"count": 1}')
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueTransientError, match="changed"):
            await files_of(client)


async def test_a_server_that_ignores_paging_is_noticed(scicat_server: ScicatServer) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    body = "[" + ",".join(f'{{"_id": "{number}", "dataFileList": []}}' for number in range(5)) + "]"
    scicat_server.control.fail("GET", r"/origdatablocks\Z", 200, body=body, times=-1)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueTransientError, match="changed"):
            await files_of(client)


@pytest.mark.parametrize("entry", ['{"size": 1}', '{"path": "a", "size": -1}', '{"path": "a", "size": 1.5}', "7"])
async def test_an_entry_that_cannot_be_read_is_an_error(scicat_server: ScicatServer, entry: str) -> None:
    scicat_server.control.seed_dataset(DATASET, {"a": 1})
    body = f'[{{"_id": "the-block", "dataFileList": [{entry}]}}]'
    scicat_server.control.fail("GET", r"/origdatablocks\Z", 200, body=body)
    async with open_client(scicat_server) as client:
        with pytest.raises(CatalogueAccessError, match="the-block"):
            await files_of(client)


async def test_an_expired_token_does_not_hide_what_a_published_dataset_has(scicat_server: ScicatServer) -> None:
    scicat_server.control.switches.expired_is_anonymous = True
    scicat_server.control.seed_dataset(DATASET, {"a": 1}, published=True)
    async with open_client(scicat_server) as client:
        await client.lifecycle(DATASET)
        scicat_server.control.expire_tokens()
        assert [entry.path for entry in await files_of(client)] == ["a"]
    assert {request.user for request in scicat_server.control.requests("GET", "origdatablocks")} == {scicat_server.user}
