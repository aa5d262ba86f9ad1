"""The deployment as the README sets it up, on a real Docker engine: what it does, what it gives away, what it keeps."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from playwright.sync_api import Browser

from mover.model import archive_id
from tests.deployment_moves import Facility
from tests.deployment_witness import Witness, processes
from tests.deployments import BOTH, Deployment, docker
from tests.flow_world import until
from tests.servers import object_keys, s3_client

pytestmark = [pytest.mark.docker]

_LIMIT_S = 600.0
_STEPS = {"create", "archive-job", "retrieve-job"}  # of the end-to-end test, each in a container of its own
_MAY_BE_ROOT = ("docker-proxy",)  # who may use the engine's socket; without any capability
_SECRETS = ("postgrespass", "prefectauth", "miniopass", "scicatpass", "scicattrigger")
_OF_OTHERS = {"postgres"}  # services that know no release of this project


class Trial(msgspec.Struct):
    """What the end-to-end test of the deployment came to."""

    output: str
    exit_code: int
    began_at: str
    took_s: float
    witness: Witness

    @property
    def dataset_id(self) -> str:
        found = re.search(r"dataset (\S+)", self.output)
        assert found
        return found[1]


@pytest.fixture(scope="module")
def trial(docker_deployment: Deployment) -> Trial:
    began_at, began = datetime.now(UTC).isoformat(), time.monotonic()
    with Witness(docker_deployment) as witness:
        done = docker_deployment.compose("run", "--rm", "end-to-end-test", check=False)

        def over() -> bool:
            begun = {step for step in _STEPS for name in witness.ended() if name.startswith(step)}
            left = {runtime.facts["Id"] for runtime in witness.found} & set(docker_deployment.containers())
            return begun == _STEPS and not left

        until(over, 60, "the end of the runtime containers")
    return Trial(done.stdout, done.returncode, began_at, time.monotonic() - began, witness)


@pytest.fixture(scope="module")
def facility(docker_deployment: Deployment) -> Facility:
    return Facility(docker_deployment)


# -------------------------------------------------------------------------------------------------------- what it does
def test_a_dataset_is_created_archived_retrieved_and_equal_in_ten_minutes_from_the_clone_on(
    docker_deployment: Deployment, trial: Trial
) -> None:
    steps_s = {**docker_deployment.steps_s, "end-to-end-test": round(trial.took_s, 1)}
    print(steps_s, f"in sum {sum(steps_s.values()):.0f} s")  # noqa: T201 - shown by -rP
    assert (trial.exit_code, trial.output.splitlines()[-1]) == (0, "done: what came back is equal, byte for byte")
    assert sum(steps_s.values()) < _LIMIT_S


def test_the_catalogue_went_through_the_documented_states(facility: Facility, trial: Trial) -> None:
    asked = f"/fake/history?kind=lifecycle&id={quote(trial.dataset_id, safe='')}"
    changes = facility.deployment.catalogue("GET", asked)
    shown = [(change["after"]["archiveStatusMessage"], change["after"]["retrieveStatusMessage"]) for change in changes]
    assert list(dict.fromkeys(shown)) == [
        ("datasetCreated", ""),
        ("started", ""),
        ("datasetOnArchiveDisk", ""),
        ("datasetOnArchiveDisk", "started"),
        ("datasetOnArchiveDisk", "datasetRetrieved"),
    ]
    assert facility.lifecycle(trial.dataset_id) == (False, True, "datasetOnArchiveDisk")


def test_every_flow_run_had_a_container_of_its_own_that_is_gone(docker_deployment: Deployment, trial: Trial) -> None:
    ended = trial.witness.ended()
    assert {step for step in _STEPS for name in ended if name.startswith(step)} == _STEPS
    assert set(ended.values()) == {"0"}
    for runtime in trial.witness.found:
        assert runtime.facts["Config"]["Image"] == f"mover-runtime:{docker_deployment.project}"
        assert list(runtime.facts["NetworkSettings"]["Networks"]) == [docker_deployment.network]
    # Later runs, the reconciler's, may be there by now.
    assert not {runtime.facts["Id"] for runtime in trial.witness.found} & set(docker_deployment.containers())


def test_the_files_on_the_lts_belong_to_the_configured_user(facility: Facility, trial: Trial) -> None:
    folder = facility.folder(trial.dataset_id)
    files = [folder, *folder.iterdir()]
    assert len(list(folder.glob("*.tar"))) > 1
    assert {(path.stat().st_uid, path.stat().st_gid) for path in files} == {(1000, 1000)}


def test_the_server_makes_runs_of_the_reconcilers_schedule(docker_deployment: Deployment) -> None:
    body = {"deployments": {"name": {"any_": ["reconciliation"]}}, "limit": 200}

    def scheduled() -> bool:
        return any(run["auto_scheduled"] for run in docker_deployment.api("POST", "/flow_runs/filter", body))

    until(scheduled, 120, "a run that the schedule asks for")


# ------------------------------------------------------------------------------------------------------ what it may do
def facts_of(deployment: Deployment) -> list[dict[str, Any]]:
    """What the engine says of the project's containers."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", *deployment.containers(), check=False) or "[]")
    return found  # but for runtime containers that have gone meanwhile


def service(facts: dict[str, Any]) -> str:
    return str(facts["Config"]["Labels"].get("com.docker.compose.service", facts["Name"]))


def test_no_process_of_any_container_is_root(docker_deployment: Deployment, trial: Trial) -> None:
    looked_at = [(facts, processes(facts["Id"])) for facts in facts_of(docker_deployment)]
    still = set(docker_deployment.containers())
    seen = {service(facts): found for facts, found in looked_at if found or facts["Id"] in still}
    seen |= {runtime.facts["Name"]: runtime.processes for runtime in trial.witness.found}
    assert all(seen.values())
    roots = {name for name, found in seen.items() if any(uid == 0 for uid, _ in found)}
    assert roots <= set(_MAY_BE_ROOT)


def test_root_file_systems_are_read_only_and_privileges_dropped(docker_deployment: Deployment, trial: Trial) -> None:
    for facts in [*facts_of(docker_deployment), *(runtime.facts for runtime in trial.witness.found)]:
        host = facts["HostConfig"]
        assert host["ReadonlyRootfs"], facts["Name"]
        assert host["CapDrop"] == ["ALL"], facts["Name"]
        assert "no-new-privileges:true" in host["SecurityOpt"], facts["Name"]
        assert not host["Privileged"], facts["Name"]
        assert host["Memory"] > 0, facts["Name"]
        sockets = [mount for mount in facts["Mounts"] if "docker.sock" in mount["Source"]]
        assert not sockets or service(facts) == "docker-proxy"


def texts_to_search(deployment: Deployment, trial: Trial) -> Iterator[tuple[str, str]]:
    """Everything that people without the secrets' files can look at, and what it is."""
    yield "containers", json.dumps(facts_of(deployment))
    yield "runtime containers", json.dumps([runtime.facts for runtime in trial.witness.found])
    for container in deployment.containers():
        yield "process arguments", str(processes(container))
    yield "process arguments", str([runtime.processes for runtime in trial.witness.found])
    images = docker("images", "-q", "--filter", f"reference=*:{deployment.project}").split()
    assert len(images) >= 3
    for image in images:
        yield "image", docker("inspect", image) + docker("history", "--no-trunc", image)
    yield "logs", (logs := deployment.compose("logs", "--no-color").stdout)
    assert "archive job" in logs
    for kind in ("deployments", "flow_runs", "task_runs", "variables", "work_pools", "block_documents", "logs"):
        yield kind, str(deployment.api("POST", f"/{kind}/filter", {"limit": 200}))


def test_no_secret_shows_anywhere(docker_deployment: Deployment, trial: Trial) -> None:
    secrets = {name: docker_deployment.secret(name).rpartition(":")[2] for name in _SECRETS}
    tokens = [line.split(":") for line in docker_deployment.secret("movertoken").splitlines()]
    secrets |= {f"token of {name}": token for name, _, token in tokens}
    assert (len(secrets), min(map(len, secrets.values())) >= 32) == (len(_SECRETS) + len(tokens), True)
    login = docker_deployment.secret("prefectauth")
    secrets["basic authentication"] = base64.b64encode(login.encode()).decode()
    found = [
        (name, place)
        for place, text in texts_to_search(docker_deployment, trial)
        for name, value in secrets.items()
        if value in text
    ]
    assert found == []


def test_the_search_for_secrets_would_find_one(docker_deployment: Deployment, trial: Trial) -> None:
    places = [place for place, text in texts_to_search(docker_deployment, trial) if "prefectauth" in text]
    assert "containers" in places  # the name of the file is no secret


def test_no_service_logs_an_error(docker_deployment: Deployment, trial: Trial) -> None:
    logs = docker_deployment.compose("logs", "--no-color", "--since", trial.began_at).stdout
    assert "archive job" in logs
    said = [line for line in logs.splitlines() if re.search(r"\bERROR\b|Traceback|\bCRITICAL\b|\bFATAL\b", line)]
    # The daemon tells of each dependency that does not answer yet.
    assert [line for line in said if "mover.daemon_health" not in line] == []


# --------------------------------------------------------------------------------------------------------- who may ask
def test_the_api_answers_only_with_the_secret(docker_deployment: Deployment) -> None:
    url = f"{docker_deployment.url}/prefect-ui/api/flow_runs/count"
    user, _, password = docker_deployment.secret("prefectauth").partition(":")
    answers = [httpx.post(url, auth=auth, json={}) for auth in (None, (user, "wrong"), (user, password))]
    assert [answer.status_code for answer in answers] == [401, 401, 200]


def test_the_ui_is_served_with_its_scripts(docker_deployment: Deployment) -> None:
    page = httpx.get(f"{docker_deployment.url}/prefect-ui/dashboard", headers={"Accept": "text/html"})
    assert page.status_code == 200
    scripts = re.findall(r'src="(/prefect-ui/[^"]+\.js)"', page.text)
    assert scripts
    assert [httpx.get(docker_deployment.url + script).status_code for script in scripts] == [200] * len(scripts)
    assert httpx.get(docker_deployment.url, follow_redirects=True).url.path == "/prefect-ui/dashboard"


def test_the_ui_asks_for_the_secret_and_shows_the_runs_of_the_trial(
    docker_deployment: Deployment, trial: Trial, chromium: Browser, tmp_path: Path
) -> None:
    body = {"flow_runs": {"name": {"like_": "archive job"}, "start_time": {"after_": trial.began_at}}}
    name = docker_deployment.api("POST", "/flow_runs/filter", body)[0]["name"]
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{docker_deployment.url}/prefect-ui/dashboard")
    page.locator("input[type=password]").fill(docker_deployment.secret("prefectauth"))
    page.keyboard.press("Enter")
    page.get_by_text("archival-docker-workpool").first.wait_for()  # of the dashboard
    page.goto(f"{docker_deployment.url}/prefect-ui/runs")
    page.get_by_text(name, exact=True).first.wait_for()
    page.screenshot(path=tmp_path / "runs.png")


def test_the_docker_proxy_refuses_what_workers_do_not_need(docker_deployment: Deployment) -> None:
    worker = docker_deployment.container("prefect-archival-worker")
    ask = (
        "import http.client as h; c = h.HTTPConnection('docker-proxy', 2375);"
        "c.request({!r}, {!r}); print(c.getresponse().status)"
    )
    asked = [
        docker("exec", worker, "python", "-c", ask.format(method, path))
        for method, path in (
            ("GET", "/_ping"),
            ("GET", "/v1.45/containers/json"),
            ("POST", f"/v1.45/containers/{worker}/exec"),
            ("DELETE", f"/v1.45/containers/{worker}"),
            ("GET", "/v1.45/volumes"),
        )
    ]
    assert asked == ["200", "403", "403", "403", "403"]


# ------------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize("env_files", [BOTH[:1], BOTH])
def test_the_configuration_is_valid(docker_deployment: Deployment, env_files: Sequence[str]) -> None:
    # Without the variables of the test's own, as an administrator gives it.
    plain = {name: value for name, value in docker_deployment.environ.items() if name in {"PATH", "HOME"}}
    words = [word for file in env_files for word in ("--env-file", file)]
    command = ["docker", "compose", *words, "--profile", "*", "config", "--quiet"]
    done = subprocess.run(
        command, check=False, cwd=docker_deployment.folder, env=plain, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_variable_stops_compose_with_its_name(docker_deployment: Deployment, tmp_path: Path) -> None:
    lines = (docker_deployment.folder / ".env").read_text(encoding="utf-8").splitlines()
    required = [line.partition("=")[0] for line in lines if re.match(r"[A-Z]", line)]
    assert {"COMPOSE_PROFILES", "LTS_VOLUME_MODE", "SCRATCH_FOLDER"} <= set(required)
    assert len(required) > 30
    plain = {name: value for name, value in docker_deployment.environ.items() if name in {"PATH", "HOME"}}
    unnamed = []
    for name in required:
        file = tmp_path / "without.env"
        file.write_text("\n".join(line for line in lines if not line.startswith(f"{name}=")), encoding="utf-8")
        command = ["docker", "compose", "--env-file", str(file), "config", "--quiet"]
        done = subprocess.run(
            command, check=False, cwd=docker_deployment.folder, env=plain, capture_output=True, text=True, timeout=60
        )
        if not done.returncode or name not in done.stderr:
            unnamed.append(name)
    assert unnamed == []


def test_the_configuration_finds_nothing_to_change_a_second_time(docker_deployment: Deployment) -> None:
    done = docker_deployment.compose("run", "--rm", "prefect-config", "--check", check=False)
    assert (done.returncode, done.stdout.splitlines()[-1].split(",")[0]) == (0, "0 to change")


# ------------------------------------------------------------------------------------------------ what a change reaches
def test_a_release_recreates_every_container_of_its_own(docker_deployment: Deployment) -> None:
    def hashes(environ: dict[str, str]) -> set[str]:
        return set(docker_deployment.compose("config", "--hash", "*", environ=environ).stdout.splitlines())

    same = hashes({}) & hashes({"MOVER_TAG": "next"})
    assert {line.split()[0] for line in same} == _OF_OTHERS


def test_bringing_it_up_again_recreates_nothing(docker_deployment: Deployment) -> None:
    services = [item["Service"] for item in docker_deployment.listed() if item["Health"]]
    before = {service: docker_deployment.container(service) for service in services}
    for words in ((), ("prefect-archival-worker",), ("prefect-retrieval-worker",)):
        docker_deployment.compose("up", "-d", *words)
    assert {service: docker_deployment.container(service) for service in services} == before


def test_the_proxy_follows_its_file_as_git_replaces_it(docker_deployment: Deployment) -> None:
    file = docker_deployment.folder / "docker" / "Caddyfile"
    before = file.read_text(encoding="utf-8")

    def replace(text: str) -> None:
        new = file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        new.rename(file)

    def said() -> str:
        return httpx.get(f"{docker_deployment.url}/elsewhere").text

    assert said() == "not found"
    replace(before.replace('"not found"', '"not here"'))
    until(lambda: said() == "not here", 15, "the new file")
    replace(before)
    until(lambda: said() == "not found", 15, "the old file")


# ------------------------------------------------------------------------------------------------------- what it keeps
class Kept(msgspec.Struct, frozen=True):
    """What has to outlive the containers."""

    deployments: dict[str, str]
    variables: dict[str, Any]
    limits: dict[str, int]
    finished_runs: set[str]
    dataset: Any
    datablocks: Any
    objects: list[str]
    files: dict[str, tuple[int, int]]


def kept(facility: Facility, dataset_id: str) -> Kept:
    deployment = facility.deployment
    pid = quote(dataset_id, safe="")
    ended = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "limit": 200}
    return Kept(
        {item["name"]: item["id"] for item in deployment.api("POST", "/deployments/filter", {})},
        {item["name"]: item["value"] for item in deployment.api("POST", "/variables/filter", {"limit": 200})},
        {item["name"]: item["limit"] for item in deployment.api("POST", "/v2/concurrency_limits/filter", {})},
        {run["id"] for run in deployment.api("POST", "/flow_runs/filter", ended)},
        deployment.catalogue("GET", f"/api/v3/datasets/{pid}"),
        deployment.catalogue("GET", f"/api/v3/datasets/{pid}/datablocks"),
        object_keys(deployment.s3, "retrieval"),
        {
            str(path.relative_to(facility.lts)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in facility.lts.rglob("*")
            if path.is_file()
        },
    )


def test_all_state_is_there_after_down_and_up(facility: Facility, trial: Trial) -> None:
    deployment = facility.deployment
    before = kept(facility, trial.dataset_id)
    assert (len(before.deployments), bool(before.finished_runs), bool(before.objects)) == (5, True, True)

    deployment.down()
    assert deployment.containers() == []
    deployment.compose("up", "-d")
    deployment.wait_until_healthy()

    after = kept(facility, trial.dataset_id)
    assert before.finished_runs <= after.finished_runs
    assert msgspec.structs.replace(after, finished_runs=before.finished_runs) == before

    # The dataset is retrieved again, from the files on the LTS.
    key = archive_id(trial.dataset_id, 1)
    with s3_client(deployment.s3) as client:
        client.delete_object(Bucket="retrieval", Key=key)
    job_id = facility.order("retrieve", [trial.dataset_id])
    facility.wait_for_end(job_id)
    assert facility.job(job_id)["statusCode"] == "finishedSuccessful"
    with s3_client(deployment.s3) as client:
        assert client.get_object(Bucket="retrieval", Key=key)["Body"].read() == (facility.lts / key).read_bytes()
