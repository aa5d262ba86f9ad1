"""The Prefect server's side of the configuration: what is there, and the writing of changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import anyio
import httpx
from prefect.blocks.system import Secret as SecretBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    VariableCreate,
    VariableUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

from flows.configuration import REGISTRY_BLOCK, Automation, Change, Found, Limit, Pool, Registry, Wanted
from flows.server_settings import HEARTBEAT_TIMEOUT_S
from flows.settings import read_variables
from mover.errors import ConfigError, MoverError
from mover.settings_rules import Secret

__all__ = ["ZOMBIES", "PrefectServerError", "apply", "connect", "read_found", "wanted_automations"]

ZOMBIES: Final = "Flow runs without heartbeat have crashed"
"""Name of the automation that ends runs which died together with their worker."""

# After one of these no heartbeat is expected any more. The names after the fourth are those that the flows give.
_LAST_STATES: Final = (
    *("Completed", "Failed", "Cancelled", "Crashed"),
    *("CompletedWithDatasetErrors", "Skipped", "UserError", "TimedOut", "Paused", "Suspended"),
)
_POLL_S: Final = 1.0


class PrefectServerError(MoverError):
    """The Prefect server does not answer, or not as it should."""

    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"the Prefect server at {url}: {reason}")


def wanted_automations(heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S) -> dict[str, Automation]:
    """The automations of a deployment; a flow run that is silent for ``heartbeat_timeout_s`` is set to Crashed."""
    heartbeat = "prefect.flow-run.heartbeat"
    message = f"No heartbeat for {heartbeat_timeout_s} s: the process of the run and its worker are gone."
    zombies = AutomationCore(
        name=ZOMBIES,
        description="Ends runs that died with their worker, so that their slots are free and the reconciler sees them.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{state}" for state in _LAST_STATES)},
            threshold=1,
            within=timedelta(seconds=heartbeat_timeout_s),
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)],
    )
    return {ZOMBIES: Automation(_fields(zombies))}


@asynccontextmanager
async def connect(deadline_s: float) -> AsyncIterator[PrefectClient]:
    """A client of the server that PREFECT_API_URL names, once it answers.

    Raises:
        ConfigError: there is no PREFECT_API_URL, or the server refuses the credentials.
        PrefectServerError: it does not answer within ``deadline_s``, or fails.
    """
    url = PREFECT_API_URL.value()
    if not url:  # Prefect would start a server of its own and forget everything at the end
        raise ConfigError("PREFECT_API_URL", None, "the address of the Prefect server, as http://host:4200/api")
    try:
        async with get_client() as client:
            await _wait(client, url, deadline_s)
            yield client
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise ConfigError("PREFECT_API_AUTH_STRING", Secret(""), "what the server accepts") from error
        raise PrefectServerError(url, f"{error.request.method} {error.request.url.path} answered {status}") from error
    except httpx.HTTPError as error:
        raise PrefectServerError(url, type(error).__name__) from error


async def _wait(client: PrefectClient, url: str, deadline_s: float) -> None:
    failure: Exception | None = None
    with anyio.move_on_after(deadline_s):
        while True:
            failure = await client.api_healthcheck()
            if failure is None:
                return
            await anyio.sleep(_POLL_S)
    reason = f"no answer within {deadline_s:g} s"
    raise PrefectServerError(url, reason) from failure


async def read_found(client: PrefectClient, wanted: Wanted) -> Found:
    """What the server has of ``wanted``.  Raises httpx.HTTPError."""
    limits, pools = {}, {}
    variables = await read_variables()
    for name in wanted.limits:
        try:
            limit = await client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            continue
        limits[name] = Limit(limit.limit, limit.active, limit.slot_decay_per_second)
    for name in wanted.pools:
        try:
            pool = await client.read_work_pool(name)
        except ObjectNotFound:
            continue
        queues = {queue.name: queue.concurrency_limit for queue in await client.read_work_queues(name)}
        pools[name] = Pool(pool.type, pool.concurrency_limit, pool.base_job_template, queues)
    secrets = {name: secret for name in wanted.secrets if (secret := await _secret(client, name)) is not None}
    automations = {}
    for name in wanted.automations:
        same = await client.read_automations_by_name(name)
        if same:
            automations[name] = Automation(_fields(same[0]), len(same))
    return Found(variables, limits, secrets, pools, automations, await _registry(client))


async def _secret(client: PrefectClient, name: str) -> Secret | None:
    try:
        document = await client.read_block_document_by_name(name, "secret", include_secrets=True)
    except ObjectNotFound:
        return None
    return Secret(str(document.data.get("value")))


async def _registry(client: PrefectClient) -> Registry | None:
    slug = "docker-registry-credentials"
    try:
        document = await client.read_block_document_by_name(REGISTRY_BLOCK, slug, include_secrets=True)
    except ObjectNotFound:
        return None
    data = document.data
    return Registry(str(data.get("registry_url")), Secret(str(data.get("username"))), Secret(str(data.get("password"))))


async def apply(client: PrefectClient, change: Change) -> None:
    """Writes one change.  Raises httpx.HTTPError."""
    name, value = change.item.name, change.value
    if value is None:
        return
    match change.item.kind:
        case "variable":
            await _write_variable(client, name, value)
        case "limit":
            await _write_limit(client, name, value)
        case "secret":
            block: SecretBlock[str] = SecretBlock(value=value.reveal())
            await block.asave(name, overwrite=True, client=client)
        case "registry":
            await _write_registry(client, name, value)
        case "work pool":
            await _write_pool(client, name, value)
        case "automation":
            await _write_automation(client, name, value)


async def _write_variable(client: PrefectClient, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON
    try:
        await client.create_variable(VariableCreate(name=name, value=value))
    except ObjectAlreadyExists:
        await client.update_variable(VariableUpdate(name=name, value=value))


async def _write_limit(client: PrefectClient, name: str, limit: Limit) -> None:
    fields: dict[str, Any] = {
        "limit": limit.slots,
        "active": limit.active,
        "slot_decay_per_second": limit.slot_decay_per_second,
    }
    try:  # in this order: a limit that is there already is an error in the server's log
        await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(**fields))
    except ObjectNotFound:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, **fields))


async def _write_registry(client: PrefectClient, name: str, registry: Registry) -> None:
    from prefect_docker import DockerRegistryCredentials

    block = DockerRegistryCredentials(
        username=registry.username.reveal(),
        password=SecretStr(registry.password.reveal()),
        registry_url=registry.url,
    )
    await block.asave(name, overwrite=True, client=client)


async def _write_pool(client: PrefectClient, name: str, pool: Pool) -> None:
    # Never with ``overwrite``: it resets what the call does not name.
    fields: dict[str, Any] = {"concurrency_limit": pool.concurrency_limit}
    if pool.base_job_template is not None:
        fields["base_job_template"] = pool.base_job_template
    try:
        await client.create_work_pool(WorkPoolCreate(name=name, type=pool.type, **fields))
    except ObjectAlreadyExists:
        await client.update_work_pool(name, WorkPoolUpdate(**fields))
    there = {queue.name: queue for queue in await client.read_work_queues(name)}
    for queue_name, limit in pool.queues.items():
        if queue_name in there:
            await client.update_work_queue(there[queue_name].id, concurrency_limit=limit)
        else:
            await client.create_work_queue(queue_name, concurrency_limit=limit, work_pool_name=name)


async def _write_automation(client: PrefectClient, name: str, automation: Automation) -> None:
    core = AutomationCore.model_validate(automation.fields)
    same = await client.read_automations_by_name(name)
    if not same:
        await client.create_automation(core)
        return
    await client.update_automation(same[0].id, core)
    for surplus in same[1:]:
        await client.delete_automation(surplus.id)


def _fields(automation: AutomationCore) -> Mapping[str, Any]:
    """All fields as JSON, sets in a fixed order, without what the server adds."""
    fields = automation.model_dump(mode="json", exclude={"id", "created", "updated", "owner_resource"})
    for key, value in fields["trigger"].items():
        if key in {"after", "expect", "for_each"}:
            fields["trigger"][key] = sorted(value)
        elif key in {"match", "match_related"} and isinstance(value, dict):
            fields["trigger"][key] = {k: [v] if isinstance(v, str) else v for k, v in value.items()}
    return fields
