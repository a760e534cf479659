"""What compiling at run time needs."""

import contextlib
import fcntl
import functools
import os
import shutil
import socket
import struct
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from shards.errors import UserError

LONGEST_BUILD = 300.0  # seconds; the two kernels take 23 and 40 s here
LONGEST_LINK = 60.0  # seconds; of one of inductor's small libraries, about one
SHORT, POLL = 2.0, 0.1


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


def mend_compile_cache() -> None:
    """Removes the libraries in inductor's cache that a killed compilation cut short: torch takes whatever is there for
    whole, and every later run would fail at it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    remove_cut_libraries(Path(cache_dir()))


def remove_cut_libraries(directory: Path) -> None:
    """Of those below `directory`; a young one may be under way in another process, and stays."""
    for path in directory.rglob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another rank was quicker
            if _age(path) > LONGEST_LINK and not _is_whole(path):
                _say(f"{path} was cut short by a compilation that was killed: removed")
                path.unlink()


def _is_whole(library: Path) -> bool:
    """Whether the section headers of a 64-bit ELF file, which come last, lie within it."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return False
    (start,), (size, number) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return header[:4] != b"\x7fELF" or 0 < start <= library.stat().st_size - size * number


@functools.cache
def build_kernel(name: str) -> None:
    """Builds and loads a kernel of DeepSpeed's, once, by the name of its builder, before DeepSpeed does: where a build
    that was killed left its lock, it would wait for ever. What this machine cannot build is left to DeepSpeed."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension  # warns of a missing CUDA as it is imported

    builder = get_accelerator().create_op_builder(name)
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        with building_alone(Path(cpp_extension._get_build_directory(builder.name, verbose=False))):
            builder.load(verbose=False)


@contextmanager
def building_alone(directory: Path) -> Iterator[None]:
    """One process of ours at a time builds in `directory`, by an OS lock, which dies with its process; first it removes
    torch's own lock, the mere file `lock`, where a killed build has left it.

    The OS lock serves all machines on a shared directory where its file system passes it on, as NFS does; where it does
    not, torch's lock keeps them apart, as it keeps apart other programs and us. So only a lock that is certainly left
    over goes: the last builder was of this machine, and holds the OS lock no more; or it is older than any build.
    """
    with open(directory / "builder", "a+") as file:
        _lock(file, directory)
        file.seek(0)
        _remove_left_over(directory / "lock", ours=file.read().partition(" ")[0] == socket.gethostname())
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}")
        file.flush()
        yield


def _lock(file: TextIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Others of this launch only load what is built, which takes no time that is worth a line.
        telling = threading.Timer(SHORT, _say, (f"waiting for the process that builds in {directory}",))
        telling.start()
        fcntl.flock(file, fcntl.LOCK_EX)
        telling.cancel()
    except OSError as error:
        _say(f"{directory} takes no lock ({error}): torch's own keeps builds apart")


def _remove_left_over(lock: Path, ours: bool) -> None:
    told = False
    while lock.exists():
        age = _age(lock)
        if ours or age > LONGEST_BUILD:
            _say(f"{lock} was left by a build that was killed: removed")
            lock.unlink(missing_ok=True)
        elif not told:
            left = LONGEST_BUILD - age
            _say(f"waiting up to {left:.0f} s for another program that holds {lock}; if none builds, remove it")
            told = True
        time.sleep(POLL)


def _age(path: Path) -> float:
    """In seconds; 0 where it has just gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
