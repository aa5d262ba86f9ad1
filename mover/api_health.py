"""One question to a daemon behind a reverse proxy; servers' certificates are looked at as for every other request."""

from __future__ import annotations

import httpx

__all__ = ["get_text"]


def get_text(url: str, *, accept: str, timeout_s: float) -> tuple[int, str]:
    """Status and body of a GET; redirects are not followed. Blocking.

    Raises:
        ConnectionError: no answer, or a certificate that is not trusted.
    """
    try:
        reply = httpx.get(url, headers={"Accept": accept}, timeout=timeout_s, follow_redirects=False)
    except httpx.HTTPError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error
    return reply.status_code, reply.text
