"""An image and what is known of it, as the members of a WebDataset sample."""

import json
from dataclasses import dataclass
from functools import lru_cache

from shards.images import BadImage, ImageOptions, prepare
from shards.sources.base import Fetcher, Source, sample_key
from shards.tars import ustar
from shards.writing.listing import Image


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample's members, the image first; `image_bytes` is the size of the image in them."""

    label: int
    image_bytes: int
    members: bytes
    changes: str


def encode(image: Image, class_name: str, data: bytes, options: ImageOptions) -> Encoded:
    """BadImage says why the bytes are no sample."""
    prepared = prepare(data, image.name, options)
    key = sample_key(class_name, image.name)
    meta = {  # sorted
        "changes": prepared.changes,
        "filename": image.name,
        "height": prepared.height,
        "width": prepared.width,
        "wnid": class_name,
    }
    members = (
        # The image first: its offset and its header give the reader the bytes and the key. It is copied only once.
        *ustar.parts(f"{key}.{prepared.field}", prepared.data),
        ustar.member(f"{key}.cls", b"%d" % image.label),
        ustar.member(f"{key}.json", json.dumps(meta).encode()),
    )
    return Encoded(image.label, len(prepared.data), b"".join(members), prepared.changes)


def fetch(source: Source, image: Image) -> bytes:
    """The image's bytes; BadImage where they cannot be had."""
    try:
        return fetcher_of(source)(image.container, image.name, image.offset, image.size)
    except (OSError, ValueError, EOFError) as error:
        raise BadImage(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error


@lru_cache(maxsize=1)
def fetcher_of(source: Source) -> Fetcher:
    """One a process: it holds files open."""
    return source.fetcher()
