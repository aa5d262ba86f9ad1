"""The journal: what it says survives kills, what it does not know is fetched again."""

from __future__ import annotations

from pathlib import Path

import pytest

from mover.errors import JournalError
from mover.journal import DatablockJournal, Journal, StagedPart

PID = "20.500.11935/../a b"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def file_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "journal").rglob("*.jsonl")
    return found


def begun(journal: Journal) -> DatablockJournal:
    opened = journal.open(PID, 1)
    opened.begin("plan", 100, 7)
    opened.add_windows([(0, 0, "aa"), (0, 1, "bb")])
    return opened


def test_everything_recorded_is_there_after_a_reopen(journal: Journal) -> None:
    with begun(journal) as first:
        first.add_windows([(3, 0, "cc")])
        first.moved(99)
    with journal.open(PID, 1) as second:
        assert second.state == first.state
        assert second.state.windows == {(0, 0): "aa", (0, 1): "bb", (3, 0): "cc"}
        assert (second.state.moved_id, second.state.file_id) == (99, 7)
        assert second.state.describes("plan", 100)
        assert not second.state.describes("plan", 101)
        assert not second.state.describes("other", 100)


@pytest.mark.parametrize("torn_bytes", range(1, 40, 3))
def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next_one(
    journal: Journal, tmp_path: Path, torn_bytes: int
) -> None:
    with begun(journal) as first:
        before = file_of(tmp_path).stat().st_size
        first.add_windows([(9, 9, "dd" * 20)])
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[: before + torn_bytes])
    with journal.open(PID, 1) as second:
        assert (9, 9) not in second.state.windows
        assert second.state.windows == {(0, 0): "aa", (0, 1): "bb"}
        assert path.stat().st_size == before
        second.add_windows([(1, 0, "ee")])
    with journal.open(PID, 1) as third:
        assert third.state.windows[1, 0] == "ee"


def test_a_line_that_only_lacks_its_end_is_torn_too(journal: Journal, tmp_path: Path) -> None:
    begun(journal).close()
    path = file_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with journal.open(PID, 1) as second:
        assert second.state.windows == {}


def test_garbage_ends_what_counts(journal: Journal, tmp_path: Path) -> None:
    begun(journal).close()
    path = file_of(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00\xff\n" + lines[1])
    with journal.open(PID, 1) as second:
        assert second.state.windows == {}
        assert second.state.describes("plan", 100)


def test_another_plan_starts_anew(journal: Journal, tmp_path: Path) -> None:
    with begun(journal) as opened:
        opened.begin_staging("upload")
        opened.begin("other plan", 100, 7)
        assert opened.state.windows == {}
        assert opened.state.upload_id == ""
    with journal.open(PID, 1) as reopened:
        assert reopened.state.describes("other plan", 100)
        assert reopened.state.windows == {}
    assert len(file_of(tmp_path).read_bytes().splitlines()) == 1


def test_another_file_of_the_same_plan_has_no_windows_but_keeps_what_is_staged(journal: Journal) -> None:
    with begun(journal) as opened:
        opened.begin_staging("upload")
        opened.add_part(StagedPart(1, "etag"), [(0, 0, "aa")])
        opened.begin("plan", 100, 8)
        assert opened.state.windows == {}
        assert opened.state.parts == {1: StagedPart(1, "etag")}
        assert opened.state.staged_windows == {(0, 0): "aa"}


def test_the_same_file_keeps_its_windows(journal: Journal) -> None:
    with begun(journal) as opened:
        opened.begin("plan", 100, 7)
        assert opened.state.windows == {(0, 0): "aa", (0, 1): "bb"}


def test_forgotten_windows_are_gone_and_the_file_is_no_longer_complete(journal: Journal) -> None:
    with begun(journal) as opened:
        opened.moved(99)
        opened.forget_windows([(0, 1), (5, 5)])
    with journal.open(PID, 1) as reopened:
        assert reopened.state.windows == {(0, 0): "aa"}
        assert reopened.state.moved_id == 0


def test_a_withdrawn_file_keeps_its_windows_under_its_new_number(journal: Journal) -> None:
    with begun(journal) as opened:
        opened.moved(99)
        opened.renamed(12)
        opened.begin("plan", 100, 12)
    with journal.open(PID, 1) as reopened:
        assert reopened.state.windows == {(0, 0): "aa", (0, 1): "bb"}
        assert (reopened.state.file_id, reopened.state.moved_id) == (12, 0)


def test_a_new_upload_drops_the_parts_of_the_one_before(journal: Journal) -> None:
    with begun(journal) as opened:
        opened.begin_staging("one")
        opened.add_part(StagedPart(1, "etag"), [(0, 0, "aa")])
        opened.begin_staging("two")
    with journal.open(PID, 1) as reopened:
        assert (reopened.state.upload_id, reopened.state.parts, reopened.state.staged_windows) == ("two", {}, {})
        assert reopened.state.windows == {(0, 0): "aa", (0, 1): "bb"}


def test_numbers_of_every_size_that_a_file_can_have_survive(journal: Journal) -> None:
    with journal.open(PID, 1) as opened:
        opened.begin("plan", 1 << 62, (1 << 63) - 1)
        opened.moved((1 << 64) - 1)
    with journal.open(PID, 1) as reopened:
        assert (reopened.state.file_id, reopened.state.moved_id) == ((1 << 63) - 1, (1 << 64) - 1)


def test_hostile_ids_stay_in_the_folder_and_only_the_owner_reads(journal: Journal, tmp_path: Path) -> None:
    begun(journal).close()
    path = file_of(tmp_path)
    assert path.parent.parent == tmp_path / "journal"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_finished_dataset_is_forgotten_and_others_are_not(journal: Journal, tmp_path: Path) -> None:
    begun(journal).close()
    journal.open("other", 2).close()
    journal.forget(PID)
    journal.forget("never seen")
    assert file_of(tmp_path).name == "2.jsonl"


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(JournalError, match="journal"):
        Journal(tmp_path).open(PID, 1)


def test_appending_to_a_closed_journal_is_an_error_of_the_tree(journal: Journal) -> None:
    opened = begun(journal)
    opened.close()
    opened.close()
    with pytest.raises(JournalError):
        opened.add_windows([(1, 1, "x")])
