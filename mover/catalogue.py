"""What the pipelines need from a catalogue of datasets, and the catalogue of those who have none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from mover.model import CatalogueFile, Manifest

__all__ = ["Catalogue", "NoCatalogue"]


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

    async def register(self, dataset_id: str, manifest: Manifest) -> None:
        """Records one verified datablock. One that is recorded with the same content is fine; other content raises.

        Datablocks of one dataset are registered one after another, never at the same time. The source is released only
        after this has returned for every datablock.
        """
        ...

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Takes the record of one datablock back; one that is not recorded is fine."""
        ...


class NoCatalogue:
    """Used where no catalogue is configured: lists nothing, accepts everything."""

    async def listed_files(self, dataset_id: str) -> AsyncIterator[CatalogueFile] | None:  # noqa: ARG002 - the protocol's
        """No list is kept: the landing zone alone says what the dataset is."""
        return None

    async def register(self, dataset_id: str, manifest: Manifest) -> None:
        """Accepts the datablock."""

    async def unregister(self, dataset_id: str, manifest: Manifest) -> None:
        """Accepts that, too."""
