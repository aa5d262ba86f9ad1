"""What the pipelines and the jobs need from a catalogue of datasets, and the catalogue of those who have none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import msgspec

from mover.model import CatalogueFile, Manifest

__all__ = ["Catalogue", "CatalogueJob", "JobCatalogue", "JobDataset", "Lifecycle", "NoCatalogue"]


class Catalogue(Protocol):
    """Knows which files a dataset should have, and is told which datablocks hold them.

    Implementations apply their own retries; what they raise is a ``MoverError``. All methods may be repeated.
    """

    async def listed_files(self, dataset_id: str) -> AsyncIterator[CatalogueFile] | None:
        """The files that the dataset should have, in any order; None when the catalogue keeps no list of them.

        A list without entries says that the dataset is really empty: an implementation that may have been denied the
        entries has to find out, and raise.

        Raises:
            DatasetNotFoundError: the catalogue does not know the dataset.
        """
        ...

    async def register(self, dataset_id: str, manifest: Manifest) -> bool:
        """Records one verified datablock; whether it was not recorded before. Other content under its name raises.

        Datablocks of one dataset are registered one after another, never at the same time. The source is released only
        after this has returned for every datablock.
        """
        ...

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Takes the record of one datablock back; one that is not recorded is fine."""
        ...


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dataset stands, as the catalogue's frontend reads it; in a change, None leaves a field alone.

    The names and their values are SciCat's ``datasetlifecycle``. The two messages for people are JSON objects, replaced
    as a whole.
    """

    archivable: bool | None = None
    retrievable: bool | None = None
    archive_status_message: str | None = None
    retrieve_status_message: str | None = None
    archive_return_message: dict[str, Any] | None = None
    retrieve_return_message: dict[str, Any] | None = None
    retrieve_integrity_check: bool | None = None


class JobDataset(msgspec.Struct, frozen=True):
    """One dataset of a job; ``files``: paths that are wanted, none: all of them."""

    dataset_id: str
    files: tuple[str, ...] = ()


class CatalogueJob(msgspec.Struct, frozen=True):
    """A job that somebody ordered in the catalogue.

    ``kind`` is the catalogue's word (``archive``, ``retrieve``, sites have others); ``created_at`` is ISO 8601;
    ``result`` is what earlier updates left there.
    """

    job_id: str
    kind: str
    status_code: str
    status_message: str
    datasets: tuple[JobDataset, ...]
    created_at: str = ""
    result: dict[str, Any] = msgspec.field(default_factory=dict)


class JobCatalogue(Catalogue, Protocol):
    """A catalogue that also keeps the orders and shows people how they go."""

    async def job(self, job_id: str) -> CatalogueJob:
        """One job.  Raises JobNotFoundError."""
        ...

    def jobs(self, kinds: Sequence[str], status_codes: Sequence[str]) -> AsyncIterator[CatalogueJob]:
        """All jobs of these kinds in one of these states, oldest first; nothing is cut off."""
        ...

    async def update_job(
        self, job_id: str, status_code: str, status_message: str, result: dict[str, Any] | None = None
    ) -> None:
        """Sets the state of a job; ``result`` replaces the earlier one as a whole, None keeps it.

        An update that the server stored although it answered with an error (an e-mail that failed) counts as done.

        Raises:
            JobNotFoundError: there is no such job, or a dataset of it was deleted, which ends all updates.
        """
        ...

    async def unregister_all(self, dataset_id: str) -> int:
        """Takes the records of all datablocks of the dataset back; returns how many there were."""
        ...

    async def lifecycle(self, dataset_id: str) -> Lifecycle:
        """Where the dataset stands.  Raises DatasetNotFoundError."""
        ...

    async def update_lifecycle(self, dataset_id: str, change: Lifecycle) -> None:
        """Changes the fields that are not None, leaves the others as they are, and reads back that it took.

        Raises:
            DatasetNotFoundError: the catalogue does not know the dataset.
        """
        ...


class NoCatalogue:
    """Used where no catalogue is configured: lists nothing, accepts everything."""

    async def listed_files(self, dataset_id: str) -> AsyncIterator[CatalogueFile] | None:  # noqa: ARG002 - the protocol's
        """No list is kept: the landing zone alone says what the dataset is."""
        return None

    async def register(self, dataset_id: str, manifest: Manifest) -> bool:  # noqa: ARG002 - the protocol's
        """Accepts the datablock."""
        return True

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Accepts that, too."""
