"""Datasets, jobs and flow runs of a deployment on a Docker engine, and a link to its S3 server that a test can hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from mover.model import archive_id, raw_files_prefix
from tests.datasets import random_bytes, upload
from tests.deployments import Deployment, docker
from tests.engines import read_tar
from tests.flow_world import LIMITS, until
from tests.servers import object_keys

__all__ = ["HELD", "LARGE", "MIB", "SMALL", "Facility", "Link", "linked"]

MIB: Final = 1 << 20
WINDOW_MIB: Final = 64
_LINK_SCRIPT: Final = Path(__file__).parent / "deployment_link.py"
_TAGS: Final = {
    "LTS_FREE_LIMIT": "tag:wait-for-free-space-in-lts",
    "MOVE_TO_LTS_LIMIT": "tag:move-to-lts",
    "VERIFY_LTS_LIMIT": "tag:verify-lts",
    "LTS_TO_RETRIEVAL_LIMIT": "tag:lts-to-retrieval",
}
_DEPLOYMENTS: Final = {
    "archive": "archive_datasetlist/datasets_archival",
    "retrieve": "retrieve_datasetlist/datasets_retrieval",
    "reconcile": "reconcile/reconciliation",
}
SMALL: Final = {"frames/1.tif": 9 * MIB, "frames/2.tif": 9 * MIB, "frames/3.tif": 3 * MIB, "frames/4.tif": 3 * MIB + 1}
LARGE: Final = {"frames/1.tif": 9 * MIB, "frames/2.tif": 9 * MIB, "large.bin": (WINDOW_MIB + 2) * MIB}
"""Sizes of files in two datablocks of at most 20 MiB; the second one has two windows."""

HELD: Final = ("frames/4.tif", f"large.bin bytes={WINDOW_MIB * MIB}-")
"""The last windows of both kinds of dataset, as the link names their requests."""


class Facility:
    """What people of a facility do with a deployment, and what they see."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.lts, self._scratch = deployment.volume("lts-mock-volume"), deployment.volume("scratch")

    # ------------------------------------------------------------------------------------------------------------- do
    def add_dataset(self, dataset_id: str, sizes: Mapping[str, int] = SMALL) -> dict[str, bytes]:
        """Uploads files of these sizes (bytes by path) and lists them in the catalogue; returns them."""
        files = {path: random_bytes(size, hash(f"{dataset_id}/{path}")) for path, size in sizes.items()}
        upload(self.deployment.s3, "landingzone", files, dataset_id)
        self.deployment.catalogue("POST", "/fake/datasets", {"pid": dataset_id, "files": dict(sizes)})
        return files

    def order(self, kind: str, dataset_ids: Sequence[str]) -> str:
        """A job in the catalogue and the flow run that its backend triggers; returns the job's id."""
        job = {"kind": kind, "datasets": list(dataset_ids)}
        job_id = str(self.deployment.catalogue("POST", "/fake/jobs", job)["id"])
        self._start(kind, {"job_id": job_id}, f"{kind} job {job_id}", f"{kind}/{job_id}/1")
        return job_id

    def reconcile(self) -> None:
        """Runs the deployment ``reconciliation`` and waits for its end."""
        run_id = self._start("reconcile", {}, "reconcile by a test")["id"]

        def ended() -> str:
            state = self.deployment.api("GET", f"/flow_runs/{run_id}")["state"]
            return str(state["type"]) if state["type"] not in {"SCHEDULED", "PENDING", "RUNNING"} else ""

        # Only one runs at a time; the scheduled one does the same.
        assert until(ended, 120, "the reconciler") in {"COMPLETED", "CANCELLED"}

    def _start(self, kind: str, parameters: Mapping[str, Any], name: str, key: str = "") -> Any:  # noqa: ANN401
        deployment = self.deployment.api("GET", f"/deployments/name/{_DEPLOYMENTS[kind]}")
        body = {"parameters": dict(parameters), "name": name, "state": {"type": "SCHEDULED"}}
        if key:
            body["idempotency_key"] = key
        return self.deployment.api("POST", f"/deployments/{deployment['id']}/create_flow_run", body)

    def set_variable(self, name: str, value: object) -> None:
        """A setting of later flow runs, as an administrator sets it in the UI."""
        self.deployment.api("PATCH", f"/variables/name/{name.lower()}", {"value": value})

    def set_limit(self, name: str, slots: int) -> None:
        """A limit, from now on."""
        self.deployment.api("PATCH", f"/v2/concurrency_limits/{_TAGS[name]}", {"limit": slots})

    def set_pool_limit(self, pool: str, runs: int) -> None:
        """How many flow runs of a work pool there may be at a time."""
        self.deployment.api("PATCH", f"/work_pools/{pool}", {"concurrency_limit": runs})

    # ----------------------------------------------------------------------------------------------------------- look
    def runs(self, job_id: str) -> list[dict[str, Any]]:
        """The flow runs of a job, oldest first."""
        body = {"flow_runs": {"name": {"like_": job_id}}, "limit": 200}
        found = self.deployment.api("POST", "/flow_runs/filter", body)
        return sorted((run for run in found if run["deployment_id"]), key=lambda run: str(run["created"]))

    def states(self, job_id: str) -> list[str]:
        """Names of the states of a job's runs, oldest first."""
        return [run["state_name"] for run in self.runs(job_id)]

    def job(self, job_id: str) -> Any:  # noqa: ANN401 - any JSON
        """The catalogue's job."""
        return self.deployment.catalogue("GET", f"/api/v4/jobs/{job_id}")

    def lifecycle(self, dataset_id: str) -> tuple[bool, bool, str]:
        """What the frontend reads: archivable, retrievable, archiveStatusMessage."""
        now = self.deployment.catalogue("GET", f"/api/v3/datasets/{quote(dataset_id, safe='')}")["datasetlifecycle"]
        return now["archivable"], now["retrievable"], now["archiveStatusMessage"]

    def taken_slots(self) -> dict[str, int]:
        """Slots in use, by the documented names."""
        found = self.deployment.api("POST", "/v2/concurrency_limits/filter", {"limit": 200})
        taken = {limit["name"]: limit["active_slots"] for limit in found}
        return {name: taken[_TAGS[name]] for name in LIMITS}

    def folder(self, dataset_id: str) -> Path:
        """Where the datablocks of a dataset are."""
        return (self.lts / archive_id(dataset_id, 1)).parent

    def journal(self, dataset_id: str) -> Path:
        """Where the progress of a dataset is kept."""
        return self._scratch / "journal" / quote(dataset_id, safe="")

    def half_moved(self, dataset_id: str) -> bool:
        """Whether one datablock is committed and one window of the second one is durable."""
        journal = self.journal(dataset_id) / "2.jsonl"
        manifests = list(self.folder(dataset_id).glob("*.json")) if self.folder(dataset_id).exists() else []
        return len(manifests) == 1 and journal.exists() and '"type":"windows"' in journal.read_text(encoding="utf-8")

    def logs(self, job_id: str) -> list[str]:
        """What the runs of a job logged."""
        ids = [run["id"] for run in self.runs(job_id)]
        body = {"logs": {"flow_run_id": {"any_": ids}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        return [entry["message"] for entry in self.deployment.api("POST", "/logs/filter", body)][::-1]

    # ----------------------------------------------------------------------------------------------------------- wait
    def wait_until_held(self, job_id: str, dataset_id: str) -> str:
        """Until the move stands where the link holds it; returns the id of the runtime container."""
        try:
            until(lambda: self.half_moved(dataset_id), 120, f"the held move of {dataset_id}")
        except BaseException:
            self.explain(job_id)
            raise
        return self.deployment.runtime_container(self.runs(job_id)[-1]["id"])

    def wait_for_end(self, job_id: str, timeout_s: float = 300.0) -> None:
        """Until the job has ended and none of its runs is alive."""

        def ended() -> bool:
            if not self.job(job_id)["statusCode"].startswith("finished"):
                return False
            return not {"Scheduled", "Pending", "Running", "Late"} & set(self.states(job_id))

        try:
            until(ended, timeout_s, f"the end of job {job_id}")
        except BaseException:
            self.explain(job_id)
            raise

    def explain(self, job_id: str) -> None:
        """Prints what a failed test has to be understood from."""
        job = self.job(job_id)
        print(job["statusCode"], job["statusMessage"], self.taken_slots())  # noqa: T201 - pytest shows it of failures
        for run in self.runs(job_id):
            print(run["id"], run["state"])  # noqa: T201
        print("\n".join(self.logs(job_id)[-60:]))  # noqa: T201
        for service in ("prefect-archival-worker", "prefect-server"):
            print(docker("logs", "--tail", "40", self.deployment.container(service), check=False))  # noqa: T201

    # --------------------------------------------------------------------------------------------------------- expect
    def expect_archived(self, job_id: str, files: Mapping[str, bytes], dataset_id: str) -> None:
        """Byte for byte on the LTS, registered once, shown as such, released; nothing is left over."""
        job = self.job(job_id)
        assert (job["statusCode"], self.lifecycle(dataset_id)) == (
            "finishedSuccessful",
            (False, True, "datasetOnArchiveDisk"),
        )
        folder = self.folder(dataset_id)
        assert read_tar(*sorted(folder.glob("*.tar"))) == dict(files)
        number = len(list(folder.glob("*.tar")))
        assert {path.name for path in folder.iterdir() if path.suffix not in {".tar", ".json"}} <= {".lock"}
        blocks = self.deployment.catalogue("GET", f"/api/v3/datasets/{quote(dataset_id, safe='')}/datablocks")
        expected = [archive_id(dataset_id, index + 1) for index in range(number)]
        assert sorted(block["archiveId"] for block in blocks) == expected
        assert object_keys(self.deployment.s3, "landingzone", raw_files_prefix(dataset_id)) == []
        assert not self.journal(dataset_id).exists()

    def expect_slots_back(self, timeout_s: float = 110.0) -> None:
        """All slots of all limits come back without anybody's help: a lease of 60 s, and the server's sweep."""
        until(lambda: not any(self.taken_slots().values()), timeout_s, "the slots")


class Link:
    """A container between the flow runs and the S3 server; see ``tests.deployment_link``."""

    name = "s3-link"

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        self._deployment, self._folder = deployment, folder
        self._seen_from = 0
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "seen.jsonl").touch()
        (folder / "seen.jsonl").chmod(0o666)
        self.set()
        script = folder / "deployment_link.py"
        script.write_bytes(_LINK_SCRIPT.read_bytes())
        script.chmod(0o644)
        self.container = docker(
            *("run", "--detach", "--network", deployment.network, "--network-alias", self.name),
            *("--label", f"com.docker.compose.project={deployment.project}"),
            *("--volume", f"{folder}:/control", "--entrypoint", "python"),
            f"mover-runtime:{deployment.project}",
            *("/control/deployment_link.py", "s3", "9000"),
        )

    @property
    def url(self) -> str:
        """MINIO_ENDPOINT of flow runs."""
        return f"http://{self.name}:9000"

    def set(self, *, held: Sequence[str] = (), reply_s: float = 0.0) -> None:
        """What is held, and how long each larger reply takes."""
        new = self._folder / "rules.new"
        new.write_text(json.dumps({"held": list(held), "reply_s": reply_s}), encoding="utf-8")
        new.chmod(0o644)
        new.rename(self._folder / "rules.json")

    def forget(self) -> None:
        """``fetches`` tells of what comes from now on."""
        self._seen_from = len(self._seen())

    def fetches(self, dataset_id: str) -> dict[str, int]:
        """How often each file, or window of a file, was asked for: by ``path range``."""
        mark = f"GET /landingzone/{raw_files_prefix(dataset_id)}"
        found = [what.removeprefix(mark).strip() for what in self._seen()[self._seen_from :] if what.startswith(mark)]
        return dict(sorted(Counter(found).items()))

    def _seen(self) -> list[str]:
        lines = (self._folder / "seen.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["what"] for line in lines]

    def cut(self) -> None:
        """The network to the S3 server is gone: connections fall silent, its name is unknown."""
        docker("network", "disconnect", self._deployment.network, self.container)

    def mend(self) -> None:
        """The network is there again, under the same name, with another address perhaps."""
        docker("network", "connect", "--alias", self.name, self._deployment.network, self.container)

    def remove(self) -> None:
        docker("rm", "--force", self.container, check=False)


@contextmanager
def linked(facility: Facility, folder: Path) -> Iterator[Link]:
    """Flow runs that begin in this block reach the S3 server through a link."""
    link = Link(facility.deployment, folder)
    try:
        until(lambda: docker("inspect", "--format", "{{.State.Running}}", link.container) == "true", 10, "the link")
        facility.set_variable("MINIO_ENDPOINT", link.url)
        yield link
    finally:
        link.set()
        facility.deployment.compose("run", "--rm", "prefect-config")  # the documented values again
        link.remove()
