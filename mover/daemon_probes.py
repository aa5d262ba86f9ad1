"""How each dependency of the daemon is tried: cheap, real, and without a trace where that is possible."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from mover.daemon_health import Blocking, Finding, Probe
from mover.daemon_prefect import PrefectStarter
from mover.engine import EngineConfig
from mover.errors import MissingMountError, MoverError
from mover.policies.retry import RetryPolicy
from mover.policies.space import SpaceReading
from mover.scicat import SciCat, SciCatAccess
from mover.settings_rules import Secret
from mover.shown import bytes_text
from mover.streams.durable import write_file_durably
from mover.streams.lts_mount import filesystem_of, free_space, probe_mount, require_folder
from mover.streams.s3_probe import S3Probe
from mover.tasks import open_task_group

__all__ = ["LtsProbe", "catalogue_probe", "open_probes", "scratch_probe"]

_LARGEST_SKEW_S = 300.0  # S3 refuses signatures that are older than 15 minutes
_SCRATCH_FLOOR_BYTES = 256 << 20
_ONE_ATTEMPT = RetryPolicy(attempts=1)
_REMOTE_EVERY_S = 30.0
_EXPECTED = "lts-mount"


class LtsProbe:
    """Tries the LTS; blocking. What is there the first time is expected from then on, over restarts, too.

    Under a mount that is gone lies an empty folder that everything can be written to.
    """

    def __init__(self, root: Path, folder: Path, floor_percentage: float) -> None:
        """``folder``: where the daemon keeps what it expects."""
        self._root, self._expected = root, folder / _EXPECTED
        self._floor_percentage = floor_percentage
        self.reading: SpaceReading | None = None

    @property
    def floor_bytes(self) -> int:
        """What has to stay free, as of the last reading."""
        return math.ceil(self.reading.total_bytes * self._floor_percentage / 100) if self.reading else 0

    def __call__(self) -> Finding:
        """Looks for the mount, writes, and reads how much is free.

        Raises:
            LtsError: it is not what it was, or refuses to be written.
            OSError: the scratch folder cannot be used.
        """
        found = self.check_mount()
        profile = probe_mount(self._root)
        self.reading = reading = free_space(self._root)
        free = f"{bytes_text(reading.free_bytes)} of {bytes_text(reading.total_bytes)} free"
        where = f"{found} at {self._root}" + (", write-once" if profile.write_once else "")
        if reading.free_bytes <= self.floor_bytes:
            floor = f"{bytes_text(self.floor_bytes)} have to stay free: archiving waits for space"
            return Finding(f"{where}; {free}, {floor}", "degraded")
        return Finding(f"{where}; {free}")

    def check_mount(self) -> str:
        """The type of the file system; blocking.  Raises MissingMountError when it is another one than it was."""
        require_folder(self._root)
        found = f"{filesystem_of(self._root) or 'an unknown file system'} of {_mount_point(self._root)}"
        try:
            expected = self._expected.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            self._expected.parent.mkdir(parents=True, exist_ok=True)
            write_file_durably(self._expected, f"{found}\n".encode())
            return found
        if not _same_kind(expected, found):
            hint = f"{found} (if that is meant to be so, remove {self._expected})"
            raise MissingMountError(str(self._root), expected, hint)
        return found


def _mount_point(path: Path) -> Path:
    """The highest folder on the same device."""
    path = path.resolve()
    device = path.stat().st_dev
    while path != path.parent and path.parent.stat().st_dev == device:
        path = path.parent
    return path


def _same_kind(expected: str, found: str) -> bool:
    kinds = [text.partition(" of ") for text in (expected, found)]
    (kind_before, _, mount_before), (kind_now, _, mount_now) = kinds
    of_nfs = kind_before.startswith("nfs") and kind_now.startswith("nfs")  # versions are negotiated
    return (kind_before == kind_now or of_nfs) and mount_before == mount_now


def scratch_probe(folder: Path) -> Finding:
    """Writes a file durably where the journal is; blocking.  Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file_durably(folder / ".mover-health", b"written by the daemon to see whether it can\n")
    numbers = os.statvfs(folder)
    free_bytes = numbers.f_bavail * numbers.f_frsize
    text = f"{bytes_text(free_bytes)} free in {folder}"
    return Finding(text, "degraded" if free_bytes < _SCRATCH_FLOOR_BYTES else "ok")


async def _look_at_s3(probe: S3Probe, config: EngineConfig) -> Finding:
    """Asks for all buckets at once.  Raises the first failure."""
    names = [config.buckets.landing_zone, config.buckets.retrieval]
    optional = [] if config.staging else [config.buckets.staging]
    names += [] if optional else [config.buckets.staging]
    failures: dict[str, MoverError] = {}
    skews: list[float] = []

    async def look(bucket: str) -> None:
        try:
            skew_s = await probe.clock_skew_s(bucket)
        except MoverError as error:
            failures[bucket] = error
        else:
            skews.append(skew_s or 0.0)

    async with open_task_group() as tasks:
        for bucket in dict.fromkeys(names + optional):
            tasks.start_soon(look, bucket)
    for bucket in names:
        if bucket in failures:
            raise failures[bucket]
    text = f"{', '.join(names)} at {config.s3.endpoint_url}"
    if failures:
        text += f"; {optional[0]} is not there, and not used"
    worst_s = max((abs(skew_s) for skew_s in skews), default=0.0)
    if worst_s > _LARGEST_SKEW_S:
        return Finding(f"{text}; its clock and this host's are {worst_s:.0f} s apart", "degraded")
    return Finding(text)


@asynccontextmanager
async def catalogue_probe(access: SciCatAccess) -> AsyncIterator[Probe]:
    """Logs in and asks who the mover is there."""
    async with SciCat.open(access, retry=_ONE_ATTEMPT) as catalogue:

        async def look() -> Finding:
            check = await catalogue.check()
            who = f"{check.username} at {access.endpoint_url}"
            if check.health != "ok":
                return Finding(f"{who}; it says about itself: {check.health}", "degraded")
            return Finding(who)

        yield Probe("catalogue", look, deadline_s=20.0, every_s=_REMOTE_EVERY_S)


@asynccontextmanager
async def _prefect_probe(api_url: str, auth: Secret | None) -> AsyncIterator[Probe]:
    """Asks for what a job needs: whether the server lives it tells everybody, also those whom it lets start nothing."""
    async with PrefectStarter.open(api_url, auth) as prefect:

        async def look() -> Finding:
            await prefect.check()
            return Finding(prefect.url)

        # Without it jobs are not started from the catalogue, but those that the daemon has go on.
        yield Probe("prefect", look, required=False, every_s=_REMOTE_EVERY_S)


@asynccontextmanager
async def open_probes(
    config: EngineConfig,
    lts: LtsProbe,
    folder: Path,
    *,
    scicat: SciCatAccess | None = None,
    prefect_url: str = "",
    prefect_auth: Secret | None = None,
) -> AsyncIterator[list[Probe]]:
    """All probes, with their connections.

    Args:
        config: of the engine.
        lts: tries the LTS.
        folder: where the daemon keeps its jobs.
        scicat: None: there is no catalogue.
        prefect_url: '': there is none.
        prefect_auth: ``user:password``; None: it asks for none.
    """
    async with AsyncExitStack() as stack:
        s3 = await stack.enter_async_context(S3Probe.open(config.s3))
        probes = [
            Probe("s3", lambda: _look_at_s3(s3, config)),
            Probe("lts", Blocking(lts, 10.0)),
            Probe("scratch", Blocking(lambda: scratch_probe(folder), 10.0)),
        ]
        if scicat is not None:
            probes.append(await stack.enter_async_context(catalogue_probe(scicat)))
        if prefect_url:
            probes.append(await stack.enter_async_context(_prefect_probe(prefect_url, prefect_auth)))
        yield probes
