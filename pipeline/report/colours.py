"""A colour a run."""

RUNS = ("#3b82f6", "#f97316", "#10b981", "#e0529c", "#a16ee8", "#c59a1b", "#14a3b8", "#ef4444")
"""Apart from each other, and from both a white and a black ground."""


def colour_of(run: int) -> str:
    """They come again after the last one."""
    return RUNS[run % len(RUNS)]
