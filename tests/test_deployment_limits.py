"""The limits over many runtime containers, measured on the long-term storage itself."""

from __future__ import annotations

import os
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.deployment_moves import MIB, Facility, linked
from tests.deployments import Deployment
from tests.flow_world import LIMITS, until

pytestmark = [pytest.mark.docker]

_JOBS = 4
_SIZES = {f"frames/{index}.tif": 12 * MIB for index in range(4)}  # each a datablock of its own
_REPLY_S = 2.0
_LOOK_S = 0.02
_UNFINISHED = f"**/.*.tar.{'[0-9a-f]' * 16}.part"


class LtsWatch:
    """Looks at unfinished datablocks while the block runs: at their names, and at who has them open.

    One counts when it is there in two looks in a row: then it was there at the instant between them, as all others that
    count then.
    """

    def __init__(self, lts: Path) -> None:
        self._lts = lts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most: Counter[str] = Counter()
        """Most that were ``there``, and ``open``, at a time."""
        self.looks = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before: set[tuple[str, str]] = set()
        while not self._stop.wait(_LOOK_S):
            # Manifests have unfinished files too, which no limit speaks of.
            now = {("there", path.name) for path in self._lts.glob(_UNFINISHED)}
            now |= {("open", name) for name in _open_parts({name for _, name in now})}
            self.most |= Counter(use for use, _ in before & now)
            before = now
            self.looks += 1


def _open_parts(names: set[str]) -> Iterator[str]:
    """Those of the files that a process of this machine, in whatever container, has open."""
    if not names:
        return
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"prefect" not in (folder / "cmdline").read_bytes():
                continue
            numbers = os.listdir(folder / "fd")  # noqa: PTH208 - many times a second
        except OSError:
            continue
        for number in numbers:
            try:
                name = os.readlink(folder / "fd" / number).rpartition("/")[2]  # noqa: PTH115
            except OSError:
                continue
            if name in names:
                yield name


@pytest.mark.timeout(400)
def test_never_more_datablocks_are_written_than_the_limit_says_over_all_containers(
    docker_deployment: Deployment, tmp_path: Path
) -> None:
    facility, stamp = Facility(docker_deployment), uuid.uuid4().hex[:8]
    datasets = [f"20.500.11935/{stamp}-{number}" for number in range(2 * _JOBS)]
    files = {dataset_id: facility.add_dataset(dataset_id, _SIZES) for dataset_id in datasets}

    def committed() -> int:
        return sum(len(list(facility.folder(dataset_id).glob("*.json"))) for dataset_id in datasets)

    with linked(facility, tmp_path / "control") as link:
        link.set(reply_s=_REPLY_S)
        with LtsWatch(facility.lts) as documented:
            jobs = [facility.order("archive", datasets[2 * job : 2 * job + 2]) for job in range(_JOBS)]
            until(lambda: committed() >= len(datasets), 150, "a good part of the datablocks")
            containers = {docker_deployment.runtime_container(facility.runs(job)[-1]["id"]) for job in jobs}
        # The same runs with a larger limit: the watch sees it.
        with LtsWatch(facility.lts) as larger:
            facility.set_limit("MOVE_TO_LTS_LIMIT", 2 * LIMITS["MOVE_TO_LTS_LIMIT"])
            for job in jobs:
                facility.wait_for_end(job)

    assert len(containers - {""}) == _JOBS  # all at once
    print(documented.most, documented.looks, larger.most, larger.looks)  # noqa: T201 - shown by -rP
    assert documented.most == {"there": LIMITS["MOVE_TO_LTS_LIMIT"], "open": LIMITS["MOVE_TO_LTS_LIMIT"]}
    assert LIMITS["MOVE_TO_LTS_LIMIT"] < larger.most["open"] <= 2 * LIMITS["MOVE_TO_LTS_LIMIT"]
    for number, dataset_id in enumerate(datasets):
        facility.expect_archived(jobs[number // 2], files[dataset_id], dataset_id)
    facility.expect_slots_back()
