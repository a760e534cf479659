"""Files beside the shards that other readers ask for: timm's `_info.json`, open_clip's `sizes.json`, and Energon's.

Energon (megatron-energon 7.4) reads a directory that has `.nv-meta/{dataset.yaml, split.yaml, .info.json}` and, beside
every `x.tar`, a `x.tar.idx`: little-endian 64-bit integers, where each sample begins and where the last one ends. Its
`index.sqlite` is for random access by key alone; `energon prepare` adds it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.durable import atomic_file, explained
from shards.index import Index, Split
from shards.tars import ustar
from shards.tars.in_place import IN_PLACE

_ENERGON = ".nv-meta"
_ENERGON_DATASET = b"""\
sample_type:
  __module__: megatron.energon
  __class__: ImageClassificationSample
field_map:
  image: jpg,png,webp
  label: cls
  label_name: json[wnid]
"""


def write_sidecars(index: Index) -> None:
    """Writes the sidecars of all splits of an index; those that are right already are left alone.

    Energon's are for splits that make_shards wrote: where a sample of another's tar begins, the index does not say.
    UserError where the system cannot write them.
    """
    _write(index.root / "_info.json", _json({"splits": {split.name: _timm_split(split) for split in index.splits}}))
    _write(index.root / "sizes.json", _json(_shard_counts(index.splits)))
    own = [split for split in index.splits if IN_PLACE not in split.made_from]
    if own:
        _write_energon(index, own)


def _timm_split(split: Split) -> dict[str, Any]:
    return {
        "name": split.name,
        "num_samples": split.num_samples,
        "filenames": [shard.name for shard in split.shards],
        "shard_lengths": [shard.num_samples for shard in split.shards],
    }


def _shard_counts(splits: Sequence[Split]) -> dict[str, int]:
    return {shard.name: shard.num_samples for split in splits for shard in split.shards}


def _write_energon(index: Index, splits: Sequence[Split]) -> None:
    for split in splits:
        for name, data in _energon_indices(index, split):
            _write(index.root / name, data)
    directory = index.root / _ENERGON
    with explained(directory):
        directory.mkdir(exist_ok=True)
    _write(directory / ".info.json", _json({"shard_counts": _shard_counts(splits)}))
    # JSON is YAML.
    shards = {split.name: [shard.name for shard in split.shards] for split in splits}
    _write(directory / "split.yaml", _json({"split_parts": shards, "exclude": []}))
    if not (directory / "dataset.yaml").exists():  # its user may have changed it
        _write(directory / "dataset.yaml", _ENERGON_DATASET)


def _energon_indices(index: Index, split: Split) -> Iterator[tuple[str, bytes]]:
    """Name and content of each shard's `.tar.idx`."""
    offsets, start = index.offsets(split.name)["offset"], 0
    for shard in split.shards:
        images = offsets[start : start + shard.num_samples]
        start += shard.num_samples
        end = shard.num_bytes - len(ustar.END)
        # The image is a sample's first member, after its header.
        yield f"{shard.name}.idx", np.append(images - ustar.BLOCK, end).astype("<u8").tobytes()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    with explained(path):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with atomic_file(path) as file:
        file.write(data)
