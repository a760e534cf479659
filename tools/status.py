"""How runs stand: `python tools/status.py RUN...`, with run directories, or chains', of which every stage is shown.

A run that left no outcome goes on where its first rank's process lives (told by logs/rank-0.log), or, if that is on
another machine, where it wrote within the recipe's hang time-out; else it is dead, and the reason is looked for in the
logs of its ranks and the kernel's.

Exit code 0: no run is dead or ended in error; 1: one is; 2: something is no run.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.status import (
    best_evaluation,
    chain_state,
    check_is_run,
    progress_of,
    read_chain,
    read_facts,
    state_of,
)
from pipeline.status.words import clock, duration
from shards.errors import UserError
from shards.text import one_line

Entry = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        found = [entry for path in arguments.runs for entry in entries(path, time.time())]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(line for entry in found for line in _lines(entry)))
    return int(any(entry["state"] in ("dead", "error") for entry in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show how runs stand: state, step, time left, last checkpoint, bad samples, why a dead run died.",
        epilog="Exit code: 0 none is dead or ended in error; 1 one is; 2 something is no run.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, or a chain's")
    parser.add_argument("--json", action="store_true", help="a JSON list of all that is known")
    return parser


def entries(path: Path, now: float) -> Iterator[Entry]:
    """Of a run; of a chain and its stages. Raises UserError for what is neither."""
    check_is_run(path)
    if chain := read_chain(path):
        state = chain_state(chain, now)
        yield {"chain": str(path), "stages": len(chain.stages), "state": state.name, "why": state.why}
        for stage in chain.stages:
            yield {"name": stage.name, "kind": stage.kind, **_entry(stage.path, now)}
    else:
        yield {"name": str(path), "kind": "train", **_entry(path, now)}


def _entry(path: Path, now: float) -> Entry:
    facts = read_facts(path)
    state, progress, best, commit = state_of(facts, now), progress_of(facts, now), best_evaluation(facts), facts.commit
    return {
        "run": str(path),
        "state": state.name,
        "why": state.why,
        **dataclasses.asdict(progress),
        "seconds_left": progress.seconds_left if state.name == "running" else None,
        "commit": commit and {"step": commit.step, "seconds_ago": now - commit.time},
        "best": best and dataclasses.asdict(best),
        "attempts": len(facts.attempts),
        "quarantined": len(facts.quarantine),
        "skipped": len(facts.skipped),
    }


def _lines(entry: Entry) -> Iterator[str]:
    if "chain" in entry:
        yield f"{entry['chain']}: {entry['state']}, a chain of {entry['stages']} stages"
        yield from _told("why", entry["why"])
        return
    yield f"{entry['name']}: {entry['state']}" + ("" if entry["kind"] == "train" else f" ({entry['kind']})")
    yield from _told("why", entry["why"])
    if entry["state"] != "waiting" and entry["kind"] == "train":
        for name, text in _figures(entry).items():
            yield from _told(name, text)


def _told(name: str, text: str) -> Iterator[str]:
    """A line for every one of the text's, the first under a name."""
    for number, line in enumerate(text.splitlines()):
        yield f"  {'' if number else name:<7} {one_line(line)}"


def _figures(entry: Entry) -> dict[str, str]:
    """Name -> what is known of it; "" for nothing."""
    total, epoch, best, commit = entry["total"], entry["epoch"], entry["best"], entry["commit"]
    share = f" of {total:,} ({entry['step'] / total:.1%})" if total else ""
    return {
        "step": f"{entry['step']:,}{share}" + (f", epoch {epoch:.2f}" if epoch is not None else ""),
        "speed": _speed(entry),
        "ETA": _eta(entry["seconds_left"]),
        "commit": f"step {commit['step']:,}, {duration(commit['seconds_ago'])} ago" if commit else "none yet",
        "best": f"{best['metric']} {best['value']:.2%} at step {best['step']:,}" if best else "",
        "bad": f"{entry['quarantined']} in quarantine, {entry['skipped']} steps skipped, {entry['attempts']} attempts",
    }


def _speed(entry: Entry) -> str:
    rate, wait = entry["images_per_second"], entry["data_wait"]
    waiting = f", {wait:.1%} of the time waiting for data" if wait is not None else ""
    return f"{rate:,.0f} images/s{waiting}" if rate is not None else ""


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)}, {clock(time.time() + seconds)}"


if __name__ == "__main__":
    sys.exit(main())
