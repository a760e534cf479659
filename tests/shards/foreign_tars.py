"""WebDataset tars as others write them: by the tar of Python's library, with whatever members a test wants."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(seed, field="jpg"):
    """The bytes of a small image of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, _FORMATS[field])
    return buffer.getvalue()


def sample(key, label, field="jpg", /, **meta):
    """Members of a labelled sample, (name, bytes) each; `meta` is its json."""
    members = [(f"{key}.{field}", picture(label, field)), (f"{key}.cls", str(label).encode())]
    return [*members, (f"{key}.json", json.dumps(meta).encode())] if meta else members


def write_tar(path, *samples, tar_format=tarfile.GNU_FORMAT):
    """A tar of members, which are (name, bytes), or whole TarInfos."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format, encoding="utf-8", errors="surrogateescape") as tar:
        for member in (member for members in samples for member in members):
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return Path(path)


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info
