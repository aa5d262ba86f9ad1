"""The configuration: one table of names, read once into a frozen object, each value with where it came from.

``Settings`` is the table. A field is a setting; its annotation holds the section of the TOML file, the description with
the unit, and the rule for its values; its default is the setting's. Everything else here follows from it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec

from mover.errors import ConfigError
from mover.settings_rules import API_PREFIX, BUCKET, ENDPOINT, PATH, WORD, Rule, Secret, choice, endpoint_url, whole

__all__ = [
    "S3Access",
    "Setting",
    "SettingRow",
    "Settings",
    "load_settings",
    "require",
    "s3_access",
    "setting_names",
    "setting_rows",
]

_PREFIXES = ("ARCHIVER_", "LTS_", "MINIO_", "MOVER_", "SCICAT_")
_OTHER_VARIABLES = frozenset({"MOVER_CONFIG", "MOVER_URL"})  # read elsewhere, no settings


class Setting(NamedTuple):
    """What the table says about one setting. ``from_file``: ``<NAME>_FILE`` may name a file that holds the value."""

    section: str
    description: str
    rule: Rule
    from_file: bool = False

    @property
    def secret(self) -> bool:
        """Whether the value is masked wherever it is shown."""
        return self.rule.secret


def _archiver(text: str, rule: Rule) -> Setting:
    return Setting("archiver", text, rule)


def _lts(text: str, rule: Rule) -> Setting:
    return Setting("lts", text, rule)


def _minio(text: str, rule: Rule) -> Setting:
    return Setting("minio", text, rule)


def _limit(text: str) -> Setting:
    return Setting("limits", text, whole(1))


def _mover(text: str, rule: Rule) -> Setting:
    return Setting("mover", text, rule)


_PASSWORD = Rule(Secret, "a text that is not empty", secret=True)
_SCRATCH = Path("/tmp/scratch")  # noqa: S108 - the documented default, on a volume of its own in a deployment
_LTS = Path("/tmp/LTS")  # noqa: S108 - as above


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings with their effective values; ``origins`` says for each name where its value came from.

    An origin is ``default``, ``option``, ``environment``, ``prefect variable`` or ``file <path>``, followed by
    `` (<NAME>_FILE)`` when the value was read from the file named there.
    """

    archiver_scratch_folder: Annotated[Path, _archiver("journal and locks; receives no payload", PATH)] = _SCRATCH
    archiver_target_size_mb: Annotated[int, _archiver("payload of a datablock, MiB", whole(1))] = 200
    archiver_lts_file_timeout_s: Annotated[int, _archiver("wait for the first byte from the LTS, s", whole(1))] = 300
    archiver_lts_wait_before_verify_s: Annotated[int, _archiver("pause before reading back, s", whole(0))] = 0
    archiver_staging: Annotated[
        Literal["never", "always"], _archiver("go through the staging bucket", choice("never", "always"))
    ] = "never"

    lts_storage_root: Annotated[Path, _lts("where the LTS share is mounted", PATH)] = _LTS
    lts_filesystem: Annotated[str, _lts("type that the LTS has to have, as nfs; any: not looked at", WORD)] = "any"
    lts_free_space_percentage: Annotated[int, _lts("share of the LTS that stays free, percent", whole(0, 99))] = 20

    minio_region: Annotated[str, _minio("region of the S3 storage", WORD)] = "eu-west-1"
    minio_endpoint: Annotated[str | None, _minio("S3 storage", ENDPOINT)] = None
    minio_external_endpoint: Annotated[str | None, _minio("S3 storage in links; default: MINIO_ENDPOINT", ENDPOINT)] = (
        None
    )
    minio_landingzone_bucket: Annotated[str, _minio("bucket that datasets arrive in", BUCKET)] = "landingzone"
    minio_staging_bucket: Annotated[str, _minio("bucket of datablocks on their way", BUCKET)] = "staging"
    minio_retrieval_bucket: Annotated[str, _minio("bucket that datasets are retrieved to", BUCKET)] = "retrieval"
    minio_url_expiration_days: Annotated[int, _minio("lifetime of a link, days", whole(1, 7))] = 7
    minio_user: Annotated[str | None, Setting("minio", "access key", WORD, from_file=True)] = None
    minio_password: Annotated[Secret | None, Setting("minio", "secret key", _PASSWORD, from_file=True)] = None

    scicat_endpoint: Annotated[str | None, Setting("scicat", "the catalogue", ENDPOINT)] = None
    scicat_api_prefix: Annotated[str, Setting("scicat", "path of the catalogue's API", API_PREFIX)] = "/api/v3/"
    scicat_user: Annotated[str | None, Setting("scicat", "the mover's account", WORD, from_file=True)] = None
    scicat_password: Annotated[Secret | None, Setting("scicat", "its password", _PASSWORD, from_file=True)] = None

    lts_free_limit: Annotated[int, _limit("checks of free space at a time")] = 1
    move_to_lts_limit: Annotated[int, _limit("datablocks being written to the LTS at a time")] = 2
    verify_lts_limit: Annotated[int, _limit("datablocks being read back at a time")] = 1
    lts_to_retrieval_limit: Annotated[int, _limit("datablocks being read for retrieval at a time")] = 1

    mover_buffer_mb: Annotated[int, _mover("memory for bytes in flight, MiB", whole(16))] = 256
    mover_s3_concurrency: Annotated[int, _mover("requests to the S3 storage at a time", whole(1, 1024))] = 64
    mover_host: Annotated[str, _mover("address that the daemon listens on", WORD)] = "127.0.0.1"
    mover_port: Annotated[int, _mover("port that the daemon listens on", whole(1, 65535))] = 8420
    mover_socket: Annotated[Path | None, _mover("Unix socket that the daemon listens on, too", PATH)] = None
    mover_token_file: Annotated[Path | None, _mover("the daemon's tokens, or the client's own one", PATH)] = None
    mover_drain_s: Annotated[int, _mover("time for running work when the daemon is to stop, s", whole(0))] = 60

    origins: Mapping[str, str] = MappingProxyType({})


class SettingRow(NamedTuple):
    """One line of ``mover config``; ``value`` is the text to show: masked when secret, ``-`` when there is none."""

    name: str
    section: str
    value: str
    origin: str
    description: str


class S3Access(msgspec.Struct, frozen=True):
    """What it takes to reach the S3 storage; the endpoints are URLs."""

    endpoint_url: str
    external_endpoint_url: str
    region: str
    user: str
    password: Secret


class _Source(NamedTuple):
    origin: str
    values: Mapping[str, object]


def _table() -> dict[str, Setting]:
    hints = get_type_hints(Settings, include_extras=True)
    return {field.upper(): hint.__metadata__[0] for field, hint in hints.items() if field != "origins"}


_TABLE = _table()
_SECTIONS = tuple(dict.fromkeys(setting.section for setting in _TABLE.values()))
_NAMES = frozenset(_TABLE) | {f"{name}_FILE" for name, setting in _TABLE.items() if setting.from_file}


def load_settings(
    options: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    variables: Mapping[str, object] | None = None,
) -> Settings:
    """Reads all sources, strongest first: ``options``, environment, Prefect ``variables``, TOML file, defaults.

    Args:
        options: values of command-line options under the upper-case names; None means not given.
        config: the TOML file; None: the files that ``MOVER_CONFIG`` names, if any, with ``:`` between; the last counts.
        environ: None: the process's own environment.
        variables: Prefect Variables under the lower-case names.

    Raises:
        ConfigError: an unknown name, a value that is not allowed, or a file that cannot be read.
    """
    env = os.environ if environ is None else environ
    sources = [_Source("option", {name: value for name, value in (options or {}).items() if value is not None})]
    sources.append(_Source("environment", _ours(env)))
    sources.append(_Source("prefect variable", _upper_case(variables or {})))
    named = env.get("MOVER_CONFIG", "").split(":") if config is None and "MOVER_CONFIG" in env else []
    files = [config] if config is not None else [PATH.parse("MOVER_CONFIG", name, "environment") for name in named]
    sources += [_Source(f"file {path}", _read_toml(path)) for path in reversed(files)]
    for source in sources:
        _refuse_unknown(source)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_TABLE, "default")
    for name, setting in _TABLE.items():
        for source in sources:
            found = _value_of(name, setting, source)
            if found is not None:
                values[name.lower()], origins[name] = found
                break
    if "minio_endpoint" in values:
        values.setdefault("minio_external_endpoint", values["minio_endpoint"])
    return Settings(**values, origins=MappingProxyType(origins))


def require(settings: Settings, names: Iterable[str]) -> None:
    """Raises ConfigError for the first of the upper-case ``names`` that has no value."""
    for name in names:
        if getattr(settings, name.lower()) is None:
            hint = f" (or {name}_FILE)" if _TABLE[name].from_file else ""
            raise ConfigError(name, None, f"{_TABLE[name].rule.allowed}{hint}, and it is required here")


def s3_access(settings: Settings) -> S3Access:
    """The settings of the S3 storage, complete.  Raises ConfigError when one is missing."""
    require(settings, ("MINIO_ENDPOINT", "MINIO_USER", "MINIO_PASSWORD"))
    endpoint, user, password = settings.minio_endpoint, settings.minio_user, settings.minio_password
    assert endpoint is not None and user is not None and password is not None  # noqa: S101, PT018 - for the type checker
    external = settings.minio_external_endpoint or endpoint
    return S3Access(endpoint_url(endpoint), endpoint_url(external), settings.minio_region, user, password)


def setting_names() -> frozenset[str]:
    """The upper-case names of all settings, without their ``_FILE`` forms."""
    return frozenset(_TABLE)


def setting_rows(settings: Settings) -> Iterator[SettingRow]:
    """All settings in the table's order, as ``mover config`` prints them."""
    for name, setting in _TABLE.items():
        value = getattr(settings, name.lower())
        origin = settings.origins.get(name, "default")
        yield SettingRow(name, setting.section, "-" if value is None else str(value), origin, setting.description)


def _value_of(name: str, setting: Setting, source: _Source) -> tuple[object, str] | None:
    origin, file_name = source.origin, f"{name}_FILE"
    if not setting.from_file or file_name not in source.values:
        if name not in source.values:
            return None
        return setting.rule.parse(name, source.values[name], origin), origin
    if name in source.values:
        raise ConfigError(name, Secret(""), f"one of {name} and {file_name}, not both", origin)
    path: Path = PATH.parse(file_name, source.values[file_name], origin)
    try:
        text = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(file_name, str(path), f"a readable text file: {reason}", origin) from error
    if not text.strip():
        raise ConfigError(file_name, str(path), "a file that is not empty", origin)
    origin = f"{origin} ({file_name})"
    return setting.rule.parse(name, text, origin), origin


def _ours(environ: Mapping[str, str]) -> dict[str, object]:
    return {
        name: value
        for name, value in environ.items()
        if name in _NAMES or (name.startswith(_PREFIXES) and name not in _OTHER_VARIABLES)
    }


def _upper_case(variables: Mapping[str, object]) -> dict[str, object]:
    return {name.upper() if name == name.lower() else name: value for name, value in variables.items()}


def _refuse_unknown(source: _Source) -> None:
    for name in source.values:
        if name not in _NAMES:
            # Whatever the value is, it may be a secret under a misspelt name.
            raise ConfigError(name, Secret(""), f"a known setting{_near(name, _NAMES)}", source.origin)


def _near(name: str, names: Iterable[str]) -> str:
    from difflib import get_close_matches

    matches = get_close_matches(name.upper(), sorted(names), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _read_toml(path: Path) -> dict[str, object]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise ConfigError("--config", str(path), f"a readable TOML file: {reason}") from error
    origin = f"file {path}"
    values: dict[str, object] = {}
    for section, table in document.items():
        if section in _TABLE and _TABLE[section].section == "limits":  # a list of limits may stand without its heading
            values[section] = table
            continue
        if section not in _SECTIONS or not isinstance(table, dict):
            allowed = ", ".join(f"[{name}]" for name in _SECTIONS)
            raise ConfigError(section, Secret(""), f"settings in the sections {allowed}", origin)
        for name, value in table.items():
            home = _TABLE.get(name) or _TABLE.get(name.removesuffix("_FILE"))
            if home is not None and home.section != section:
                raise ConfigError(name, Secret(""), f"section [{home.section}], not [{section}]", origin)
            values[name] = value
    return values
