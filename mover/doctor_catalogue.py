"""The preflight's look at the catalogue: whether it answers, takes the account, and lets it do what the mover does."""

from __future__ import annotations

from collections.abc import Sequence

from mover.doctor import Check, Finding, fine, skip, warn
from mover.scicat import SciCat, SciCatAccess

__all__ = ["catalogue_checks"]

_LOGIN_ADVICE = (
    "look at SCICAT_ENDPOINT, SCICAT_API_PREFIX, SCICAT_USER and SCICAT_PASSWORD; proxies must leave %2F in paths alone"
)
_GROUPS_ADVICE = (
    "give the account the groups of the server's ADMIN_GROUPS (or UPDATE_DATASET_LIFECYCLE_GROUPS,"
    " UPDATE_JOB_PRIVILEGED_GROUPS and CREATE_DATASET_PRIVILEGED_GROUPS) and of DELETE_GROUPS, to take datablocks back"
)


def catalogue_checks(access: SciCatAccess | None) -> Sequence[Check]:
    """The checks of one catalogue; None: none is configured."""

    async def look() -> Finding:
        if access is None:
            return skip("SCICAT_ENDPOINT is not set")
        async with SciCat.open(access) as catalogue:
            found = await catalogue.check()
        who = f"{found.username} ({', '.join(found.groups) or 'no group'})"
        measured = f"{access.endpoint_url} {found.health}, as {who}, jobs {found.jobs_api}"
        return fine(measured) if found.groups else warn(measured, _GROUPS_ADVICE)

    return [Check("catalogue", "login and jobs", look, _LOGIN_ADVICE, deadline_s=90.0)]
