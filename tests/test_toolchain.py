"""A build of a kernel that was killed does not hang later ones."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import ranks
from torch.utils import cpp_extension

from pipeline.backend.toolchain import LONGEST_BUILD, LONGEST_LINK, build_kernel, building_alone, remove_cut_libraries


def hold(directory: Path, entered: Path, let_go: Path) -> None:
    """Builds as torch does, with a lock that is a file, until it is killed or told to end."""
    with building_alone(directory):
        (directory / "lock").touch()
        entered.touch()
        while not let_go.exists():
            threading.Event().wait(ranks.POLL)
        (directory / "lock").unlink()


def compile_small(directory: Path) -> None:
    """A library without torch's headers, which compiles in a second, by what DeepSpeed compiles with."""
    source = directory.with_suffix(".cpp")
    source.write_text('extern "C" int seven() { return 7; }')
    with building_alone(directory):
        library = cpp_extension.load("small", [source], build_directory=str(directory), is_python_module=False)
    print(f"loaded {library}", flush=True)


def load_of_deepspeed(extensions: Path) -> None:
    os.environ.update(TORCH_EXTENSIONS_DIR=str(extensions), DS_ACCELERATOR="cpu")
    build_kernel("ShareMemCommBuilder")
    print("loaded", flush=True)


def wait_for(path: Path) -> None:
    while not path.exists():
        threading.Event().wait(ranks.POLL)


def test_what_a_killed_build_left_is_removed_at_once(tmp_path):
    entered, never = tmp_path / "entered", tmp_path / "never"
    builder = ranks.run_function(hold, (tmp_path, entered, never), tmp_path / "logs", 1)
    wait_for(entered)
    waiting = ranks.run_function(hold, (tmp_path, tmp_path / "again", tmp_path), tmp_path / "logs", 1)
    wait_for(waiting.logs[0])
    told = f"waiting for the process that builds in {tmp_path}\n"
    while told not in waiting.logs[0].read_text():
        assert waiting.processes[0].is_alive()
        threading.Event().wait(ranks.POLL)
    os.kill(builder.processes[0].pid, signal.SIGKILL)
    ended = waiting.wait()
    assert ended.codes == [0]
    assert f"{tmp_path / 'lock'} was left by a build that was killed: removed" in ended.outputs[0]
    assert not (tmp_path / "lock").exists()
    builder.kill()


@pytest.mark.parametrize(
    ("work", "name"),
    [(compile_small, ""), pytest.param(load_of_deepspeed, "deepspeed_shm_comm", marks=pytest.mark.soak)],
)
def test_kernels_are_built_where_a_lock_was_left(tmp_path, work, name):
    """By two ranks at once; the lock is of an unknown program, and older than any build."""
    lock = tmp_path / "built" / name / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - LONGEST_BUILD - 1))
    ended = ranks.run_function(work, (tmp_path / "built",), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert all("loaded" in text for text in ended.outputs)
    assert sum(f"{lock} was left by a build that was killed: removed" in text for text in ended.outputs) == 1


def test_another_programs_build_is_waited_for(tmp_path, capfd):
    (tmp_path / "lock").touch()
    done = threading.Timer(0.5, (tmp_path / "lock").unlink)
    done.start()
    with building_alone(tmp_path):
        assert done.finished.is_set()
    told = capfd.readouterr().err
    assert "waiting up to 300 s for another program that holds" in told
    assert "if none builds, remove it" in told


def test_libraries_that_a_killed_compilation_cut_short_are_removed(tmp_path, capfd):
    source, whole = tmp_path / "seven.c", tmp_path / "ab" / "whole.so"
    source.write_text("int seven(void) { return 7; }")
    whole.parent.mkdir()
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(whole)], check=True)
    content = whole.read_bytes()
    cut = {whole.with_name(f"cut-{size}.so"): size for size in (0, 63, 64, len(content) // 2, len(content) - 1)}
    for path, size in cut.items():
        path.write_bytes(content[:size])
    (tmp_path / "young.so").touch()
    for path in (whole, *cut):
        os.utime(path, times=(0, time.time() - 2 * LONGEST_LINK))
    remove_cut_libraries(tmp_path)
    assert sorted(tmp_path.rglob("*.so")) == [whole, tmp_path / "young.so"]
    assert capfd.readouterr().err.count("was cut short by a compilation that was killed: removed") == len(cut)
