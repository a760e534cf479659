"""Where images come from. A source lists its images, then hands out their bytes by where they lie.

Every source gives the same key, class and order to the same image, so class folders and the archive of those folders
become the same shards.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WHOLE_FILE = 0
MAX_IMAGE_BYTES = 256 << 20


class Entry(NamedTuple):
    """An image: `size` bytes at `offset` of the file `container`, or the file `name` of the directory `container`.

    `name` is the file's own name, which gives the key. `offset` is what the source's fetcher takes it for, and grows
    from front to back of a container. `size` is 0 where only reading tells. Text from outside that is not UTF-8 is
    decoded with surrogateescape.
    """

    split: str
    class_name: str
    name: str
    container: str
    offset: int
    size: int


class Rejected(NamedTuple):
    """A file that cannot be a sample: `where` says which, in printable characters, and `reason` why."""

    split: str
    where: str
    reason: str


@dataclass(frozen=True)
class PRule:
    """ImageNet-21k-P (Ridnik et al., 2021): classes of at least `min_images`, the first `num_val` by name validate."""

    min_images: int = 501
    num_val: int = 50


class Fetcher(Protocol):
    """Bytes of an entry; OSError (or ValueError) says why they cannot be had. One a process."""

    def __call__(self, container: str, name: str, offset: int, size: int) -> bytes: ...


class Source(Protocol):
    """A frozen dataclass, so that it crosses to other processes."""

    def __hash__(self) -> int: ...

    @property
    def in_order(self) -> bool:
        """Whether bytes can only be had front to back (gzip): entries must be fetched with growing offsets."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes that the source must have, in order of their labels; None: its sorted class names."""
        ...

    @property
    def p_rule(self) -> PRule | None:
        """Where train is everything yet, and is to be cut into train and val."""
        ...

    def scan(self) -> Iterator[Entry | Rejected]:
        """Every image, in any order. UserError for what makes the whole source unusable."""
        ...

    def fetcher(self) -> Fetcher: ...


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def sample_key(class_name: str, name: str) -> str:
    """<class>_<name without suffix>; ImageNet's names (n01440764_10026.JPEG) carry their class already."""
    stem = os.path.splitext(name)[0]
    return stem if stem.startswith(f"{class_name}_") else f"{class_name}_{stem}"
