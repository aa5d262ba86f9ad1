"""The hands of a test on the server: faults, switches, accounts, seeds, and what happened so far."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

from tests.scicat_fake.seeding import FILES_PER_BLOCK, Files, seed_dataset, seed_job
from tests.scicat_fake.state import Account, Change, Document, Fault, LoggedRequest, State, Switches

__all__ = ["Control", "Holder"]


class Holder(Protocol):
    """Has the server's state, and replaces it."""

    state: State

    def reset(self) -> None: ...


class Control:
    """Steers a server of the same process, from any thread. The methods take effect with the next request.

    ``method`` and ``path`` choose requests as ``Fault`` describes: "" is any, ``path`` is a regular expression.
    """

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    @property
    def state(self) -> State:
        """The documents; look, and change what nothing else here changes."""
        return self._holder.state

    @property
    def switches(self) -> Switches:
        return self.state.switches

    def reset(self) -> None:
        """An empty catalogue with the first accounts and switches, no faults, no history."""
        self._holder.reset()

    # ---------------------------------------------------------------------------------------------------------- faults
    def add(self, fault: Fault) -> Fault:
        self.state.faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        """Ends a fault; the requests that it holds go on."""
        self.state.faults[:] = [other for other in self.state.faults if other is not fault]

    def lose_reply(self, method: str, path: str, *, times: int = 1, after: int = 0) -> Fault:
        """The request takes effect, then the connection is closed without an answer."""
        return self.add(Fault(method=method, path=path, times=times, after=after, handled=True, close=True))

    def lose_request(self, method: str, path: str, *, times: int = 1, after: int = 0) -> Fault:
        """The connection is closed without an answer, and nothing has happened."""
        return self.add(Fault(method=method, path=path, times=times, after=after, close=True))

    def fail(
        self,
        method: str,
        path: str,
        status: int,
        *,
        body: str = "",
        content_type: str = "application/json; charset=utf-8",
        headers: Mapping[str, str] | None = None,
        times: int = 1,
        after: int = 0,
        handled: bool = False,
    ) -> Fault:
        """The request is answered with ``status`` instead; ``handled``: after it has taken effect."""
        return self.add(
            Fault(
                method=method,
                path=path,
                status=status,
                body=body,
                content_type=content_type,
                headers=dict(headers or {}),
                times=times,
                after=after,
                handled=handled,
            )
        )

    def fail_stored_job_update(self, *, times: int = 1) -> Fault:
        """PATCH of a job is stored, then an action of the site fails: 400."""
        body = '{"status":400,"message":"Email action failed"}'
        return self.fail("PATCH", r"/jobs/", 400, body=body, times=times, handled=True)

    def delay(self, method: str, path: str, delay_s: float, *, times: int = 1) -> Fault:
        return self.add(Fault(method=method, path=path, delay_s=delay_s, times=times))

    def hold(self, method: str, path: str, *, times: int = 1, handled: bool = False) -> Fault:
        """The request waits until the fault is removed, before it takes effect or (``handled``) after that."""
        return self.add(Fault(method=method, path=path, hold=True, times=times, handled=handled))

    def expire_tokens(self) -> None:
        """All tokens given so far are expired now."""
        self.state.token_epoch += 1

    # -------------------------------------------------------------------------------------------------------- accounts
    def account(
        self,
        username: str,
        *,
        password: str | None = None,
        rights: Iterable[str] | None = None,
        groups: Iterable[str] | None = None,
    ) -> Account:
        """Adds an account (password: its name, no rights, no groups) or changes what is given of a known one."""
        known = self.state.accounts.setdefault(username, Account(username, username, set(), set()))
        known.password = known.password if password is None else password
        known.rights = known.rights if rights is None else set(rights)
        known.groups = known.groups if groups is None else set(groups)
        return known

    # ----------------------------------------------------------------------------------------------------------- seeds
    def seed_dataset(
        self,
        pid: str,
        files: Files,
        *,
        files_per_block: int = FILES_PER_BLOCK,
        directories: bool = True,
        chk_alg: str | None = None,
        owner_group: str = "p12345",
        published: bool = False,
        lifecycle: Document | None = None,
    ) -> Document:
        """See ``seeding.seed_dataset``."""
        return seed_dataset(
            self.state,
            pid,
            files,
            files_per_block=files_per_block,
            directories=directories,
            chk_alg=chk_alg,
            owner_group=owner_group,
            published=published,
            lifecycle=lifecycle,
        )

    def seed_job(
        self, kind: str, datasets: Sequence[str] | Mapping[str, Sequence[str]], *, status: str = "jobSubmitted"
    ) -> str:
        """See ``seeding.seed_job``; returns the job's id."""
        return seed_job(self.state, kind, datasets, status=status)

    def delete_dataset(self, pid: str) -> None:
        """Removes the dataset, as somebody else may do at any time; its blocks and jobs stay."""
        del self.state.datasets[pid]

    # ------------------------------------------------------------------------------------------------------- observing
    def lifecycle(self, pid: str) -> Document:
        """A copy of the dataset's lifecycle as it is now."""
        return dict(self.state.datasets[pid]["datasetlifecycle"])

    def datablocks(self, pid: str) -> list[Document]:
        return list(self.state.datablocks.get(pid, {}).values())

    def requests(self, method: str = "", path: str = "") -> list[LoggedRequest]:
        """The requests so far, oldest first, without those to the controls."""
        return [
            request
            for request in list(self.state.log)
            if method.upper() in {"", request.method} and _finds(path, request.path)
        ]

    def history(self, kind: str = "", document_id: str = "") -> list[Change]:
        """The changes so far, oldest first; ``kind``: lifecycle, job or datablock."""
        return [
            change
            for change in list(self.state.history)
            if kind in {"", change.kind} and document_id in {"", change.id}
        ]

    def job_statuses(self, job_id: str) -> list[str]:
        """The status codes of a job from its creation on, one for each change."""
        return [change.after["statusCode"] for change in self.history("job", job_id)]

    def lifecycle_values(self, pid: str, field: str = "archiveStatusMessage") -> list[Any]:
        """What a field of the lifecycle was after each change that a request made."""
        return [change.after[field] for change in self.history("lifecycle", pid)]


def _finds(pattern: str, raw_path: str) -> bool:
    compiled = re.compile(pattern, re.IGNORECASE)
    return bool(compiled.search(raw_path) or compiled.search(unquote(raw_path)))
