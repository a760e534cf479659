"""The main of a chain's recipe file, and its own options."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.chain.decide import Options, Plan, decide
from pipeline.chain.stage import Stage
from pipeline.chain.work import do_all
from pipeline.launch import launch
from pipeline.recipe import Runtime
from pipeline.record import EXIT_USER_ERROR
from shards.errors import UserError

USAGE = """
A finished stage is skipped, an interrupted one gone on with. A finished one whose inputs have changed is done again in
a new directory, and the old one stays; an unfinished one is refused then.
  --list               print what would be done with each stage, and why, and stop
  --from STAGE         do this stage, and those that start from it, again in new directories
  --only STAGE [...]   do these stages alone
"""


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The chain's own options of a command line, and the rest of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--from", dest="again", default="", metavar="STAGE")
    parser.add_argument("--only", nargs="+", default=(), metavar="STAGE")
    parser.add_argument("--list", dest="listing", action="store_true")
    found, rest = parser.parse_known_args(argv)
    return Options(found.again, tuple(found.only), found.listing), rest


def run(stages: Sequence[Stage], run_dir: str, runtime: Runtime, options: Options) -> NoReturn:
    """The stages' own directories lie below `run_dir`. Exits with the outcome's code."""
    root = Path(run_dir)
    if options.listing:
        sys.exit(show(stages, root, options))
    dry = any(stage.dry_run for stage in stages)
    launch(lambda world: do_all(stages, root, options, world), runtime, root, dry)


def show(stages: Sequence[Stage], root: Path, options: Options) -> int:
    """--list, printed by one of the processes that a launcher starts; exit code 2 where the chain would not run."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        plan = decide(stages, root, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(listed(stages, root, plan))
    return EXIT_USER_ERROR if any(step.action == "refuse" for step in plan.steps.values()) else 0


def listed(stages: Sequence[Stage], root: Path, plan: Plan) -> str:
    """A line for each stage."""
    lines = []
    for stage in stages:
        step = plan.steps[stage.name]
        after = f"after {stage.start_from}" if stage.start_from else ""
        lines.append(f"{step.action:<7} {stage.name:<14} {stage.kind:<9} {after:<20} {root / step.directory}")
        lines.append(f"        {step.reason}")
    return "\n".join(lines)
