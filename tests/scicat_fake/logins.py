"""Login, identity and health."""

from __future__ import annotations

import hashlib

from tests.scicat_fake.access import new_token
from tests.scicat_fake.calls import Call, Reply, Route
from tests.scicat_fake.errors import http_error
from tests.scicat_fake.state import Account, Document, now

__all__ = ["ROUTES"]


def _user_id(account: Account) -> str:
    return hashlib.sha256(account.username.encode()).hexdigest()[:24]


def _user(account: Account) -> Document:
    return {
        "_id": _user_id(account),
        "id": _user_id(account),
        "username": account.username,
        "email": account.email,
        "authStrategy": "local",
    }


def _login(call: Call) -> Reply:
    body = call.body if isinstance(call.body, dict) else {}
    account = call.state.accounts.get(str(body.get("username")))
    if account is None or account.password != body.get("password"):
        raise http_error(401, "Unauthorized")
    token = new_token(call.state, account.username)
    lifetime = call.state.switches.token_lifetime_s
    seconds = int(lifetime) if lifetime == int(lifetime) else lifetime
    return Reply(
        {
            "access_token": token,
            "id": token,
            "expires_in": seconds,
            "ttl": seconds,
            "created": now(),
            "userId": _user_id(account),
            "user": _user(account),
        },
        201,
    )


def _dead_login(_: Call) -> Reply:
    return Reply(status=201)


def _identity(call: Call) -> Reply:
    account = call.known
    groups = sorted({*account.groups, *account.rights})
    return Reply(
        {
            "_id": _user_id(account),
            "authStrategy": "local",
            "profile": {
                "username": account.username,
                "displayName": account.username,
                "email": account.email,
                "accessGroups": groups,
            },
            "userId": _user_id(account),
        }
    )


def _health(_: Call) -> Reply:
    mongodb = {"mongodb": {"status": "up"}}
    return Reply({"status": "ok", "info": mongodb, "error": {}, "details": mongodb})


ROUTES = (
    Route("POST", "auth/login", _login, ("v3",), public=True),
    Route("POST", "auth/ldap", _login, ("v3",), public=True),
    Route("POST", "users/login", _dead_login, ("v3",), public=True),
    Route("GET", "users/my/identity", _identity, ("v3",)),
    Route("GET", "health", _health, ("v3",), public=True),
)
