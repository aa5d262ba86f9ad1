"""The forward pipeline of a dataset: plan → move → verify → register → release, one awaited call per step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from mover.cleanup import Registered, release_source
from mover.datablock import DatablockRun
from mover.errors import LayoutMismatchError, LtsError, MoverError, SourceDiffersError
from mover.model import Datablock, DatasetPlan, Manifest, ManifestMember, SourceObject, Stage, raw_files_prefix
from mover.parts import Parts, hold_dataset, read_manifests
from mover.plan import compare_with_manifests, plan_dataset
from mover.policies.names import check_dataset_id
from mover.reports import ArchiveReport, ByteCounters, DatablockReport, ReleaseReport
from mover.staging import empty_staging
from mover.streams.lts import LtsFolder
from mover.tasks import side_by_side
from mover.verification import verify_datablock

__all__ = ["ArchiveOptions", "archive_dataset", "plan_source"]


_log = logging.getLogger(__name__)

_ROLLBACK_S = 120.0  # a catalogue that is away must not hold up a run that is told to end
_GONE = "it has a manifest, but the datablock is gone; `mover repair` rebuilds it"


class ArchiveOptions(msgspec.Struct, frozen=True):
    """``release_source``: delete the source objects after everything is proved and registered."""

    release_source: bool = False


async def plan_source(parts: Parts, dataset_id: str, target_bytes: int | None = None) -> DatasetPlan:
    """The plan of a dataset from its listing and, where there is one, the catalogue's list.

    Raises:
        UserError: names, missing files, an unknown dataset.
    """
    check_dataset_id(dataset_id)
    bucket, prefix = parts.buckets.landing_zone, raw_files_prefix(dataset_id)
    announcer = parts.announcer(dataset_id, Stage.PLAN)
    with announcer.stage():
        plan = await plan_dataset(
            dataset_id,
            parts.store.list_objects(bucket, prefix),
            target_bytes=target_bytes or parts.target_bytes,
            listed_files=await parts.catalogue.listed_files(dataset_id),
            where=f"s3://{bucket}/{prefix}",
        )
        announcer.expect(plan.size_bytes)
        return plan


async def archive_dataset(parts: Parts, dataset_id: str, options: ArchiveOptions) -> ArchiveReport:
    """Archives one dataset, or finishes what an earlier run began. A dataset that is archived already is adopted.

    Raises:
        DatasetBusyError: another run holds the dataset.
        SourceDiffersError: it is archived, in part or whole, and the source is another one now.
        MoverError: a step failed; what is durable stays, for the next run.
    """
    began = anyio.current_time()
    check_dataset_id(dataset_id)
    begun_before = await parts.on_lts(parts.folder(dataset_id).exists)
    # A new dataset is planned before anything is written: a refused one leaves no trace on the LTS.
    plan = None if begun_before else await plan_source(parts, dataset_id)
    async with hold_dataset(parts, dataset_id) as folder:
        manifests = await read_manifests(parts, folder)
        await _check_adopted(parts, folder, manifests)
        if parts.staging:
            for manifest in manifests:  # a run that ended right after its manifest leaves the copy behind
                await empty_staging(parts, manifest)
        if manifests or plan is None:
            plan = await _plan_rest(parts, dataset_id, manifests)
        written = [] if plan is None else await _archive_datablocks(parts, folder, plan, manifests)
        proved = await _prove_again(parts, folder, manifests) if options.release_source else {}
        manifests = sorted([*manifests, *(manifest for manifest, _ in written)], key=lambda item: item.number)
        registered = await _register(parts, manifests)
        release = await _release(parts, dataset_id, registered) if options.release_source else None
        await parts.on_lts(parts.journal.forget, dataset_id)
    new = proved | {report.number: report for _, report in written}
    reports = tuple(new.get(manifest.number) or _adopted(manifest) for manifest in manifests)
    return _report(dataset_id, plan, reports, release, anyio.current_time() - began)


async def _check_adopted(parts: Parts, folder: LtsFolder, manifests: Sequence[Manifest]) -> None:
    """Committed datablocks count only while their files are there and have their sizes."""
    for manifest in manifests:
        name = manifest.name
        size_bytes = await parts.on_lts(folder.datablock_size, name)
        if size_bytes is None:
            raise LtsError("adopt", str(folder.datablock_path(name)), _GONE)
        if size_bytes != manifest.size_bytes:
            raise LayoutMismatchError(name, "size in bytes", manifest.size_bytes, size_bytes)


async def _prove_again(parts: Parts, folder: LtsFolder, manifests: Sequence[Manifest]) -> dict[int, DatablockReport]:
    """Reads committed datablocks back whose source is still there, before it is deleted; their reports by number.

    What was proved then may have been damaged since, and the source is the only other copy.
    """
    numbers = {member.path: manifest.number for manifest in manifests for member in manifest.members}
    listing = parts.store.list_objects(parts.buckets.landing_zone, raw_files_prefix(folder.dataset_id))
    there = {numbers[item.path] async for item in listing if item.path in numbers} if manifests else set()
    proved = [manifest for manifest in manifests if manifest.number in there]
    return {manifest.number: await verify_datablock(parts, folder, manifest, "read-back") for manifest in proved}


async def _plan_rest(parts: Parts, dataset_id: str, manifests: Sequence[Manifest]) -> DatasetPlan | None:
    """The plan of what is still to do; None when all datablocks are committed.

    A committed dataset is compared with its source object by object: objects may be gone (released), none may be new or
    another one. An interrupted one goes on under the target size that it began with.
    """
    if manifests and len(manifests) == manifests[0].datablock_count:
        await _compare_source(parts, dataset_id, manifests)
        return None
    plan = await plan_source(parts, dataset_id, manifests[0].target_bytes if manifests else None)
    if any(manifest.fingerprint != plan.fingerprint for manifest in manifests):
        differences = await anyio.to_thread.run_sync(compare_with_manifests, plan, manifests)
        added = differences.added if differences.complete else ()  # else these are what is still to be archived
        raise SourceDiffersError(dataset_id, added, differences.removed, differences.changed)
    return plan


async def _compare_source(parts: Parts, dataset_id: str, manifests: Sequence[Manifest]) -> None:
    archived = {member.path: member for manifest in manifests for member in manifest.members}
    listing = parts.store.list_objects(parts.buckets.landing_zone, raw_files_prefix(dataset_id))
    others = [item.path async for item in listing if _differs(archived.get(item.path), item)]
    if others:
        added = [path for path in others if path not in archived]
        changed = [path for path in others if path in archived]
        raise SourceDiffersError(dataset_id, added, (), changed)


def _differs(member: ManifestMember | None, item: SourceObject) -> bool:
    if member is None:
        return not _is_marker(item)
    return (member.size_bytes, member.etag) != (item.size_bytes, item.etag)


def _is_marker(item: SourceObject) -> bool:
    return not item.size_bytes and (not item.path or item.path.endswith("/"))


async def _archive_datablocks(
    parts: Parts, folder: LtsFolder, plan: DatasetPlan, manifests: Sequence[Manifest]
) -> list[tuple[Manifest, DatablockReport]]:
    """Moves and verifies what is not committed, side by side as far as the limits allow, in the plan's order."""
    committed = {manifest.number for manifest in manifests}
    pending = [datablock for datablock in plan.datablocks if datablock.number not in committed]
    target_bytes = manifests[0].target_bytes if manifests else parts.target_bytes
    written: list[tuple[Manifest, DatablockReport]] = []

    async def work(datablock: Datablock) -> None:
        written.append(await DatablockRun(parts, folder, plan, datablock, target_bytes).run())

    # one for each slot on the way: the next datablock is ready when one comes free
    await side_by_side(pending, work, lambda: parts.limits.slots_to_lts, lambda: parts.limits.changed)
    return written


async def _register(parts: Parts, manifests: Sequence[Manifest]) -> list[Registered]:
    """Tells the catalogue, one datablock after another, only now that all are proved: all of them or none.

    What earlier runs registered is never taken back here: the dataset may have been archived for years.
    """
    registered: list[Registered] = []
    new: list[Manifest] = []
    for manifest in manifests:
        register = partial(parts.catalogue.register, manifest.dataset_id, manifest)
        with parts.announcer(manifest.dataset_id, Stage.REGISTER, manifest.number).stage():
            try:
                if await parts.run_stage(Stage.REGISTER, manifest.name, register):
                    new.append(manifest)
            except BaseException:
                with anyio.move_on_after(_ROLLBACK_S, shield=True):
                    await _unregister(parts, new)
                raise
        registered.append(Registered(manifest))
    return registered


async def _unregister(parts: Parts, manifests: Sequence[Manifest]) -> None:
    """Takes back what was registered; one that resists does not keep the others, and registering again is harmless."""
    for manifest in manifests:
        try:
            await parts.catalogue.unregister(manifest.dataset_id, manifest)
        except MoverError as exc:
            _log.warning("%s stays registered: %s", manifest.archive_id, exc)


async def _release(parts: Parts, dataset_id: str, registered: Sequence[Registered]) -> ReleaseReport:
    release = partial(release_source, parts.store, parts.buckets.landing_zone, registered)
    with parts.announcer(dataset_id, Stage.RELEASE).stage():
        return await parts.run_stage(Stage.RELEASE, dataset_id, release)


def _adopted(manifest: Manifest) -> DatablockReport:
    return DatablockReport(
        number=manifest.number,
        name=manifest.name,
        size_bytes=manifest.size_bytes,
        payload_bytes=manifest.payload_bytes,
        members=len(manifest.members),
        outcome="adopted",
        digest=manifest.digest,
        evidence=max((evidence.level for evidence in manifest.evidence), default=""),
    )


def _report(
    dataset_id: str,
    plan: DatasetPlan | None,
    reports: tuple[DatablockReport, ...],
    release: ReleaseReport | None,
    elapsed_s: float,
) -> ArchiveReport:
    counters = ByteCounters()
    for report in reports:
        counters.add(report.counters)
    return ArchiveReport(
        dataset_id=dataset_id,
        file_count=sum(report.members for report in reports),
        payload_bytes=sum(report.payload_bytes for report in reports),
        size_bytes=sum(report.size_bytes for report in reports),
        datablocks=reports,
        counters=counters,
        elapsed_s=elapsed_s,
        anomalies=plan.anomalies if plan is not None else (),
        release=release,
    )
