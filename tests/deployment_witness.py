"""Runtime containers as the engine shows them while they are there."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import Any, Self

import msgspec

from tests.deployments import Deployment, docker

__all__ = ["Runtime", "Witness", "processes"]


class Runtime(msgspec.Struct):
    """A runtime container as the engine showed it while it was there."""

    facts: dict[str, Any]
    processes: list[tuple[int, str]]
    """User and command line of each process."""


class Witness:
    """Looks at every runtime container that starts while the block runs."""

    def __init__(self, deployment: Deployment) -> None:
        label = f"label=org.mover.runtime={deployment.project}"
        self._command = ["docker", "events", "--filter", label, "--filter", "type=container", "--format", "{{json .}}"]
        self.events: list[dict[str, Any]] = []
        self.found: list[Runtime] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            event = json.loads(line)
            self.events.append(event)
            if event["Action"] == "start":
                facts = docker("inspect", event["id"], check=False)
                self.found += [Runtime(fact, processes(event["id"])) for fact in json.loads(facts or "[]")]

    def ended(self) -> dict[str, str]:
        """Exit codes of the containers that ended, by name."""
        deaths = [event["Actor"]["Attributes"] for event in self.events if event["Action"] == "die"]
        return {death["name"]: death["exitCode"] for death in deaths}


def processes(container: str) -> list[tuple[int, str]]:
    """User and command line of each process of a running container."""
    lines = docker("top", container, "-eo", "uid,pid,args", check=False).splitlines()[1:]
    return [(int(line.split(maxsplit=2)[0]), line.split(maxsplit=2)[2]) for line in lines]
