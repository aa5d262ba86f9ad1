"""The deployment on a real Docker engine, for tests; a pytest plugin that ``conftest.py`` loads.

``docker_deployment`` is one for the session: a fresh clone of the repository, brought up by the commands of the README
under a project name, with ports and secrets of its own, and removed with its volumes at the end. The build cache stays.
Tests leave it up and healthy, but for the last one, which takes it away.
``TEST_DEPLOYMENT=<folder>`` keeps it, with its clone in that folder, and takes it again the next time.

Tests with the mark ``docker`` need an engine that answers, compose, git, and root, who sees into volumes and processes.
Where Docker is installed and ``CI`` is set they fail without; otherwise they are left out with a line that says why.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.flow_world import until
from tests.prefect_servers import free_port
from tests.servers import S3Server

__all__ = ["BOTH", "Deployment", "docker", "docker_deployment"]

BOTH: Final = (".env", ".development.env")
_ROOT = Path(__file__).parent.parent
_TIMEOUT_S: Final = 600.0
_KEPT = os.environ.get("TEST_DEPLOYMENT", "")
_LEFT_OUT = pytest.StashKey[int]()
_INHERITED: Final = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONFIG", "LANG")


def docker(*arguments: str, check: bool = True, timeout_s: float = 120.0) -> str:
    """What a ``docker`` command prints, without the last line end."""
    done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode:
        pytest.fail(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Deployment:
    """One project of compose, made from a clone in ``folder``."""

    def __init__(self, folder: Path, name: str = "", ports: Sequence[int] = ()) -> None:
        """``name``, ``ports`` (of proxy, S3 server, catalogue and daemon): those of one that is up already."""
        name = name or f"mover-test-{uuid.uuid4().hex[:8]}"
        self.folder, self.project, self.network = folder, name, f"{name}-runtime"
        self.ports = tuple(ports) or (free_port(), free_port(), free_port(), free_port())
        self.proxy_port, self.s3_port, self.scicat_port, self.mover_port = self.ports
        self.url = f"http://localhost:{self.proxy_port}"
        self.steps_s: dict[str, float] = {}
        """How long each command of ``up`` took, by its last words."""
        self.environ = {
            **{key: os.environ[key] for key in _INHERITED if key in os.environ},
            "COMPOSE_PROJECT_NAME": name,
            "RUNTIME_NETWORK": self.network,
            "PUBLIC_URL": self.url,
            "PROXY_PORT": str(self.proxy_port),
            "S3_PORT": str(self.s3_port),
            "SCICAT_PORT": str(self.scicat_port),
            "MOVER_PORT": str(self.mover_port),
            "MOVER_TAG": name,  # an image that is there would not be built
        }
        self._catalogue_token = ""

    # ------------------------------------------------------------------------------------------------------- commands
    def compose(
        self,
        *arguments: str,
        env_files: Sequence[str] = BOTH,
        environ: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """``docker compose --env-file ... <arguments>`` in the clone."""
        command = ["docker", "compose", *(word for file in env_files for word in ("--env-file", file)), *arguments]
        done = subprocess.run(
            command,
            check=False,
            cwd=self.folder,
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def clone(self) -> None:
        """The last commit, as a facility gets it whose umask keeps files from others."""
        clone = ["git", "clone", "--quiet", "--no-hardlinks", str(_ROOT), str(self.folder)]
        subprocess.run(clone, check=True, timeout=120, umask=0o077)

    def make_secrets(self) -> None:
        """``make secrets``."""
        subprocess.run(["make", "-s", "secrets"], check=True, cwd=self.folder, env=self.environ, timeout=60)

    def up(self) -> None:
        """The commands of the README, in its order."""
        self._timed("make secrets", self.make_secrets)
        for words in (
            ("up", "-d"),
            ("run", "--rm", "prefect-config"),
            ("up", "-d", "prefect-archival-worker"),
            ("up", "-d", "prefect-retrieval-worker"),
            ("run", "--rm", "prefect-flows-deployment"),
        ):
            self._timed(" ".join(words), lambda words=words: self.compose(*words))

    def _timed(self, name: str, step: Any) -> None:  # noqa: ANN401 - any callable without arguments
        began = time.monotonic()
        step()
        self.steps_s[name] = round(time.monotonic() - began, 1)

    def down(self, *options: str) -> None:
        """``make down``: what belongs to the project, runtime containers of flow runs that still work among it."""
        self.compose("--profile", "*", "down", "--remove-orphans", *options)

    def wait_until_healthy(self, *services: str, timeout_s: float = 180.0) -> None:
        """Until every container with a health check, or those of ``services``, say that they are well."""

        def healthy() -> bool:
            states = {item["Service"]: item["Health"] for item in self.listed() if item["State"] == "running"}
            return all(states.get(service) == "healthy" for service in services or _CHECKED)

        until(healthy, timeout_s, f"healthy containers: {services or 'all'}")

    def listed(self) -> list[dict[str, Any]]:
        """What ``docker compose ps`` lists; it fails when a runtime container goes between its list and its look."""
        listing = ("ps", "--all", "--format", "json")
        done = self.compose(*listing, check=False)
        for _ in range(10):
            if "No such container" not in done.stderr:
                break
            done = self.compose(*listing, check=False)
        if done.returncode:
            pytest.fail(f"docker compose ps: exit code {done.returncode}\n{done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def container(self, service: str) -> str:
        """Id of a service's container."""
        return self.containers(f"com.docker.compose.service={service}", "com.docker.compose.oneoff=False")[0]

    def containers(self, *labels: str) -> list[str]:
        """Ids of the project's containers, running or not, runtime containers among them."""
        filters = [f"label={label}" for label in (f"com.docker.compose.project={self.project}", *labels)]
        return docker("ps", "-aq", "--no-trunc", *(word for text in filters for word in ("--filter", text))).split()

    def runtime_container(self, flow_run_id: str) -> str:
        """Id of the container that executes a flow run."""
        label = f"io.prefect.flow-run-id={flow_run_id}"
        return docker("ps", "-q", "--no-trunc", "--filter", f"label={label}")

    def volume(self, name: str) -> Path:
        """The folder of a volume on this machine."""
        return Path(docker("volume", "inspect", "--format", "{{.Mountpoint}}", f"{self.project}_{name}"))

    # -------------------------------------------------------------------------------------------------------- servers
    def secret(self, name: str) -> str:
        """A secret of the deployment, by the name of its file."""
        return (self.folder / ".secrets" / f"{name}.txt").read_text(encoding="utf-8").strip()

    def api(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - any JSON
        """What the Prefect server answers below ``/api``, through the reverse proxy."""
        user, _, password = self.secret("prefectauth").partition(":")
        url = f"{self.url}/prefect-ui/api{path}"
        answer = httpx.request(method, url, json=body, auth=(user, password), timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def catalogue(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401
        """What the catalogue answers to the archive's account."""
        if not self._catalogue_token and not path.startswith("/fake/"):
            account = {"username": self.secret("scicatuser"), "password": self.secret("scicatpass")}
            self._catalogue_token = self._ask_catalogue("POST", "/api/v3/auth/login", account)["id"]
        return self._ask_catalogue(method, path, body)

    def _ask_catalogue(self, method: str, path: str, body: object) -> Any:  # noqa: ANN401
        headers = {"Authorization": f"Bearer {self._catalogue_token}"} if self._catalogue_token else {}
        url = f"http://127.0.0.1:{self.scicat_port}{path}"
        answer = httpx.request(method, url, json=body, headers=headers, timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @property
    def s3(self) -> S3Server:
        """The S3 server as this machine reaches it."""
        url = f"http://127.0.0.1:{self.s3_port}"
        return S3Server("rgw", url, self.secret("miniouser"), self.secret("miniopass"))


_CHECKED: Final = (
    "postgres",
    "prefect-server",
    "reverse-proxy",
    "docker-proxy",
    "prefect-archival-worker",
    "prefect-retrieval-worker",
    "mover",
    "s3",
    "scicat",
)


@pytest.fixture(scope="session")
def docker_deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    if missing := missing_for_docker():
        pytest.fail(f"the deployment cannot be tried: {missing}")
    if _KEPT and Path(_KEPT, "kept.json").exists():
        yield Deployment(Path(_KEPT), **json.loads(Path(_KEPT, "kept.json").read_text(encoding="utf-8")))
        return
    deployment = Deployment(Path(_KEPT) if _KEPT else tmp_path_factory.mktemp("deployment") / "mover")
    try:
        deployment.clone()
        deployment.up()
        deployment.wait_until_healthy()
        if _KEPT:
            facts = {"name": deployment.project, "ports": deployment.ports}
            Path(_KEPT, "kept.json").write_text(json.dumps(facts), encoding="utf-8")
        yield deployment
    finally:
        if not _KEPT:
            remove(deployment)


def remove(deployment: Deployment) -> None:
    """Takes everything away that the deployment made, its images among it; their layers stay in the build cache."""
    with suppress(subprocess.SubprocessError):
        deployment.compose("--profile", "*", "down", "-v", "--remove-orphans", "--timeout", "5", check=False)
    images = docker("images", "-q", "--filter", f"reference=*:{deployment.project}").split()
    if images:
        docker("image", "rm", "-f", *set(images), check=False)


# ----------------------------------------------------------------------------------------------------------- the engine
@cache
def missing_for_docker() -> str:
    """What keeps the tests of the deployment from running, or ''."""
    for program in ("docker", "git", "make"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if subprocess.run(["docker", "compose", "version"], check=False, capture_output=True, timeout=30).returncode:
        return "docker compose is not installed"
    answer = subprocess.run(["docker", "info"], check=False, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        return f"no Docker engine answers ({answer.stderr.strip()})"
    if os.geteuid():
        return "root is needed, to look into volumes and processes of containers"
    if not re.match(r"unix://|$", os.environ.get("DOCKER_HOST", "")):
        return "the engine is on another machine (DOCKER_HOST)"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs the engine, which is slow, and leaves it out where there is none, unless this is CI."""
    marked = [item for item in items if item.get_closest_marker("docker")]
    for item in marked:
        item.add_marker("slow")
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))
    wanted = bool(os.environ.get("CI")) and shutil.which("docker") is not None
    if not marked or wanted or not missing_for_docker():
        return
    config.stash[_LEFT_OUT] = len(marked)
    items[:] = [item for item in items if not item.get_closest_marker("docker")]
    config.hook.pytest_deselected(items=marked)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """The line that says so."""
    count = config.stash.get(_LEFT_OUT, 0)
    return [f"docker: {missing_for_docker()}; {count} tests need it and are left out"] if count else []
