"""Replays what every rank of a run would see, and audits it: `python tools/audit_stream.py DATA --world 4 --keys`.

Lines of `--keys` come in the order (step, rank, sample): without their second column they are the same for every world.
No other line on stdout begins with a digit.

Exit code 0: exact, whether or not a tail is dropped, the replay starts late, or samples within the budget are bad;
1: something is wrong; 2: it cannot be audited, and why.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from pipeline.data.loading import serve_workers
from pipeline.data.replay import IdReader, Replay
from pipeline.prepare import make_shuffle
from pipeline.recipe import Data, Recipe
from shards.audit import audit_epoch
from shards.budget import Budget
from shards.errors import UserError
from shards.index import Index
from shards.layout import Layout
from shards.plan import Plan, WindowShuffle, mixing_distance
from shards.progress import Progress
from shards.reader import Reader
from shards.store import StoreError, StoreOptions, open_data
from shards.text import one_line

_MAX_LISTED = 20
_MEASURED_BATCHES = 16
_LEAST = {"world": 1, "workers": 0, "accumulation": 1, "runs": 0, "epoch": 0, "start_step": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code, 130 after Ctrl-C, 141 where stdout is closed."""
    arguments = _parser().parse_args(argv)
    try:
        return _audit(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the lines has had enough; what is buffered goes nowhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    data, store = Data(), StoreOptions()
    parser = argparse.ArgumentParser(
        description="Replay what every rank of a run would see, and audit it.",
        epilog="Exit code: 0 exact; 1 something is wrong; 2 it cannot be audited.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="directory of shards with their index, or its URL")
    add("--split", default=data.train, metavar="NAME", help="split of the data")
    add("--world", type=int, default=1, metavar="N", help="ranks of the run")
    add("--workers", type=int, default=2, metavar="N", help="processes that read and decode")
    add("--global-batch", type=int, default=data.global_batch, metavar="B", help="samples of a step, over all ranks")
    add("--accumulation", type=int, default=data.accumulation, metavar="N", help="micro-batches of a rank's step")
    add("--mixing", action="store_true", help="the run mixes pairs of samples, which stay together")
    add("--seed", type=int, default=Recipe().seed, metavar="S", help="that of the run")
    add("--epoch", type=int, default=0, metavar="E", help="the one to audit; the first is 0")
    add("--start-step", type=int, default=0, metavar="K", help="replay the epoch from this step of it on")
    add("--shuffle", choices=("global", "window"), default=data.shuffle, help="how an epoch is ordered")
    add("--runs", type=int, default=data.runs, metavar="G", help="window shuffle: the recipe's data.runs")
    add("--window", type=int, default=data.window, metavar="W", help="window shuffle: the recipe's data.window")
    add("--max-bad", default=data.max_bad, metavar="N|P%%", help="samples of the split that may be bad")
    add("--no-decode", action="store_true", help="read the images, but do not decode them")
    add("--remote", choices=("cache", "range"), default=store.remote, help="whole shards of a URL, or a range a sample")
    add("--cache", default=store.cache, metavar="DIR", help="where shards of a URL are kept")
    add("--cache-size", default=store.cache_size, metavar="SIZE", help="most bytes of them")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--keys", action="store_true", help="print a line `step rank key` for every sample")
    output.add_argument("--plan-only", action="store_true", help="read the index alone, and replay nothing")
    return parser


def _audit(arguments: argparse.Namespace) -> int:
    layout = _layout(arguments)
    budget = Budget(arguments.max_bad)
    options = StoreOptions(arguments.remote, arguments.cache, arguments.cache_size)
    index, store = open_data(arguments.data, options)
    reader = IdReader(index, arguments.split, store)
    plan = _plan(arguments, index)
    print("\n".join(_described(arguments, plan, layout, reader)))
    wrong = audit_plan(plan, arguments.epoch)
    if not arguments.plan_only:
        wrong += _replay(arguments, plan, layout, reader, budget.allows(plan.num_samples))
    print("\n".join(f"wrong: {one_line(text)}" for text in wrong) or "exact: nothing is wrong", flush=True)
    return 1 if wrong else 0


def _layout(arguments: argparse.Namespace) -> Layout:
    for name, least in _LEAST.items():
        if getattr(arguments, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {getattr(arguments, name)}: it must be {least} or more")
    layout = Layout(arguments.global_batch, arguments.world, arguments.accumulation, arguments.mixing)
    layout.check()
    return layout


def _plan(arguments: argparse.Namespace, index: Index) -> Plan:
    data = Data(
        train=arguments.split,
        global_batch=arguments.global_batch,
        shuffle=arguments.shuffle,
        runs=arguments.runs,
        window=arguments.window,
    )
    shuffle = make_shuffle(Recipe(data=data), index)
    num_samples = index.split(data.train).num_samples
    plan = Plan(num_samples, index.fingerprint(data.train), arguments.seed, data.global_batch, shuffle)
    if arguments.start_step >= plan.batches_per_epoch:
        raise UserError(
            f"--start-step {arguments.start_step} is past the end: an epoch of {num_samples} samples has "
            f"{plan.batches_per_epoch} steps of {data.global_batch}; give one from 0 to {plan.batches_per_epoch - 1}"
        )
    return plan


def _described(arguments: argparse.Namespace, plan: Plan, layout: Layout, reader: Reader) -> list[str]:
    """The plan in words."""
    uneven = "" if layout.is_even else f" of {layout.sizes[0]} or {layout.sizes[-1]} samples (DDP and FSDP2 alone)"
    lines = [
        f"plan: {plan.num_samples:,} samples of split {reader.split}, fingerprint {plan.fingerprint}, seed "
        f"{plan.seed}, epoch {arguments.epoch}: {plan.batches_per_epoch:,} global batches of {plan.global_batch:,}, on "
        f"{layout.world:,} ranks x {layout.accumulation:,} micro-batches{uneven}"
    ]
    shuffle = plan.shuffle
    if not isinstance(shuffle, WindowShuffle):
        return [*lines, "shuffle: global, a permutation of the split"]
    batches = range(min(plan.batches_per_epoch, _MEASURED_BATCHES))
    drawn_on = [len(reader.shards_of(plan.ids(arguments.epoch, batch))) for batch in batches]
    return [
        *lines,
        f"shuffle: window, {shuffle.runs:,} runs of {plan.num_samples // shuffle.runs:,} samples, windows of about "
        f"{shuffle.window:,}",
        f"mixing: neighbours in storage come {mixing_distance(plan, arguments.epoch):,.0f} samples apart in the "
        f"median; in a global shuffle {0.29 * plan.num_samples:,.0f}",
        f"shards: a global batch draws on {min(drawn_on):,} to {max(drawn_on):,} of {len(shuffle.shard_sizes):,}, "
        f"in the first {len(batches)} batches",
    ]


def audit_plan(plan: Plan, epoch: int) -> list[str]:
    """Prints what the plan's epoch holds; what is wrong with it."""
    found = audit_epoch(plan, epoch)
    print(
        f"epoch: {found.num_planned:,} samples planned, {found.num_dropped:,} in the dropped tail, "
        f"{found.num_duplicates:,} duplicates, {found.num_missing:,} missing\n"
        f"hash: {found.hash:016x} of the epoch's ids, {found.split_hash:016x} of the index's",
        flush=True,
    )
    if found.is_exact:
        return []
    return [
        f"epoch {epoch} has {found.num_duplicates} duplicates, {found.num_missing} samples missing and "
        f"{found.num_outside} that the split has not; its hash is {found.hash:016x}, not {found.split_hash:016x}"
    ]


def _replay(arguments: argparse.Namespace, plan: Plan, layout: Layout, reader: IdReader, allowed: int) -> list[str]:
    """Prints what the ranks were given, sample by sample where keys are asked for; what is wrong with it."""
    replay = Replay(reader, plan, layout)
    total = (plan.batches_per_epoch - arguments.start_step) * plan.global_batch
    if arguments.workers:
        serve_workers()
    came = replay.run(arguments.epoch, arguments.start_step, not arguments.no_decode, arguments.workers)
    hopeless = []
    with Progress("replaying", total) as progress:
        try:
            for step, rank, ids in came:
                if arguments.keys:
                    print("\n".join(f"{step} {rank} {one_line(reader.key(sample))}" for sample in ids.tolist()))
                progress.advance(len(ids))
        except StoreError:
            raise
        except UserError as error:  # all substitutes of a sample are bad
            hopeless = [str(error)]
    _print_replayed(replay, allowed)
    if len(replay.bad) > allowed:
        hopeless.append(f"{len(replay.bad)} samples are bad, and --max-bad {arguments.max_bad} allows {allowed}")
    return [*replay.wrong, *hopeless]


def _print_replayed(replay: Replay, allowed: int) -> None:
    print(
        f"replay: {replay.num_steps:,} steps, {replay.num_planned:,} samples planned - {replay.num_quarantined:,} "
        f"quarantined + {replay.num_substitutes:,} substitutes = {replay.num_delivered:,} delivered\n"
        f"bad: {len(replay.bad):,} different samples, {allowed:,} allowed"
    )
    for error in list(replay.bad.values())[:_MAX_LISTED]:
        print(f"bad: {one_line(f'{error.shard}: {error.key}: {error.reason}')}")


if __name__ == "__main__":
    sys.exit(main())
