"""attempts.jsonl: a JSON object for every time that a run was started.

`started` (seconds since 1970), `step` (that it went on from), `commit`, `versions`, `host` and `hardware` (rank 0's),
`world` (number of ranks), `strategy`, `index`: {"path", "fingerprint" (of the training split), "val_fingerprint"}.
"""

import json
import os
import platform
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipeline.record.json_files import read_lines
from pipeline.record.run_dir import code_version
from shards.durable import replace_text

ATTEMPTS = "attempts.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy", "pillow", "safetensors")


@dataclass(frozen=True)
class Setting:
    """What an attempt runs on."""

    hardware: str = ""
    world: int = 1
    strategy: str = ""
    index: dict[str, str] = field(default_factory=dict)


def begin_attempt(run_dir: Path, step: int, setting: Setting) -> float:
    """Notes that the run goes on from `step` now, on the disk; when it was first started."""
    path = run_dir / ATTEMPTS
    told = {"commit": code_version(), "versions": versions(), "host": socket.gethostname(), **asdict(setting)}
    lines = [*read_lines(path), {"started": time.time(), "step": step, **told}]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines[0]["started"]


def versions() -> dict[str, str]:
    """Of Python, of CUDA where torch was built for it, and of the packages among PACKAGES that are installed."""
    found = {"python": platform.python_version()} | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware(device: torch.device) -> str:
    """What one rank computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {name}"
