"""Real tasks on real processes: what they report, raise and die of, and that they end with whoever began them."""

import os
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards.durable import atomic_file, locked
from shards.engine import open_engine
from shards.errors import UserError

HERE = Path(__file__).parent
PATIENCE = 120
NOBODY = (0, 0)


class Unportable(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, value, limit):
        super().__init__(f"{value} of {limit}")


def write_number(task, advance):
    directory, number = task
    with atomic_file(Path(directory) / str(number)) as file:
        file.write(b"%d" % number)
    advance(1, 10)
    advance(2, number)
    return number, os.getpid()


def fail(task, advance):
    raise task


def fail_unportably(task, advance):
    raise Unportable(*task)


def die(task, advance):
    os.kill(os.getpid(), task)


def leave(task, advance):
    os._exit(task)


def report_often(task, advance):
    for _ in range(task):
        advance(1, 2)


def report_until(path, advance):
    while not os.path.exists(path):
        advance(1, 0)


def echo(task, advance):
    return task


def hang(task, advance):
    os.write(1, b"under way\n")
    threading.Event().wait()


def open_too_many():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    with open_engine("local", 64) as engine:
        list(engine.run(echo, [1], print))


def hang_in_two_workers():
    with open_engine("local", 2) as engine:
        list(engine.run(hang, range(4), print))


def run(engine, function, tasks):
    """The results, and the images and bytes reported."""
    reports = [NOBODY]
    results = list(engine.run(function, tasks, lambda *report: reports.append(report)))
    return results, tuple(map(sum, zip(*reports, strict=True)))


def start(call):
    """A process of a session of its own that calls a function of this module."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_engine; test_engine.{call}"],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def two():
    with open_engine("local", 2) as engine:
        yield engine


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_reported(workers, tmp_path):
    with open_engine("local", workers) as engine:
        results, reported = run(engine, write_number, ((str(tmp_path), number) for number in range(20)))
    assert sorted(number for number, _ in results) == list(range(20))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(n): str(n) for n in range(20)}
    assert reported == (60, 200 + sum(range(20)))
    workers_seen = {pid for _, pid in results}
    assert workers_seen == {os.getpid()} if workers == 1 else len(workers_seen - {os.getpid()}) == 2


def test_tasks_are_made_as_workers_become_free(two):
    made = done = 0

    def tasks():
        nonlocal made
        for made in range(1, 21):
            assert made - done <= 3  # one for each worker, and this one
            yield bytes(1 << 20)

    for result in two.run(echo, tasks(), print):
        done += 1
        assert len(result) == 1 << 20
    assert (made, done) == (20, 20)


def test_no_tasks(two):
    assert run(two, echo, []) == ([], NOBODY)


def test_reports_come_while_a_task_runs(two, tmp_path):
    flag = tmp_path / "flag"
    assert list(two.run(report_until, [str(flag)], lambda *report: flag.touch())) == [None]


def test_frequent_reports_are_gathered(two):
    reports = []
    list(two.run(report_often, [5000, 5000], lambda *report: reports.append(report)))
    assert [sum(column) for column in zip(*reports, strict=True)] == [10000, 20000]
    assert len(reports) < 100


@pytest.mark.parametrize("workers", [1, 2])
def test_a_user_error_of_a_task_arrives_as_it_is(workers):
    with open_engine("local", workers) as engine, pytest.raises(UserError, match=r"^mend it$"):
        run(engine, fail, [UserError("mend it")])


def test_another_error_brings_the_traceback_of_its_worker(two):
    with pytest.raises(FileNotFoundError) as caught:
        run(two, fail, [FileNotFoundError(2, "gone", "x.jpg")])
    assert caught.value.filename == "x.jpg"
    assert "in process " in caught.value.__notes__[0]
    assert "in fail\n    raise task" in caught.value.__notes__[0]


def test_an_error_that_cannot_cross_arrives_by_its_text(two):
    with pytest.raises(RuntimeError) as caught:
        run(two, fail_unportably, [(3, 2)])
    assert str(caught.value) == "Unportable: 3 of 2"
    assert "in fail_unportably\n" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("function", "task", "cause"),
    [
        (die, signal.SIGKILL, "killed by signal 9: out of memory?); run again with fewer --workers; "),
        (die, signal.SIGSEGV, "killed by signal 11: Segmentation fault); run again; "),
        (leave, 3, "exit code 3); run again; "),
    ],
)
def test_a_worker_that_dies(two, function, task, cause):
    with pytest.raises(UserError) as caught:
        run(two, function, [task] * 3)
    assert str(caught.value) == f"a worker process died ({cause}finished shards are kept"
    assert run(two, echo, [1])[0] == [1]


def test_a_worker_that_dies_idle(two, tmp_path):
    (_, worker), *_ = run(two, write_number, [(str(tmp_path), 0)])[0]
    death = os.pidfd_open(worker)
    os.kill(worker, signal.SIGKILL)
    select.select([death], [], [])
    os.close(death)
    with pytest.raises(UserError, match="killed by signal 9: out of memory"):
        run(two, echo, range(4))


def test_errors_of_the_task_list_end_the_run(two):
    def tasks():
        yield 1
        raise UserError("the list ends early")

    with pytest.raises(UserError, match="the list ends early"):
        run(two, echo, tasks())
    assert run(two, echo, [1])[0] == [1]


def test_results_may_be_left(two):
    results = two.run(echo, range(100), print)
    assert next(results) in (0, 1)
    results.close()
    assert sorted(run(two, echo, range(5))[0]) == list(range(5))


def test_more_workers_than_the_system_allows():
    _, errors = start("open_too_many()").communicate(timeout=PATIENCE)
    assert errors.splitlines()[-1] == (
        "shards.errors.UserError: cannot start a worker process: [Errno 24] Too many open files; run again with fewer "
        "--workers"
    )


def test_workers_hold_no_lock_of_this_process(tmp_path):
    with open_engine("local", 2) as engine:
        with locked(tmp_path):
            run(engine, echo, range(4))
        with locked(tmp_path):
            run(engine, echo, range(4))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number):
    process = start("hang_in_two_workers()")
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["under way\n"] * 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        # The end of its output, which the workers share, tells that all have ended.
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == -number
    assert output == ""
    assert [line for line in errors.splitlines() if "Error" in line or "Interrupt" in line] == (
        ["KeyboardInterrupt"] if number == signal.SIGINT else []
    )


def test_the_default_is_every_cpu_that_this_process_may_use(tmp_path):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with open_engine("local") as engine:
            assert run(engine, write_number, [(str(tmp_path), 1)])[0] == [(1, os.getpid())]
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("name", "workers", "text"),
    [
        ("spark", 2, "'spark' is no engine: choose local or ray"),
        ("local", 0, "--workers 0: it must be at least 1"),
        ("ray", -1, "--workers -1: it must be at least 1"),
    ],
)
def test_bad_values(name, workers, text):
    with pytest.raises(UserError) as caught, open_engine(name, workers):
        pass
    assert str(caught.value) == text
