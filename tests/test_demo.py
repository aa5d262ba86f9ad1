"""The demonstration brings every file back, says what it leaves out, and fails when a byte differs."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from mover.cli_run import Options, execute
from mover.demo import run_demo
from mover.demo_data import DemoFile, DemoFiles, check_room, compare, make_folder, scan
from mover.demo_server import embedded_s3
from mover.errors import ConfigError


@pytest.mark.anyio
async def test_the_generated_folder_comes_back_byte_for_byte_and_nothing_stays() -> None:
    report = await run_demo(None, target_bytes=1 << 20, buffer_bytes=32 << 20, keep=False)
    assert report.differences == ()
    assert len(report.datablocks) > 3
    assert [step.name for step in report.steps if step.name != "tar tf"] == [
        *("upload", "plan", "archive", "verify", "retrieve", "download", "unpack", "compare"),
    ]
    assert report.skipped == (("broken link", "broken link"),)
    assert not Path(report.workplace).exists()


def test_a_folder_of_ones_own_is_shown_with_where_to_look(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mover import cli_demo

    folder, place = tmp_path / "mine", tmp_path / "tmp"
    folder.mkdir()
    place.mkdir()
    (folder / "x").write_bytes(b"1" * 5000)
    (folder / "void").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert execute(Options(), lambda session: cli_demo.demo(session, folder, keep=True)) == 0
    out = capfd.readouterr().out
    assert "1 file(s), 5,000 bytes: byte-identical" in out
    assert "1 empty folder(s)" in out
    (workplace,) = place.iterdir()
    assert (workplace / "unpacked" / "x").read_bytes() == b"1" * 5000
    assert str(next(workplace.joinpath("lts").rglob("*.tar"))) in out


def test_links_to_files_are_followed_and_what_is_no_file_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder link").symlink_to("nested")
    (tmp_path / "line\nend").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin \xe9")).write_bytes(b"")
    files = scan(tmp_path, 40)
    assert dict(files.skipped) == {
        "broken link": "broken link",
        "folder link": "link to a folder",
        "pipe": "no regular file",
        "line\nend": "the embedded S3 storage knows no line ends in names",
        "latin \udce9": "the name is not UTF-8",
    }
    sizes = {file.path: file.size_bytes for file in files.files}
    assert sizes["latest.tiff"] == sizes["movie.tiff"] > 1 << 20
    assert "unicode/caf\u00e9 (NFC).txt" in sizes
    assert "unicode/cafe\u0301 (NFD).txt" in sizes


def test_every_kind_of_difference_is_found(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    unpacked.mkdir()
    for name in ("same", "changed", "missing"):
        (source / name).write_bytes(b"abc")
    for name, body in (("same", b"abc"), ("changed", b"abd"), ("more", b"")):
        (unpacked / name).write_bytes(body)
    expected = ["missing: 'missing'", "other bytes: 'changed'", "too much: 'more'"]
    assert sorted(compare(scan(source, 0), unpacked)) == expected


def test_a_folder_that_memory_does_not_hold_is_refused(tmp_path: Path) -> None:
    huge = DemoFiles((DemoFile("x", tmp_path / "x", 1 << 50),), (), 0)
    with pytest.raises(ConfigError, match="on this host"):
        check_room(huge, tmp_path)
    with pytest.raises(ConfigError, match="exists"):
        scan(tmp_path / "gone", 0)


@pytest.mark.anyio
async def test_the_embedded_storage_answers_and_ends_with_its_block() -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        async with embedded_s3() as url:
            assert (await client.get(url)).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await client.get(url)
