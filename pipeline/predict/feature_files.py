"""Features of many images in one file.

Shapes: N images, D width.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as as_safetensors
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.predict.answers import pooled
from pipeline.predict.checkpoint import Checkpoint
from shards.durable import atomic_file
from shards.errors import UserError

SUFFIXES = (".npz", ".safetensors")


def check_output(path: Path) -> None:
    """Raises UserError unless features can be written to `path`, before any work."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--features {path}: features are written as .npz or .safetensors; give a name that ends so")
    if not path.parent.is_dir():
        raise UserError(f"--features {path}: there is no directory {path.parent}; make it, or give another one")


def write_features(asked: Checkpoint, batches: Iterable[Batch], paths: Sequence[str], file: Path) -> dict[str, Tensor]:
    """Writes float32 [N, D] of every head under its name, and which of the paths the N rows are of, for images that
    cannot be read have none: in .npz as the array "images", in .safetensors as JSON in the metadata. Gives the heads.

    Raises UserError where no image could be read.
    """
    parts: list[dict[str, Tensor]] = []
    rows: list[str] = []
    for batch in batches:
        bad = {replaced.error.sample for replaced in batch.bad}
        good = [place for place, sample in enumerate(batch.ids.tolist()) if sample not in bad]
        rows += [paths[sample] for sample in batch.ids[good].tolist()]
        parts.append({name: found[good].float().cpu() for name, found in pooled(asked, batch.images).items()})
    if not rows:
        raise UserError(f"--features {file}: none of the {len(paths)} images could be read; nothing was written")
    heads = {name: torch.cat([part.pop(name) for part in parts]) for name in [*parts[0]]}  # of one head twice at a time
    with atomic_file(file) as written:
        written.write(_encoded(file.suffix, heads, rows))
    return heads


def _encoded(suffix: str, heads: dict[str, Tensor], rows: list[str]) -> bytes:
    if suffix == ".safetensors":
        return as_safetensors(heads, {"images": json.dumps(rows)})
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: found.numpy() for name, found in heads.items()}
    np.savez(buffer, images=np.array(rows), **arrays)
    return buffer.getvalue()
