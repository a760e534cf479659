"""Numbers as people read them."""

from datetime import UTC, datetime


def duration(seconds: float) -> str:
    """In the two largest units: 2 d 3 h."""
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, seconds = divmod(max(0, int(seconds)), size)
        parts.append((number, unit))
    first = next((place for place, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def clock(seconds: float) -> str:
    """A time in seconds since 1970."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"


def large(number: float) -> str:
    """12,345, and with a letter from a million on: 1.28 M, 3.6 P."""
    if abs(number) < 1e6:
        return f"{number:,.0f}"
    for letter, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}" if abs(number) < 1000 * size else f"{number / size:,.0f} {letter}"
    raise AssertionError(number)
