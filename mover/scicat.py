"""SciCat as the catalogue of datasets and jobs: versions 3 and 4 of its API, each for what it has."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import msgspec

from mover.catalogue import CatalogueJob, Lifecycle
from mover.model import CatalogueFile, Manifest
from mover.policies.names import check_dataset_id
from mover.policies.retry import RetryPolicy
from mover.scicat_datablocks import Datablocks
from mover.scicat_files import OrigDatablocks
from mover.scicat_http import PATIENCE, SciCatAccess, SciCatSession
from mover.scicat_jobs import Jobs
from mover.scicat_lifecycle import Lifecycles
from mover.scicat_locks import DatasetLocks
from mover.scicat_trial import Trial

__all__ = ["SciCat", "SciCatAccess", "SciCatCheck"]


class SciCatCheck(msgspec.Struct, frozen=True):
    """What a look at the server found. ``health`` is ``ok`` or what it says instead; ``groups`` are the account's."""

    health: str
    username: str
    groups: tuple[str, ...]
    jobs_api: Literal["v3", "v4"]


class SciCat:
    """Implements ``JobCatalogue``; any number of calls may run at a time.

    All methods raise CatalogueTransientError when the server stayed out of reach for as long as the policy tries, and
    CatalogueAccessError when it refuses the account or answers what SciCat does not answer. An id of a dataset that
    cannot be one is a HostileNameError.
    """

    def __init__(self, session: SciCatSession) -> None:
        self._session = session
        locks = DatasetLocks()
        self._datablocks = Datablocks(session, locks)
        self._lifecycles = Lifecycles(session, locks)
        self._jobs = Jobs(session)
        self.trial = Trial(session)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        access: SciCatAccess,
        *,
        retry: RetryPolicy = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: Callable[[], float] = random.random,
    ) -> AsyncIterator[SciCat]:
        """A client with its own connections; nothing is sent before the first call.

        Args:
            access: where the server is, and the account.
            retry: how calls are repeated.
            clock: seconds, monotonic; a token's age is told by it.
            sleep: waits a number of seconds.
            rng: uniform in [0, 1).
        """
        async with SciCatSession.open(access, retry, clock=clock, sleep=sleep, rng=rng) as session:
            yield cls(session)

    async def check(self) -> SciCatCheck:
        """Health, login, identity, and a list of jobs: what can be tried without changing anything."""
        health = await self._session.health()
        profile = await self._session.identity()
        await self._jobs.probe()
        groups = profile.get("accessGroups")
        return SciCatCheck(
            health=health,
            username=str(profile.get("username")),
            groups=tuple(map(str, groups)) if isinstance(groups, list) else (),
            jobs_api=self._jobs.api,
        )

    async def listed_files(self, dataset_id: str) -> AsyncIterator[CatalogueFile]:
        """The files that the dataset should have, read page by page as they are taken; never None.

        Raises:
            DatasetNotFoundError: the catalogue does not know the dataset.
            CatalogueAccessError: at the latest after the last file: not all of the list can be seen.
            CatalogueTransientError: also when the list changed while it was read.
        """
        check_dataset_id(dataset_id)
        origdatablocks = OrigDatablocks(self._session, dataset_id)
        await origdatablocks.prepare()
        return origdatablocks.files()

    async def register(self, dataset_id: str, manifest: Manifest) -> bool:
        """Records one verified datablock, once, whatever answers are lost; whether it was not recorded before.

        Raises:
            CatalogueConflictError: it is recorded with another content.
            DatasetNotFoundError: the catalogue does not know the dataset.
        """
        check_dataset_id(dataset_id)
        return await self._datablocks.register(dataset_id, manifest)

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Takes the record of one datablock back; one that is not recorded is fine."""
        check_dataset_id(dataset_id)
        await self._datablocks.unregister(dataset_id, manifest)

    async def unregister_all(self, dataset_id: str) -> int:
        """Takes the records of all datablocks back in one call and resets the dataset's counters; how many it were."""
        check_dataset_id(dataset_id)
        return await self._datablocks.unregister_all(dataset_id)

    async def job(self, job_id: str) -> CatalogueJob:
        """One job.  Raises JobNotFoundError."""
        return await self._jobs.read(job_id)

    async def jobs(self, kinds: Sequence[str], status_codes: Sequence[str]) -> AsyncIterator[CatalogueJob]:
        """All jobs of these kinds in one of these states, oldest first."""
        for job in await self._jobs.every(kinds, status_codes):
            yield job

    async def update_job(
        self, job_id: str, status_code: str, status_message: str, result: dict[str, Any] | None = None
    ) -> None:
        """Sets the state of a job; an update that was stored although it was answered with an error is done.

        Version 3 of the API has no message besides the state: there ``status_message`` is not stored.

        Raises:
            JobNotFoundError: there is no such job, or a dataset of it was deleted, which ends all updates.
        """
        await self._jobs.update(job_id, status_code, status_message, result)

    async def lifecycle(self, dataset_id: str) -> Lifecycle:
        """Where the dataset stands.  Raises DatasetNotFoundError."""
        check_dataset_id(dataset_id)
        return await self._lifecycles.read(dataset_id)

    async def update_lifecycle(self, dataset_id: str, change: Lifecycle) -> None:
        """Changes the fields that are not None and reads back that it took.  Raises DatasetNotFoundError."""
        check_dataset_id(dataset_id)
        await self._lifecycles.update(dataset_id, change)
