"""How well colours are told apart, as WCAG 2 has it: text needs a contrast of 4.5."""

from __future__ import annotations

__all__ = ["contrast", "luminance"]


def luminance(red: int, green: int, blue: int) -> float:
    """Of a colour with parts from 0 to 255."""
    parts = [part / 255 for part in (red, green, blue)]
    r, g, b = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: float, other: float) -> float:
    """Of two luminances."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
