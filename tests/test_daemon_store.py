"""The daemon's journal: what is committed stays, through restarts and crashes; what cannot be written is refused."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path

import anyio
import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mover.api import Failure, JobOptions
from mover.daemon_book import Job, Tally, Update
from mover.daemon_ids import JobIds
from mover.daemon_queries import read_page
from mover.daemon_store import Store
from mover.daemon_store_rows import (
    find_key,
    insert_job,
    read_items,
    read_job,
    read_jobs,
    read_newest_id,
    read_reports,
    read_transitions,
    read_unfinished,
    request_cancel,
    trim,
    write_changes,
)
from mover.daemon_store_schema import ItemRow, JobRow, NewJob
from mover.errors import DaemonRunningError, JournalError, KeyConflictError, UnknownJobError

FINAL = ("done", "failed", "cancelled")


def job_row(job_id: str, *, key: str = "", at_ms: int = 1_000, owner: str = "ann") -> JobRow:
    return JobRow(job_id, "archive", owner, 0, JobOptions(), at_ms, at_ms, "queued", "", key, "", "", at_ms)


def new_job(job_id: str, *dataset_ids: str, key: str = "", at_ms: int = 1_000, owner: str = "ann") -> NewJob:
    digest = ",".join(dataset_ids).encode()
    return NewJob(job_row(job_id, key=key, at_ms=at_ms, owner=owner), dataset_ids or ("d/1",), owner, digest)


def loaded(row: JobRow, items: list[ItemRow]) -> Job:
    return Job(row, items, 0, Tally(), open_end=False)


@pytest.mark.anyio
@pytest.mark.slow
async def test_requests_that_wait_are_committed_together_and_in_their_order(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon") as store:
        steps: list[int] = []
        batches: list[int] = []
        real = store._transact  # noqa: SLF001 - commits are seen from nowhere else

        def counting(batch: list[object]) -> Exception | None:
            batches.append(len(batch))
            return real(batch)  # type: ignore[arg-type]

        store._transact = counting  # type: ignore[method-assign,assignment]  # noqa: SLF001
        async with anyio.create_task_group() as tasks:
            for number in range(500):
                tasks.start_soon(store.write, partial(lambda _c, n: steps.append(n), n=number))
        assert steps == list(range(500))
        assert len(batches) <= 5


@pytest.mark.anyio
async def test_what_a_step_refuses_is_its_callers_alone(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon") as store:
        outcomes: dict[str, str] = {}

        async def one(job_id: str, dataset_id: str, key: str) -> None:
            try:
                outcomes[job_id] = await store.write(partial(insert_job, new=new_job(job_id, dataset_id, key=key)))
            except KeyConflictError:
                outcomes[job_id] = "conflict"

        async with anyio.create_task_group() as tasks:
            for job_id, dataset_id, key in (("1", "x", "k"), ("2", "x", "k"), ("3", "y", "k"), ("4", "y", "")):
                tasks.start_soon(one, job_id, dataset_id, key)
        assert outcomes == {"1": "1", "2": "1", "3": "conflict", "4": "4"}


@pytest.mark.anyio
async def test_a_step_that_fails_leaves_nothing_of_itself_and_all_of_the_others(tmp_path: Path) -> None:
    def broken(connection: sqlite3.Connection) -> None:
        insert_job(connection, new_job("broken"))
        connection.execute("INSERT INTO nowhere VALUES (1)")

    async with Store.open(tmp_path / "daemon") as store:
        failures = []

        async def failing() -> None:
            try:
                await store.write(broken)
            except JournalError as error:
                failures.append(str(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.write, partial(insert_job, new=new_job("1")))
            tasks.start_soon(failing)
            tasks.start_soon(store.write, partial(insert_job, new=new_job("2")))
        assert failures == [f"journal {store.path}: SQLITE_ERROR: no such table: nowhere"]
        assert [row.id for row, _ in await store.read(read_unfinished)] == ["1", "2"]


@pytest.mark.anyio
async def test_a_second_daemon_is_told_who_is_there(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon"):
        with pytest.raises(DaemonRunningError, match=r"another daemon works on .*daemon: .*process"):
            async with Store.open(tmp_path / "daemon"):
                pass
    async with Store.open(tmp_path / "daemon") as store:
        assert await store.read(read_newest_id) == ""


@pytest.mark.anyio
async def test_others_on_the_host_cannot_read_the_journal(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "a" / "daemon") as store:
        await store.write(partial(insert_job, new=new_job("1")))
        files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.path.parent.iterdir()}
    assert set(files) == {"jobs.sqlite", "jobs.sqlite-shm", "jobs.sqlite-wal", "lock"}
    assert set(files.values()) == {0o600}
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


@pytest.mark.anyio
async def test_a_journal_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "damaged") as store:
        for number in range(200):
            await store.write(partial(insert_job, new=new_job(f"{number:03}", "d" * 100)))
    path = tmp_path / "damaged" / "jobs.sqlite"
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 4)
    with pytest.raises(JournalError, match=r"jobs\.sqlite: (damaged|SQLITE_CORRUPT)"):
        async with Store.open(tmp_path / "damaged"):
            pass
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(JournalError, match="SQLITE_NOTADB"):
        async with Store.open(tmp_path / "damaged"):
            pass
    (tmp_path / "newer").mkdir()
    with closing(sqlite3.connect(tmp_path / "newer" / "jobs.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="version 99; this program knows 1"):
        async with Store.open(tmp_path / "newer"):
            pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalError, match=r"exists|directory"):
        async with Store.open(tmp_path / "file"):
            pass


@pytest.mark.anyio
async def test_somebody_who_holds_the_file_for_long_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mover.daemon_store._BUSY_TIMEOUT_S", 0.1)
    async with Store.open(tmp_path / "daemon") as store:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalError, match="SQLITE_BUSY: database is locked"):
                await store.write(partial(insert_job, new=new_job("1")))
            assert store.error
            other.execute("ROLLBACK")
        await store.write(partial(insert_job, new=new_job("1")))
        assert not store.error


@pytest.mark.anyio
async def test_an_older_change_that_is_written_late_undoes_nothing(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon") as store:
        new = new_job("1", "d/1", "d/2")
        await store.write(partial(insert_job, new=new))
        (row, items), *_ = await store.read(read_unfinished)
        job = loaded(row, items)
        older = job.change([Update(job.items[0], {"state": "running"})], 2_000)
        newer = job.change([Update(job.items[0], {"state": "done"}), Update(job.items[1], {"state": "done"})], 3_000)
        for changes in (newer, older):
            await store.write(partial(write_changes, changes=changes))
        assert [item.state for item in await store.read(partial(read_items, job_id="1"))] == ["done", "done"]
        assert (await store.read(partial(read_job, job_id="1"))).state == "done"
        kept = await store.read(partial(read_transitions, job_id="1"))
        assert [item.number for item in kept] == sorted({item.number for item in kept})


@pytest.mark.anyio
async def test_old_jobs_are_forgotten_a_few_at_a_time_and_unfinished_ones_never(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon") as store:
        for number in range(30):
            new = new_job(f"{number:02}", *(f"d/{n}" for n in range(10)), at_ms=number + 1, key=f"k{number}")
            await store.write(partial(insert_job, new=new))
            if number % 3:
                row, items = (await store.read(read_unfinished))[-1]
                job = loaded(row, items)
                updates = [Update(item, {"state": "done"}) for item in list(job.items.values())]
                changes = msgspec.structs.replace(job.change(updates, number + 1), report=b"x", report_bytes=1)
                await store.write(partial(write_changes, changes=changes))
        steps = []
        while forgotten := await store.write(partial(trim, before_ms=16, datasets=25)):
            steps.append(forgotten)
        await store.give_back()
        assert steps == [3, 3, 3, 1]
        left = await store.read(partial(_jobs, limit=100))
        assert sorted(row.id for row, _ in left) == [f"{n:02}" for n in range(30) if n >= 15 or n % 3 == 0]
        for table, per_job in (("items", 10), ("transitions", None), ("reports", None)):
            count = await store.read(partial(_distinct_jobs, table=table))
            assert count == (20 if per_job or table == "transitions" else 10)


def _distinct_jobs(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(DISTINCT job_id) FROM {table}").fetchone()[0])  # noqa: S608


@pytest.mark.anyio
@pytest.mark.slow
async def test_a_page_of_50_000_jobs_is_read_from_indexes(tmp_path: Path) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        for number in range(50_000):
            job_id, dataset_id, owner = f"{number:06}", f"d/{number % 500}", f"o{number % 40}"
            insert_job(connection, new_job(job_id, dataset_id, owner=owner, key=job_id))

    async with Store.open(tmp_path / "daemon") as store:
        await store.write(fill)
        for where in (
            (),
            (("state", "queued"),),
            (("owner", "o7"),),
            (("dataset_id", "d/7"),),
            (("state", "done"), ("owner", "o7")),
            (("dataset_id", "d/7"), ("owner", "o7"), ("state", "queued")),
        ):
            read = partial(read_page, where=where, before="030000", limit=20, live={})
            took_s = []
            for _ in range(3):
                began_s = time.perf_counter()
                await store.read(read)
                took_s.append(time.perf_counter() - began_s)
            assert min(took_s) < 0.5
            page = await store.read(read)
            assert [job.id for job in page.jobs] == sorted((job.id for job in page.jobs), reverse=True)
            told = len(page.jobs), page.next
            assert told == ((0, "") if ("state", "done") in where else (20, page.jobs[-1].id))
            plan = await store.read(partial(_plan_of, where=where))
            assert "SCAN" not in plan or not where
            assert "TEMP B-TREE" not in plan
        assert "USING INDEX jobs_by_key" in await store.read(_plan_of_key)


def _plan_of_key(connection: sqlite3.Connection) -> str:
    return _plan(connection, lambda: find_key(connection, "o7", "000007", b"d/7"))


def _plan_of(connection: sqlite3.Connection, where: tuple[tuple[str, str], ...]) -> str:
    return _plan(connection, lambda: list(read_jobs(connection, where, "030000", 20)))


def _jobs(connection: sqlite3.Connection, limit: int) -> list[tuple[JobRow, list[ItemRow]]]:
    return list(read_jobs(connection, (), "", limit))


def _plan(connection: sqlite3.Connection, ask: Callable[[], object]) -> str:
    """How the first question is answered."""
    seen: list[str] = []
    connection.set_trace_callback(seen.append)
    ask()
    connection.set_trace_callback(None)
    return "; ".join(str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {seen[0]}"))


@pytest.mark.anyio
async def test_files_that_failures_name_come_as_far_as_they_fit(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "daemon") as store:
        await store.write(partial(insert_job, new=new_job("1", "d/0", "d/1", "d/2")))
        row, items = (await store.read(read_unfinished))[0]
        job = loaded(row, items)
        lost = Failure("MissingFilesError", "5 files", 4, retryable=False, fault="user", missing=tuple("abcde"))
        for position in range(3):
            changes = job.change([Update(job.items[position], {"state": "failed", "failure": lost})], 2_000)
            await store.write(partial(write_changes, changes=changes))

        async def named(paths: int) -> list[int]:
            found = await store.read(partial(read_items, job_id="1", paths=paths))
            assert [item.failure.message for item in found if item.failure is not None] == ["5 files"] * 3
            return [len(item.failure.missing) for item in found if item.failure is not None]

        assert await named(0) == [0, 0, 0]
        assert await named(1) == [5, 0, 0]
        assert await named(6) == [5, 5, 0]
        page = await store.read(partial(read_page, where=(), before="", limit=10, live={}))
        assert all(view.failure is not None and not view.failure.missing for view in page.jobs[0].datasets)


@pytest.mark.anyio
async def test_a_page_of_jobs_has_bounded_bytes_and_misses_none(tmp_path: Path) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        long = "é" * 4000
        files = tuple(f"{long}/{number}" for number in range(500))
        for number in range(1_500):
            new = new_job(f"{number:06}")
            options = JobOptions(files=files if number == 7 else files[:30])
            insert_job(connection, msgspec.structs.replace(new, row=msgspec.structs.replace(new.row, options=options)))
        row, items = loaded_first(connection)
        failure = Failure("LtsError", "x" * 100_000, 1, retryable=True, fault="system")
        update = Update(loaded(row, items).items[0], {"state": "failed", "failure": failure, "reason": "x" * 100_000})
        write_changes(connection, update.item.job.change([update], 2_000))

    def loaded_first(connection: sqlite3.Connection) -> tuple[JobRow, list[ItemRow]]:
        return read_unfinished(connection)[0]

    async with Store.open(tmp_path / "daemon") as store:
        await store.write(fill)
        before, seen, sizes = "", [], []
        while True:
            page = await store.read(partial(read_page, where=(), before=before, limit=1_000, live={}))
            seen += [job.id for job in page.jobs]
            sizes.append(len(msgspec.json.encode(page)))
            assert all(job.options.files for job in page.jobs)
            before = page.next
            if not before:
                break
    assert seen == [f"{number:06}" for number in reversed(range(1_500))]
    assert max(sizes) < 9 << 20
    assert len(page.jobs[-1].datasets[0].reason) < 2_000


@pytest.mark.anyio
async def test_reports_come_as_far_as_they_fit_and_the_first_one_always(tmp_path: Path) -> None:
    import zlib

    async with Store.open(tmp_path / "daemon") as store:
        await store.write(partial(insert_job, new=new_job("1", "d/0", "d/1", "d/2")))
        row, items = (await store.read(read_unfinished))[0]
        job = loaded(row, items)
        for position in range(3):
            body = b'{"n":%d}' % position * 100
            changes = job.change([Update(job.items[position], {"state": "done"})], 2_000)
            changes = msgspec.structs.replace(changes, report=zlib.compress(body), report_bytes=len(body))
            await store.write(partial(write_changes, changes=changes))

        def read(connection: sqlite3.Connection, at_most: int, position: int | None = None) -> list[int]:
            return [found for found, _ in read_reports(connection, "1", at_most, position)]

        assert await store.read(partial(read, at_most=0)) == [0]
        assert await store.read(partial(read, at_most=1_500)) == [0, 1]
        assert await store.read(partial(read, at_most=0, position=2)) == [2]


def test_ids_grow_whatever_the_clock_does() -> None:
    times = iter([5.0, 5.0, 5.0, 4.0, 5.001, 5.0])
    ids = JobIds("", lambda: next(times))
    given = [ids.next() for _ in range(5)]
    given.append(JobIds(given[-1], lambda: next(times)).next())
    assert given == sorted(set(given))
    assert all(len(job_id) == 36 and job_id[14] == "7" and job_id[19] in "89ab" for job_id in given)
    many = JobIds("", lambda: 1.0)
    burst = [many.next() for _ in range(20_000)]
    assert burst == sorted(set(burst))


class StoreMachine(RuleBasedStateMachine):
    """Jobs against a model; the journal is closed in order, or copied as a crash leaves it, and opened again."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.portal: BlockingPortal = self.stack.enter_context(start_blocking_portal())
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.folder = self.root / "0"
        self.lives = 0
        self.now_ms = 1_000
        self.model: dict[str, dict[str, str]] = {}
        self.jobs: dict[str, Job] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.store: Store
        self.opened: AbstractContextManager[Store]

    @initialize()
    def open(self) -> None:
        self.opened = self.portal.wrap_async_context_manager(Store.open(self.folder))
        self.store = self.opened.__enter__()

    def write(self, step: object) -> object:
        return self.portal.call(self.store.write, step)  # type: ignore[arg-type]

    @rule(datasets=st.integers(1, 4), caller=st.sampled_from("ab"), key=st.sampled_from(["", "", "k", "l"]))
    def accept(self, datasets: int, caller: str, key: str) -> None:
        self.now_ms += 1
        job_id = f"{self.now_ms:06}"
        ids = [f"d/{n}" for n in range(datasets)]
        new = new_job(job_id, *ids, key=key, at_ms=self.now_ms, owner=caller)
        known = self.keys.get((caller, key), "")
        if known and len(self.model[known]) - 1 != datasets:
            with pytest.raises(KeyConflictError, match=known):
                self.write(partial(insert_job, new=new))
            return
        assert self.write(partial(insert_job, new=new)) == (known or job_id)
        if not known:
            self.model[job_id] = dict.fromkeys(ids, "queued") | {"": "queued"}
            self.keys |= {(caller, key): job_id} if key else {}
            self.jobs[job_id] = loaded(new.row, [ItemRow(job_id, n, name) for n, name in enumerate(ids)])

    @precondition(lambda self: any(job.items for job in self.jobs.values()))
    @rule(data=st.data(), state=st.sampled_from(["waiting", "running", "done", "failed", "cancelled"]))
    def change(self, data: st.DataObject, state: str) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs.values() if job.items]))
        item = data.draw(st.sampled_from(list(job.items.values())))
        self.now_ms += data.draw(st.integers(0, 2))
        self.write(partial(write_changes, changes=job.change([Update(item, {"state": state})], self.now_ms)))
        model = self.model[job.row.id]
        model[item.dataset_id] = state
        states = {value for name, value in model.items() if name}
        order = ("running", "waiting", "queued", "failed", "cancelled", "done")
        model[""] = next(one for one in order if one in states)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def want_cancelled(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        self.write(partial(request_cancel, job_id=job_id, who="ann"))
        assert self.portal.call(self.store.read, partial(read_job, job_id=job_id)).cancelled_by == "ann"

    @rule()
    def forget(self) -> None:
        self.write(partial(trim, before_ms=self.now_ms - 5, datasets=1_000))
        for job_id, job in list(self.jobs.items()):
            if not job.items and job.row.changed_ms < self.now_ms - 5:
                del self.jobs[job_id], self.model[job_id]
                self.keys = {key: known for key, known in self.keys.items() if known != job_id}
                with pytest.raises(UnknownJobError):
                    self.portal.call(self.store.read, partial(read_job, job_id=job_id))

    @rule(crash=st.booleans())
    def open_again(self, crash: bool) -> None:
        self.lives += 1
        after = self.root / str(self.lives)
        if crash:  # committed pages are still in the log beside the file
            shutil.copytree(self.folder, after)
        self.opened.__exit__(None, None, None)
        if not crash:
            shutil.copytree(self.folder, after)
        (after / "jobs.sqlite-shm").unlink(missing_ok=True)
        self.folder = after
        self.open()
        for row, items in self.portal.call(self.store.read, read_unfinished):
            assert [(item.position, item.state) for item in items if item.state not in FINAL] == [
                (item.row.position, item.row.state) for item in self.jobs[row.id].items.values()
            ]
            assert row.last_number == self.jobs[row.id].row.last_number
            self.jobs[row.id] = loaded(row, items)

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        if not hasattr(self, "store"):
            return
        found = self.portal.call(self.store.read, partial(_jobs, limit=1_000))
        seen = {row.id: {item.dataset_id: item.state for item in items} | {"": row.state} for row, items in found}
        assert seen == self.model
        unfinished = {row.id for row, _ in self.portal.call(self.store.read, read_unfinished)}
        assert unfinished == {job_id for job_id, model in self.model.items() if model[""] not in FINAL}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.opened.__exit__(None, None, None)
        self.stack.close()


StoreMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase
