"""The controls over HTTP, below ``/fake/``, for tests and operators in other processes. They need no token.

GET, PATCH  /fake/switches           the switches; PATCH changes the given ones
GET         /fake/faults             the faults and how often each was met
POST        /fake/faults             adds one, answers it with its id
DELETE      /fake/faults[/{id}]      ends one, or all
POST        /fake/expire-tokens
PUT         /fake/accounts/{name}    {"password", "rights", "groups"}, each optional
POST        /fake/datasets           {"pid", "files": {path: bytes}} and the options of ``seed_dataset``
POST        /fake/jobs               {"kind", "datasets": [pid] or {pid: [path]}, "status"}; answers {"id"}
GET         /fake/log                ?method=&path=   the requests
GET         /fake/history            ?kind=&id=       the changes
POST        /fake/reset              forgets everything
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import msgspec

from tests.scicat_fake.calls import Reply
from tests.scicat_fake.control import Control, Holder
from tests.scicat_fake.state import Fault, Switches

__all__ = ["answer"]


def answer(holder: Holder, method: str, path: str, query: str, body: bytes) -> Reply:
    """Does what a request to the controls asks; what it does not understand is a 400 that says why."""
    control = Control(holder)
    what, _, name = path.removeprefix("/fake/").partition("/")
    values = {key: texts[0] for key, texts in parse_qs(query).items()}
    try:
        sent: Any = msgspec.json.decode(body) if body else {}
        if method == "GET":
            return Reply(_shown(control, what, values))
        return _done(control, f"{method} {what}", name, sent)
    except (TypeError, ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
        return Reply({"message": f"{type(error).__name__}: {error}"}, 400)


def _shown(control: Control, what: str, values: dict[str, str]) -> object:
    if what == "switches":
        return control.switches
    if what == "faults":
        return control.state.faults
    if what == "log":
        return control.requests(values.get("method", ""), values.get("path", ""))
    if what == "history":
        return control.history(values.get("kind", ""), values.get("id", ""))
    raise ValueError(what)


def _done(control: Control, what: str, name: str, sent: Any) -> Reply:  # noqa: ANN401 - any JSON
    match what:
        case "PATCH switches":
            current = msgspec.to_builtins(control.switches)
            control.state.switches = msgspec.convert({**current, **sent}, Switches)
            return Reply(control.switches)
        case "POST faults":
            return Reply(control.add(msgspec.convert(sent, Fault)), 201)
        case "DELETE faults":
            control.state.faults[:] = [fault for fault in control.state.faults if name and fault.id != name]
        case "POST expire-tokens":
            control.expire_tokens()
        case "PUT accounts":
            control.account(name, **sent)
        case "POST datasets":
            return Reply({"pid": control.seed_dataset(sent.pop("pid"), sent.pop("files"), **sent)["pid"]}, 201)
        case "POST jobs":
            return Reply({"id": control.seed_job(sent.pop("kind"), sent.pop("datasets"), **sent)}, 201)
        case "POST reset":
            control.reset()
        case _:
            raise ValueError(what)
    return Reply({})
