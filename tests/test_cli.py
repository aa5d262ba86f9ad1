"""The command line as a user meets it: processes, exit codes, documents, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from mover.cli import hoisted
from mover.cli_errors import gravest, record_of
from mover.cli_retrieve import write_secret
from mover.cli_run import Options, Outcome, Session, execute, parse_assignments
from mover.errors import (
    ConfigError,
    DatasetBusyError,
    DatasetNotFoundError,
    DigestMismatchError,
    ExitCode,
    MoverError,
    NotEnoughSpaceError,
    ObjectTransientError,
    ProcessingError,
)
from mover.model import archive_id, raw_files_prefix
from mover.shown import masked
from mover.streams.lts import LtsFolder
from mover.streams.lts_mount import probe_mount
from tests.servers import S3Server, fresh_bucket, object_keys, put_objects

_HEAVY = (
    "aiobotocore",
    "botocore",
    "obstore",
    "httpx",
    "anyio",
    "asyncio",
    "uvloop",
    "rich",
    "prefect",
    "moto",
    "msgspec",
    "mover.engine",
    "mover.settings",
)
_PID = "20.500.1/one"
_SPACE = NotEnoughSpaceError(1, 1, 1, 1, 1.0)
_BROKEN = DigestMismatchError("a", "md5", "x", "y", "z")
_ABSENT = DatasetNotFoundError("a", "b")
_PASSING = ObjectTransientError("get", "s3://a/b", "reset")


class Site:
    """Buckets on moto, an LTS folder, a scratch folder, and ``mover`` configured for them."""

    def __init__(self, server: S3Server, buckets: tuple[str, str, str], folder: Path) -> None:
        self.server, self.landing_zone, self.lts = server, buckets[0], folder / "lts"
        self.lts.mkdir()
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")} | {
            "MINIO_ENDPOINT": server.endpoint_url,
            "MINIO_USER": server.access_key,
            "MINIO_PASSWORD": server.secret_key,
            "MINIO_REGION": server.region,
            "MINIO_LANDINGZONE_BUCKET": buckets[0],
            "MINIO_STAGING_BUCKET": buckets[1],
            "MINIO_RETRIEVAL_BUCKET": buckets[2],
            "LTS_STORAGE_ROOT": str(self.lts),
            "LTS_FREE_SPACE_PERCENTAGE": "0",
            "ARCHIVER_SCRATCH_FOLDER": str(folder / "scratch"),
            "ARCHIVER_TARGET_SIZE_MB": "1",
            "MOVER_BUFFER_MB": "32",
        }

    def upload(self, dataset_id: str, objects: dict[str, bytes]) -> None:
        prefix = raw_files_prefix(dataset_id)
        put_objects(self.server, self.landing_zone, {prefix + path: body for path, body in objects.items()})

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mover.cli", *arguments],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **environ) as process:
            out, err = process.communicate(timeout=50)
        assert self.server.secret_key not in out + err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def document(self, *arguments: str) -> Any:  # noqa: ANN401 - as JSON is
        done = self.run("--json", *arguments)
        assert done.stderr.count("Traceback") == 0
        return msgspec.json.decode(done.stdout) | {"code": done.returncode}


@pytest.fixture
def site(moto_server: S3Server, tmp_path: Path) -> Iterator[Site]:
    with fresh_bucket(moto_server) as one, fresh_bucket(moto_server) as two, fresh_bucket(moto_server) as three:
        yield Site(moto_server, (one, two, three), tmp_path)


def _some_files() -> dict[str, bytes]:
    return {
        "a b.txt": b"first",
        "empty": b"",
        "sub/[x]\ttab.bin": bytes(range(256)) * 100,
        "large.bin": b"y" * 1_500_000,
    }


# ---------------------------------------------------------------------------------------------------- before any work
def test_help_imports_nothing_heavy_and_does_without_prefect() -> None:
    program = (
        "import sys; sys.modules['prefect'] = None\n"
        "from mover.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: print('loaded:', [n for n in {_HEAVY!r} if sys.modules.get(n)])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "loaded: []" in done.stdout
    for command in ("plan", "archive", "verify", "retrieve", "ls", "repair", "doctor", "config", "demo"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["archive"],
        ["nonsense"],
        ["archive", "a/b", "--nonsense"],
        ["verify", "a/b", "--level", "hope"],
        ["ls", "--members"],
    ],
)
def test_mistakes_in_arguments_are_usage_errors(site: Site, arguments: list[str]) -> None:
    done = site.run(*arguments, "--json")
    assert done.returncode == ExitCode.USAGE
    assert msgspec.json.decode(done.stdout)["error"]["exit_code"] == ExitCode.USAGE
    assert "Usage: mover" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["ls"], {"MOVER_BUFER_MB": "64"}, "MOVER_BUFER_MB"),
        (["ls", "--set", "MOVER_BUFFER_MB=none"], {}, "MOVER_BUFFER_MB"),
        (["ls", "--set", "MOVER_BUFFER_MB"], {}, "NAME=VALUE"),
        (["ls", "--set", "MINIO_PASSWORD=test-secret"], {}, "MINIO_PASSWORD_FILE"),
        (["ls", "--config", "/nonexistent.toml"], {}, "/nonexistent.toml"),
    ],
)
def test_a_bad_configuration_is_named_and_stops(
    site: Site, arguments: list[str], environ: dict[str, str], named: str
) -> None:
    done = site.run(*arguments, **environ)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_missing_setting_is_a_configuration_error_where_it_is_needed(site: Site) -> None:
    del site.environ["MINIO_ENDPOINT"]
    assert site.run("ls").returncode == ExitCode.USAGE
    assert site.run("doctor").returncode == ExitCode.USAGE
    assert site.run("config", "--check").returncode == ExitCode.USAGE
    assert site.run("config").returncode == ExitCode.DONE


def test_the_configuration_is_shown_with_origins_and_without_secrets(site: Site) -> None:
    document = site.document("config", "--set", "MOVER_S3_CONCURRENCY=7")
    rows = {row["name"]: row for row in document["settings"]}
    assert (rows["MOVER_S3_CONCURRENCY"]["value"], rows["MOVER_S3_CONCURRENCY"]["origin"]) == ("7", "option")
    assert (rows["MINIO_PASSWORD"]["value"], rows["MINIO_PASSWORD"]["origin"]) == ("***", "environment")


def test_a_missing_mount_is_a_system_error(site: Site) -> None:
    site.lts.rmdir()
    document = site.document("archive", _PID)
    assert (document["code"], document["error"]["kind"]) == (ExitCode.SYSTEM, "MissingMountError")
    assert document["error"]["retryable"]


# ------------------------------------------------------------------------------------------------------ the way forward
@pytest.mark.slow
def test_plans_and_dry_runs_write_nothing(site: Site) -> None:
    site.upload(_PID, _some_files())
    before = object_keys(site.server, site.landing_zone)
    document = site.document("plan", _PID, "--members")
    (dataset,) = document["datasets"]
    assert document["code"] == 0
    assert [member["path"] for block in dataset["datablocks"] for member in block["members"]]
    assert dataset["forecast"]["free_after_bytes"] == dataset["forecast"]["free_before_bytes"] - dataset["size_bytes"]
    done = site.run("archive", _PID, "--dry-run")
    assert done.returncode == 0
    assert f"{dataset['size_bytes']:,}" in done.stdout
    assert "MB/s moving" in done.stdout
    assert list(site.lts.iterdir()) == []
    assert object_keys(site.server, site.landing_zone) == before


def test_a_dataset_is_archived_listed_and_verified_and_a_second_time_adopted(site: Site) -> None:
    files = _some_files()
    site.upload(_PID, files)
    (first,) = site.document("archive", _PID)["datasets"]
    counters, payload = first["counters"], sum(len(body) for body in files.values())
    assert counters["landing_zone_read_bytes"] == payload
    assert counters["lts_written_bytes"] == counters["lts_read_bytes"] == first["size_bytes"]
    assert counters["scratch_payload_bytes"] == counters["reused_bytes"] == 0
    (again,) = site.document("archive", _PID)["datasets"]
    assert {block["outcome"] for block in again["datablocks"]} == {"adopted"}
    assert site.document("ls")["datasets"][0]["dataset_id"] == _PID
    members = site.document("ls", _PID, "--members")["members"]
    assert {member["path"]: member["size_bytes"] for member in members} == {k: len(v) for k, v in files.items()}
    verified = site.run("verify", _PID)
    assert verified.returncode == 0
    assert verified.stdout.count("agrees") == len(first["datablocks"])
    assert "not archived whole" not in verified.stdout
    (site.lts / f"{archive_id(_PID, 1)}.manifest.json").unlink()  # as while its archival goes on
    whole = len(first["datablocks"])
    assert f"not archived whole: {whole - 1} of {whole} datablocks are committed" in site.run("verify", _PID).stdout
    assert "sub/[x]\\ttab.bin" in site.run("ls", _PID, "--members").stdout


@pytest.mark.slow
def test_one_dataset_that_fails_does_not_stop_the_others(site: Site) -> None:
    site.upload(_PID, {"x": b"1"})
    site.upload("20.500.1/two", {"x": b"2"})
    document = site.document("archive", _PID, "20.500.1/absent", "20.500.1/two")
    assert document["code"] == document["error"]["exit_code"] == ExitCode.USER
    assert [report["dataset_id"] for report in document["datasets"]] == [_PID, "20.500.1/two"]
    (failure,) = document["failures"]
    assert (failure["dataset_id"], failure["error"]["fault"]) == ("20.500.1/absent", "user")
    done = site.run("archive", _PID, "20.500.1/absent")
    assert done.returncode == ExitCode.USER
    assert "1 of 2 dataset(s) archived, 1 failed" in done.stdout
    assert "20.500.1/absent" in done.stderr


@pytest.mark.slow
def test_a_damaged_datablock_is_an_integrity_failure_until_it_is_repaired(site: Site) -> None:
    site.upload(_PID, _some_files())
    assert site.document("archive", _PID)["code"] == 0
    path = site.lts / archive_id(_PID, 1)
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    document = site.document("verify", _PID)
    assert (document["code"], document["error"]["exit_code"]) == (ExitCode.INTEGRITY, ExitCode.INTEGRITY)
    assert site.document("repair", _PID, "--datablock", "1", "--dry-run")["datablocks"][0]["datablock"] == 1
    assert site.document("repair", _PID, "--datablock", "9", "--dry-run")["code"] == ExitCode.USER
    assert site.document("repair", _PID, "--datablock", "1")["code"] == 0
    assert site.document("verify", _PID)["code"] == 0


@pytest.mark.slow
def test_a_busy_dataset_is_waited_for_as_long_as_asked(site: Site) -> None:
    site.upload(_PID, {"x": b"1"})
    folder = LtsFolder.open(site.lts, _PID, probe_mount(site.lts))
    with folder.lock("somebody else"):
        document = site.document("archive", _PID)
        assert (document["code"], document["error"]["kind"]) == (ExitCode.SYSTEM, "DatasetBusyError")
        process = site.start("archive", _PID, "--wait", "40")
        _wait_for_line(process, "in use by somebody else")
    _, err = process.communicate(timeout=50)
    assert process.returncode == 0, err


# ---------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_an_interrupted_archive_goes_on_where_it_stopped(site: Site, number: signal.Signals) -> None:
    body = b"z" * 900_000
    site.upload(_PID, {"x": body})
    process = site.start("archive", _PID, ARCHIVER_LTS_WAIT_BEFORE_VERIFY_S="300")
    _wait_for_line(process, "before the read-back")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED, err
    assert "interrupted; the same command goes on from there" in err
    assert out == ""
    assert not site.document("ls")["datasets"]
    (report,) = site.document("archive", _PID)["datasets"]
    assert report["counters"]["landing_zone_read_bytes"] == 0
    assert report["counters"]["reused_bytes"] == len(body)


def test_an_interrupt_is_a_document_too(site: Site) -> None:
    site.upload(_PID, {"x": b"1"})
    lock = LtsFolder.open(site.lts, _PID, probe_mount(site.lts)).lock("somebody else")
    process = site.start("-v", "--json", "archive", _PID, "--wait", "300")
    _wait_for_line(process, "in use by somebody else")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    lock.release()
    assert process.returncode == ExitCode.INTERRUPTED
    assert msgspec.json.decode(out)["error"]["kind"] == "Interrupted"


# ------------------------------------------------------------------------------------------------------- the way back
def test_a_dataset_comes_back_by_links_on_stdout_and_by_a_script(site: Site, tmp_path: Path) -> None:
    files = _some_files()
    site.upload(_PID, files)
    assert site.document("archive", _PID)["code"] == 0
    assert site.document("retrieve", _PID, "--dry-run")["files"] == len(files)
    assert site.document("retrieve", _PID, "--file", "nope", "--dry-run")["code"] == ExitCode.USER
    script = tmp_path / "get.sh"
    done = site.run("retrieve", _PID, "--script", str(script))
    assert done.returncode == 0, done.stderr
    links = done.stdout.splitlines()
    assert links
    assert all("X-Amz-Signature=" in link for link in links)
    assert "X-Amz-Signature" not in done.stderr
    assert script.stat().st_mode & 0o777 == 0o600
    for number, link in enumerate(links, start=1):
        assert httpx.get(link, trust_env=False).content == (site.lts / archive_id(_PID, number)).read_bytes()


@pytest.mark.slow
def test_a_single_file_comes_back(site: Site) -> None:
    files = _some_files()
    site.upload(_PID, files)
    assert site.document("archive", _PID)["code"] == 0
    (link,) = site.run("retrieve", _PID, "--file", "a b.txt").stdout.splitlines()
    assert httpx.get(link, trust_env=False).content == files["a b.txt"]
    assert site.document("retrieve", "20.500.1/absent")["code"] == ExitCode.USER


def _wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} was not said: {seen}")


# ------------------------------------------------------------------------------------------------------- in process
def _run(error: Exception | None, *, json: bool = False) -> int:
    async def work(_: Session) -> Outcome:
        if error is not None:
            raise error
        return Outcome({"done": True}, lambda console: console.print("done"))

    return execute(Options(json=json), work)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (_PASSING, 1),
        (ZeroDivisionError("oops"), 1),
        (ConfigError("A", "b", "c"), 2),
        (_ABSENT, 3),
        (_BROKEN, 4),
        (_SPACE, 5),
        (ProcessingError([("a", _ABSENT), ("b", _SPACE)]), 5),
        (ExceptionGroup("", [_PASSING, ExceptionGroup("", [_BROKEN])]), 4),
        (ExceptionGroup("", [_BROKEN, ZeroDivisionError()]), 1),
    ],
)
def test_each_class_of_error_has_its_exit_code_one_line_and_a_document(
    error: Exception | None, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(error) == code
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), "Traceback" in err) == (("", 1, False) if error else ("done\n", 0, False))
    assert _run(error, json=True) == code
    document = msgspec.json.decode(capfd.readouterr().out)
    assert document.get("error", {}).get("exit_code", 0) == code
    if error is not None:
        assert set(document["error"]) == {"kind", "message", "exit_code", "retryable", "fault"}


def test_verbose_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(_: Session) -> Outcome:
        raise _PASSING

    assert execute(Options(verbose=True), work) == 1
    assert "Traceback" in capfd.readouterr().err


def test_links_and_secrets_are_masked_in_errors() -> None:
    text = "GET https://host:1/b/k?X-Amz-Signature=abc&X=1 failed, pass is hunter2"
    assert masked(text, ("hunter2",)) == "GET https://host:1/b/k?*** failed, pass is ***"
    assert "abc" not in record_of(ValueError(text)).message


def test_the_gravest_error_counts() -> None:
    errors: list[MoverError] = [_PASSING, ConfigError("A", "b", "c"), _ABSENT, _SPACE, _BROKEN]
    for index, error in enumerate(errors):
        assert gravest(errors[: index + 1]) is error
    assert gravest([DatasetBusyError("a", "b"), _ABSENT]) is _ABSENT


def test_options_of_all_commands_may_stand_anywhere() -> None:
    assert hoisted(["ls", "--json", "x", "--set", "A=b", "--config=c"]) == [
        *("--json", "--set", "A=b", "--config=c"),
        *("ls", "x"),
    ]
    assert hoisted(["ls", "--", "--json"]) == ["ls", "--", "--json"]


def test_a_setting_keeps_what_follows_its_first_equals_sign() -> None:
    assert parse_assignments(["A=b=c", "D="]) == {"A": "b=c", "D": ""}


@pytest.mark.parametrize("before", [None, 0o644])
def test_a_script_with_links_is_for_its_owner_alone(tmp_path: Path, before: int | None) -> None:
    path = tmp_path / "get.sh"
    if before is not None:
        path.write_text("older", encoding="utf-8")
        path.chmod(before)
    write_secret(path, b"curl\n")
    assert path.read_bytes() == b"curl\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
