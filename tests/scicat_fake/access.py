"""Tokens, and who may do what."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time

import msgspec

from tests.scicat_fake.errors import http_error
from tests.scicat_fake.state import (
    ADMIN,
    CREATE_DATASET,
    CREATE_OWN,
    LIFECYCLE,
    UPDATE_JOB,
    Account,
    Document,
    State,
    new_id,
)

__all__ = [
    "account_of",
    "has",
    "may_change_dataset",
    "may_change_jobs",
    "may_create_blocks",
    "may_patch_lifecycle",
    "may_read_blocks",
    "may_read_dataset",
    "may_read_job",
    "new_token",
]


class _Claims(msgspec.Struct):
    username: str
    exp: float
    epoch: int
    jti: str


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


_HEADER = _encoded(b'{"alg":"HS256","typ":"JWT"}')


def _signature(state: State, text: str) -> str:
    return _encoded(hmac.digest(state.token_key.encode(), text.encode(), hashlib.sha256))


def new_token(state: State, username: str) -> str:
    """A token that ends by itself; it is signed, so that a restarted server still knows it."""
    claims = _Claims(username, time.time() + state.switches.token_lifetime_s, state.token_epoch, new_id())
    text = f"{_HEADER}.{_encoded(msgspec.json.encode(claims))}"
    return f"{text}.{_signature(state, text)}"


def account_of(state: State, authorization: str) -> Account | None:
    """The account behind a header, None for nobody: no token, one that is not ours, or an account that is gone.

    Raises:
        ApiError: 401, the token was good and is expired, and the server is new enough to say so.
    """
    scheme, _, token = authorization.partition(" ")
    text, _, signature = token.strip().rpartition(".")
    if scheme.lower() != "bearer" or not hmac.compare_digest(signature.encode(), _signature(state, text).encode()):
        return None
    payload = text.partition(".")[2]
    claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)), type=_Claims)
    if claims.exp <= time.time() or claims.epoch != state.token_epoch:
        if state.switches.expired_is_anonymous:
            return None
        raise http_error(401, "SESSION_EXPIRED")
    return state.accounts.get(claims.username)


def has(account: Account | None, *rights: str) -> bool:
    """Whether the account has one of the rights."""
    return account is not None and not account.rights.isdisjoint(rights)


def _owns(account: Account | None, document: Document) -> bool:
    return account is not None and document.get("ownerGroup") in account.groups


def _member(account: Account | None, document: Document) -> bool:
    if account is None:
        return False
    return _owns(account, document) or not account.groups.isdisjoint(document.get("accessGroups") or ())


def may_read_dataset(account: Account | None, dataset: Document) -> bool:
    return bool(dataset.get("isPublished")) or has(account, ADMIN, LIFECYCLE) or _member(account, dataset)


def may_read_blocks(account: Account | None, document: Document) -> bool:
    """The right to patch lifecycles shows every dataset, but not its files."""
    return bool(document.get("isPublished")) or has(account, ADMIN) or _member(account, document)


def may_change_dataset(account: Account | None, dataset: Document) -> bool:
    return has(account, ADMIN) or _owns(account, dataset)


def may_patch_lifecycle(account: Account | None, dataset: Document) -> bool:
    return has(account, ADMIN, LIFECYCLE) or _owns(account, dataset)


def may_create_blocks(account: Account | None, dataset: Document) -> bool:
    """Also for creating the dataset itself."""
    return has(account, ADMIN, CREATE_DATASET) or (has(account, CREATE_OWN) and _owns(account, dataset))


def may_read_job(account: Account | None, job: Document) -> bool:
    if account is None:
        return False
    own = job.get("ownerUser") == account.username or job.get("createdBy") == account.username
    return own or has(account, ADMIN, UPDATE_JOB) or _owns(account, job)


def may_change_jobs(account: Account | None) -> bool:
    """Creating jobs for others does not include changing them."""
    return has(account, ADMIN, UPDATE_JOB)
