"""The interface against its own description: schemathesis makes 2,000 requests of the daemon's document and more.

By hand, against a daemon that runs: ``schemathesis run http://127.0.0.1:8420/schema/openapi.json``. It orders, cancels
and changes limits: never against one that is in use. The check ``use_after_free`` is left out: ``DELETE`` cancels a
job, which is shown for as long as it is kept.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import jsonschema
import pytest

from mover.api import JobOptions, JobOrder
from mover.daemon_http_bodies import BodyError, check_order
from mover.daemon_scicat import CatalogueTrigger
from mover.engine import EngineConfig
from tests.datasets import fresh_buckets, make_config
from tests.http_daemons import Served, browser, serve
from tests.job_services import open_service
from tests.servers import S3Server

pytestmark = pytest.mark.anyio

READINGS = {"/livez", "/readyz", "/metrics", "/v1/jobs", "/v1/limits", "/v1/events", "/v1/scicat/jobs"}

_EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "2000"))  # fewer where time is short
_EXAMPLES_OF_EACH = min(100, max(1, _EXAMPLES // 20))  # of each operation, in one run


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_buckets(moto_server) as buckets:
        yield make_config(tmp_path, moto_server, buckets)


class _Ready:
    """Starts nothing, and says that it did."""

    async def start(self, kind: str, job_id: str) -> str:
        return f"{kind}-{job_id}"


async def _told(served: Served, method: str, path: str, **more: Any) -> tuple[httpx.Response, dict[str, Any]]:  # noqa: ANN401
    """An answer, and what the document says of it; headers and body are as it says."""
    async with browser(served) as client:
        document = (await client.get("/schema/openapi.json")).json()
        answer = await client.request(method, path.replace("{job_id}", "x"), **more)
    said = document["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in said, (method, path, answer.status_code, sorted(said))
    described = said[str(answer.status_code)]
    assert {name for name, header in described["headers"].items() if header.get("required")} <= {
        "-".join(part.capitalize() for part in name.split("-")) for name in answer.headers
    }
    kind, *parameters = answer.headers["Content-Type"].split("; ")
    assert len(parameters) == len(set(parameters))
    schema = described["content"][kind]["schema"]
    value = answer.json() if "json" in kind else answer.text
    jsonschema.validate(value, schema | {"components": document["components"]})
    return answer, document


async def test_without_an_engine_every_path_answers_as_the_document_says() -> None:
    async with CatalogueTrigger.open(_Ready()) as trigger, serve(None, scicat=trigger) as served:
        _, document = await _told(served, "GET", "/livez")
        assert set(document["paths"]) >= READINGS
        codes = {}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                body: dict[str, Any] = {"id": "1", "type": "archive"} if "scicat" in path else {}
                if path == "/v1/jobs":
                    body = {"kind": "plan", "dataset_ids": ["20.500/x"]}
                more: dict[str, Any] = {"json": body} if "requestBody" in operation else {}
                params = {"dataset_id": "20.500/x"} if path.endswith("/dataset") else {}
                answer, _ = await _told(served, method.upper(), path, params=params, **more)
                codes[f"{method} {path}"] = answer.status_code
    assert {code for name, code in codes.items() if "/v1/" in name and "scicat" not in name} == {503}


async def test_names_of_files_are_described_as_they_are_taken() -> None:
    async with serve(None) as served:
        _, document = await _told(served, "GET", "/livez")
    order = document["components"]["schemas"]["RetrieveFilesOrder"]["properties"]
    described = order["options"]["properties"]["files"]["items"]
    assert (described["minLength"], described["maxLength"]) == (1, 4096)
    pattern = re.compile(described["pattern"])
    for length in range(1, 7):
        for letters in itertools.product("a./\n", repeat=length):
            name = "".join(letters)
            try:
                await check_order(JobOrder("retrieve", ("20.500/x",), JobOptions(files=(name,))))
            except BodyError:
                assert not pattern.search(name), name
            else:
                assert pattern.search(name), name


async def test_health_is_told_as_it_is_described_to_programs_and_as_text() -> None:
    async with serve(None) as served:
        for ready in (True, False):
            served.health.report("s3", "ok" if ready else "failed", "three buckets", latency_s=0.02)
            answer, _ = await _told(served, "GET", "/readyz")
            assert (answer.status_code, answer.json()["ready"]) == (200 if ready else 503, ready)
            answer, _ = await _told(served, "GET", "/readyz", headers={"Accept": "text/plain"})
            assert answer.text.startswith("ready: " if ready else "not ready: ")
        answer, _ = await _told(served, "GET", "/metrics")
        assert answer.headers["Content-Type"].count("charset") == 1
        answer, _ = await _told(served, "GET", "/livez", headers={"Host": "elsewhere.example"})
        assert answer.status_code == 403


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_request_of_the_document_fails_or_gets_an_answer_that_is_not_in_it(
    config: EngineConfig, tmp_path: Path
) -> None:
    made = 0
    async with (
        open_service(config) as service,
        CatalogueTrigger.open(_Ready()) as trigger,
        serve(service, scicat=trigger, heartbeat_s=0.2) as served,
    ):
        tasks_end = anyio.Event()

        async def end_streams() -> None:
            """Streams without an end are ended, as the daemon's end would."""
            while not tasks_end.is_set():
                await anyio.sleep(0.3)
                served.app.streams.interrupt()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_streams)
            seed = 0
            while made < _EXAMPLES:
                seed += 1
                done = await anyio.run_process(_command(served.url, seed), check=False, cwd=tmp_path)
                said = done.stdout.decode() + done.stderr.decode()
                assert done.returncode == 0, said[-12_000:]
                made += int((re.search(r"([0-9]+) generated", said) or ["", "0"])[1])
            tasks_end.set()


def _command(url: str, seed: int) -> list[str]:
    return [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/schema/openapi.json"),
        *("--max-examples", str(_EXAMPLES_OF_EACH), "--seed", str(seed)),
        *("--exclude-checks", "use_after_free", "--no-color"),
    ]
