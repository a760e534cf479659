"""Whether a run is done, goes on, waits or is dead, and why."""

import re
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.record import LOGS, OUTCOME
from pipeline.status.facts import Facts, read_facts
from pipeline.status.files import modified, number, read_object
from pipeline.status.stages import Chain
from pipeline.status.words import clock
from pipeline.status.writer import Writer, boot_time, last_attempt, lives

STATES = ("done", "running", "requeue", "error", "dead", "waiting")
"""dead: it left no outcome, and nobody writes there any more. waiting: it has not begun."""
HANG_TIMEOUT = 480.0  # of a recipe that says nothing else
LAST_WORDS = re.compile(r"Fatal Python error: .*|error: .*|requeue: .*|[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*")
MAX_WORDS = 600


@dataclass(frozen=True)
class State:
    """name: one of STATES. why: the reason of an end, or a remark; "" for none."""

    name: str
    why: str = ""


def state_of(facts: Facts, now: float | None = None) -> State:
    if facts.outcome:
        return State(_known(facts.outcome.get("outcome")), str(facts.outcome.get("reason", "")))
    if not facts.begun:
        return State("waiting")
    above = read_object(facts.logs.parent / OUTCOME)  # of a chain, which ended with this stage
    if above.get("outcome") in ("error", "requeue"):
        return State(above["outcome"], str(above.get("reason", "")))
    return _without_outcome(facts.logs, facts.modified, _patience(facts), now or time.time())


def chain_state(chain: Chain, now: float | None = None) -> State:
    """Of a chain as a whole: by its own outcome and logs, else by its stages' states."""
    outcome = read_object(chain.path / OUTCOME)
    if outcome:
        return State(_known(outcome.get("outcome")), str(outcome.get("reason", "")))
    facts = [read_facts(stage.path) for stage in chain.stages]
    if not (chain.path / LOGS).is_dir():
        return _of_stages({stage.name: state_of(each, now) for stage, each in zip(chain.stages, facts, strict=True)})
    written = max(stage.modified for stage in facts)
    return _without_outcome(chain.path / LOGS, written, max(map(_patience, facts)), now or time.time())


def _of_stages(states: Mapping[str, State]) -> State:
    """What most needs to be known of runs that no launch has as its stages."""
    for name in ("running", "error", "dead", "requeue", "waiting"):
        if found := [stage for stage, state in states.items() if state.name == name]:
            return State(name, ", ".join(found))
    return State("done")


def _patience(facts: Facts) -> float:
    """Seconds that a run may stand still for."""
    return number(facts.recipe.get("runtime.hang_timeout")) or HANG_TIMEOUT


def _known(outcome: object) -> str:
    return outcome if isinstance(outcome, str) and outcome in STATES else "error"


def _without_outcome(logs: Path, written: float, timeout: float, now: float) -> State:
    """It goes on or is dead: told by the process where that is on this machine, else by what was written how long
    ago."""
    writer, _ = last_attempt(logs / "rank-0.log")
    silent = now - max(written, modified(logs / "rank-0.log"))
    living = lives(writer) if writer else None
    if living or (living is None and silent <= timeout):
        return State("running", f"nothing was written for {silent:.0f} s" if silent > timeout else "")
    return State("dead", _last_words(logs, writer) or _killed(logs, writer, silent))


def _last_words(logs: Path, writer: Writer | None) -> str:
    """The last error that a rank wrote into its log in the last attempt; "" for none."""
    for log in sorted(logs.glob("rank-*.log")):
        own, text = last_attempt(log)
        if own is None or (writer and own.since < writer.since - 60):  # of an earlier attempt on more ranks
            continue
        said = [line for line in text.splitlines() if LAST_WORDS.match(line)]
        if said:
            return f"rank {own.rank}: {said[-1][:MAX_WORDS]} ({log})"
    return ""


def _killed(logs: Path, writer: Writer | None, silent: float) -> str:
    """Of ranks that left no word."""
    last = f"it last wrote {silent:.0f} s ago"
    if writer is None:
        return f"{last}, and keeps no log of who wrote"
    if lives(writer) is None:
        return f"{last}, from {writer.host}: the processes, that machine or the way there is gone"
    if boot_time() > writer.since:
        return f"{writer.host} was started again at {clock(boot_time())}; {last}"
    if line := out_of_memory(_kernel_log(), _pids(logs)):
        return f"memory ran out: {line}"
    return (
        f"no rank left a word: killed as a whole (kill -9, memory that ran out, a batch system), {last}; the end of "
        f"{logs}/rank-0.log: {_tail(logs / 'rank-0.log')!r}"
    )


def out_of_memory(kernel_log: str, pids: Collection[int]) -> str:
    """The last line by which the kernel says that it killed one of these processes for memory; "" for none."""
    numbers = "|".join(map(str, pids))
    found = re.findall(rf"^.*[Oo]ut of memory: Killed process (?:{numbers})\b.*$", kernel_log, re.MULTILINE)
    return found[-1].strip() if found and numbers else ""


def _kernel_log() -> str:
    try:
        return subprocess.run(["dmesg"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _pids(logs: Path) -> list[int]:
    writers = [last_attempt(log)[0] for log in logs.glob("rank-*.log")]
    return [writer.pid for writer in writers if writer]


def _tail(log: Path) -> str:
    _, text = last_attempt(log)
    return (text.rstrip().splitlines() or [""])[-1][:MAX_WORDS]
