"""Numbers and names as people read them."""

from __future__ import annotations

import re

__all__ = ["bytes_text", "masked", "rate_text", "seconds_text", "shown_name"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_QUERY = re.compile(r"(https?://[^\s?\"']*)\?[^\s\"']+")


def bytes_text(size_bytes: float) -> str:
    """A size with its binary unit: ``1.5 MiB``."""
    amount, unit = float(size_bytes), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.0f} {_UNITS[unit]}" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"


def rate_text(size_bytes: float, seconds: float) -> str:
    """Megabytes (10^6) per second; ``-`` where that says nothing."""
    return f"{size_bytes / seconds / 1e6:,.1f} MB/s" if seconds > 0 and size_bytes > 0 else "-"


def seconds_text(seconds: float) -> str:
    """A span of time: ``0.42 s``, ``12 s``, ``3:05 min``, ``2:10 h``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60:,}:{minutes % 60:02} h"


def shown_name(name: str) -> str:
    """A name on one line: what does not print, line ends and terminal controls above all, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def masked(text: str, secrets: tuple[str, ...] = ()) -> str:
    """``text`` without queries of links, which are signatures, and without any of ``secrets``."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _QUERY.sub(r"\1?***", text)
