"""The catalogue's list of files against the objects that are there.

Clients write the list by walking a folder, so it names directories (never uploaded) and links (their content is
uploaded, their size is the length of the link's text; links to folders have no object), and it may name a file twice.
"""

from __future__ import annotations

from mover.model import Anomaly, CatalogueFile, SourceChecksum, SourceObject
from mover.policies.names import check_path

__all__ = ["ExpectedFiles"]


class ExpectedFiles:
    """The catalogue's list while it is compared: entries leave it as their objects are found.

    ``anomalies`` and ``checksums`` (by path) are what was found so far; ``contradictory`` are paths whose sizes
    disagree, between object and list or within the list; ``is_empty`` says that the list names no file at all.
    """

    def __init__(self) -> None:
        self.files: dict[str, CatalogueFile] = {}
        self.anomalies: list[Anomaly] = []
        self.checksums: dict[str, SourceChecksum] = {}
        self.contradictory: set[str] = set()
        self.is_empty = True

    def add(self, entry: CatalogueFile) -> None:
        """Takes the next entry; directories have no objects and are skipped.

        Raises:
            HostileNameError: the entry's path cannot be archived.
        """
        if entry.kind == "directory":
            return
        check_path(entry.path)
        self.is_empty = False
        known = self.files.setdefault(entry.path, entry)
        if known is entry:
            return
        self.anomalies.append(Anomaly("duplicate-entry", entry.path, "the catalogue lists it more than once"))
        if known.size_bytes != entry.size_bytes:
            self.contradictory.add(entry.path)
        self.files[entry.path] = max(known, entry, key=_preference)

    def take(self, item: SourceObject) -> SourceObject | None:
        """The object as the catalogue wants it archived; None when it does not list it."""
        entry = self.files.pop(item.path, None)
        if entry is None:
            return None
        if entry.size_bytes != item.size_bytes:
            if entry.kind != "symlink":
                self.contradictory.add(item.path)
                return item
            detail = f"the link has {entry.size_bytes:,} bytes, what it points to {item.size_bytes:,}"
            self.anomalies.append(Anomaly("symlink-size", item.path, detail))
        elif entry.checksum is not None:
            self.checksums[entry.path] = entry.checksum
        if entry.mtime_s is None or entry.mtime_s == item.mtime_s:
            return item
        return SourceObject(item.path, item.size_bytes, item.etag, entry.mtime_s)

    def missing(self) -> list[str]:
        """Listed files without an object, in order; links without one may lead to folders and are anomalies."""
        links = [entry.path for entry in self.files.values() if entry.kind == "symlink"]
        detail = "no object: a link to a folder, or it was not uploaded; its target is listed itself"
        self.anomalies.extend(Anomaly("missing-symlink", path, detail) for path in links)
        return sorted(path for path, entry in self.files.items() if entry.kind != "symlink")


def _preference(entry: CatalogueFile) -> tuple[bool, int, tuple[str, str]]:
    """Which of several entries of one path counts, whatever their order: a file, the newest, one with a checksum."""
    checksum = ("", "") if entry.checksum is None else (entry.checksum.algorithm, entry.checksum.value)
    return entry.kind == "file", -1 if entry.mtime_s is None else entry.mtime_s, checksum
