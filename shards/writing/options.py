"""How a split is written. Text of the command line is parsed and refused here, before any work starts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from shards.budget import Budget, share
from shards.errors import UserError
from shards.images import ImageOptions

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class ShardSize:
    """About how large a shard is: so many images, or so many bytes where a unit is given."""

    amount: int
    in_bytes: bool

    @classmethod
    def parse(cls, text: str) -> "ShardSize":
        """`5000` images, or `500MB`; UserError for anything else."""
        match = re.fullmatch(r"(\d+)([A-Za-z]*)", text)
        if not match or match[2] not in _UNITS or int(match[1]) < 1:
            raise UserError(f"a shard size of {text!r}: give images, as in 5000, or bytes, as in 500MB or 1GiB")
        return cls(int(match[1]) * _UNITS[match[2]], bool(match[2]))

    def num_shards(self, num_images: int, bytes_an_image: float) -> int:
        """The fewest shards, at least one, that are not larger on average."""
        total = num_images * bytes_an_image if self.in_bytes else num_images
        return min(num_images, max(1, -int(-total // self.amount)))


@dataclass(frozen=True)
class WriteOptions:
    """`seed` orders the samples over the shards. `splits`: those to be written; none: all that the source has.

    `minival`: the share of train, as in `1%`, that becomes the split minival; "" for none. `in_order` reads the source
    once from front to back, through a spool a shard, where random reads are slow; the shards are the same.
    """

    splits: tuple[str, ...] = ()
    shard_size: str = "5000"
    seed: int = 0
    minival: str = ""
    max_bad: str = "0.01%"
    in_order: bool = False
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        for split in self.splits:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
                raise UserError(f"{split!r} cannot name a split: use letters, digits, '_' and '-', as in train")
        ShardSize.parse(self.shard_size)
        Budget(self.max_bad)
        if self.minival and not 0 < share(self.minival, "a minival") <= 0.5:
            raise UserError(f"a minival of {self.minival!r}: give more than 0% and 50% at most, as in 1%")

    def that_decide_bytes(self) -> Mapping[str, str | int]:
        """The options that the written bytes depend on, as text for people."""
        images = {item.name.replace("_", " "): str(getattr(self.images, item.name)) for item in fields(self.images)}
        return {"shard size": self.shard_size, "seed": self.seed, "minival": self.minival, **images}
