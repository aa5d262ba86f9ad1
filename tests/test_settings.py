"""The configuration: precedence, what is refused and how it is said, secrets."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from mover.errors import ConfigError, ExitCode
from mover.settings import Settings, load_settings, require, s3_access, setting_rows
from mover.settings_rules import Secret, endpoint_url

_S3 = {"MINIO_ENDPOINT": "s3.example.org:9000", "MINIO_USER": "reader", "MINIO_PASSWORD": "hunter2"}


def _refusal(environ: Mapping[str, str] | None = None, **sources: Mapping[str, object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_settings(sources.get("options"), environ=environ or {}, variables=sources.get("variables"))
    assert caught.value.exit_code is ExitCode.USAGE
    return caught.value


def _toml(folder: Path, text: str) -> Path:
    path = folder / "mover.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _toml_refusal(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_settings(config=_toml(folder, text), environ={})
    return caught.value


# ------------------------------------------------------------------------------------------------ table and precedence
def test_defaults_are_the_documented_ones() -> None:
    shown = {row.name: row.value for row in setting_rows(load_settings(environ={}))}
    assert shown == {
        "ARCHIVER_SCRATCH_FOLDER": "/tmp/scratch",
        "ARCHIVER_TARGET_SIZE_MB": "200",
        "ARCHIVER_LTS_FILE_TIMEOUT_S": "300",
        "ARCHIVER_LTS_WAIT_BEFORE_VERIFY_S": "0",
        "ARCHIVER_STAGING": "never",
        "LTS_STORAGE_ROOT": "/tmp/LTS",
        "LTS_FILESYSTEM": "any",
        "LTS_FREE_SPACE_PERCENTAGE": "20",
        "MINIO_REGION": "eu-west-1",
        "MINIO_ENDPOINT": "-",
        "MINIO_EXTERNAL_ENDPOINT": "-",
        "MINIO_LANDINGZONE_BUCKET": "landingzone",
        "MINIO_STAGING_BUCKET": "staging",
        "MINIO_RETRIEVAL_BUCKET": "retrieval",
        "MINIO_URL_EXPIRATION_DAYS": "7",
        "MINIO_USER": "-",
        "MINIO_PASSWORD": "-",
        "SCICAT_ENDPOINT": "-",
        "SCICAT_API_PREFIX": "/api/v3/",
        "SCICAT_USER": "-",
        "SCICAT_PASSWORD": "-",
        "LTS_FREE_LIMIT": "1",
        "MOVE_TO_LTS_LIMIT": "2",
        "VERIFY_LTS_LIMIT": "1",
        "LTS_TO_RETRIEVAL_LIMIT": "1",
        "MOVER_BUFFER_MB": "256",
        "MOVER_S3_CONCURRENCY": "64",
        "MOVER_HOST": "127.0.0.1",
        "MOVER_PORT": "8420",
        "MOVER_SOCKET": "-",
        "MOVER_TOKEN_FILE": "-",
        "MOVER_DRAIN_S": "60",
    }


def test_the_strongest_source_wins_and_is_named(tmp_path: Path) -> None:
    config = _toml(
        tmp_path, "[mover]\nMOVER_PORT = 1\nMOVER_HOST = 'h'\nMOVER_BUFFER_MB = 17\nMOVER_S3_CONCURRENCY = 4\n"
    )
    settings = load_settings(
        {"MOVER_PORT": 4, "MOVER_BUFFER_MB": None},
        config=config,
        environ={"MOVER_PORT": "3", "MOVER_HOST": "environ"},
        variables={"mover_port": 2, "mover_host": "variable", "mover_buffer_mb": 18},
    )
    assert (settings.mover_port, settings.origins["MOVER_PORT"]) == (4, "option")
    assert (settings.mover_host, settings.origins["MOVER_HOST"]) == ("environ", "environment")
    assert (settings.mover_buffer_mb, settings.origins["MOVER_BUFFER_MB"]) == (18, "prefect variable")
    assert (settings.mover_s3_concurrency, settings.origins["MOVER_S3_CONCURRENCY"]) == (4, f"file {config}")
    assert (settings.lts_free_limit, settings.origins["LTS_FREE_LIMIT"]) == (1, "default")


def test_the_file_of_the_option_wins_over_the_one_of_the_environment(tmp_path: Path) -> None:
    named = _toml(tmp_path, "[lts]\nLTS_STORAGE_ROOT = '/mnt/lts'\n")
    environ = {"MOVER_CONFIG": str(named)}
    assert load_settings(environ=environ).lts_storage_root == Path("/mnt/lts")
    other = tmp_path / "other.toml"
    other.write_text("", encoding="utf-8")
    assert load_settings(config=other, environ=environ).lts_storage_root == Path("/tmp/LTS")


def test_the_document_s_example_file_is_understood(tmp_path: Path) -> None:
    config = _toml(
        tmp_path,
        """
        [archiver]
        ARCHIVER_SCRATCH_FOLDER = "/tmp/scratch" #string
        ARCHIVER_TARGET_SIZE_MB = 200
        [lts]
        LTS_STORAGE_ROOT = "/tmp/LTS"
        LTS_FREE_SPACE_PERCENTAGE = 20
        [minio]
        MINIO_REGION = "eu-west-1"
        MINIO_ENDPOINT = "scopem-openemdata.ethz.ch:9090"
        [scicat]
        SCICAT_API_PREFIX = "/api/v3/"
        [limits]
        MOVE_TO_LTS_LIMIT = 2
        """,
    )
    settings = load_settings(config=config, environ={})
    assert settings.minio_endpoint == settings.minio_external_endpoint == "scopem-openemdata.ethz.ch:9090"


def test_settings_are_frozen() -> None:
    settings = load_settings(environ={})
    with pytest.raises(AttributeError):
        settings.mover_port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.origins["MOVER_PORT"] = "me"  # type: ignore[index]


def test_unrelated_variables_of_the_shell_do_not_matter() -> None:
    environ = {"PATH": "/bin", "HOME": "/", "MOVER_URL": "http://h", "VERIFY_OTHER": "1"}
    assert load_settings(environ=environ) == load_settings(environ={})


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("LTS_FREE_SPACE_PERCENTAGE", "100", "a whole number from 0 to 99"),
        ("LTS_FREE_SPACE_PERCENTAGE", "-1", "a whole number from 0 to 99"),
        ("LTS_FREE_SPACE_PERCENTAGE", "20%", "a whole number from 0 to 99"),
        ("MOVE_TO_LTS_LIMIT", "0", "a whole number, 1 or more"),
        ("LTS_FREE_LIMIT", "1.5", "a whole number, 1 or more"),
        ("VERIFY_LTS_LIMIT", "1_0", "a whole number, 1 or more"),
        ("MOVER_BUFFER_MB", "15", "a whole number, 16 or more"),
        ("MOVER_PORT", "0", "a whole number from 1 to 65535"),
        ("MOVER_PORT", "65536", "a whole number from 1 to 65535"),
        ("MINIO_URL_EXPIRATION_DAYS", "8", "a whole number from 1 to 7"),
        ("ARCHIVER_STAGING", "sometimes", "never or always"),
        ("ARCHIVER_TARGET_SIZE_MB", " ", "a whole number, 1 or more"),
        ("ARCHIVER_LTS_WAIT_BEFORE_VERIFY_S", "-1", "a whole number, 0 or more"),
        ("LTS_STORAGE_ROOT", "", "an absolute path"),
        ("LTS_STORAGE_ROOT", "LTS", "an absolute path"),
        ("MINIO_LANDINGZONE_BUCKET", "Landing Zone", "a bucket name: 3 to 63 of a-z, 0-9, dot and hyphen"),
        ("MINIO_REGION", "", "a text without blanks"),
        ("SCICAT_API_PREFIX", "api/v3", "a path that begins and ends with a slash"),
        ("MINIO_USER", "", "a text without blanks"),
    ],
)
def test_a_refusal_names_key_value_origin_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    assert str(_refusal({name: value})) == f"{name}={value!r} (from environment): allowed is {allowed}"
    assert str(_refusal(options={name: value})) == f"{name}={value!r} (from option): allowed is {allowed}"


@pytest.mark.parametrize("value", [True, 1.0, [1], {"a": 1}])
def test_a_value_of_another_kind_is_refused(value: object) -> None:
    assert _refusal(variables={"mover_port": value}).value == value


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("MINIO_PASWORD", "MINIO_PASSWORD"),
        ("LTS_STORAGE_ROT", "LTS_STORAGE_ROOT"),
        ("MOVER_BUFFER", "MOVER_BUFFER_MB"),
        ("MINIO_PASSWORDFILE", "MINIO_PASSWORD_FILE"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name_and_without_its_value(name: str, suggestion: str) -> None:
    message = str(_refusal({name: "hunter2"}))
    assert message == f"{name}=*** (from environment): allowed is a known setting; did you mean {suggestion}?"


def test_an_unknown_name_is_refused_in_every_source(tmp_path: Path) -> None:
    assert _refusal(options={"PORT": 1}).origin == "option"
    assert _refusal(variables={"mover_prot": 1}).key == "MOVER_PROT"
    assert _refusal({"MOVER_PORT_FILE": "/x"}).key == "MOVER_PORT_FILE"
    assert _toml_refusal(tmp_path, "[mover]\nMOVER_PROT = 1\n").key == "MOVER_PROT"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[movers]\nMOVER_PORT = 1\n",
            "settings in the sections [archiver], [lts], [minio], [scicat], [limits], [mover]",
        ),
        ("MOVER_PORT = 1\n", "settings in the sections"),
        ("[lts]\nMOVER_PORT = 1\n", "section [mover], not [lts]"),
        ("[lts]\nMINIO_PASSWORD_FILE = '/x'\n", "section [minio], not [lts]"),
        ("[mover\n", "a readable TOML file: "),
        ("[mover]\nMOVER_PORT = 99999\n", "a whole number from 1 to 65535"),
        ("[minio]\nMINIO_REGION = ''\n", "a text without blanks"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    message = str(_toml_refusal(tmp_path, text))
    assert said in message
    assert str(tmp_path / "mover.toml") in message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(config=tmp_path / "none.toml", environ={})
    assert _refusal({"MOVER_CONFIG": ""}).key == "MOVER_CONFIG"


# -------------------------------------------------------------------------------------------------------------- secrets
def test_a_secret_is_masked_wherever_it_could_be_shown() -> None:
    settings = load_settings(environ=_S3)
    access = s3_access(settings)
    rows = {row.name: row.value for row in setting_rows(settings)}
    assert rows["MINIO_PASSWORD"] == "***"
    assert rows["MINIO_USER"] == "reader"
    for shown in (
        repr(settings),
        str(settings),
        repr(access),
        f"{access.password}",
        f"{access.password!r:>9}",
        str(rows),
    ):
        assert "hunter2" not in shown
    assert access.password.reveal() == "hunter2"
    with pytest.raises(TypeError):
        msgspec.json.encode(settings)
    with pytest.raises(TypeError):
        pickle.dumps(access.password)


def test_a_secret_is_read_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("hunter 2\n", encoding="utf-8")
    settings = load_settings(environ={"MINIO_PASSWORD_FILE": str(path)})
    assert settings.minio_password == Secret("hunter 2")
    assert settings.origins["MINIO_PASSWORD"] == "environment (MINIO_PASSWORD_FILE)"
    config = _toml(tmp_path, f"[scicat]\nSCICAT_PASSWORD_FILE = '{path}'\n")
    assert load_settings(config=config, environ={}).scicat_password == Secret("hunter 2")


def test_a_secret_and_its_file_together_are_refused_and_a_stronger_source_wins(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("weak", encoding="utf-8")
    refusal = _refusal({"MINIO_PASSWORD": "hunter2", "MINIO_PASSWORD_FILE": str(path)})
    assert "one of MINIO_PASSWORD and MINIO_PASSWORD_FILE, not both" in str(refusal)
    assert "hunter2" not in str(refusal)
    config = _toml(tmp_path, f"[minio]\nMINIO_PASSWORD_FILE = '{path}'\n")
    assert load_settings(config=config, environ={"MINIO_PASSWORD": "x"}).minio_password == Secret("x")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"", "not empty"), (b"\n", "not empty"), (b"\xff", "not UTF-8")]
)
def test_a_secret_s_file_that_gives_nothing_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    refusal = _refusal({"MINIO_PASSWORD_FILE": str(path)})
    assert refusal.key == "MINIO_PASSWORD_FILE"
    assert said in str(refusal)
    assert str(path) in str(refusal)


def test_a_refused_secret_is_not_shown(tmp_path: Path) -> None:
    assert str(_refusal({"MINIO_PASSWORD": ""})).startswith("MINIO_PASSWORD=***")
    assert "hunter2" not in str(_refusal(options={"MINIO_PASSWORD": ["hunter2"]}))
    assert "hunter2" not in str(_refusal({"MINIO_ENDPOINT": "http://reader:hunter2@host:9000"}))
    assert "hunter2" not in str(_toml_refusal(tmp_path, "[minio]\nMINIO_PASSWRD = 'hunter2'\n"))


# ------------------------------------------------------------------------------------------------- required, endpoints
@pytest.mark.parametrize("missing", sorted(_S3))
def test_what_s3_needs_is_required_by_name(missing: str) -> None:
    settings = load_settings(environ={name: value for name, value in _S3.items() if name != missing})
    with pytest.raises(ConfigError, match="it is required here") as caught:
        s3_access(settings)
    assert caught.value.key == missing


def test_require_passes_what_has_a_value() -> None:
    require(load_settings(environ=_S3), [*_S3, "LTS_STORAGE_ROOT"])
    with pytest.raises(ConfigError, match="SCICAT_PASSWORD_FILE"):
        require(load_settings(environ=_S3), ["SCICAT_PASSWORD"])


def test_links_go_through_the_external_endpoint() -> None:
    access = s3_access(load_settings(environ={**_S3, "MINIO_EXTERNAL_ENDPOINT": "https://data.example.org"}))
    assert (access.endpoint_url, access.external_endpoint_url) == (
        "https://s3.example.org:9000",
        "https://data.example.org",
    )


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("scopem-openemdata.ethz.ch:9090", "https://scopem-openemdata.ethz.ch:9090"),
        ("10.0.0.5:9000", "https://10.0.0.5:9000"),
        ("[2001:db8::1]:9000", "https://[2001:db8::1]:9000"),
        ("localhost:9000", "http://localhost:9000"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("127.1.2.3:9000", "http://127.1.2.3:9000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("minio:9000", "http://minio:9000"),
        ("s3_storage:9000", "http://s3_storage:9000"),
        ("127.example.org:9000", "https://127.example.org:9000"),
        ("http://s3.example.org:9000", "http://s3.example.org:9000"),
        ("https://localhost", "https://localhost"),
        ("https://s3.example.org/", "https://s3.example.org"),
    ],
)
def test_the_scheme_of_an_endpoint(value: str, url: str) -> None:
    assert endpoint_url(value) == url
    assert load_settings(environ={"MINIO_ENDPOINT": value}).minio_endpoint == value


@pytest.mark.parametrize(
    "value",
    [
        *("host", "host:", "host:0", "host:65536", "host:x", ":9000", "host:9000/", "host:9000/path", "a b:9000"),
        *("ftp://host", "s3://bucket", "http://", "http:///", "http://host/path", "http://host?x=1", "http://host#x"),
        *("http://user@host", "http://u:p@host:9000", "u:p@host:9000", "2001:db8::1", "http://host:x", "://host:1"),
        *("host:9000\n", "HTTP//host:9000", "http://http://host", "http://host//"),
    ],
)
def test_what_is_no_endpoint_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        endpoint_url(value)
    assert _refusal({"SCICAT_ENDPOINT": value}).key == "SCICAT_ENDPOINT"


def test_importing_the_settings_is_light() -> None:
    program = "import sys, mover.settings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"asyncio", "botocore", "obstore", "prefect", "rich", "typer", "httpx"} & set(done.stdout.split())


def test_every_field_is_in_the_table() -> None:
    names = {row.name.lower() for row in setting_rows(Settings())}
    assert names | {"origins"} == {field.name for field in msgspec.structs.fields(Settings)}


def test_of_several_configuration_files_the_last_counts(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text('[minio]\nMINIO_REGION = "one"\nMINIO_ENDPOINT = "one:1"\n')
    two.write_text('[minio]\nMINIO_ENDPOINT = "two:2"\n')
    settings = load_settings(environ={"MOVER_CONFIG": f"{one}:{two}"})
    assert (settings.minio_region, settings.minio_endpoint) == ("one", "two:2")
    assert settings.origins["MINIO_ENDPOINT"] == f"file {two}"
    with pytest.raises(ConfigError, match="MOVER_CONFIG"):
        load_settings(environ={"MOVER_CONFIG": f"{one}:"})
