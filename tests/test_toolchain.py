"""A build of a kernel that was killed does not hang later ones."""

import os
import signal
import threading
import time
from pathlib import Path

import ranks

from pipeline.backend.toolchain import LONGEST_BUILD, build_kernels, building_alone


def hold(directory: Path, entered: Path, let_go: Path) -> None:
    """Builds as torch does, with a lock that is a file, until it is killed or told to end."""
    with building_alone(directory):
        (directory / "lock").touch()
        entered.touch()
        while not let_go.exists():
            threading.Event().wait(ranks.POLL)
        (directory / "lock").unlink()


def load(extensions: Path) -> None:
    os.environ.update(TORCH_EXTENSIONS_DIR=str(extensions), DS_ACCELERATOR="cpu")
    build_kernels(["ShareMemCommBuilder"])
    print("loaded", flush=True)


def wait_for(path: Path) -> None:
    while not path.exists():
        threading.Event().wait(ranks.POLL)


def test_what_a_killed_build_left_is_removed_at_once(tmp_path):
    entered, never = tmp_path / "entered", tmp_path / "never"
    builder = ranks.run_function(hold, (tmp_path, entered, never), tmp_path / "logs", 1)
    wait_for(entered)
    waiting = ranks.run_function(hold, (tmp_path, tmp_path / "again", tmp_path), tmp_path / "logs", 1)
    while "waiting for the process that builds" not in (
        text := waiting.logs[0].read_text() if waiting.logs[0].exists() else ""
    ):
        threading.Event().wait(ranks.POLL)
    assert f"({os.uname().nodename} {builder.processes[0].pid})" in text
    os.kill(builder.processes[0].pid, signal.SIGKILL)
    ended = waiting.wait()
    assert ended.codes == [0]
    assert f"{tmp_path / 'lock'} was left by a build that was killed: removed" in ended.outputs[0]
    assert not (tmp_path / "lock").exists()
    builder.kill()


def test_deepspeed_loads_its_kernel_where_a_lock_was_left(tmp_path):
    """Two ranks at once; the lock is of an unknown program, and older than any build."""
    built = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm"
    directory = tmp_path / built.name
    directory.mkdir()
    for path in built.iterdir() if built.exists() else ():
        if path.name not in ("lock", "builder"):
            (directory / path.name).write_bytes(path.read_bytes())
            os.utime(directory / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    (directory / "lock").touch()
    os.utime(directory / "lock", (0, time.time() - LONGEST_BUILD - 1))
    ended = ranks.run_function(load, (tmp_path,), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert all("loaded" in text for text in ended.outputs)
    assert sum("was left by a build that was killed: removed" in text for text in ended.outputs) == 1


def test_another_programs_build_is_waited_for(tmp_path, capfd):
    (tmp_path / "lock").touch()
    done = threading.Timer(0.5, (tmp_path / "lock").unlink)
    done.start()
    with building_alone(tmp_path):
        assert done.finished.is_set()
    told = capfd.readouterr().err
    assert "waiting up to 300 s for another program that holds" in told
    assert "if none builds, remove it" in told
