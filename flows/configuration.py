"""What the Prefect server shall have, what it has, and the changes from one to the other: a comparison without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from mover.errors import ConfigError
from mover.settings_rules import Secret

__all__ = [
    "REGISTRY_BLOCK",
    "REGISTRY_SECRETS",
    "Automation",
    "Change",
    "Found",
    "Item",
    "Kind",
    "Limit",
    "Pool",
    "Registry",
    "State",
    "Wanted",
    "changes",
]

Kind = Literal["variable", "limit", "secret", "registry", "work pool", "automation"]
State = Literal["unchanged", "created", "updated"]

REGISTRY_SECRETS: Final = ("github-openem-username", "github-openem-access-token")
"""Secret blocks with the account that images are pulled with from a private registry."""

REGISTRY_BLOCK: Final = "github-openem"
"""Name of the block in which docker workers look for that account."""

_REGISTRY_VARIABLE: Final = {
    "title": "Registry credentials",
    "type": "string",  # the worker puts the block in its place; the server takes it for a text
    "default": f"{{{{ prefect.blocks.docker-registry-credentials.{REGISTRY_BLOCK} }}}}",
    "description": "Block with the account that the image is pulled with.",
}


class Item(msgspec.Struct, frozen=True):
    """One thing on the server and what becomes of it; ``detail`` says which of its fields differ, never a secret."""

    kind: Kind
    name: str
    state: State
    detail: str = ""


class Limit(NamedTuple):
    """A global concurrency limit. Slots that decay, or a limit that is not active, limit nothing."""

    slots: int
    active: bool = True
    slot_decay_per_second: float = 0.0


class Pool(NamedTuple):
    """A work pool; a ``base_job_template`` of None is the business of the pool's first worker.

    ``queues``: limits of its queues by name; others that it has are somebody else's.
    """

    type: str
    concurrency_limit: int | None
    base_job_template: Mapping[str, Any] | None = None
    queues: Mapping[str, int | None] = {}


class Registry(NamedTuple):
    """A private registry and the account for it."""

    url: str
    username: Secret
    password: Secret


class Automation(NamedTuple):
    """An automation: its fields as JSON, and how many there are under the name."""

    fields: Mapping[str, Any]
    copies: int = 1


class Wanted(NamedTuple):
    """What the server shall have. A secret of None is given nowhere; ``required`` names those that have to exist."""

    variables: Mapping[str, object]
    limits: Mapping[str, Limit]
    default_limits: frozenset[str]  # of these, named in no file: for a server that has none
    secrets: Mapping[str, Secret | None]
    pools: Mapping[str, Pool]
    automations: Mapping[str, Automation]
    required: Mapping[str, str]  # block -> the setting that it holds
    registry_url: str | None = None


class Found(NamedTuple):
    """What the server has under the names that are wanted, and all variables that are settings of the flows."""

    variables: Mapping[str, object]
    limits: Mapping[str, Limit]
    secrets: Mapping[str, Secret]
    pools: Mapping[str, Pool]
    automations: Mapping[str, Automation]
    registry: Registry | None = None


class Change(NamedTuple):
    """An item, and what to write for it; None where there is nothing to write."""

    item: Item
    value: Any = None


def changes(wanted: Wanted, found: Found) -> Sequence[Change]:
    """All items in the order in which they are shown and written.

    Raises:
        ConfigError: a secret or the address of the registry is needed and there is none, or an existing work pool has
            another type.
    """
    registry = _registry(wanted, found)
    return [
        *_compared("variable", wanted.variables, found.variables),
        *_in_no_file(wanted, found),
        *_compared("limit", {**wanted.limits, **_kept(wanted, found)}, found.limits),
        *_secrets(wanted, found),
        *([] if registry is None else [_registry_change(registry, found.registry)]),
        *_pools(wanted, found, with_registry=registry is not None),
        *_compared("automation", wanted.automations, found.automations),
    ]


def _in_no_file(wanted: Wanted, found: Found) -> Iterator[Change]:
    """Variables that count though no file names them: of an earlier configuration, or written by hand."""
    for name in sorted(found.variables.keys() - wanted.variables.keys()):
        detail = f"kept, and in force: {found.variables[name]!r}; in no file (to be rid of it: delete it in Prefect)"
        yield Change(Item("variable", name, "unchanged", detail))


def _kept(wanted: Wanted, found: Found) -> dict[str, Limit]:
    """Limits that no file names stay as they are, as long as they limit at all."""
    return {name: Limit(found.limits[name].slots) for name in wanted.default_limits if name in found.limits}


def _compared(kind: Kind, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Change]:
    for name, value in wanted.items():
        if name not in found:
            yield Change(Item(kind, name, "created", _shown(value)), value)
        elif _same(found[name], value):
            yield Change(Item(kind, name, "unchanged", _shown(value)))
        else:
            yield Change(Item(kind, name, "updated", _difference(found[name], value)), value)


def _same(found: object, wanted: object) -> bool:
    return type(found) is type(wanted) and found == wanted  # 1 and True are not the same variable


def _shown(value: object) -> str:
    if isinstance(value, Limit):
        return str(value.slots)
    return "" if isinstance(value, Automation) else repr(value)


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, Automation) and isinstance(wanted, Automation):
        names = [name for name, value in wanted.fields.items() if found.fields.get(name) != value]
        surplus = [f"{found.copies} of the name"] if found.copies > 1 else []
        return ", ".join([*names, *surplus])
    if isinstance(found, Limit) and isinstance(wanted, Limit):
        pairs = zip(("", "active ", "slot decay "), found, wanted, strict=True)
        return ", ".join(f"{label}{old} -> {new}" for label, old, new in pairs if old != new)
    return f"{found!r} -> {wanted!r}"


def _secrets(wanted: Wanted, found: Found) -> Iterator[Change]:
    for block, secret in wanted.secrets.items():
        if secret is not None:
            state: State = "created" if block not in found.secrets else "updated"
            state = "unchanged" if found.secrets.get(block) == secret else state
            yield Change(Item("secret", block, state), None if state == "unchanged" else secret)
        elif block in found.secrets:
            yield Change(Item("secret", block, "unchanged", "kept; no file is given"))
        elif block in wanted.required:
            name = f"{wanted.required[block]}_FILE"
            raise ConfigError(name, None, f"the path of a file with what the Secret block {block} shall hold")
        else:
            yield Change(Item("secret", block, "unchanged", "left out; no file is given"))


def _registry(wanted: Wanted, found: Found) -> Registry | None:
    """The registry that the workers shall know: of what is given now and, where nothing is given, of what is there."""
    username, password = (wanted.secrets.get(block) or found.secrets.get(block) for block in REGISTRY_SECRETS)
    if username is None or password is None:
        return None
    url = wanted.registry_url or (found.registry.url if found.registry else None)
    if url is not None:
        return Registry(url, username, password)
    if any(wanted.secrets.get(block) for block in REGISTRY_SECRETS):
        raise ConfigError("REGISTRY_URL", None, "the registry that the account is for, as host or host:port")
    return None  # blocks for somebody else's purposes


def _registry_change(registry: Registry, there: Registry | None) -> Change:
    if there == registry:
        return Change(Item("registry", REGISTRY_BLOCK, "unchanged", registry.url))
    detail = registry.url if there is None or there.url == registry.url else f"{there.url} -> {registry.url}"
    return Change(Item("registry", REGISTRY_BLOCK, "created" if there is None else "updated", detail), registry)


def _referring(pool: Pool) -> Pool:
    """The pool, whose workers log in to the registry before they pull."""
    template = pool.base_job_template
    if pool.type != "docker" or template is None:
        return pool
    name = "registry_credentials"
    variables = template["variables"]
    changed = {
        "job_configuration": {**template["job_configuration"], name: f"{{{{ {name} }}}}"},
        "variables": {**variables, "properties": {**variables["properties"], name: _REGISTRY_VARIABLE}},
    }
    return pool._replace(base_job_template={**template, **changed})


def _pools(wanted: Wanted, found: Found, *, with_registry: bool) -> Iterator[Change]:
    for name, given in wanted.pools.items():
        pool = _referring(given) if with_registry else given
        there = found.pools.get(name)
        if there is None:
            detail = f"type {pool.type}, limit {pool.concurrency_limit}"
            yield Change(Item("work pool", name, "created", detail), pool)
            continue
        if there.type != pool.type:
            allowed = f"{there.type}: the work pool {name} exists with this type, which cannot change"
            raise ConfigError("WORK_POOL_TYPE", pool.type, allowed)
        details = []
        if there.concurrency_limit != pool.concurrency_limit:
            details.append(f"limit {there.concurrency_limit} -> {pool.concurrency_limit}")
        if pool.base_job_template is not None and there.base_job_template != pool.base_job_template:
            details.append("base job template")
        for queue, limit in pool.queues.items():
            if queue not in there.queues:
                details.append(f"queue {queue}")
            elif there.queues[queue] != limit:
                details.append(f"limit of queue {queue} {there.queues[queue]} -> {limit}")
        if details:
            yield Change(Item("work pool", name, "updated", ", ".join(details)), pool)
        else:
            yield Change(Item("work pool", name, "unchanged", f"type {pool.type}, limit {pool.concurrency_limit}"))
