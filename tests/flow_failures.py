"""What tests of failures need: deployments and workers on the real server, a dataset whose move can be held.

``Deployment`` is a ``FlowWorld`` whose settings are Prefect Variables and Secret blocks, as in a facility, and whose S3
traffic passes a ``FaultProxy`` that runs in a thread of its own: tests wait without an event loop.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import anyio.from_thread
import msgspec
import pytest

from mover.catalogue import JobCatalogue
from mover.jobs_lifecycle import JobKind
from mover.model import archive_id, raw_files_prefix
from tests.datasets import random_bytes
from tests.engines import expect_same_files
from tests.faults import FaultProxy, Rule, StallReply, TrickleReply
from tests.flow_world import FlowWorld, until
from tests.prefect_servers import PrefectServer, PrefectWorker

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from flows.reconciliation import Action

__all__ = [
    "PID",
    "SIBLING",
    "Deployment",
    "deployment",
    "flow_processes",
    "held_move",
    "working",
]

ARCHIVAL_POOL, RETRIEVAL_POOL = "archival-docker-workpool", "retrieval-docker-workpool"
PID, SIBLING = "20.500.11935/hit", "20.500.11935/sibling"

_ROOT = Path(__file__).parent.parent
_ENTRYPOINTS = {
    "datasets_archival": ("flows/archive.py:archive_datasetlist", ARCHIVAL_POOL),
    "datasets_retrieval": ("flows/retrieve.py:retrieve_datasetlist", RETRIEVAL_POOL),
}
_FILE_BYTES = 330_000  # three in a datablock of 1 MiB, each large enough to be a window of its own
_ARRIVING = 2  # of the three
_SLOTS_BACK_S = 110.0  # a lease of 60 s, the sweep of the server, and a machine that is busy


class Deployment:
    """A facility's installation with everything real, and the hands of a test on it."""

    def __init__(self, world: FlowWorld, proxy: FaultProxy) -> None:
        self.world, self.proxy = world, proxy
        self.control = world.control

    # ----------------------------------------------------------------------------------------------------------- begin
    def add_held_dataset(self, dataset_id: str = PID, datablocks: int = 3) -> dict[str, bytes]:
        """A dataset whose last file never arrives, and whose last but one does so late enough for a checkpoint."""
        count = 3 * datablocks
        files = {f"frames/{index:02}.tif": random_bytes(_FILE_BYTES, index) for index in range(count)}
        self.proxy.rules += [
            Rule(StallReply(1000), "GET", f"{quote(dataset_id)}/raw_files/frames/{count - 1:02}", times=float("inf")),
            Rule(TrickleReply(2, 2.0), "GET", f"{quote(dataset_id)}/raw_files/frames/{count - 2:02}"),
        ]
        return self.world.add_dataset(dataset_id, files)

    def start_job(self, kind: JobKind = "archive", datasets: Sequence[str] = (PID,), job_id: str = "") -> str:
        """Orders a job in the catalogue and triggers it, as the catalogue's backend does."""
        from flows.runs import start_run

        job_id = job_id or self.control.seed_job(kind, datasets)
        self.ask(lambda client, _: start_run(client, kind, job_id, 1))
        return job_id

    def let_go(self) -> None:
        """The bytes flow again; what passed so far is forgotten."""
        self.proxy.rules.clear()
        self.proxy.seen.clear()

    # ------------------------------------------------------------------------------------------------------------ look
    def fetched(self, dataset_id: str = PID) -> list[str]:
        """Paths of the files that were asked for since ``let_go``, each once, sorted."""
        return list(self.fetches(dataset_id))

    def fetches(self, dataset_id: str = PID) -> dict[str, int]:
        """How often each file was asked for since ``let_go``."""
        mark = raw_files_prefix(dataset_id)
        paths = [seen.target.partition("?")[0].partition(mark)[2] for seen in self.proxy.seen if seen.method == "GET"]
        return dict(sorted(Counter(path for path in paths if path).items()))

    def manifests(self, dataset_id: str = PID) -> list[str]:
        """Names of the datablocks that are committed."""
        folder = (self.world.lts / archive_id(dataset_id, 1)).parent
        return sorted(path.name for path in folder.glob("*.json")) if folder.exists() else []

    def half_moved(self, number: int, dataset_id: str = PID) -> bool:
        """Whether the windows of both files that arrive are durable in a datablock."""
        path = self.world.scratch / "journal" / quote(dataset_id, safe="") / f"{number}.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last one may be half written
        entries = [msgspec.json.decode(line) for line in lines]
        done = {tuple(window[:2]) for entry in entries if entry["type"] == "windows" for window in entry["windows"]}
        return len(done) >= _ARRIVING

    def runs(self, job_id: str) -> list[FlowRun]:
        """The runs of a job, oldest first."""
        from flows.runs import runs_of_job

        kind: JobKind = "archive" if self.world.job(job_id)["type"] == "archive" else "retrieve"
        found: list[FlowRun] = self.ask(lambda client, _: runs_of_job(client, kind, job_id))
        return found

    def states(self, job_id: str) -> list[str]:
        """Names of the states of a job's runs, oldest first."""
        return [run.state_name or "" for run in self.runs(job_id)]

    def status(self, job_id: str) -> tuple[str, str]:
        """Status code and message of a job."""
        job = self.world.job(job_id)
        return job["statusCode"], job["statusMessage"]

    def told(self, dataset_id: str = PID, field: str = "archiveReturnMessage") -> dict[str, Any]:
        """What the catalogue tells the scientist."""
        return dict(self.control.lifecycle(dataset_id)[field])

    def shown(self, dataset_id: str = PID) -> tuple[bool, bool, str]:
        """What the frontend reads: archivable, retrievable, archiveStatusMessage."""
        now = self.control.lifecycle(dataset_id)
        return now["archivable"], now["retrievable"], now["archiveStatusMessage"]

    def history(self, dataset_id: str = PID) -> list[tuple[bool, bool, str]]:
        """All that ``shown`` ever gave, without repetitions."""
        found: list[tuple[bool, bool, str]] = []
        for change in self.control.history("lifecycle", dataset_id):
            after = change.after
            item = after["archivable"], after["retrievable"], after["archiveStatusMessage"]
            if found[-1:] != [item]:
                found.append(item)
        return found

    # -------------------------------------------------------------------------------------------------------------- do
    def ask(self, call: Callable[[PrefectClient, JobCatalogue], Any]) -> Any:  # noqa: ANN401 - what the call gives
        """What a call of the flows' own modules comes to."""
        from prefect.client.orchestration import get_client

        from flows.services import open_catalogue

        async def asked() -> Any:  # noqa: ANN401
            async with open_catalogue() as catalogue, get_client() as client:
                return await call(client, catalogue)

        return anyio.run(asked)

    def reconcile(self) -> list[Action]:
        """Runs the reconciler once."""
        from flows.reconciliation import reconcile_all

        actions: list[Action] = self.ask(reconcile_all)
        return actions

    def cancel(self, run: FlowRun) -> None:
        """Asks for the end of a run, as the button of Prefect's UI does."""
        from prefect.states import Cancelling

        self.ask(lambda client, _: client.set_flow_run_state(run.id, Cancelling()))

    def trigger_by_hand(self, job_id: str) -> FlowRun:
        """A run that nobody keeps from being the second one of its job."""
        from flows.runs import start_run

        run: FlowRun = self.ask(lambda client, _: start_run(client, "archive", job_id, 99))
        return run

    def wait_for_end(self, job_id: str, timeout_s: float = 150.0) -> None:
        """Returns when the job has ended and none of its runs is alive."""
        what = f"the end of job {job_id}"
        try:
            until(lambda: self.status(job_id)[0].startswith("finished"), timeout_s, what)
            until(lambda: all(run.state and run.state.is_final() for run in self.runs(job_id)), 30, what)
        except BaseException:
            self.explain(job_id)
            raise

    def explain(self, job_id: str) -> None:
        """Prints what a failed test has to be understood from."""
        print(self.status(job_id), self.history(), self.states(job_id))  # noqa: T201 - pytest shows it of failures
        for run in self.runs(job_id):
            print(run.id, run.state)  # noqa: T201
        for log in self.world.prefect.home.glob("worker-*.log"):
            print(log.read_text(encoding="utf-8", errors="replace")[-6000:])  # noqa: T201

    # ---------------------------------------------------------------------------------------------------------- expect
    def expect_archived(self, job_id: str, files: Mapping[str, bytes], dataset_id: str = PID) -> None:
        """Byte for byte on the LTS, registered once, shown as such, released, the job successful."""
        assert self.shown(dataset_id) == (False, True, "datasetOnArchiveDisk")
        assert self.status(job_id)[0] == "finishedSuccessful"
        expect_same_files(self.world.lts, files, dataset_id)
        registered = [block["archiveId"] for block in self.control.datablocks(dataset_id)]
        assert sorted(registered) == [archive_id(dataset_id, number + 1) for number in range(len(registered))]
        assert len(registered) == len(self.manifests(dataset_id))
        assert self.world.source_keys(dataset_id) == []
        self.expect_no_leftovers(dataset_id)

    def expect_no_leftovers(self, dataset_id: str = PID) -> None:
        """No journal, no unfinished file, and nobody holds the dataset."""
        from mover.streams.lts_lock import lock_dataset
        from mover.streams.lts_mount import probe_mount

        folder = (self.world.lts / archive_id(dataset_id, 1)).parent
        assert [path.name for path in folder.iterdir() if path.suffix not in {".tar", ".json"}] == [".lock"]
        assert not (self.world.scratch / "journal" / quote(dataset_id, safe="")).exists()
        with lock_dataset(folder, dataset_id, "a test", probe_mount(self.world.lts)):
            pass

    def expect_slots_back(self) -> None:
        """All slots of all limits come back without anybody's help."""
        until(lambda: not any(self.world.taken_slots().values()), _SLOTS_BACK_S, "the slots")


@contextmanager
def working(server: PrefectServer, pool: str = ARCHIVAL_POOL) -> Iterator[PrefectWorker]:
    """A worker of a pool; what it leaves is ended with the server."""
    with PrefectWorker(server, pool) as worker:
        yield worker


def flow_processes(run: FlowRun) -> list[int]:
    """Ids of the processes that execute a flow run, the outermost first."""
    mark = re.compile(rb"PREFECT__FLOW_RUN_ID=" + str(run.id).encode())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ, state = (folder / "environ").read_bytes(), (folder / "stat").read_bytes()
        except OSError:
            continue
        if mark.search(environ) and b") Z " not in state:
            found.append(int(folder.name))
    return sorted(found)


def held_move(deployment: Deployment, job_id: str, datablocks: int = 3, dataset_id: str = PID) -> FlowRun:
    """Waits until all but the last datablock are committed and the last one is half moved; returns the running run."""

    def held() -> list[FlowRun]:
        if len(deployment.manifests(dataset_id)) < datablocks - 1 or not deployment.half_moved(datablocks, dataset_id):
            return []
        return [run for run in deployment.runs(job_id) if run.state_name == "Running"]

    try:
        return until(held, 90, "the move to be held")[0]
    except BaseException:
        deployment.explain(job_id)
        raise


@pytest.fixture
def deployment(flow_world: FlowWorld, tmp_path: Path) -> Iterator[Deployment]:
    with anyio.from_thread.start_blocking_portal() as portal:
        proxy = FaultProxy(flow_world.s3.endpoint_url)
        with portal.wrap_async_context_manager(proxy):
            _configure(flow_world, proxy.url, tmp_path)
            yield Deployment(flow_world, proxy)


def _configure(world: FlowWorld, s3_url: str, folder: Path) -> None:
    """Variables, secrets, limits, pools and the automation as the deployment's own step writes them; deployments."""
    from flows.configure import configure
    from flows.settings import SECRET_BLOCKS

    settings: dict[str, str] = {**world.settings, "MINIO_ENDPOINT": s3_url}
    environ = {"WORK_POOL_TYPE": "process"}
    for name in SECRET_BLOCKS:
        path = folder / name
        path.write_text(settings.pop(name), encoding="utf-8")
        environ[f"{name}_FILE"] = str(path)
    toml = folder / "vars.toml"
    toml.write_text(_toml(settings), encoding="utf-8")
    anyio.run(configure, [toml], environ)
    anyio.run(_deploy)


def _toml(settings: Mapping[str, str]) -> str:
    """A file of variables with a section for each prefix of names, as the documented one."""
    sections: dict[str, list[str]] = {}
    for name, value in settings.items():
        text = value if value.isdigit() else msgspec.json.encode(value).decode()
        sections.setdefault(name.partition("_")[0].lower(), []).append(f"{name} = {text}")
    return "".join("\n".join([f"[{section}]", *lines, ""]) for section, lines in sections.items())


async def _deploy() -> None:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        for name, (entrypoint, pool) in _ENTRYPOINTS.items():
            flow_id = await client.create_flow_from_name(entrypoint.partition(":")[2])
            await client.create_deployment(
                flow_id,
                name,
                entrypoint=entrypoint,
                work_pool_name=pool,
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(_ROOT)}}],
                parameter_openapi_schema={"type": "object", "properties": {}},
            )
