"""Shards of images that can be read in any order: each shard is written on its own, from its place in the shuffle."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.engine import Advance
from shards.images import BadImage
from shards.keyed import Permutation
from shards.sources.base import Rejected
from shards.writing.listing import Listing
from shards.writing.parts import Job, Part, write_part
from shards.writing.sample import Encoded, encode, fetch


def write_shard(task: tuple[Job, int], advance: Advance) -> Part:
    """Writes shard `number` of a job."""
    job, number = task
    return write_part(job, number, _samples(job, number, advance))


def _samples(job: Job, number: int, advance: Advance) -> Iterator[Encoded | Rejected]:
    listing = _listing(job.work, job.listing_sha256)
    for position in Permutation(job.num_images, job.seed)(np.arange(*job.bounds(number))).tolist():
        image = listing[position]
        class_name = listing.classes[image.label]
        try:
            data = fetch(job.source, image)
            yield encode(image, class_name, data, job.images)
            advance(1, len(data))
        except BadImage as error:
            yield Rejected(job.split, ascii(f"{class_name}/{image.name}"), str(error))
            advance(1, 0)


@lru_cache(maxsize=2)
def _listing(work: Path, sha256: str) -> Listing:
    """One a process; the hash tells a listing from one that lay there before."""
    return Listing(work)
