"""The SciCat for tests behaves as the real one does: accounts, datasets, their blocks, and faults on request."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from tests.scicat_fake.seeding import SeedFile, dataset_body, origdatablock_bodies
from tests.scicat_fake.server import ScicatServer
from tests.scicat_fake.state import ADMIN, CREATE_DATASET, DELETE, LIFECYCLE

Login = Callable[..., httpx.Client]

PID = "20.500.11935/3a6f1c1e-0000-4000-8000-000000000001"
DATASET = f"/api/v3/datasets/{quote(PID, safe='')}"
DATASET_V4 = f"/api/v4/datasets/{quote(PID, safe='')}"
MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}


@pytest.fixture
def login(scicat_server: ScicatServer) -> Iterator[Login]:
    clients = []

    def logged_in(username: str = "", password: str = "") -> httpx.Client:
        client = httpx.Client(base_url=scicat_server.url, trust_env=False)
        clients.append(client)
        sent = {"username": username or scicat_server.user, "password": password or username or scicat_server.password}
        if username != "nobody":
            token = client.post("/api/v3/auth/login", json=sent).json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
        return client

    yield logged_in
    for client in clients:
        client.close()


@pytest.fixture
def client(login: Login) -> httpx.Client:
    return login()


@pytest.fixture
def nobody(login: Login) -> httpx.Client:
    return login("nobody")


@pytest.fixture
def dataset(scicat_server: ScicatServer) -> dict[str, Any]:
    return scicat_server.control.seed_dataset(PID, {"run/a.h5": 10, "run/b.h5": 20, "empty": 0})


def filter_of(where: dict[str, Any] | None = None, **limits: object) -> dict[str, str]:
    wanted = {"where": where or {}, **({"limits": limits} if limits else {})}
    return {"filter": json.dumps(wanted)}


def datablock(archive_id: str = "x_1.tar", **changes: object) -> dict[str, Any]:
    file = {"path": "run/a.h5", "size": 10, "time": "2025-06-15T17:06:40+02:00"}
    body = {"archiveId": archive_id, "size": 10, "packedSize": 2048, "version": "1", "dataFileList": [file]}
    return {name: value for name, value in {**body, **changes}.items() if value is not None}


def http_error(status: int, message: object, error: str) -> dict[str, object]:
    return {"message": message, "error": error, "statusCode": status}


# ------------------------------------------------------------------------------------------------------------ accounts
def test_a_login_answers_201_with_token_and_lifetime_for_json_and_forms(scicat_server: ScicatServer) -> None:
    sent = {"username": scicat_server.user, "password": scicat_server.password}
    for kind in ("json", "data"):
        answer = httpx.post(f"{scicat_server.url}/api/v3/Auth/Login", **{kind: sent}, trust_env=False)  # type: ignore[arg-type]
        assert answer.status_code == 201
        reply = answer.json()
        assert reply.keys() == {"access_token", "id", "expires_in", "ttl", "created", "userId", "user"}
        assert reply["access_token"] == reply["id"]
        assert reply["expires_in"] == reply["ttl"] == 3600


def test_wrong_credentials_and_the_dead_logins(scicat_server: ScicatServer, nobody: httpx.Client) -> None:
    wrong = nobody.post("/api/v3/auth/login", json={"username": scicat_server.user, "password": "x"})
    assert wrong.status_code == 401
    sent = {"username": scicat_server.user, "password": scicat_server.password}
    dead = nobody.post("/api/v3/Users/login", json=sent)
    assert (dead.status_code, dead.content) == (201, b"")
    assert nobody.post("/api/v4/auth/login", json=sent).status_code == 404


def test_the_identity_names_the_groups_and_health_needs_no_account(client: httpx.Client, nobody: httpx.Client) -> None:
    profile = client.get("/api/v3/users/my/identity").json()["profile"]
    assert profile["username"] == "archiveManager"
    assert {"admin", "delete", "archivemanager"} <= set(profile["accessGroups"])
    assert nobody.get("/api/v3/health").json()["status"] == "ok"


@pytest.mark.usefixtures("dataset")
def test_an_expired_token_is_401_on_a_new_server_and_nobody_on_an_old_one(
    scicat_server: ScicatServer, client: httpx.Client
) -> None:
    scicat_server.control.seed_dataset("published", {"a": 1}, published=True)
    assert client.get(DATASET).status_code == 200
    scicat_server.control.expire_tokens()
    assert client.get(DATASET).json() == http_error(401, "SESSION_EXPIRED", "Unauthorized")
    scicat_server.control.switches.expired_is_anonymous = True
    assert client.get(DATASET).status_code == 403
    assert client.get("/api/v3/datasets/published").status_code == 200


@pytest.mark.usefixtures("dataset")
def test_a_token_expires_by_itself_and_garbage_is_nobody(scicat_server: ScicatServer, login: Login) -> None:
    scicat_server.control.switches.token_lifetime_s = 0
    client = login()
    assert client.get(DATASET).status_code == 401
    for garbage in ("Bearer nonsense", "Bearer a.b.c", "Basic abc", ""):
        assert client.get(DATASET, headers={"Authorization": garbage}).status_code == 403


# ------------------------------------------------------------------------------------------------------------ datasets
@pytest.mark.usefixtures("dataset")
def test_resources_are_found_in_any_case_and_a_pid_only_with_its_slash_encoded(client: httpx.Client) -> None:
    assert client.get(DATASET.replace("datasets", "Datasets")).json()["pid"] == PID
    assert client.get(DATASET_V4).json()["pid"] == PID
    raw = client.get(f"/api/v3/datasets/{PID}")
    assert raw.json() == http_error(404, f"Cannot GET /api/v3/datasets/{PID}", "Not Found")


@pytest.mark.usefixtures("dataset")
def test_a_missing_dataset_is_404_and_an_invisible_one_403(client: httpx.Client, nobody: httpx.Client) -> None:
    for version in ("v3", "v4"):
        assert client.get(f"/api/{version}/datasets/none").status_code == 404
    assert nobody.get(DATASET).json() == http_error(403, "Unauthorized access", "Forbidden")
    assert client.get("/api/v3/datasets/none/datasetlifecycle").status_code == 404


def test_a_new_dataset_gets_the_servers_lifecycle_or_the_ingestors(scicat_server: ScicatServer, login: Login) -> None:
    ingestor = login("ingestor")
    created = ingestor.post("/api/v3/datasets", json=dataset_body(PID))
    assert created.status_code == 201
    lifecycle = created.json()["datasetlifecycle"]
    assert (lifecycle["archivable"], lifecycle["retrievable"]) == (True, False)
    assert (lifecycle["archiveStatusMessage"], lifecycle["retrieveStatusMessage"]) == ("datasetCreated", "")
    assert lifecycle["dateOfDiskPurging"] == scicat_server.control.state.started_at
    assert not {"storageLocation", "exportedTo"} & lifecycle.keys()
    scicat_server.control.switches.lifecycle_on_create = "ingestor"
    other = ingestor.post("/api/v4/datasets", json={**dataset_body("x"), "owner": None}).json()["datasetlifecycle"]
    assert (other["archivable"], other["archiveStatusMessage"]) == (False, "filesNotYetAvailable")
    assert ingestor.post("/api/v3/datasets", json=dataset_body(PID)).status_code == 409


def test_what_an_ingestor_posts_counts_into_the_dataset(login: Login) -> None:
    ingestor = login("ingestor")
    ingestor.post("/api/v3/datasets", json=dataset_body(PID)).raise_for_status()
    files = [SeedFile("a/b/c", 5), SeedFile("a/link", 7, kind="symlink")]
    for version, body in zip(("v3", "v4"), origdatablock_bodies(PID, files, files_per_block=2), strict=True):
        stored = ingestor.post(f"/api/{version}/origdatablocks", json=body)
        assert stored.status_code == 201
        assert stored.json()["dataFileList"][0]["time"] == "2025-06-15T15:06:40.000Z"
    read = ingestor.get(DATASET).json()
    assert (read["size"], read["numberOfFiles"]) == (2 * 4096 + 5 + 7, 4)
    entries = [entry for block in ingestor.get(f"{DATASET}/origdatablocks").json() for entry in block["dataFileList"]]
    kinds = [(entry["path"], entry["perm"][0]) for entry in entries]
    assert kinds == [("a", "d"), ("a/b", "d"), ("a/b/c", "-"), ("a/link", "L")]


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize("url", [DATASET, DATASET_V4])
def test_a_datasets_patch_replaces_the_lifecycle_and_refills_its_defaults(client: httpx.Client, url: str) -> None:
    first = {"archivable": False, "retrievable": True, "storageLocation": "ETHZ", "retrieveStatusMessage": "x"}
    client.patch(f"{url}/datasetlifecycle", json=first).raise_for_status()
    sent = {"datasetlifecycle": {"archiveStatusMessage": "started", "nonsense": 1, "publishable": "true"}}
    after = client.patch(url, json=sent).json()["datasetlifecycle"]
    assert (after["archivable"], after["retrievable"], after["retrieveStatusMessage"]) == (True, False, "")
    assert (after["archiveStatusMessage"], after["publishable"]) == ("started", True)
    assert not {"storageLocation", "nonsense"} & after.keys()


@pytest.mark.usefixtures("dataset")
def test_a_merge_patch_merges_in_v4_only_with_exactly_its_type(client: httpx.Client) -> None:
    client.patch(f"{DATASET}/datasetlifecycle", json={"archivable": False, "storageLocation": "ETHZ"})

    def patched(url: str, kind: str, lifecycle: dict[str, object]) -> dict[str, Any]:
        content = json.dumps({"datasetlifecycle": lifecycle})
        answer = client.patch(url, content=content, headers={"Content-Type": kind})
        found: dict[str, Any] = answer.raise_for_status().json()["datasetlifecycle"]
        return found

    merged = patched(DATASET_V4, "application/merge-patch+json", {"archiveStatusMessage": "started"})
    assert (merged["archivable"], merged["storageLocation"]) == (False, "ETHZ")
    assert patched(DATASET_V4, "application/merge-patch+json", {"archivable": None})["archivable"] is True
    charset = patched(DATASET_V4, "application/merge-patch+json; charset=utf-8", {"retrievable": True})
    assert "storageLocation" not in charset
    assert patched(DATASET, "application/merge-patch+json", {"publishable": True})["retrievable"] is False


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize("url", [DATASET, DATASET_V4])
def test_the_lifecycles_own_patch_merges_and_is_strict(client: httpx.Client, url: str) -> None:
    client.patch(f"{url}/datasetlifecycle", json={"archivable": False, "storageLocation": "ETHZ"}).raise_for_status()
    after = client.patch(f"{url}/datasetlifecycle", json={"archiveReturnMessage": {"any": ["json"]}})
    assert after.status_code == 200
    assert after.json() == client.get(f"{url}/datasetlifecycle").json()
    assert (after.json()["archivable"], after.json()["storageLocation"]) == (False, "ETHZ")
    assert client.patch(f"{url}/datasetlifecycle", json={}).status_code == 400
    unknown = client.patch(f"{url}/datasetlifecycle", json={"nonsense": 1})
    assert unknown.json() == http_error(400, ["property nonsense should not exist"], "Bad Request")
    word = client.patch(f"{url}/datasetlifecycle", json={"archivable": "true"})
    assert word.json()["message"] == ["archivable must be a boolean value"]


@pytest.mark.usefixtures("dataset")
def test_an_old_server_has_no_patch_of_the_lifecycle(scicat_server: ScicatServer, client: httpx.Client) -> None:
    scicat_server.control.switches.merge_lifecycle = False
    answer = client.patch(f"{DATASET}/datasetlifecycle", json={"archivable": False})
    assert answer.status_code == 404
    assert answer.json()["message"].startswith("Cannot PATCH /api/v3/")
    assert client.get(f"{DATASET}/datasetlifecycle").status_code == 200


@pytest.mark.usefixtures("dataset")
def test_who_changed_it_is_the_servers_business_and_a_stale_change_is_412(client: httpx.Client) -> None:
    for name in ("updatedBy", "updatedAt"):
        answer = client.patch(DATASET, json={name: "me"})
        assert (answer.status_code, answer.json()["message"]) == (400, [f"property {name} should not exist"])
    old, new = "Mon, 01 Jan 2024 00:00:00 GMT", "Thu, 01 Jan 2099 00:00:00 GMT"
    assert client.patch(DATASET, json={"comment": "x"}, headers={"If-Unmodified-Since": old}).status_code == 412
    assert client.patch(DATASET, json={"comment": "x"}, headers={"If-Unmodified-Since": new}).status_code == 200


# ------------------------------------------------------------------------------------------------------ origdatablocks
def test_lists_of_blocks_are_cut_without_a_word(scicat_server: ScicatServer, client: httpx.Client) -> None:
    scicat_server.control.seed_dataset(PID, {f"f{n}": 1 for n in range(108)}, files_per_block=1)
    assert len(client.get(f"{DATASET}/origdatablocks").json()) == 100
    assert client.get(f"{DATASET}/origdatablocks/count").json() == {"count": 108}
    where = {"datasetId": PID}
    assert len(client.get("/api/v4/origdatablocks", params=filter_of(where)).json()) == 10
    assert len(client.get("/api/v3/origdatablocks", params=filter_of(where)).json()) == 100
    for version, order in (("v3", {"order": "_id:asc"}), ("v4", {"sort": {"_id": "asc"}})):
        ids = []
        for skip in range(0, 120, 40):
            page = filter_of(where, limit=40, skip=skip, **order)
            ids += [block["_id"] for block in client.get(f"/api/{version}/origdatablocks", params=page).json()]
        assert ids == sorted(ids)
        assert len(set(ids)) == 108
    assert client.get(f"{DATASET_V4}/origdatablocks").status_code == 404


def test_without_an_order_pages_may_overlap(scicat_server: ScicatServer, client: httpx.Client) -> None:
    scicat_server.control.seed_dataset(PID, {f"f{n}": 1 for n in range(6)}, files_per_block=1)
    scicat_server.control.switches.unstable_order = True
    ids = set()
    for skip in (0, 3):
        page = filter_of({"datasetId": PID}, limit=3, skip=skip)
        ids |= {block["_id"] for block in client.get("/api/v3/origdatablocks", params=page).json()}
    assert len(ids) < 6


@pytest.mark.usefixtures("dataset")
def test_the_newer_list_refuses_unknown_keys_of_a_filter(client: httpx.Client) -> None:
    bad = {"filter": json.dumps({"where": {"datasetId": PID, "nonsense": 1}})}
    assert client.get("/api/v4/origdatablocks", params=bad).status_code == 400
    assert client.get("/api/v3/origdatablocks", params=bad).json() == []
    for wanted in ({"where": {"datasetId": {"$in": [PID]}}, "fields": ["size"]}, {"limits": {"limit": 1, "skip": 0}}):
        rows = client.get("/api/v4/origdatablocks", params={"filter": json.dumps(wanted)})
        assert len(rows.json()) == 1


@pytest.mark.usefixtures("dataset")
def test_without_the_right_to_read_files_a_flat_list_is_empty_and_the_nested_one_403(
    scicat_server: ScicatServer, login: Login
) -> None:
    scicat_server.control.account("archiver", rights=[LIFECYCLE])
    archiver = login("archiver")
    flat = archiver.get("/api/v3/origdatablocks", params=filter_of({"datasetId": PID}))
    assert (flat.status_code, flat.json()) == (200, [])
    assert archiver.get(f"{DATASET}/origdatablocks").status_code == 403
    assert archiver.get(DATASET).json()["numberOfFiles"] == 4
    assert archiver.patch(f"{DATASET}/datasetlifecycle", json={"archivable": False}).status_code == 200
    assert archiver.patch(DATASET, json={"comment": "x"}).status_code == 403
    assert archiver.post(f"{DATASET}/datablocks", json=datablock()).status_code == 403
    scicat_server.control.account("archiver", groups=["p12345"])  # looked up with each request
    assert len(archiver.get(f"{DATASET}/origdatablocks").json()) == 1


# ---------------------------------------------------------------------------------------------------------- datablocks
@pytest.mark.usefixtures("dataset")
def test_a_datablock_is_stored_and_counted_and_a_second_one_of_its_name_refused(client: httpx.Client) -> None:
    stored = client.post("/api/v3/datablocks", json={**datablock(), "datasetId": PID})
    assert stored.status_code == 201
    assert stored.json()["_id"] == stored.json()["id"]
    assert stored.json()["dataFileList"][0]["time"] == "2025-06-15T15:06:40.000Z"
    assert client.post("/api/v3/datablocks", json={**datablock(), "datasetId": PID}).status_code == 409
    nested = client.post(f"{DATASET}/datablocks", json=datablock())
    assert (nested.status_code, nested.text) == (500, '"Internal server error"')
    assert client.post(f"{DATASET}/datablocks", json=datablock("x_2.tar")).status_code == 201
    counts = client.get(DATASET).json()
    assert (counts["packedSize"], counts["numberOfFilesArchived"]) == (4096, 2)
    by_name = client.get("/api/v3/datablocks", params=filter_of({"archiveId": "x_2.tar"})).json()
    assert [block["archiveId"] for block in by_name] == ["x_2.tar"]
    assert client.get(f"/api/v3/datablocks/{by_name[0]['_id']}").json() == by_name[0]
    assert client.post("/api/v4/datablocks", json=datablock()).status_code == 404


def test_the_name_of_a_datablock_is_unique_across_datasets(scicat_server: ScicatServer, client: httpx.Client) -> None:
    for pid in ("one", "two"):
        scicat_server.control.seed_dataset(pid, {"a": 1})
    codes = [
        client.post("/api/v3/datablocks", json={**datablock(), "datasetId": pid}).status_code for pid in ["one", "two"]
    ]
    assert codes == [201, 409]


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (datablock(datasetId=PID), "property datasetId should not exist"),
        (datablock(ownerGroup="x"), "property ownerGroup should not exist"),
        (datablock(packedSize=None), "packedSize must be an integer number"),
        (datablock(version=1), "version must be a string"),
        (datablock(chkAlg=""), "chkAlg should not be empty"),
        (datablock(dataFileList=[]), "dataFileList should not be empty"),
        (datablock(dataFileList=None), "dataFileList must be an array"),
        (
            datablock(dataFileList=[{"path": "a", "size": 1, "time": "2025-01-01", "extra": 1}]),
            "dataFileList.0.property extra should not exist",
        ),
        (
            datablock(dataFileList=[{"path": "a", "size": 1, "time": "soon"}]),
            "dataFileList.0.time must be a valid ISO 8601 date string",
        ),
        (
            datablock(dataFileList=[{"path": "a", "size": 1, "time": "2025-01-01", "uid": 0}]),
            "dataFileList.0.uid must be a string",
        ),
    ],
)
def test_a_datablock_is_checked_strictly(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    answer = client.post(f"{DATASET}/datablocks", json=body)
    assert answer.json() == http_error(400, [message], "Bad Request")
    assert client.get(f"{DATASET}/datablocks/count").json() == {"count": 0}


@pytest.mark.usefixtures("dataset")
def test_deleting_datablocks_takes_their_counts_back(client: httpx.Client) -> None:
    ids = [client.post(f"{DATASET}/datablocks", json=datablock(f"x_{n}.tar")).json()["id"] for n in range(3)]
    first = client.delete(f"{DATASET}/datablocks/{ids[0]}")
    assert (first.status_code, first.content) == (200, b"")
    assert client.delete(f"{DATASET}/datablocks/{ids[0]}").status_code == 404
    assert client.get(DATASET).json()["packedSize"] == 4096
    assert client.delete(f"{DATASET}/datablocks").json() == {"count": 2}
    after = client.get(DATASET).json()
    assert (after["packedSize"], after["numberOfFilesArchived"]) == (0, 0)
    assert client.post(f"{DATASET}/datablocks", json=datablock("x_0.tar")).status_code == 201


@pytest.mark.usefixtures("dataset")
def test_creating_and_deleting_datablocks_are_two_rights(scicat_server: ScicatServer, login: Login) -> None:
    scicat_server.control.account("creator", rights=[CREATE_DATASET], groups=["p12345"])
    scicat_server.control.account("administrator", rights=[ADMIN])
    scicat_server.control.account("sweeper", rights=[DELETE])
    assert login("creator").post(f"{DATASET}/datablocks", json=datablock()).status_code == 201
    assert login("administrator").delete(f"{DATASET}/datablocks").status_code == 403
    assert login("sweeper").delete(f"{DATASET}/datablocks").json() == {"count": 1}


@pytest.mark.usefixtures("dataset")
def test_a_body_over_the_limit_is_500_and_a_bare_string(client: httpx.Client) -> None:
    content = b'{"comment": "' + b"x" * (16 * 1024 * 1024) + b'"}'
    answer = client.patch(DATASET, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (500, "Internal server error")


# -------------------------------------------------------------------------------------------------------------- faults
@pytest.mark.usefixtures("dataset")
def test_a_lost_reply_leaves_the_change_and_a_lost_request_does_not(
    scicat_server: ScicatServer, client: httpx.Client
) -> None:
    control = scicat_server.control
    fault = control.lose_reply("POST", "/datablocks", after=1)
    assert client.post(f"{DATASET}/datablocks", json=datablock("x_1.tar")).status_code == 201
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(f"{DATASET}/datablocks", json=datablock("x_2.tar"))
    control.lose_request("POST", f"{re.escape(PID)}/datablocks")
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(f"{DATASET}/datablocks", json=datablock("x_3.tar"))
    assert [block["archiveId"] for block in control.datablocks(PID)] == ["x_1.tar", "x_2.tar"]
    assert fault.hits == 1
    assert [request.status for request in control.requests("POST", "datablocks")] == [201, 0, 0]


@pytest.mark.usefixtures("dataset")
def test_any_answer_can_be_put_in_place_of_the_real_one(scicat_server: ScicatServer, client: httpx.Client) -> None:
    control = scicat_server.control
    control.fail("GET", "/datasets/", 503, headers={"Retry-After": "7"}, times=2)
    control.fail("GET", "/datasets/", 502, body="<html>", content_type="text/html")
    control.fail("GET", "/datasets/", 200)
    answers = [client.get(DATASET) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [503, 503, 502, 200, 200]
    assert answers[0].headers["retry-after"] == "7"
    assert (answers[2].headers["content-type"], answers[2].text, answers[3].content) == ("text/html", "<html>", b"")


@pytest.mark.usefixtures("dataset")
def test_a_held_request_takes_effect_when_it_is_let_go(scicat_server: ScicatServer, client: httpx.Client) -> None:
    control = scicat_server.control
    fault = control.hold("PATCH", "datasetlifecycle")
    with pytest.raises(httpx.ReadTimeout):
        client.patch(f"{DATASET}/datasetlifecycle", json={"archivable": False}, timeout=0.05)
    assert control.lifecycle(PID)["archivable"] is True
    control.remove(fault)
    deadline = time.monotonic() + 5
    while control.lifecycle(PID)["archivable"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    control.delay("GET", "datasets", 3.0)
    with pytest.raises(httpx.ReadTimeout):
        client.get(DATASET, timeout=0.05)


@pytest.mark.usefixtures("dataset")
def test_the_history_has_every_state_in_its_order(scicat_server: ScicatServer, client: httpx.Client) -> None:
    for status in ("started", "datasetOnArchiveDisk"):
        client.patch(f"{DATASET}/datasetlifecycle", json={"archiveStatusMessage": status}).raise_for_status()
    client.patch(DATASET, json={"datasetlifecycle": {"archivable": False}}).raise_for_status()
    control = scicat_server.control
    assert control.lifecycle_values(PID) == ["started", "datasetOnArchiveDisk", "datasetCreated"]
    assert control.lifecycle_values(PID, "archivable") == [True, True, False]
    assert [change.action for change in control.history("lifecycle")] == ["merge", "merge", "replace"]
    assert [change.at_s for change in control.history()] == sorted(change.at_s for change in control.history())


def test_the_controls_work_over_http_too(scicat_server: ScicatServer, client: httpx.Client) -> None:
    assert client.post("/fake/datasets", json={"pid": PID, "files": {"a/b": 3}}).json() == {"pid": PID}
    job = client.post("/fake/jobs", json={"kind": "archive", "datasets": [PID]}).json()["id"]
    fault = client.post("/fake/faults", json={"method": "GET", "path": "/jobs/", "status": 429, "times": -1}).json()
    assert client.get(f"/api/v4/jobs/{job}").status_code == 429
    assert client.get("/fake/faults").json()[0]["hits"] == 1
    client.delete(f"/fake/faults/{fault['id']}").raise_for_status()
    assert client.get(f"/api/v4/jobs/{job}").json()["jobParams"]["datasetList"] == [{"pid": PID, "files": []}]
    assert client.patch("/fake/switches", json={"v3_only": True}).json()["v3_only"] is True
    assert client.get(f"/api/v4/jobs/{job}").status_code == 404
    client.put("/fake/accounts/archiveManager", json={"rights": []}).raise_for_status()
    assert client.get(DATASET).status_code == 403
    client.post("/fake/expire-tokens").raise_for_status()
    assert client.get(DATASET).status_code == 401
    assert [row["status"] for row in client.get("/fake/log", params={"path": "/datasets"}).json()] == [403, 401]
    assert client.get("/fake/history", params={"kind": "job", "id": job}).json()[0]["action"] == "create"
    assert client.post("/fake/faults", json={"nonsense": 1}).status_code == 400
    client.post("/fake/reset").raise_for_status()
    assert not scicat_server.control.state.datasets


def test_no_secret_gets_into_the_log(scicat_server: ScicatServer, client: httpx.Client) -> None:
    client.get("/api/v3/users/my/identity", params={"access_token": client.headers["authorization"]})
    logged = msgspec.json.encode(scicat_server.control.requests()).decode()
    assert scicat_server.password not in logged
    assert client.headers["authorization"].removeprefix("Bearer ") not in logged
