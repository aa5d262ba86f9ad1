"""The interface against its own description: schemathesis makes 2,000 requests of the OpenAPI document and more.

By hand, against a daemon that runs: ``schemathesis run http://127.0.0.1:8420/schema/openapi.json``. It orders, cancels
and changes limits: never against one that is in use. The check ``use_after_free`` is left out: ``DELETE`` cancels a
job, which is shown for as long as it is kept.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from mover.daemon_scicat import CatalogueTrigger
from mover.engine import EngineConfig
from mover.parts import Buckets
from tests.datasets import make_config
from tests.http_daemons import serve
from tests.job_services import open_service
from tests.servers import S3Server, fresh_bucket

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(1800)]

_EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "2000"))  # fewer where time is short
_EXAMPLES_OF_EACH = min(100, max(1, _EXAMPLES // 20))  # of each operation, in one run


@pytest.fixture
def config(tmp_path: Path, moto_server: S3Server) -> Iterator[EngineConfig]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        yield make_config(tmp_path, moto_server, Buckets(one, two, three))


class _Ready:
    """Starts nothing, and says that it did."""

    async def start(self, kind: str, job_id: str) -> str:
        return f"{kind}-{job_id}"


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
