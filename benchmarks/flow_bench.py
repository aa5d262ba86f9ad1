"""What the benchmark of the flows stands on: the servers, a worker, jobs, and moves as the LTS folder shows them."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self
from uuid import UUID

import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal
from prefect.client.schemas.objects import FlowRun

from benchmarks.support import MIB, Server, fresh_folder
from flows.archive import archive_datasetlist
from mover.model import dataset_folder
from tests.datasets import random_bytes
from tests.faults import FaultProxy, Rule, TrickleReply
from tests.flow_world import FlowWorld
from tests.prefect_servers import PrefectServer, PrefectWorker
from tests.scicat_fake.server import running_server
from tests.servers import S3Server, fresh_bucket

__all__ = ["FlowBench", "Move", "MoveWatch", "open_flow_bench"]

_ROOT = Path(__file__).parent.parent
_POOL = "benchmark"
_POLL_S = 0.005
_WRITTEN = re.compile(r"\.tar\.[0-9a-f]{16}\.part$")  # the temporary name of a datablock; manifests have one, too
_PIECES = 8
_ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_RUN_TIMEOUT_S = 900.0


class Move(msgspec.Struct, frozen=True):
    """One datablock on its way: from the appearance of its temporary file to the rename; Unix times."""

    began_s: float
    ended_s: float

    @property
    def length_s(self) -> float:
        """How long it took."""
        return self.ended_s - self.began_s


class MoveWatch:
    """Looks at a dataset's folder on the LTS every 5 ms, in a thread, from outside of the processes that write."""

    def __init__(self, lts: Path, dataset_id: str) -> None:
        self._folder = lts / dataset_folder(dataset_id) / "datablocks"
        self._open: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="move-watch")
        self.moves: list[Move] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def gaps(self, slots: int) -> list[float]:
        """Seconds between the end of a move and the begin of the next one in the same slot, of ``slots`` slots."""
        free_since: list[float] = []
        found: list[float] = []
        for number, move in enumerate(sorted(self.moves, key=lambda item: item.began_s)):
            if number >= slots:
                freed_s = min(free_since)
                free_since.remove(freed_s)
                found.append(max(move.began_s - freed_s, 0.0))  # below 0: both within one look at the folder
            free_since.append(move.ended_s)
        return found

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            now = time.time()
            try:
                found = {path.name for path in self._folder.iterdir() if _WRITTEN.search(path.name)}
            except FileNotFoundError:
                continue
            for name in found - self._open.keys():
                self._open[name] = now
            for name in self._open.keys() - found:
                self.moves.append(Move(self._open.pop(name), now))


class FlowBench:
    """A world with a worker and an S3 that can be made slow."""

    def __init__(self, world: FlowWorld, proxy: FaultProxy, portal: BlockingPortal, deployment_id: UUID) -> None:
        self.world, self._proxy, self._portal, self._deployment_id = world, proxy, portal, deployment_id
        self._datasets = 0

    def throttle(self, move_s: float) -> None:
        """The body of every object takes so long from now on; 0: no longer than it needs."""
        pace = TrickleReply(_PIECES, move_s / _PIECES)
        rules = [Rule(pace, method="GET", target="/raw_files/", times=math.inf)] if move_s else []
        self._portal.call(self._proxy.rules.__setitem__, slice(None), rules)

    def add_job(self, datablocks: int) -> tuple[str, str]:
        """A new dataset of so many datablocks of 1 MiB, and a job that archives it: (dataset, job)."""
        self._datasets += 1
        dataset_id = f"bench/{self._datasets}"
        pattern = random_bytes(MIB, self._datasets)
        files = {f"{number:04}.bin": number.to_bytes(8, "big") + pattern[8:] for number in range(datablocks)}
        self.world.add_dataset(dataset_id, files)
        return dataset_id, self.world.control.seed_job("archive", [dataset_id])

    def first_requests(self) -> tuple[Future[float], Future[float]]:
        """Futures: when S3 is asked for anything from now on, and for the first byte of an object."""
        count = len(self._proxy.seen)

        async def when(path: str) -> float:
            await self._proxy.wait_until(lambda: any(path in seen.target for seen in self._proxy.seen[count:]))
            return time.time()

        return self._portal.start_task_soon(when, ""), self._portal.start_task_soon(when, "/raw_files/")

    def run_flow(self, job_id: str) -> FlowRun:
        """Orders the run of a job from the worker and waits for its end.  Exits when it fails."""
        with self.world.client() as client:
            run = client.create_flow_run_from_deployment(self._deployment_id, parameters={"job_id": job_id})
            deadline = time.monotonic() + _RUN_TIMEOUT_S
            while run.state_type is None or run.state_type.value not in _ENDED:
                if time.monotonic() > deadline:
                    sys.exit(f"the run of job {job_id} does not end")
                time.sleep(0.5)
                run = client.read_flow_run(run.id)
        if run.state_name != "Completed":
            sys.exit(f"the run of job {job_id} is {run.state_name}")
        return run

    def run_child(self, *arguments: str) -> bytes:
        """What a process of this benchmark prints, which finds the world's settings in its environment."""
        command = [sys.executable, "-m", "benchmarks.prefect_overhead", *arguments]
        environ = {**self.world.environ, "PREFECT_LOGGING_LEVEL": "WARNING"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=_ROOT, env=environ)
        return done.stdout

    def job_finished_s(self, job_id: str) -> float:
        """When the catalogue was told the end of a job; Unix time.  Exits when it has another end than success."""
        last = self.world.control.history("job", job_id)[-1]
        if last.after["statusCode"] != "finishedSuccessful":
            sys.exit(f"job {job_id} is {last.after['statusCode']}")
        return last.at_s


@contextmanager
def open_flow_bench(server: Server, target: str) -> Iterator[FlowBench]:
    """A Prefect server with the deployment's settings, a worker, SciCat's fake, and S3 behind a proxy."""
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(target))
        s3 = S3Server("rgw", server.endpoint_url, server.access_key, server.secret_key)
        scicat = stack.enter_context(running_server())
        portal = stack.enter_context(start_blocking_portal())
        proxy = stack.enter_context(portal.wrap_async_context_manager(FaultProxy(s3.endpoint_url)))
        prefect = PrefectServer(folder / "prefect")
        stack.callback(prefect.kill_all)
        prefect.start()
        world = FlowWorld(folder, s3, lambda: stack.enter_context(fresh_bucket(s3)), scicat, prefect)
        world.settings["MINIO_ENDPOINT"] = proxy.url
        world.set_limits()
        deployment_id = _deploy(world)
        stack.enter_context(PrefectWorker(prefect, _POOL, world.environ))
        yield FlowBench(world, proxy, portal, deployment_id)


def _deploy(world: FlowWorld) -> UUID:
    from prefect.client.schemas.actions import WorkPoolCreate

    with world.client() as client:
        client.create_work_pool(WorkPoolCreate(name=_POOL, type="process"))
        return client.create_deployment(
            flow_id=client.create_flow(archive_datasetlist),
            name="benchmark",
            work_pool_name=_POOL,
            entrypoint="flows/archive.py:archive_datasetlist",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(_ROOT)}}],
            enforce_parameter_schema=False,
        )
