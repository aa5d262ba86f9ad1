"""The client of SciCat against the server for tests: clients that do not wait, manifests, and what was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import xxhash

from mover.model import WINDOW_BYTES, Manifest, ManifestMember, SourceChecksum, archive_id, window_count
from mover.policies.retry import RetryPolicy
from mover.scicat import SciCat, SciCatAccess
from mover.settings_rules import Secret
from tests.datasets import DATASET
from tests.scicat_fake.server import ScicatServer

__all__ = ["DATASET", "QUICK", "Clock", "Sleeper", "access_to", "make_manifest", "member", "open_client"]

QUICK = RetryPolicy(attempts=4, base_s=0.001, throttle_base_s=0.001)


class Clock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Sleeper:
    """Remembers the pauses instead of waiting."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.pauses_s.append(seconds)


def access_to(server: ScicatServer, **changes: object) -> SciCatAccess:
    values: dict[str, object] = {"user": server.user, "password": Secret(server.password), **changes}
    return SciCatAccess(endpoint_url=server.url, **values)  # type: ignore[arg-type]


@asynccontextmanager
async def open_client(
    server: ScicatServer,
    access: SciCatAccess | None = None,
    *,
    retry: RetryPolicy = QUICK,
    clock: Callable[[], float] | None = None,
    sleep: Sleeper | None = None,
) -> AsyncIterator[SciCat]:
    async with SciCat.open(
        access or access_to(server), retry=retry, clock=clock or Clock(), sleep=sleep or Sleeper()
    ) as client:
        yield client


def member(path: str, size_bytes: int = 10, checksum: SourceChecksum | None = None) -> ManifestMember:
    windows = tuple(xxhash.xxh3_128_hexdigest(f"{path}{number}".encode()) for number in range(window_count(size_bytes)))
    return ManifestMember(path, f"raw_files/{path}", "etag", size_bytes, 1_750_000_000, 0, 512, windows, checksum)


def make_manifest(*members: ManifestMember, number: int = 1, dataset_id: str = DATASET) -> Manifest:
    listed = members or (member("a"), member("folder/b ä\n", WINDOW_BYTES + 1))
    return Manifest(
        dataset_id=dataset_id,
        number=number,
        datablock_count=1,
        archive_id=archive_id(dataset_id, number),
        fingerprint="0" * 32,
        target_bytes=1 << 30,
        size_bytes=sum(item.size_bytes for item in listed) + 10_240,
        payload_bytes=sum(item.size_bytes for item in listed),
        digest="xxh3_128:" + "0" * 32,
        members=listed,
        evidence=(),
        created_at="2026-01-01T00:00:00Z",
        software="mover",
    )
