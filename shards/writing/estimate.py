"""What writing a split will cost, from a few of its images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import UserError
from shards.images import BadImage, ImageOptions
from shards.keyed import Permutation
from shards.sources.base import Source
from shards.writing.listing import Image, Listing
from shards.writing.sample import encode

_IMAGES = 64


@dataclass(frozen=True)
class Estimate:
    """Of a sample in its tar: bytes, and seconds of one process to read and encode it."""

    num_bytes: float
    seconds: float


def estimates(source: Source, listings: Sequence[Listing], seed: int, options: ImageOptions) -> list[Estimate]:
    """That of each listing. A source that is read in order gets one for all, of what lies foremost in it: images that
    lie deep in an archive would cost another pass over it."""
    if not source.in_order:
        return [estimate(source, listing, seed, options) for listing in listings]
    foremost = min(listings, key=lambda listing: int(listing.rows["offset"].min()))
    return [estimate(source, foremost, seed, options)] * len(listings)


def estimate(source: Source, listing: Listing, seed: int, options: ImageOptions) -> Estimate:
    """Encodes 64 images, drawn by `seed`, or the first ones where the source is read in order.

    UserError where none of them can be read.
    """
    fetch = source.fetcher()
    start = time.perf_counter()
    sizes, reasons = [], []
    for image in _some_images(source, listing, seed):
        try:
            data = fetch(image.container, image.name, image.offset, image.size)
            sizes.append(len(encode(image, listing.classes[image.label], data, options).members))
        except (BadImage, OSError, ValueError, EOFError) as error:
            reasons.append(f"{image.name!a}: {error}")
    if not sizes:
        raise UserError(f"none of the first {len(reasons)} images that were tried can be used; {reasons[0]}")
    return Estimate(float(np.mean(sizes)), (time.perf_counter() - start) / len(sizes))


def _some_images(source: Source, listing: Listing, seed: int) -> list[Image]:
    num = min(_IMAGES, len(listing))
    if source.in_order:
        rows = np.lexsort((listing.rows["offset"], listing.rows["container"]))[:num]
    else:
        rows = Permutation(len(listing), seed, "estimate")(np.arange(num))
    return [listing[row] for row in rows.tolist()]
