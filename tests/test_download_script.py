"""The download script, really run with sh and curl: names, resuming, damage, failures, secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import anyio
import pytest

from mover.engine import EngineConfig
from mover.reports import RetrieveReport
from tests.datasets import DATASET, archive, make_config, named_for, open_engine, random_bytes, upload
from tests.faults import CutReply, FaultProxy, Rule
from tests.programs import needed_program
from tests.servers import BucketFactory, S3Server, s3_client

pytestmark = pytest.mark.anyio

FILES = {
    "-rf": b"a leading dash",
    'it\'s "quoted" $(touch harm) `touch harm` \\ ; & %41+': b"shell",
    "two\nlines/é e\u0301": b"unicode",
    "empty": b"",
    "folder/.hidden": random_bytes(300_000),
}


@pytest.fixture
def config(tmp_path: Path, s3_server: S3Server, bucket: BucketFactory) -> EngineConfig:
    return make_config(tmp_path, s3_server, bucket, target_bytes=200_000)


async def retrieve(config: EngineConfig, *, as_files: bool) -> RetrieveReport:
    async with open_engine(config) as engine:
        return await engine.retrieve(DATASET, form="files" if as_files else "datablocks")


async def run(
    tmp_path: Path, script: str, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[bytes]:
    needed_program("curl")
    (tmp_path / "get.sh").write_text(script, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environ |= {"DOWNLOAD_PAUSE": "0", "LC_ALL": "C.UTF-8"}
    if path is not None:
        environ["PATH"] = path
    return await anyio.run_process(["/bin/sh", "get.sh", *arguments], cwd=tmp_path, env=environ, check=False)


def unpacked(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".datablocks" not in path.parts
    }


@pytest.mark.parametrize("as_files", [False, True])
async def test_the_script_brings_every_file_back_under_its_name(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path, *, as_files: bool
) -> None:
    upload(s3_server, config.buckets.landing_zone, named_for(s3_server, FILES))
    await archive(config)
    report = await retrieve(config, as_files=as_files)
    first = await run(tmp_path, report.script, "-- odd 'folder'" if as_files else "folder")
    if as_files:
        assert first.returncode == 2  # it looks like an option
        first = await run(tmp_path, report.script, "--", "-- odd 'folder'")
    folder = tmp_path / ("-- odd 'folder'" if as_files else "folder")
    assert first.returncode == 0, first.stderr
    assert unpacked(folder) == named_for(s3_server, FILES)
    assert list((folder / ".datablocks").glob("*.tar")) == []
    assert not (tmp_path / "harm").exists()
    with s3_client(s3_server) as client:  # nothing is there to be loaded again
        for item in report.objects:
            client.delete_object(Bucket=config.buckets.retrieval, Key=item.key)
    again = await run(tmp_path, report.script, "--", folder.name)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(b"ok ") == len(report.objects)


async def test_keep_keeps_the_tar_files(config: EngineConfig, s3_server: S3Server, tmp_path: Path) -> None:
    upload(s3_server, config.buckets.landing_zone, named_for(s3_server, FILES))
    await archive(config)
    report = await retrieve(config, as_files=False)
    assert (await run(tmp_path, report.script, "--keep")).returncode == 0
    folder = tmp_path / DATASET.replace("/", "-")
    kept = sorted(path.stat().st_size for path in (folder / ".datablocks").glob("*.tar"))
    assert kept == sorted(item.size_bytes for item in report.objects)


async def test_an_interrupted_download_goes_on_where_it_stopped(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path
) -> None:
    upload(s3_server, config.buckets.landing_zone, {"large": random_bytes(2 << 20)})
    await archive(config)
    async with FaultProxy(s3_server.endpoint_url) as proxy:
        through = make_config(tmp_path, s3_server, config.buckets, endpoint_url=proxy.url)
        report = await retrieve(through, as_files=False)
        proxy.seen.clear()
        proxy.rules.append(Rule(CutReply(700_000), method="GET", target=".tar", times=2))
        done = await run(tmp_path, report.script, "folder")
        ranges = [item.headers.get("range", "") for item in proxy.seen]
    assert done.returncode == 0, done.stderr
    assert unpacked(tmp_path / "folder") == {"large": random_bytes(2 << 20)}
    starts = [int(value.removeprefix("bytes=").partition("-")[0] or 0) for value in ranges]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]


@pytest.mark.parametrize("unfinished", [False, True])
async def test_damaged_bytes_are_loaded_again(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path, *, unfinished: bool
) -> None:
    upload(s3_server, config.buckets.landing_zone, named_for(s3_server, FILES))
    await archive(config)
    report = await retrieve(config, as_files=True)
    assert (await run(tmp_path, report.script, "folder")).returncode == 0
    damaged = tmp_path / "folder" / "folder" / ".hidden"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    if unfinished:
        identity = next(line for line in report.script.splitlines() if "folder/.hidden" in line).split()[1]
        damaged.rename(tmp_path / "folder" / f".download-{identity}.part")
    done = await run(tmp_path, report.script, "folder")
    assert done.returncode == 0
    assert (b"again" in done.stderr) == unfinished
    assert unpacked(tmp_path / "folder") == named_for(s3_server, FILES)


async def test_what_the_bucket_lost_or_changed_is_listed_and_fails_the_script(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path
) -> None:
    upload(s3_server, config.buckets.landing_zone, named_for(s3_server, FILES))
    await archive(config)
    report = await retrieve(config, as_files=True)
    gone, changed = report.objects[0], next(item for item in report.objects if item.key.endswith(".hidden"))
    with s3_client(s3_server) as client:
        client.delete_object(Bucket=config.buckets.retrieval, Key=gone.key)
        client.put_object(Bucket=config.buckets.retrieval, Key=changed.key, Body=bytes(changed.size_bytes))
    done = await run(tmp_path, report.script, "folder")
    assert done.returncode == 1
    assert f"2 of {len(FILES)} failed".encode() in done.stderr
    assert b"FAILED  ./folder/-rf" in done.stderr
    assert b"FAILED  ./folder/folder/.hidden (its checksum" in done.stderr
    assert set(unpacked(tmp_path / "folder")) == set(named_for(s3_server, FILES)) - {"-rf", "folder/.hidden"}


async def test_links_are_never_among_the_arguments_of_a_program(
    config: EngineConfig, s3_server: S3Server, tmp_path: Path
) -> None:
    upload(s3_server, config.buckets.landing_zone, {"one": b"1"})
    await archive(config)
    report = await retrieve(config, as_files=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    curl = needed_program("curl")
    (programs / "curl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{tmp_path}/arguments"\nexec {curl} "$@"\n')
    (programs / "curl").chmod(0o755)
    done = await run(tmp_path, report.script, "folder", path=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text()
    assert "--fail" in arguments
    assert "http" not in arguments
    assert "Signature" in report.script
    assert b"Signature" not in done.stderr + done.stdout


async def test_a_missing_program_is_named(config: EngineConfig, s3_server: S3Server, tmp_path: Path) -> None:
    upload(s3_server, config.buckets.landing_zone, {"one": b"1"})
    await archive(config)
    report = await retrieve(config, as_files=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("tr", "mkdir"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = await run(tmp_path, report.script, path=str(programs))
    assert done.returncode == 1
    assert b"needs curl" in done.stderr
