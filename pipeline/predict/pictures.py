"""The image files that a user means by paths of files and folders."""

import os
from collections.abc import Iterable, Iterator

from shards.errors import UserError
from shards.sources.base import is_image_name
from shards.sources.folders import visible

_MAGIC_BYTES = 12


def find_images(paths: Iterable[str]) -> list[str]:
    """The files themselves, whatever they are called; of folders, and of the folders in them, what is a JPEG, PNG or
    WebP by its suffix or, without one of those, by its first bytes, in sorted order.

    Raises UserError for a folder without images, and for no images at all.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = list(_inside(path))
            if not inside:
                raise UserError(
                    f"{path} holds no images (JPEG, PNG or WebP), nor do the folders in it: give another one"
                )
            found += inside
        else:
            found.append(path)
    if not found:
        raise UserError("there are no images to look at: give files, folders, or - for paths on standard input")
    return found


def _inside(folder: str) -> Iterator[str]:
    """Names that begin with a dot are passed over, and links to folders not followed."""
    entries = sorted(visible(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _inside(entry.path)
        elif is_image_name(entry.name) or _is_image(entry.path):
            yield entry.path


def _is_image(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_MAGIC_BYTES)
    except OSError:
        return False
    is_webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or is_webp
