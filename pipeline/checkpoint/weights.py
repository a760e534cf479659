"""The weights of a checkpoint alone, for other uses than to go on: nothing in it that could run code is opened."""

import pathlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from pipeline.checkpoint.directory import read_state
from pipeline.checkpoint.whole import difference, read_manifest
from shards.errors import UserError

READABLE = ("ddp", "fsdp")
_HARMLESS = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
        pathlib.PosixPath,
    )
}


def read_weights(path: Path) -> dict[str, dict[str, Tensor]]:
    """{"model": the whole weights by name, "ema": the same with what is trained averaged; {} for none} of a committed
    checkpoint.

    Raises UserError where it is not whole, or of DeepSpeed.
    """
    _check_whole(path)
    strategy = read_state(path)["strategy"]
    if strategy not in READABLE:
        raise UserError(
            f"{path} was saved by {strategy}, whose files are pickles, which may run code when opened: give the run's "
            "directory, or a file of its weights/, instead"
        )
    weights = _read(path / "engine", "model.")
    averages = _read(path / "ema", "") if (path / "ema").exists() else {}
    averaged = {name: tensor.view_as(weights[name]) for name, tensor in averages.items()}
    return {"model": weights, "ema": weights | averaged if averaged else {}}


def _check_whole(path: Path) -> None:
    manifest = read_manifest(path)
    found = [manifest] if isinstance(manifest, str) else [difference(path, name, manifest[name]) for name in manifest]
    if reasons := [text for text in found if text]:
        raise UserError(f"{path} is no checkpoint that is whole ({reasons[0]}): give another one of the run")


def _read(directory: Path, prefix: str) -> dict[str, Tensor]:
    """What is called `prefix` and a name, by that name."""
    reader = _Reader(directory)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # there is one process, and that is right
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _Reader(dcp.FileSystemReader):
    """torch unpickles the table of contents; this one makes only what such a table is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: {error}: this is no checkpoint of a run, do not trust it") from error
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of contents")
