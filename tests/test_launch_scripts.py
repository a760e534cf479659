"""ds_configs/multinode.sh and slurm.sbatch: with stand-ins for Slurm's commands, and in the soak as real launchers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ranks

SCRIPTS = ("ds_configs/multinode.sh", "ds_configs/slurm.sbatch")
FINETUNE = "recipes/finetune_1k.py"
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && { [ "$3" = "n[1-2]" ] && printf '127.0.0.1\\nn2\\n'; exit; }
echo "$*" >>"$LOG/scontrol"
"""
# One task a node, each in an environment of its own, until all have ended; what it is signalled, it hands on.
SRUN = """#!/bin/bash
echo "$*" >"$LOG/srun"
env >"$LOG/environment"
while [ "${1#-}" != "$1" ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" >"$LOG/node-$node" 2>&1 & tasks+=($!); done
trap 'echo USR1 >>"$LOG/signals"; kill -USR1 "${tasks[@]}"' USR1
trap 'echo TERM >>"$LOG/signals"; kill -KILL "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
    [ "$code" -gt "${worst:-0}" ] && worst=$code
done
exit "${worst:-0}"
"""
# In the place of multinode.sh's launcher: node 0 ends as it is told, or as a run does that is asked to stop.
ACCELERATE = """#!/bin/bash
echo "$*" >"$LOG/accelerate-$SLURM_NODEID"
say() { mkdir -p "$LOG/run"; printf '{"outcome": "%s", "step": 3}\\n' "$1" >"$LOG/run/outcome.json"; }
[ "$ENDS" = killed ] && exit 137
[ "$ENDS" != signalled ] && { say "$ENDS"; [ "$ENDS" = done ]; exit; }
trap 'say requeue; kill "$!"; exit 1' TERM
sleep 60 & echo "$SLURM_NODEID" >>"$LOG/started"
wait
"""
REAL = f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'  # of this environment


def commands(folder: Path, **texts: str) -> str:
    """The PATH on which these stand-ins come first."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def job(tmp_path):
    """job(options, **environment) -> a running slurm.sbatch on two nodes, with stand-ins on its PATH."""
    running: list[subprocess.Popen] = []

    def run(options: list[str], accelerate: str = REAL, **environment: str) -> subprocess.Popen:
        path = commands(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN, accelerate=accelerate)
        slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "20007"}
        variables = os.environ | slurm | {"LOG": str(tmp_path), "PATH": path} | environment
        command = ["bash", "ds_configs/slurm.sbatch", *options]
        running.append(subprocess.Popen(command, cwd=ranks.ROOT, env=variables, start_new_session=True))
        return running[-1]

    yield run
    for each in running:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def when(path: Path, text: str, job: subprocess.Popen) -> None:
    while text not in read(path):
        assert job.poll() is None, f"the job ended before {path.name} said {text!r}"
        threading.Event().wait(ranks.POLL)


def test_shellcheck_finds_nothing():
    command = [Path(sys.executable).with_name("shellcheck"), "--norc", *SCRIPTS]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("ends", "code"), [("done", 0), ("error", 2), ("killed", 137)])
def test_a_job_that_ends_is_not_queued_again(job, tmp_path, ends, code):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "outcome.json").write_text('{"outcome": "requeue", "step": 1, "reason": ""}\n')
    options = ["ds_configs/zero2_gpu8.yaml", str(tmp_path / "run"), FINETUNE, "--model", "vittm_base"]
    assert job(options, ACCELERATE, ENDS=ends).wait() == code
    assert read(tmp_path / "scontrol") == ""
    assert f"ds_configs/multinode.sh {' '.join(options)}" in read(tmp_path / "srun")
    for node in (0, 1):
        assert read(tmp_path / f"accelerate-{node}").split() == [
            *("launch", "--config_file", "ds_configs/zero2_gpu8.yaml", "--num_machines", "2"),
            *("--machine_rank", str(node), "--num_processes", "16", "--main_process_ip", "127.0.0.1"),
            *("--main_process_port", "20007", "--deepspeed_multinode_launcher", "standard"),
            *(FINETUNE, "--run-dir", str(tmp_path / "run"), "--model", "vittm_base"),
        ]


@pytest.mark.parametrize(
    ("number", "queued"), [(signal.SIGUSR1, "requeue 20007\n"), (signal.SIGTERM, "")], ids=["time is up", "cancelled"]
)
def test_a_job_that_is_signalled_stops_in_order(job, tmp_path, number, queued):
    running = job(["ds_configs/ddp_gpu8.yaml", str(tmp_path / "run"), FINETUNE], ACCELERATE, ENDS="signalled")
    for node in ("0", "1"):
        when(tmp_path / "started", node, running)
    running.send_signal(number)
    assert running.wait() == 75
    assert read(tmp_path / "scontrol") == queued
    assert read(tmp_path / "signals") == "USR1\n", "srun answers a SIGTERM by killing its tasks"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_is_not_given_it_names(script, tmp_path):
    done = subprocess.run(["bash", script, "x"], cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"MACHINE_RANK": "0", "MAIN_ADDRESS": "x"}, "MACHINES: the number of machines"),
        ({"MACHINES": "2", "MAIN_ADDRESS": "x"}, "set MACHINE_RANK: the number of this machine, from 0"),
        ({"MACHINES": "2", "MACHINE_RANK": "0"}, "MAIN_ADDRESS: the address of machine 0"),
        ({"MACHINES": "2", "MACHINE_RANK": "0", "MAIN_ADDRESS": "x"}, "error: there is no launch file nosuch.yaml in"),
    ],
)
def test_what_a_machine_is_not_told_it_asks_for(given, told):
    command = ["bash", "ds_configs/multinode.sh", "nosuch.yaml", "runs/x", FINETUNE]
    done = subprocess.run(command, cwd=ranks.ROOT, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert told in done.stderr


# --- two launchers on this machine


@pytest.mark.soak
@pytest.mark.parametrize(("launch_file", "processes"), [("ddp_cpu2", 1), ("zero2_cpu2", 1), ("fsdp_cpu2", 2)])
def test_two_machines_are_stopped_queued_again_and_go_on(job, start, small, tmp_path, launch_file, processes):
    """Slurm's two nodes are two launchers here, over the loopback; the result is that of one machine's ranks."""
    options = ["--debug", *small, "--schedule.length", "60 steps", "--evaluation.every", "100%"]
    run_dir, given = tmp_path / "run", [f"ds_configs/{launch_file}.yaml", str(tmp_path / "run"), FINETUNE, *options]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = str(port - 20000 if port >= 20000 else port)  # the job's, from which its port follows
    first = job(given, PROCESSES=str(processes), SLURM_JOB_ID=number)
    when(run_dir / "metrics.jsonl", '{"step": 5,', first)
    first.send_signal(signal.SIGUSR1)
    assert first.wait() == 75, read(tmp_path / "node-0") + read(tmp_path / "node-1")
    outcome = json.loads(read(run_dir / "outcome.json"))
    assert (outcome["outcome"], read(tmp_path / "scontrol")) == ("requeue", f"requeue {number}\n")
    assert 5 <= outcome["step"] < 60
    assert job(given, PROCESSES=str(processes), SLURM_JOB_ID=number).wait() == 0, read(tmp_path / "node-0")
    assert f"steps {outcome['step']} to 60" in read(tmp_path / "node-0")
    world = 2 * processes
    strategy = {"fsdp_cpu2": {"ACCELERATE_USE_FSDP": "true"}, "zero2_cpu2": ZERO}.get(launch_file, {})
    alone = start(FINETUNE, [*options, "--run-dir", str(tmp_path / "alone")], world, **strategy).wait()
    assert alone.codes == [0] * world, "\n".join(alone.outputs)
    assert ranks.metrics(run_dir) == ranks.metrics(tmp_path / "alone")
    assert not shutil.which("srun"), "the stand-in was meant to be found"


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero2.json"}


@pytest.mark.soak
def test_a_sigterm_to_one_of_two_launchers_stops_both(small, tmp_path):
    options = ["--debug", *small, "--schedule.length", "400 steps", "--evaluation.every", "100%"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = commands(tmp_path / "bin", accelerate=REAL)
    shared = {"MACHINES": "2", "MAIN_ADDRESS": "127.0.0.1", "MAIN_PORT": port, "PROCESSES": "1", "PATH": path}
    command = ["ds_configs/multinode.sh", "ds_configs/ddp_cpu2.yaml", str(tmp_path / "run"), FINETUNE, *options]
    launchers = []
    for rank in ("0", "1"):
        with (tmp_path / f"launcher-{rank}").open("w") as log:
            environment = os.environ | shared | {"MACHINE_RANK": rank}
            launchers.append(subprocess.Popen(command, cwd=ranks.ROOT, env=environment, stdout=log, stderr=log))
    when(tmp_path / "run" / "metrics.jsonl", '{"step": 5,', launchers[0])
    launchers[1].terminate()
    assert [launcher.wait(60) for launcher in launchers] == [75, 75], read(tmp_path / "launcher-0")
    outcome = json.loads(read(tmp_path / "run" / "outcome.json"))
    assert (outcome["outcome"], 5 <= outcome["step"] < 400) == ("requeue", True)
