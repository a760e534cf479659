"""What compiling at run time needs."""

import shutil
import sysconfig
from pathlib import Path

from shards.errors import UserError


def check_toolchain(who: str, tools: tuple[str, ...]) -> None:
    """Raises UserError where `who` would find no compiler, or no headers of Python, in the middle of its work."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [tool for tool in tools if shutil.which(tool) is None]
    missing += [] if header.exists() else [str(header)]
    if missing:
        raise UserError(
            f"{who} compiles a kernel at first use, but {', '.join(missing)} is missing: install g++, the Python "
            "headers (Debian: g++ python3-dev) and ninja (pip install ninja), and put ninja on PATH"
        )
