"""The daemon's interface over a real server: what is taken, refused and told, to whom, and in which words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import ByteReceiveStream

from mover.api import JobOrder
from mover.api_tokens import parse_tokens, read_token_file
from mover.daemon_connections import PatientProtocol
from mover.daemon_http_access import Access, Caller
from mover.engine import Engine, EngineConfig
from mover.errors import ConfigError
from mover.parts import Buckets
from tests.datasets import DATASET, make_config, random_bytes, upload
from tests.http_daemons import OPERATOR, READER, TOKENS, Served, browser, serve
from tests.job_services import Steered, ended, open_service, service_config
from tests.servers import S3Server, fresh_bucket

pytestmark = pytest.mark.anyio

FILES = {"a": random_bytes(5_000, 1), "b/c": random_bytes(70_000, 2)}
ORDER: dict[str, Any] = {"kind": "archive", "dataset_ids": [DATASET]}


@pytest.fixture(scope="module")
def buckets(moto_server: S3Server) -> Iterator[Buckets]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        upload(moto_server, one, FILES)
        yield Buckets(one, two, three)


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server, buckets: Buckets) -> EngineConfig:
    return make_config(tmp_path, moto_server, buckets)


@pytest.fixture
async def held(config: EngineConfig) -> AsyncIterator[Served]:
    """A daemon whose jobs never get on."""

    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    jobs = service_config(config.scratch_folder, jobs_limit=3)
    async with open_service(config, jobs, steer) as service, serve(service, heartbeat_s=0.1) as served:
        yield served


async def test_a_new_job_is_202_with_its_place_and_a_repeated_key_200_with_the_same(held: Served) -> None:
    async with browser(held) as client:
        first = await client.post("/v1/jobs", json=ORDER, headers={"Idempotency-Key": '"k-1"'})
        again = await client.post("/v1/jobs", json=ORDER, headers={"Idempotency-Key": "k-1"})
        other = await client.post("/v1/jobs", json=ORDER | {"priority": 1}, headers={"Idempotency-Key": "k-1"})
        assert (first.status_code, again.status_code, other.status_code) == (202, 200, 409)
        job_id = first.json()["id"]
        assert first.headers["Location"] == again.headers["Location"] == f"/v1/jobs/{job_id}"
        assert again.json()["id"] == job_id
        assert (first.json()["owner"], first.json()["key"]) == ("local", "k-1")
        assert job_id in other.json()["detail"]
        assert other.headers["Content-Type"] == "application/problem+json"
        found = (await client.get("/v1/jobs", params={"dataset_id": DATASET})).json()
        assert [job["id"] for job in found["jobs"]] == [job_id]
        cancelled = await client.delete(f"/v1/jobs/{job_id}")
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert (await client.delete("/v1/jobs/none")).status_code == 404


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"kind": "move"}, "kind", '"move"', "archive, plan, retrieve, verify"),
    ({"prority": 1}, "prority", "1", "kind, dataset_ids, options, priority, owner"),
    ({"priority": 101}, "priority", "101", "-100 to 100"),
    ({"dataset_ids": []}, "dataset_ids", "[]", "1 to 10,000 entries"),
    ({"dataset_ids": ["a", 7]}, "dataset_ids[1]", "7", "a text"),
    ({"dataset_ids": ["../etc"]}, "dataset_ids[0]", '"../etc"', "'..' segment"),
    ({"dataset_ids": ["a%2Fb"]}, "dataset_ids[0]", '"a%2Fb"', "percent-encoded"),
    ({"options": {"level": "written"}}, "options.level", '"written"', "only with 'verify'"),
    ({"options": {"form": "files"}}, "options.form", '"files"', "only with 'retrieve'"),
    ({"kind": "verify", "options": {"release_source": True}}, "options.release_source", "true", "'archive'"),
    ({"options": {"speed": 9}}, "options.speed", "9", "release_source, registered, files, form, level"),
    (
        {"kind": "retrieve", "dataset_ids": ["a", "b"], "options": {"files": ["x"]}},
        "options.files",
        '["x"]',
        "no value with more than one dataset",
    ),
    ({"kind": "retrieve", "options": {"files": ["../x"]}}, "options.files[0]", '"../x"', "'..' segment"),
    (
        {"kind": "retrieve", "options": {"files": ["x", "x" * 4097]}},
        "options.files[1]",
        f'"{"x" * 199} ...',
        "a text, 1 to 4,096 long",
    ),
]


async def test_what_cannot_be_ordered_is_named_with_its_value_and_what_is_allowed(held: Served) -> None:
    async with browser(held, **{"X-Request-Id": "mine-1"}) as client:
        for change, field, value, allowed in REFUSED:
            answer = await client.post("/v1/jobs", json=ORDER | change)
            problem = answer.json()
            assert (answer.status_code, problem["status"], problem["request_id"]) == (400, 400, "mine-1")
            assert answer.headers["X-Request-Id"] == "mine-1"
            assert [(item["field"], item["value"]) for item in problem["errors"]] == [(field, value)]
            assert allowed in problem["errors"][0]["allowed"]


REFUSED_PARAMETERS: list[tuple[str, dict[str, str], str, str, str]] = [
    ("/v1/jobs?state=zz", {}, "state", '"zz"', "cancelled, done, failed, queued, running, waiting"),
    ("/v1/jobs?limit=0", {}, "limit", '"0"', "a whole number, 1 to 1,000"),
    (f"/v1/jobs?dataset_id={'x' * 1025}", {}, "dataset_id", f'"{"x" * 199} ...', "0 to 1,024 long"),
    ("/v1/jobs/x/dataset?dataset_id=", {}, "dataset_id", '""', "1 to 1,024 long"),
    ("/v1/jobs/x/events?after=-1", {}, "after", '"-1"', "0 to 999,999,999,999,999"),
    ("/v1/jobs/x/events", {"Last-Event-ID": "x"}, "Last-Event-ID", '"x"', "in the form ^[0-9]"),
]


async def test_a_parameter_that_is_refused_is_named_as_callers_know_it_with_its_value_and_what_is_allowed(
    held: Served,
) -> None:
    async with browser(held) as client:
        for path, headers, field, value, allowed in REFUSED_PARAMETERS:
            answer = await client.get(path, headers=headers)
            (error,) = answer.json()["errors"]
            assert (answer.status_code, error["field"], error["value"]) == (400, field, value)
            assert allowed in error["allowed"]
            assert answer.json()["detail"] == f"{field} is {value}: allowed is {error['allowed']}"
        answer = await client.post("/v1/jobs", json=ORDER, headers={"Idempotency-Key": "a b"})
        assert answer.json()["errors"][0]["field"] == "Idempotency-Key"


async def test_bodies_that_are_too_long_or_no_json_are_refused(held: Served) -> None:
    json = {"Content-Type": "application/json"}
    async with browser(held) as client:

        async def status(content: bytes, headers: dict[str, str] = json, method: str = "POST") -> int:
            path = "/v1/jobs" if method == "POST" else "/v1/limits"
            return (await client.request(method, path, content=content, headers=headers)).status_code

        assert await status(b"{") == 400
        assert await status(b"[" * 100_000) == 400
        assert await status(b"\xff") == 400
        assert await status(b'{"priority":0.5') == 400
        assert await status(b'{"priority":0.5,"x":' + b"[" * 100_000) == 400
        assert await status(b'{"kind":5,"x":"\xff"}') == 400
        assert await status('{"kind":"archive","dataset_ids":["a"],"dataset_ids.\u00b2":1}'.encode()) == 400
        assert await status(b" " * (4 << 20) + b"{}") == 413
        assert await status(b"{}", {"Content-Type": "text/plain"}) == 415
        assert await status(b"{}", {"Content-Type": "text/plain"}, "PATCH") == 415
        assert await status(b'{"MOVE_TO_LTS_LIMIT": 0}', method="PATCH") == 400
        assert await status(b'{"MOVE_TO_LTS_LIMIT": 3.0}', method="PATCH") == 200
        assert await status(b'{"MOVE_TO_LTS_LIMIT": 3.5}', method="PATCH") == 400
        assert (await client.get("/v1/limits")).json()["limits"][1]["slots"] == 3
        assert (await client.get("/v1/jobs", params={"limit": 0})).json()["errors"][0]["field"] == "limit"
        assert (await client.get("/nothing")).status_code == 404
        wrong = await client.put("/v1/jobs")
        assert (wrong.status_code, set(wrong.headers["Allow"].split(", "))) == (405, {"GET", "POST", "OPTIONS"})
        assert (await client.options("/v1/limits")).headers["Allow"] == "GET, OPTIONS, PATCH"
        for answer in (wrong, await client.get("/v1/jobs", headers={"X-Request-Id": "no\tgood; id"})):
            assert len(answer.headers["X-Request-Id"]) == 32


async def test_a_full_queue_is_429_and_a_stopping_daemon_503_each_with_a_time_to_come_back(
    config: EngineConfig,
) -> None:
    def steer(engine: Engine) -> Steered:
        steered = Steered(engine)
        steered.gate = anyio.Event()
        return steered

    jobs = service_config(config.scratch_folder, jobs_limit=1)
    async with open_service(config, jobs, steer) as service, serve(service) as served, browser(served) as client:
        assert (await client.post("/v1/jobs", json=ORDER)).status_code == 202
        full = await client.post("/v1/jobs", json=ORDER)
        service.close_intake()
        closed = await client.post("/v1/jobs", json=ORDER)
    assert (full.status_code, closed.status_code) == (429, 503)
    assert int(full.headers["Retry-After"]) > 0
    assert int(closed.headers["Retry-After"]) > 0
    assert full.json()["type"] == "urn:mover:error:QueueFullError"


async def read_events(client: httpx.AsyncClient, path: str, last: str = "") -> tuple[int, str]:
    headers = {"Last-Event-ID": last} if last else {}
    with anyio.fail_after(20):
        answer = await client.get(path, headers=headers)
    return answer.status_code, answer.text


async def test_events_have_ids_go_on_after_the_last_one_and_end_with_the_job(config: EngineConfig) -> None:
    async with open_service(config) as service, serve(service) as served, browser(served) as client:
        job, _ = await service.submit(JobOrder("archive", (DATASET,)), owner="ann")
        await ended(service, job.id)
        status, text = await read_events(client, f"/v1/jobs/{job.id}/events")
        ids = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
        assert status == 200
        assert ids == sorted(set(ids))
        assert text.split("\n\n")[-2].splitlines()[1] == "event: end"
        _, rest = await read_events(client, f"/v1/jobs/{job.id}/events", str(ids[1]))
        assert [int(line[4:]) for line in rest.splitlines() if line.startswith("id: ")] == ids[2:]
        _, by_query = await read_events(client, f"/v1/jobs/{job.id}/events?after={ids[1]}")
        assert by_query == rest
        assert await read_events(client, f"/v1/jobs/{job.id}/events", str(ids[-1])) == (204, "")
        assert (await read_events(client, "/v1/jobs/none/events"))[0] == 404
        assert (await read_events(client, f"/v1/jobs/{job.id}/events", "x"))[0] == 400


async def test_events_of_all_jobs_begin_with_now_whatever_number_a_reader_comes_back_with(held: Served) -> None:
    async with browser(held, **{"Last-Event-ID": "9" * 15}) as client:
        with anyio.fail_after(20):
            async with client.stream("GET", "/v1/events?after=999999999999999") as stream:
                job_id = (await client.post("/v1/jobs", json=ORDER)).json()["id"]
                data = [line async for line in _data(stream, 1)]
    assert f'"job_id":"{job_id}"' in data[0]


async def _data(stream: httpx.Response, count: int) -> AsyncIterator[str]:
    async for line in stream.aiter_lines():
        if line.startswith("data: "):
            yield line
            count -= 1
            if not count:
                return


@pytest.mark.slow
async def test_a_stream_without_news_is_kept_alive_and_ended_when_the_daemon_stops(held: Served) -> None:
    async with browser(held) as client:
        job_id = (await client.post("/v1/jobs", json=ORDER)).json()["id"]
        with anyio.fail_after(20):
            async with client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
                lines = stream.aiter_lines()
                async for line in lines:
                    if line == ": here":
                        break
                assert len(held.app.streams) == 1
                held.app.streams.close()
                async for _ in lines:
                    pass
        assert len(held.app.streams) == 0
        refused = await client.get(f"/v1/jobs/{job_id}/events")
    assert refused.status_code == 503


@pytest.mark.slow
async def test_a_reader_that_goes_leaves_no_stream_behind(held: Served) -> None:
    async with browser(held) as client, client.stream("GET", "/v1/events") as stream:
        assert stream.status_code == 200
        assert len(held.app.streams) == 1
    with anyio.fail_after(20):
        while len(held.app.streams):  # noqa: ASYNC110 - it looks from outside
            await anyio.sleep(0.01)


async def test_tokens_decide_who_reads_and_who_operates(config: EngineConfig) -> None:
    async with (
        open_service(config) as service,
        serve(service, TOKENS) as served,
        browser(served) as nobody,
        browser(served, READER) as reader,
        browser(served, OPERATOR) as operator,
    ):
        refused = await nobody.get("/v1/jobs")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="mover"')
        assert (await nobody.post("/v1/jobs", json=ORDER)).status_code == 401
        assert (await nobody.get("/schema/openapi.json")).status_code == 200
        assert (await reader.get("/v1/jobs")).status_code == 200
        for method, path in (("POST", "/v1/jobs"), ("PATCH", "/v1/limits"), ("DELETE", "/v1/jobs/x")):
            assert (await reader.request(method, path, json=ORDER)).status_code == 403
        job = (await operator.post("/v1/jobs", json=ORDER)).json()
        assert job["owner"] == "scicat"
        wrong = await nobody.get("/v1/jobs", headers={"Authorization": f"Bearer {OPERATOR}x"})
        assert OPERATOR not in wrong.text
        assert wrong.status_code == 401
        assert (await nobody.get("/v1/jobs", headers={"Cookie": f"mover_token={OPERATOR}"})).status_code == 401
        session = (await nobody.post("/login", data={"token": OPERATOR})).cookies["mover_token"]
        nobody.cookies.clear()
        cookie = {"Cookie": f"other=1; mover_token={session}"}
        assert (await nobody.get("/v1/jobs", headers=cookie)).status_code == 200
        assert (await nobody.delete(f"/v1/jobs/{job['id']}", headers=cookie)).status_code == 401
        basic = httpx.BasicAuth("scicat", OPERATOR)
        assert (await nobody.get("/v1/jobs", auth=basic)).status_code == 401


async def test_links_of_a_retrieval_are_for_those_who_may_operate(config: EngineConfig) -> None:
    async with (
        open_service(config) as service,
        serve(service, TOKENS) as served,
        browser(served, READER) as reader,
        browser(served, OPERATOR) as operator,
    ):
        archival = (await operator.post("/v1/jobs", json=ORDER)).json()
        assert (await ended(service, archival["id"])).state == "done"
        job = (await operator.post("/v1/jobs", json=ORDER | {"kind": "retrieve"})).json()
        assert (await ended(service, job["id"])).state == "done"
        path, query = f"/v1/jobs/{job['id']}", {"dataset_id": DATASET}
        whole = (await operator.get(path)).json()["datasets"][0]["report"]
        assert whole["objects"][0]["url"].startswith("http")
        assert whole["script"]
        for found in (
            (await reader.get(path)).json()["datasets"][0],
            (await reader.get(f"{path}/dataset", params=query)).json(),
        ):
            assert found["report"]["objects"][0] == whole["objects"][0] | {"url": ""}
            assert found["report"]["script"] == ""


async def _until_let_go(stream: ByteReceiveStream) -> None:
    with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await stream.receive()


async def test_connections_that_never_get_on_are_let_go_and_their_number_is_bounded(
    held: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PatientProtocol, "patience_s", 0.3)
    monkeypatch.setattr("mover.daemon_connections.CONNECTIONS", 6)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    begun = (b"", b"GET /livez HT", head + b"{")
    async with browser(held) as client, AsyncExitStack() as stack:
        job = (await client.post("/v1/jobs", json=ORDER)).json()
        events = await stack.enter_async_context(client.stream("GET", f"/v1/jobs/{job['id']}/events"))
        talk = [await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", held.port)) for _ in begun]
        for stream, text in zip(talk, begun, strict=True):
            await stream.send(text)
        for stream in talk:
            with anyio.fail_after(20):
                await _until_let_go(stream)
        monkeypatch.setattr(PatientProtocol, "patience_s", 600.0)  # nothing but their number lets these go
        more = [await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", held.port)) for _ in range(8)]
        with anyio.fail_after(20):
            await _until_let_go(more[-1])
        assert events.status_code == 200
        with anyio.fail_after(20):
            async for line in events.aiter_lines():  # it has been open all the time
                if line == ": here":
                    break
    assert "Traceback" not in caplog.text


async def test_pages_of_other_sites_order_nothing(held: Served) -> None:
    async with browser(held) as client:
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Host": "evil.example:8420"},
            {"Origin": "http://rebound.example", "Host": "rebound.example"},
        ):
            assert (await client.post("/v1/jobs", json=ORDER, headers=headers)).status_code == 403
        assert (await client.get("/v1/jobs")).json()["jobs"] == []
        own = {"Origin": held.url, "Sec-Fetch-Site": "same-origin"}
        assert (await client.post("/v1/jobs", json=ORDER, headers=own)).status_code == 202


async def test_the_document_describes_itself_and_its_page_needs_nothing_from_elsewhere(held: Served) -> None:
    async with browser(held) as client:
        document = (await client.get("/schema/openapi.json")).json()
        page = await client.get("/schema", headers={"Accept": "text/html"})
        as_json = await client.get("/schema", headers={"Accept": "application/json"})
    assert document["openapi"].startswith("3.1")
    assert as_json.json() == document
    assert set(document["paths"]["/v1/jobs"]["post"]["responses"]) >= {"202", "200", "400", "401", "403", "409", "413"}
    assert page.headers["Content-Type"].startswith("text/html")
    assert "//" not in page.text.replace("//json-schema", "")
    assert "<script" not in page.text


# ------------------------------------------------------------------------------------------------------- token files
def test_a_line_is_a_name_a_role_and_a_token_or_a_bare_token_that_operates(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# tokens\n\n  eye:read:{READER}\n{OPERATOR}\nnight: operate :with:colons:0123456\n")
    path.chmod(0o640)
    access = Access.from_file(path)
    assert access.holder(READER) == Caller("eye", "read")
    assert access.holder(OPERATOR) == Caller("operator", "operate")
    assert access.holder("with:colons:0123456") == Caller("night", "operate")
    assert access.holder("") is None
    assert READER not in repr(read_token_file(path))
    path.write_text("fresh-token-0123456789")
    access.reload()
    assert access.holder(READER) is None
    assert access.holder("fresh-token-0123456789") is not None
    path.write_text("")
    with pytest.raises(ConfigError):
        access.reload()
    assert access.holder("fresh-token-0123456789") is not None


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(OPERATOR)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod o-rw") as caught:
        Access.from_file(path)
    assert OPERATOR not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "# none", "a:admin:0123456789abcdef", ":read:0123456789abcdef", "x:0123456789abcdef"]
)
@pytest.mark.parametrize("prefix", ["", f"{READER}\n"])
def test_a_token_file_with_a_line_that_means_nothing_is_refused(text: str, prefix: str) -> None:
    if prefix and (not text or text.startswith("#")):
        assert len(parse_tokens(prefix + text, "a file")) == 1
        return
    with pytest.raises(ConfigError) as caught:
        parse_tokens(prefix + text, "a file")
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.parametrize("text", ["short", "with blank 0123456789", "ümlaut-0123456789abc", f"{READER}\n{READER}"])
def test_tokens_are_long_plain_and_there_once(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_tokens(text, "a file")
