"""A real cluster of one machine, and drivers in processes of their own: Ray's warnings are none of ours."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from test_engine import die, echo, fail, run, write_number

from shards.engine import open_engine
from shards.errors import UserError

HERE = Path(__file__).parent  # where Ray's workers, too, find these modules
ROOT = HERE.parents[1]


def die_once(flag, advance):
    if not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    advance(1, 0)
    return "repeated"


def hold_open(path, advance):
    with open(path, "wb", buffering=0) as pipe:
        pipe.write(b"x")
        threading.Event().wait()


def only_here(task, advance):
    """A stranger to the cluster: made here of a module that exists nowhere else."""


only_here.__module__ = "elsewhere"


def message_of(engine, function, task):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(engine, function, [task])
    return [type(caught.value).__name__, str(caught.value), *getattr(caught.value, "__notes__", [])]


def most_ahead(engine, num_tasks):
    """How many tasks were made, at most, than results had come."""
    made = done = most = 0

    def tasks():
        nonlocal made, most
        for made in range(1, num_tasks + 1):
            most = max(most, made - done)
            yield made

    for _ in engine.run(echo, tasks(), print):
        done += 1
    return most


def use(directory):
    """Prints what the tests look at, as JSON."""
    with open_engine("ray") as engine:
        sys.modules["elsewhere"] = sys.modules[__name__]
        found = {
            "files": run(engine, write_number, ((directory, number) for number in range(12))),
            "repeated": run(engine, die_once, [f"{directory}/flag"]),
            "user error": message_of(engine, fail, UserError("mend it")),
            "error": message_of(engine, fail, FileNotFoundError(2, "gone", "x.jpg")),
            "death": message_of(engine, die, signal.SIGKILL),
            "not installed": message_of(engine, only_here, 1),
            "ahead": most_ahead(engine, 12),
        }
    print(json.dumps(found))


def use_one_at_a_time():
    with open_engine("ray", 1) as engine:
        print(most_ahead(engine, 4))


def hang(path):
    with open_engine("ray") as engine:
        list(engine.run(hold_open, [path], print))


def start(call, cluster):
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_ray_engine; test_ray_engine.{call}"],
        cwd=HERE,
        env=os.environ | cluster | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(call, cluster):
    process = start(call, cluster)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])  # above it, Ray tells of dead workers


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def end_session(head):
    """Ends all processes of the session that `head` leads."""
    members = [process for process in psutil.process_iter() if session_of(process.pid) == head.pid]
    os.killpg(head.pid, signal.SIGKILL)
    head.communicate()
    assert psutil.wait_procs(members, timeout=120)[1] == []


@pytest.fixture(scope="module")
def cluster():
    """The environment of drivers of a cluster with 2 CPUs."""
    ports = free_ports(3)
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the path of a socket must be short
    command = (
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"),
        *(f"--temp-dir={directory}", "--object-store-memory=80000000", f"--port={ports[0]}"),
        *(f"--ray-client-server-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"),
    )
    environment = {"RAY_ADDRESS": f"127.0.0.1:{ports[0]}", "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        command,
        start_new_session=True,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(head.stdout.readline, "")
        assert any("Ray runtime started" in line for line in lines)
        yield environment
    finally:
        end_session(head)
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def used(cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp("numbers")
    found = output_of(f"use({str(directory)!r})", cluster)
    return found | {"texts": {path.name: path.read_text() for path in directory.iterdir() if path.name != "flag"}}


def test_every_task_is_done_once_and_reported(used):
    results, reported = used["files"]
    assert sorted(number for number, _ in results) == list(range(12))
    assert used["texts"] == {str(number): str(number) for number in range(12)}
    assert reported == [36, 120 + sum(range(12))]


def test_a_task_whose_worker_dies_is_repeated(used):
    assert used["repeated"] == [["repeated"], [1, 0]]


def test_errors_arrive_as_they_are(used):
    assert used["user error"] == ["UserError", "mend it"]
    name, text, note = used["error"]
    assert (name, text) == ("FileNotFoundError", "[Errno 2] gone: 'x.jpg'")
    assert "in fail\n    raise task" in note


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "death",
            "The worker died unexpectedly while executing this task. Check python-core-worker-*.log files for "
            "more information",
        ),
        ("not installed", "ModuleNotFoundError: No module named 'elsewhere'"),
    ],
)
def test_tasks_that_cannot_be_run(used, name, reason):
    assert used[name] == [
        "UserError",
        f"Ray could not run a task: {reason}. All of its machines need this version of vittm-pipeline, the paths of "
        "this one, and memory for a task a CPU. Run again; finished shards are kept.",
    ]


def test_the_cluster_holds_two_tasks_a_cpu(used):
    assert used["ahead"] == 4


def test_it_goes_on_for_the_next_driver_which_may_ask_for_less(used, cluster):
    assert output_of("use_one_at_a_time()", cluster) == 1


def test_tasks_end_with_their_driver(cluster, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    process = start(f"hang({str(path)!r})", cluster)
    read = []
    for _ in range(2):
        assert select.select([pipe], [], [], 30)[0]
        read.append(os.read(pipe, 1))
        process.kill()
    os.close(pipe)
    process.communicate()
    assert read == [b"x", b""]  # the task holds the pipe open, and then nobody does


def error_of(environment, *flags):
    """The last line on stderr of a process that opens the engine."""
    process = subprocess.run(
        [sys.executable, *flags, "-c", "from shards.engine import open_engine; open_engine('ray').__enter__()"],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    return process.stderr.splitlines()[-1]


def test_ray_that_is_not_installed():
    without_packages = "-S"
    assert error_of({}, without_packages) == (
        "shards.errors.UserError: --engine ray needs Ray (No module named 'ray'): pip install 'vittm-pipeline[ray]'"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1", "[Errno 111] Connection refused"),
        ("", "invalid literal for int() with base 10: 'nonsense'"),
    ],
)
def test_a_cluster_that_does_not_answer(host, reason):
    address = f"{host}:{free_ports(1)[0]}" if host else "nonsense"
    assert error_of({"RAY_ADDRESS": address}) == (
        f"shards.errors.UserError: no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start one with "
        "`ray start --head`, on other machines with `ray start --address=HOST:PORT`, and set RAY_ADDRESS=HOST:PORT "
        "where it is not on this machine"
    )


def test_make_shards_writes_the_same_bytes(cluster, source, written, files_of, tmp_path):
    command = [sys.executable, "tools/make_shards.py", "folder", source, tmp_path / "out", "--engine", "ray"]
    options = ["--split", "train", "--shard-size", "5"]
    done = subprocess.run(
        [*map(str, command), *options], cwd=ROOT, env=os.environ | cluster, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "21 images, 5 shards" in done.stdout
    assert files_of(tmp_path / "out") == files_of(written(source, tmp_path / "here").root)
