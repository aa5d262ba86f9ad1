"""The SciCat for tests treats jobs as the real one does; and it runs as a program."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from tests.scicat_fake.server import ScicatServer
from tests.scicat_fake.state import CREATE_JOB, UPDATE_JOB


@pytest.fixture
def client(scicat_server: ScicatServer) -> Iterator[httpx.Client]:
    with _logged_in(scicat_server.url, scicat_server.user, scicat_server.password) as client:
        yield client


@contextmanager
def _logged_in(url: str, user: str, password: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False) as client:
        sent = {"username": user, "password": password}
        token = client.post("/api/v3/auth/login", json=sent).raise_for_status().json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client


@pytest.fixture
def pids(scicat_server: ScicatServer) -> list[str]:
    pids = [f"20.500.11935/{number}" for number in range(3)]
    for pid in pids:
        scicat_server.control.seed_dataset(pid, {"a": 1, "b/c": 2})
    return pids


def order(pids: list[str], kind: str = "archive", **params: object) -> dict[str, Any]:
    return {"type": kind, "jobParams": {"datasetList": [{"pid": pid, "files": []} for pid in pids], **params}}


def created(client: httpx.Client, pids: list[str], kind: str = "archive") -> dict[str, Any]:
    job: dict[str, Any] = client.post("/api/v4/jobs", json=order(pids, kind)).raise_for_status().json()
    return job


# -------------------------------------------------------------------------------------------------------------- create
def test_a_job_is_one_document_in_two_spellings(client: httpx.Client, pids: list[str]) -> None:
    wanted = [{"pid": pids[0], "files": ["b/c"]}]
    sent = {"type": "retrieve", "datasetList": wanted, "jobParams": {"username": "me"}, "unknown": 1}
    old = client.post("/api/v3/Jobs", json=sent)
    assert old.status_code == 201
    assert (old.json()["jobStatusMessage"], old.json()["datasetList"]) == ("jobSubmitted", wanted)
    new = client.get(f"/api/v4/jobs/{old.json()['id']}").json()
    assert new["jobParams"] == {"username": "me", "datasetList": wanted}
    assert (new["statusCode"], new["type"], new["id"]) == ("jobSubmitted", "retrieve", new["_id"])
    assert client.get(f"/api/v3/jobs/{new['id']}").json() == old.json()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"type": "nonsense"}, 400),
        ({"type": None}, 400),
        ({"unknown": 1}, 400),
        ({"jobParams": {"datasetList": []}}, 422),
        ({"jobParams": {"datasetList": "x"}}, 422),
        ({"jobParams": {"datasetList": [{"pid": "20.500.11935/0"}]}}, 422),
        ({"jobParams": {"datasetList": [{"pid": "none", "files": []}]}}, 422),
        ({"jobParams": {"datasetList": [{"pid": "20.500.11935/0", "files": ["none"]}]}}, 422),
        ({"jobParams": {"datasetList": [{"pid": "20.500.11935/0", "files": []}] * 2}}, 403),
        ({}, 201),
    ],
)
def test_an_order_is_checked_before_it_is_stored(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str], change: dict[str, Any], status: int
) -> None:
    answer = client.post("/api/v4/jobs", json={**order(pids), **change})
    assert answer.status_code == status
    assert len(scicat_server.control.state.jobs) == (status == 201)


def test_more_than_a_hundred_datasets_do_not_exist(scicat_server: ScicatServer, client: httpx.Client) -> None:
    many = [f"many/{number}" for number in range(101)]
    for pid in many:
        scicat_server.control.seed_dataset(pid, {"a": 1})
    refused = client.post("/api/v4/jobs", json=order(many))
    assert refused.json() == {"status": 422, "message": "Datasets with pid many/100 do not exist."}
    assert client.post("/api/v4/jobs", json=order(many[:100])).status_code == 201


def test_a_site_may_ask_for_archivable_and_retrievable_datasets(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    scicat_server.control.switches.validate_jobs = True
    assert client.post("/api/v4/jobs", json=order(pids, "archive")).status_code == 201
    assert client.post("/api/v4/jobs", json=order(pids, "retrieve")).status_code == 400
    assert client.post("/api/v4/jobs", json=order(pids, "public")).status_code == 400
    scicat_server.control.state.datasets[pids[0]]["datasetlifecycle"].update(archivable=False, retrievable=True)
    assert client.post("/api/v4/jobs", json=order(pids, "archive")).status_code == 400
    assert client.post("/api/v4/jobs", json=order(pids[:1], "retrieve")).status_code == 201


# ---------------------------------------------------------------------------------------------------------------- list
def test_lists_of_jobs_are_cut_and_skip_within_the_limit(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    ids = [scicat_server.control.seed_job("archive", pids) for _ in range(103)]

    def listed(version: str, **wanted: object) -> list[str]:
        answer = client.get(f"/api/{version}/jobs", params={"filter": json.dumps(wanted)})
        return [job["id"] for job in answer.raise_for_status().json()]

    assert listed("v4") == ids[:100]
    assert listed("v4", limits={"limit": 2}) == ids[:2]
    assert listed("v4", limits={"limit": 2, "skip": 2}) == []
    assert listed("v4", limits={"limit": 4, "skip": 2}) == ids[2:4]
    assert listed("v4", limits={"limit": 200}) == ids
    assert listed("v3", limits={"limit": 2, "skip": 2}) == ids[2:4]


def test_conditions_of_lists(scicat_server: ScicatServer, client: httpx.Client, pids: list[str]) -> None:
    control = scicat_server.control
    ids = [
        control.seed_job(kind, pids, status=status)
        for kind in ("archive", "retrieve")
        for status in ("jobSubmitted", "inProgress")
    ]

    def listed(where: dict[str, object]) -> list[int]:
        answer = client.get("/api/v4/jobs", params={"filter": json.dumps({"where": where})})
        return [ids.index(job["id"]) for job in answer.raise_for_status().json()]

    assert listed({"type": "archive", "statusCode": "jobSubmitted"}) == [0]
    assert listed({"type": {"$in": ["archive", "retrieve"]}, "statusCode": {"$in": ["inProgress"]}}) == [1, 3]
    assert listed({"$or": [{"type": "archive"}, {"statusCode": "inProgress"}]}) == [0, 1, 3]
    moment = control.state.jobs[ids[3]]["createdAt"]
    assert listed({"createdAt": {"$gt": moment}}) == []
    assert 3 in listed({"createdAt": {"$gte": moment}})
    assert listed({"jobParams.datasetList.pid": pids[1]}) == [0, 1, 2, 3]
    assert listed({"jobParams.datasetList.pid": "none"}) == []
    refused = client.get("/api/v3/jobs", params={"filter": json.dumps({"where": {"type": "archive"}})})
    assert refused.status_code == 400
    full = {"fields": json.dumps({"type": "archive", "jobStatusMessage": "inProgress"})}
    assert [job["id"] for job in client.get("/api/v3/jobs/fullquery", params=full).json()] == [ids[1]]


def test_the_datasets_of_a_job_come_with_it(client: httpx.Client, pids: list[str]) -> None:
    job = created(client, pids)
    include = {"filter": json.dumps({"include": ["datasets"]})}
    datasets = client.get(f"/api/v4/jobs/{job['id']}", params=include).json()["datasets"]
    assert [dataset["pid"] for dataset in datasets] == pids
    details = client.get("/api/v3/jobs/datasetDetails", params={"jobId": job["id"]}).json()
    assert [dataset["pid"] for dataset in details] == pids


# --------------------------------------------------------------------------------------------------------------- patch
def test_an_unknown_job_is_400(client: httpx.Client) -> None:
    for version in ("v3", "v4"):
        answer = client.get(f"/api/{version}/jobs/none")
        assert (answer.status_code, answer.json()) == (400, {"status": 400, "message": "Invalid job id."})
    patch = client.patch("/api/v4/jobs/none", json={"statusCode": "x", "statusMessage": "y"})
    assert (patch.status_code, patch.json()["message"]) == (400, "Invalid job id.")
    assert client.put("/api/v3/jobs/none", json={}).status_code == 404


def test_the_newer_patch_needs_code_and_message_and_nothing_else(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    job = f"/api/v4/jobs/{created(client, pids)['id']}"
    for body in ({"statusCode": "x"}, {"statusMessage": "y"}, {"jobStatusMessage": "x"}):
        assert client.patch(job, json=body).status_code == 400
    assert client.patch(job, json={"statusCode": "x", "statusMessage": "y", "more": 1}).status_code == 400
    for code in ("inProgress", "finishedSuccessful", "inProgress"):  # no order is kept
        assert client.patch(job, json={"statusCode": code, "statusMessage": "y"}).json()["statusCode"] == code
    statuses = scicat_server.control.job_statuses(job.rpartition("/")[2])
    assert statuses == ["jobSubmitted", "inProgress", "finishedSuccessful", "inProgress"]


def test_the_older_patch_drops_unknown_keys_and_sets_both(client: httpx.Client, pids: list[str]) -> None:
    job = created(client, pids)["id"]
    assert client.patch(f"/api/v3/jobs/{job}", json={"jobStatusMessage": "inProgress", "more": 1}).status_code == 200
    read = client.get(f"/api/v4/jobs/{job}").json()
    assert (read["statusCode"], read["statusMessage"]) == ("inProgress", "inProgress")


def test_a_result_is_replaced_as_a_whole_kept_or_emptied(client: httpx.Client, pids: list[str]) -> None:
    job = f"/api/v4/jobs/{created(client, pids)['id']}"

    def patched(**result: object) -> dict[str, Any]:
        sent = {"statusCode": "x", "statusMessage": "y", **result}
        answered: dict[str, Any] = client.patch(job, json=sent).raise_for_status().json()
        return answered

    assert patched(jobResultObject={"a": 1})["jobResultObject"] == {"a": 1}
    assert patched()["jobResultObject"] == {"a": 1}
    moved = patched(jobResultObject={"b": 2, "executionTime": "2025-01-01"})
    assert (moved["jobResultObject"], moved["jobParams"]["executionTime"]) == ({"b": 2}, "2025-01-01")
    assert patched(jobResultObject=None)["jobResultObject"] is None


def test_a_job_whose_dataset_is_gone_cannot_be_changed(client: httpx.Client, pids: list[str]) -> None:
    job = created(client, pids)["id"]
    client.delete("/api/v3/datasets/20.500.11935%2F1").raise_for_status()
    for version, body in (("v3", {"jobStatusMessage": "x"}), ("v4", {"statusCode": "x", "statusMessage": "y"})):
        answer = client.patch(f"/api/{version}/jobs/{job}", json=body)
        assert (answer.status_code, answer.json()["message"]) == (404, "Unable to get a dataset")
    assert client.get(f"/api/v4/jobs/{job}").json()["statusCode"] == "jobSubmitted"


def test_the_right_to_change_jobs_is_one_of_its_own(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    job = created(client, pids)["id"]
    expected = {"creator": ([CREATE_JOB], 400), "updater": ([UPDATE_JOB], 200), "stranger": ([], 400)}
    for name, (rights, status) in expected.items():
        scicat_server.control.account(name, rights=rights)
        with _logged_in(scicat_server.url, name, name) as other:
            patch = other.patch(f"/api/v4/jobs/{job}", json={"statusCode": "x", "statusMessage": "y"})
        assert patch.status_code == status
    assert httpx.get(f"{scicat_server.url}/api/v4/jobs/{job}", trust_env=False).status_code == 403


def test_an_update_may_be_stored_and_answered_with_an_error(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    job = f"/api/v4/jobs/{created(client, pids)['id']}"
    scicat_server.control.fail_stored_job_update()
    sent = {"statusCode": "finishedSuccessful", "statusMessage": "y"}
    assert client.patch(job, json=sent).status_code == 400
    assert client.get(job).json()["statusCode"] == "finishedSuccessful"
    assert client.patch(job, json=sent).status_code == 200


def test_a_server_with_v3_only_has_no_v4(scicat_server: ScicatServer, client: httpx.Client, pids: list[str]) -> None:
    job = created(client, pids)["id"]
    scicat_server.control.switches.v3_only = True
    assert client.get(f"/api/v4/jobs/{job}").status_code == 404
    assert client.get(f"/api/v3/jobs/{job}").status_code == 200


# ------------------------------------------------------------------------------------------------------------- actions
@contextmanager
def _listener(status: int) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    told: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append((self.headers["Content-Type"], self.headers.get("Authorization", ""), body))
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"full")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/jobs", told
        finally:  # a test that fails must not keep the process alive
            server.shutdown()
            thread.join()


def test_a_new_job_is_told_to_the_url_of_its_action(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    with _listener(201) as (url, told):
        switches = scicat_server.control.switches
        switches.job_action_urls, switches.job_action_user, switches.job_action_password = [url], "scicat", "word"
        job = created(client, pids)
    [(content_type, authorization, body)] = told
    assert body == {"id": job["id"], "type": "archive"}
    assert content_type.startswith("text/plain")
    assert b64decode(authorization.removeprefix("Basic ")) == b"scicat:word"


def test_the_failure_of_an_action_is_the_callers_but_the_job_is_there(
    scicat_server: ScicatServer, client: httpx.Client, pids: list[str]
) -> None:
    control = scicat_server.control
    with _listener(503) as (url, _):
        control.switches.job_action_urls = [url]
        answer = client.post("/api/v4/jobs", json=order(pids))
    assert (answer.status_code, answer.json()["message"]) == (503, "Got response: full")
    assert client.post("/api/v4/jobs", json=order(pids)).status_code == 500  # nobody listens any more
    assert [job["statusCode"] for job in control.state.jobs.values()] == ["jobSubmitted"] * 2


def test_a_large_dataset_is_seeded_and_listed_in_seconds(scicat_server: ScicatServer, client: httpx.Client) -> None:
    start = time.monotonic()
    files = {f"run/{number // 1000}/image-{number:06}.tif": number for number in range(25_000)}
    scicat_server.control.seed_dataset("large", files, files_per_block=167)
    seen = 0
    for skip in range(0, 200, 5):
        wanted = {"where": {"datasetId": "large"}, "limits": {"limit": 5, "skip": skip, "order": "_id:asc"}}
        rows = client.get("/api/v3/origdatablocks", params={"filter": json.dumps(wanted)}).json()
        seen += sum(len(row["dataFileList"]) for row in rows)
    assert seen == 25_000 + 26
    assert time.monotonic() - start < 10
