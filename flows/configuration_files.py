"""What the files and the environment of a deployment say that its Prefect server shall have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from flows.configuration import REGISTRY_SECRETS, Automation, Limit, Pool, Wanted
from flows.limits import LIMIT_TAGS, limit_name
from flows.settings import SECRET_BLOCKS
from mover.errors import ConfigError
from mover.settings import Settings, load_settings
from mover.settings_rules import PATH, WORD, Secret, choice, whole

__all__ = ["OPTIONAL_BLOCKS", "POOLS", "RECONCILER_QUEUE", "PoolNames", "read_wanted"]

OPTIONAL_BLOCKS: Final[Mapping[str, str]] = {
    "GITHUB_OPENEM_USERNAME": REGISTRY_SECRETS[0],
    "GITHUB_OPENEM_ACCESS_TOKEN": REGISTRY_SECRETS[1],
}
"""Secret blocks of deployments that pull images from a private registry."""


RECONCILER_QUEUE: Final = "reconciliation"
"""Queue of the reconciler's runs: a place in its work pool is kept for them, so that runs which wait for tape, or are
dead, never keep away what settles them."""

_DEFAULT_QUEUE: Final = "default"  # Prefect makes it with the pool, for runs that name none


class PoolNames(NamedTuple):
    """Environment variables and defaults of one work pool."""

    prefix: str
    name: str
    concurrency_limit: int  # runs, each a container with MOVER_BUFFER_MB of buffers and more
    has_reconciler: bool = False


POOLS: Final = (
    PoolNames("ARCHIVAL", "archival-docker-workpool", 4),
    PoolNames("RETRIEVAL", "retrieval-docker-workpool", 4, has_reconciler=True),
)

_TYPE = choice("docker", "process")
_REGISTRY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?")
_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z0-9_]+)\s*\}\}")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")


def read_wanted(configs: Sequence[Path], environ: Mapping[str, str], automations: Mapping[str, Automation]) -> Wanted:
    """Reads and checks everything; a value in a later file counts.

    Raises:
        ConfigError: a file that cannot be read, an unknown name, a value that is not allowed, or a secret in a file of
            variables.
    """
    variables: dict[str, object] = {}
    limits: dict[str, Limit] = {}
    for config in configs:
        settings = load_settings(config=config, environ={})
        for name, origin in settings.origins.items():
            if not origin.startswith("file "):
                continue
            value = getattr(settings, name.lower())
            if name in SECRET_BLOCKS:
                allowed = (
                    f"no variable: the file that {name}_FILE names goes into the Secret block {SECRET_BLOCKS[name]}"
                )
                raise ConfigError(name, Secret(""), allowed, origin)
            if name in LIMIT_TAGS:
                limits[name] = Limit(value)
            else:
                variables[name.lower()] = value if isinstance(value, int) else str(value)
    defaults = {name: Limit(getattr(Settings(), name.lower())) for name in LIMIT_TAGS if name not in limits}
    return Wanted(
        variables=variables,
        limits={limit_name(tag): limits.get(name) or defaults[name] for name, tag in LIMIT_TAGS.items()},
        default_limits=frozenset(limit_name(LIMIT_TAGS[name]) for name in defaults),
        secrets={block: _secret(name, environ) for name, block in {**SECRET_BLOCKS, **OPTIONAL_BLOCKS}.items()},
        pools=_pools(environ),
        automations=automations,
        required={block: name for name, block in SECRET_BLOCKS.items()},
        registry_url=_registry_url(environ),
    )


def _registry_url(environ: Mapping[str, str]) -> str | None:
    text = environ.get("REGISTRY_URL", "")
    if not text:
        return None
    if not _REGISTRY.fullmatch(text):  # the engine compares it with the first part of the image's name
        allowed = "host or host:port, as the image's name begins, without scheme and path"
        raise ConfigError("REGISTRY_URL", text, allowed, "environment")
    return text


def _secret(name: str, environ: Mapping[str, str]) -> Secret | None:
    key = f"{name}_FILE"
    if key not in environ:
        return None
    path: Path = PATH.parse(key, environ[key], "environment")
    text = _text(key, path).rstrip("\r\n")
    if not text.strip():
        raise ConfigError(key, str(path), "a file that is not empty", "environment")
    return Secret(text)


def _text(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(key, str(path), f"a readable text file: {reason}", "environment") from error


def _pools(environ: Mapping[str, str]) -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    kind = _TYPE.parse("WORK_POOL_TYPE", environ.get("WORK_POOL_TYPE", "docker"), "environment")
    for names in POOLS:
        key = f"{names.prefix}_WORK_POOL"
        name = WORD.parse(key, environ.get(key, names.name), "environment")
        if name in pools:
            raise ConfigError(key, name, "a name that the other work pool does not have", "environment")
        key = f"{names.prefix}_WORK_POOL_LIMIT"
        limit = whole(1).parse(key, environ.get(key, names.concurrency_limit), "environment")
        key = f"{names.prefix}_BASE_JOB_TEMPLATE"
        path = PATH.parse(key, environ[key], "environment") if environ.get(key) else None
        template = _template(key, path, environ) if path else None
        pools[name] = Pool(kind, limit, template, _queues(limit) if names.has_reconciler else {})
    return pools


def _queues(limit: int) -> dict[str, int | None]:
    """A pool of one place cannot keep one: the reconciler waits for its turn there."""
    return {_DEFAULT_QUEUE: max(limit - 1, 1), RECONCILER_QUEUE: 1}


def _template(key: str, path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        template = _filled_in(json.loads(_text(key, path)), environ, f"file {path}")
    except ValueError as error:
        raise ConfigError(key, str(path), f"a JSON file: {error}", "environment") from error
    configuration = template.get("job_configuration") if isinstance(template, dict) else None
    variables = template.get("variables") if isinstance(template, dict) else None
    properties = variables.get("properties") if isinstance(variables, dict) else None
    if not isinstance(configuration, dict) or not isinstance(properties, dict):
        allowed = "a JSON object with job_configuration and variables.properties"
        raise ConfigError(key, str(path), allowed, "environment")
    unknown = sorted(set(_PLACEHOLDER.findall(json.dumps(configuration))) - set(properties))
    if unknown:
        allowed = f"a template whose variables.properties have {', '.join(unknown)}, which its job_configuration uses"
        raise ConfigError(key, str(path), allowed, "environment")
    return dict(template)


def _filled_in(value: Any, environ: Mapping[str, str], origin: str) -> Any:  # noqa: ANN401 - any JSON
    """The value with ``${NAME}`` in all its texts replaced from the environment."""
    if isinstance(value, dict):
        return {key: _filled_in(inner, environ, origin) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner, environ, origin) for inner in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if not environ.get(name, "").strip():
            raise ConfigError(name, environ.get(name), "a value that is not empty; the template needs it", origin)
        return environ[name]

    return _VARIABLE.sub(replacement, value)
