"""Where weights come from: the stages of a chain, back to the hashes of the shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.chain.records import PROVENANCE, read_provenance, sha256_of
from shards.errors import UserError
from shards.index import Index


def find(path: Path) -> dict[str, Any]:
    """The provenance of a stage, by its directory, wherever that is now, or a file below it. Raises UserError where
    there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give the directory of a chain's stage, or a file in it")
    for directory in (path.absolute(), *path.absolute().parents):
        if found := read_provenance(directory):
            return found | {"directory": str(directory)}
    raise UserError(
        f"{path} has no {PROVENANCE} above it: only stages of a chain keep one; give such a directory, or a file in it"
    )


def lines(last: Mapping[str, Any], with_shards: bool = False) -> Iterator[str]:
    """A stage, what it left and what it was made of; then the stage that it started from, and so on."""
    for found in _back(last):
        unfinished = "" if "outputs" in found else ", unfinished"
        yield f"{found.get('stage', 'unfinished')}: {found.get('directory', '')} (code {found['commit']}){unfinished}"
        for name, entry in found.get("outputs", {}).items():
            yield f"  left {name}: {entry['size']:,} bytes, sha256 {entry['sha256']}"
        for name, split in found.get("splits", {}).items():
            shards = f"{len(split['shards'])} shards, {split['num_samples']:,} samples"
            yield f"  made of {found['data']}, split {name}: {shards}, fingerprint {split['fingerprint']}"
            if with_shards:
                yield from (f"    {shard}: sha256 {value}" for shard, value in split["shards"].items())
        if start := found.get("start", {}):
            yield f"  started from {start['file']}, sha256 {_handed(found)}"


def check(last: Mapping[str, Any]) -> Iterator[str]:
    """What is not, or no longer, as it was noted: files, hand-overs and data that can still be read are compared."""
    for found in _back(last):
        for path, noted in _outputs(found):
            if path.is_file() and (now := sha256_of(path)) != noted:
                yield f"{path}: sha256 was {noted}, is {now}"
        if _has_data(found):
            yield from _check_data(found)
        earlier = _earlier(found)
        hashes = {noted for _, noted in _outputs(earlier)}
        if hashes and _handed(found) not in hashes:
            where, left = found.get("directory", ""), earlier["stage"]
            yield f"{where}: it started from weights that {left} did not leave: sha256 {_handed(found)}"


def missing(last: Mapping[str, Any]) -> Iterator[str]:
    """What `check` cannot compare: it is not there any more, or at a URL."""
    for found in _back(last):
        yield from (str(path) for path, _ in _outputs(found) if not path.is_file())
        if "splits" in found and not _has_data(found):
            yield f"{found['data']}, splits {', '.join(found['splits'])}"


def _back(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The stage, and those that it comes from."""
    while found:
        yield found
        found = _earlier(found)


def _earlier(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return found.get("start", {}).get("made_by", {})


def _outputs(found: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Files that the stage left, with their hashes."""
    directory = Path(found.get("directory", ""))
    yield from ((directory / name, entry["sha256"]) for name, entry in found.get("outputs", {}).items())


def _has_data(found: Mapping[str, Any]) -> bool:
    return "splits" in found and Path(found["data"]).is_dir()


def _check_data(found: Mapping[str, Any]) -> Iterator[str]:
    for name, split in found["splits"].items():
        try:
            now = Index.read(found["data"]).fingerprint(name)
        except UserError as error:
            yield f"{found['data']}, split {name}: its fingerprint was {split['fingerprint']}, but {error}"
            continue
        if now != split["fingerprint"]:
            yield f"{found['data']}, split {name}: its fingerprint was {split['fingerprint']}, is {now}"


def _handed(found: Mapping[str, Any]) -> object:
    return next((value for name, value in found["inputs"].items() if name.startswith("weights of ")), None)
