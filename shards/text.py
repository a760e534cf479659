"""Text from outside, for people to read."""


def one_line(text: str) -> str:
    """Without line breaks and control characters, which a terminal would heed."""
    return text if text.isprintable() else ascii(text)[1:-1]
