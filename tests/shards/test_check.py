"""A check finds every way in which shards can differ from their index, and nothing in shards that do not."""

import json
import os
import tarfile

import numpy as np
import pytest

from shards import ustar
from shards.check import CheckOptions, check_directory
from shards.check_shard import MAX_LISTED
from shards.duplicates import ROW, Spill
from shards.engine import open_engine
from shards.errors import UserError
from shards.findings import ACROSS, IN_OTHER, OTHER_CLASS, WITHIN
from shards.foreign import ForeignOptions, index_in_place
from shards.index import OFFSETS_DTYPE, Index

SHARD = "train-000001.tar"


def check(root, workers=1, **options):
    with open_engine("local", workers) as engine:
        return check_directory(root, CheckOptions(**options), engine)


def only(report):
    """The one finding of a report."""
    (finding,) = report.findings
    assert report.counts == {finding.check: 1}
    return finding


def members(path):
    with tarfile.open(path) as tar:
        return [(item.name, tar.extractfile(item).read()) for item in tar]


def rewrite(index, change, shard=SHARD):
    """Changes the members of a shard, and gives the index its size, its hash and the offsets of its images."""
    path, split = index.root / shard, index.split("train")
    number = [item.name for item in split.shards].index(shard)
    rows = np.split(index.offsets("train"), np.cumsum([item.num_samples for item in split.shards])[:-1])
    labels = dict(zip((name for name, _ in members(path)[::3]), rows[number]["label"].tolist(), strict=True))
    content, found = b"", []
    for name, data in change(members(path)):
        if name.endswith((".jpg", ".png", ".webp")):
            found.append((len(content) + ustar.BLOCK, len(data), labels.get(name, 0)))
        content += ustar.member(name, data)
    replace(index, shard, content + ustar.END)
    rows[number] = np.array(found, OFFSETS_DTYPE)
    set_offsets(index, np.concatenate(rows), {shard: len(found)})


def replace(index, shard, content):
    """New content for a shard, and its size and hash for the index."""
    (index.root / shard).write_bytes(content)
    entry = {"num_bytes": len(content), "sha256": sha256(content)}
    edit(index, lambda manifest: shards_of(manifest)[shard].update(entry))


def set_offsets(index, rows, counts):
    np.save(index.root / "train.offsets.npy", rows)

    def change(manifest):
        manifest["splits"]["train"]["offsets_sha256"] = sha256((index.root / "train.offsets.npy").read_bytes())
        for shard, count in counts.items():
            shards_of(manifest)[shard]["num_samples"] = count

    edit(index, change)
