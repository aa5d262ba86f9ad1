"""Archives and retrieves a dataset through Prefect on this machine: ``python -m tests.flows_demo``, ``make flows``.

Starts an S3 server, the catalogue's stand-in, a Prefect server and two workers; configures and deploys as an
administrator does; runs the deployment ``end_to_end_test`` and prints what the catalogue shows meanwhile. Everything is
ended and removed afterwards, or with ``--keep`` when Enter is pressed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mover.shown import seconds_text
from tests.prefect_servers import PrefectServer, PrefectWorker
from tests.scicat_fake.control import Control
from tests.scicat_fake.server import ScicatServer, running_server
from tests.servers import S3Server, moto, s3_client

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

__all__ = ["main"]

_POOLS = ("archival-docker-workpool", "retrieval-docker-workpool")
_BUCKETS = ("landingzone", "staging", "retrieval")
_PARAMETERS = {"file_count": 40, "file_kib": 256}
_TIMEOUT_S = 300.0
_ROOT = Path(__file__).parent.parent


class _Clock:
    """Prints lines with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{self.elapsed_s:6.1f} s  {text}", flush=True)  # noqa: T201 - a command

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.flows_demo", description="Archives through Prefect.")
    parser.add_argument("--keep", action="store_true", help="leave all servers running until Enter is pressed")
    options = parser.parse_args()
    clock = _Clock()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mover-flows-")))
        s3 = stack.enter_context(moto(folder))
        scicat = stack.enter_context(running_server())
        server = stack.enter_context(_prefect(folder))
        clock.say(f"S3 {s3.endpoint_url}, catalogue {scicat.url}, Prefect {server.url.removesuffix('/api')}")
        environ = _settings(folder, s3, scicat)
        _show(clock, server, environ, "flows.configure", "--config", str(folder / "vars.toml"))
        _show(clock, server, environ, "flows.deploy")
        for pool in _POOLS:
            stack.enter_context(PrefectWorker(server, pool))
        clock.say(f"two workers: {', '.join(_POOLS)}")
        run = _end_to_end(clock, server, scicat.control)
        done = run.state is not None and run.state.is_completed() and _reconciled(clock, server)
        verdict = "done" if done else "FAILED"
        clock.say(f"{verdict} in {seconds_text(clock.elapsed_s)}: {run.state.message if run.state else ''}")
        if options.keep:
            input(f"Prefect's UI: {server.url.removesuffix('/api')} (Enter ends everything) ")
    return 0 if done else 1


@contextmanager
def _prefect(folder: Path) -> Iterator[PrefectServer]:
    server = PrefectServer(folder / "prefect")
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.kill_all()


def _settings(folder: Path, s3: S3Server, scicat: ScicatServer) -> dict[str, str]:
    """Writes what an administrator writes, settings and secrets; returns the environment that names the files."""
    with s3_client(s3) as client:
        for bucket in _BUCKETS:
            client.create_bucket(Bucket=bucket)
    (folder / "lts").mkdir()
    (folder / "vars.toml").write_text(
        f"""
[archiver]
ARCHIVER_SCRATCH_FOLDER = "{folder}/scratch"
ARCHIVER_TARGET_SIZE_MB = 2

[lts]
LTS_STORAGE_ROOT = "{folder}/lts"
LTS_FREE_SPACE_PERCENTAGE = 1

[minio]
MINIO_ENDPOINT = "{s3.endpoint_url}"
MINIO_REGION = "{s3.region}"

[scicat]
SCICAT_ENDPOINT = "{scicat.url}"

[mover]
MOVER_BUFFER_MB = 64
""",
        encoding="utf-8",
    )
    secrets = {
        "MINIO_USER": s3.access_key,
        "MINIO_PASSWORD": s3.secret_key,
        "SCICAT_USER": scicat.user,
        "SCICAT_PASSWORD": scicat.password,
    }
    environ = {}
    for name, value in secrets.items():
        path = folder / f"{name.lower()}.txt"
        path.touch(mode=0o600)
        path.write_text(value, encoding="utf-8")
        environ[f"{name}_FILE"] = str(path)
    pools = dict(zip(("ARCHIVAL_WORK_POOL", "RETRIEVAL_WORK_POOL"), _POOLS, strict=True))
    return {**environ, **pools, "WORK_POOL_TYPE": "process", "FLOWS_DIRECTORY": str(_ROOT)}


def _show(clock: _Clock, server: PrefectServer, environ: dict[str, str], *command: str) -> None:
    clock.say(f"python -m {' '.join(command)}")
    done = server.run("-m", *command, environ=environ)
    for line in done.stdout.splitlines():
        clock.say(f"  {line}")
    if done.returncode:
        sys.exit(f"python -m {command[0]} ended with {done.returncode}:\n{done.stderr}")


def _end_to_end(clock: _Clock, server: PrefectServer, control: Control) -> FlowRun:
    """Runs the deployment and prints every change in the catalogue until it has ended."""
    from prefect.client.orchestration import get_client

    shown = 0
    with server.client_settings(), get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("end_to_end_test/end_to_end_test")
        run = client.create_flow_run_from_deployment(deployment.id, parameters=_PARAMETERS)
        clock.say(f"flow run {run.name}: {server.url.removesuffix('/api')}/runs/flow-run/{run.id}")
        while True:
            run = client.read_flow_run(run.id)
            history = control.history()
            for change in history[shown:]:
                clock.say(_told(change.kind, change.id, change.after))
            shown = len(history)
            if (run.state is not None and run.state.is_final()) or clock.elapsed_s > _TIMEOUT_S:
                return run
            time.sleep(0.2)


def _reconciled(clock: _Clock, server: PrefectServer) -> bool:
    """Whether the reconciliation that the deployment started has come to its end."""
    from prefect.client.orchestration import get_client

    with server.client_settings(), get_client(sync_client=True) as client:
        runs = [run for run in client.read_flow_runs(limit=200) if run.name.startswith("reconcile")]
        for run in runs:
            clock.say(f"flow run {run.name}: {run.state_name}, {run.state.message if run.state else ''}")
    return any(run.state is not None and run.state.is_completed() for run in runs)


def _told(kind: str, document_id: str, after: dict[str, object]) -> str:
    if kind == "job":
        return f"catalogue: job {document_id[:8]} {after['statusCode']}: {after['statusMessage']}"
    if kind == "lifecycle":
        return (
            f"catalogue: {document_id} archivable={after['archivable']} retrievable={after['retrievable']}"
            f" archive={after['archiveStatusMessage']!r} retrieve={after['retrieveStatusMessage']!r}"
        )
    return f"catalogue: {kind} {document_id}"


if __name__ == "__main__":
    sys.exit(main())
