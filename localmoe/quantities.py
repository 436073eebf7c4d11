"""Quantities for people: bytes, durations, shares, and gains with their intervals."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """`"3.1 MB"`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration_text(seconds: float) -> str:
    """`"250 ms"`, `"2.1 s"`, `"45 s"`, `"12 min"`, `"3.4 h"`, `"2.1 days"`."""
    if seconds < 90:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.{1 if seconds < 10 else 0}f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def percent(share: float, signed: bool = False, digits: int | None = None) -> str:
    """`"1.8 %"`, `"+1.8 %"`; a share below 0.1 % gets a second digit, so that it is not nothing."""
    if digits is None:
        digits = percent_digits(share)
    return f"{share * 100:{'+' if signed else ''}.{digits}f} %"


def interval_text(gain: float, low: float, high: float) -> str:
    """`"+1.8 % [+1.1, +2.4]"`, all with the same number of digits."""
    digits = percent_digits(gain, low, high)
    low_text, high_text = (f"{share * 100:+.{digits}f}" for share in (low, high))
    return f"{percent(gain, signed=True, digits=digits)} [{low_text}, {high_text}]"


def percent_digits(*shares: float) -> int:
    """Digits after the point with which none of these shares, in percent, shows as zero, 1 or 2."""
    return 1 if all(abs(share) >= 5e-4 for share in shares) else 2
