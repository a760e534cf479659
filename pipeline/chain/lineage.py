"""Where weights come from: the stages of a chain, back to the hashes of the shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.chain.records import PROVENANCE, read_provenance, sha256_of
from shards.errors import UserError
from shards.index import Index


def find(path: Path) -> dict[str, Any]:
    """The provenance of a stage, by its directory or a file below it. Raises UserError where none was kept."""
    for directory in (path, *path.absolute().parents):
        if found := read_provenance(directory):
            return found
    raise UserError(
        f"{path} has no {PROVENANCE} above it: only stages of a chain keep one; give such a directory, or a file in it"
    )


def lines(found: Mapping[str, Any], with_shards: bool = False) -> Iterator[str]:
    """A stage, what it left and what it was made of; then the stage that it started from, and so on."""
    while found:
        unfinished = "" if "outputs" in found else ", unfinished"
        yield f"{found.get('stage', 'unfinished')}: {found.get('directory', '')} (code {found['commit']}){unfinished}"
        for name, entry in found.get("outputs", {}).items():
            yield f"  left {name}: {entry['size']:,} bytes, sha256 {entry['sha256']}"
        for name, split in found.get("splits", {}).items():
            shards = f"{len(split['shards'])} shards, {split['num_samples']:,} samples"
            yield f"  made of {found['data']}, split {name}: {shards}, fingerprint {split['fingerprint']}"
            if with_shards:
                yield from (f"    {shard}: sha256 {value}" for shard, value in split["shards"].items())
        start = found.get("start", {})
        if start:
            yield f"  started from {start['file']}, sha256 {_handed(found)}"
        found = start.get("made_by", {})


def check(found: Mapping[str, Any]) -> Iterator[str]:
    """What is not, or no longer, as it was noted: files, hand-overs and data that can still be read are compared."""
    while found:
        directory = Path(found.get("directory", ""))
        for name, entry in found.get("outputs", {}).items():
            path = directory / name
            if path.is_file() and (now := sha256_of(path)) != entry["sha256"]:
                yield f"{path}: sha256 was {entry['sha256']}, is {now}"
        yield from _check_data(found)
        earlier = found.get("start", {}).get("made_by", {})
        hashes = {entry["sha256"] for entry in earlier.get("outputs", {}).values()}
        if hashes and _handed(found) not in hashes:
            yield f"{directory}: it started from weights that {earlier['stage']} did not leave: sha256 {_handed(found)}"
        found = earlier


def _check_data(found: Mapping[str, Any]) -> Iterator[str]:
    if not Path(found.get("data", "")).is_dir() or "splits" not in found:
        return
    index = Index.read(found["data"])
    for name, split in found["splits"].items():
        if (now := index.fingerprint(name)) != split["fingerprint"]:
            yield f"{found['data']}, split {name}: its fingerprint was {split['fingerprint']}, is {now}"


def _handed(found: Mapping[str, Any]) -> object:
    return next((value for name, value in found["inputs"].items() if name.startswith("weights of ")), None)
