"""ZeRO's partitions onto another number of ranks, through DeepSpeed's universal format."""

import contextlib
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from pipeline.backend.world import World
from shards.errors import UserError

if TYPE_CHECKING:  # importing it chooses a device, and says so
    from deepspeed import DeepSpeedEngine

# As in the tool's own command line, but for its processes, which it would fork beside running threads.
CONVERSION = {
    "num_extract_workers": 1,
    "num_merge_workers": 1,
    "keep_temp_folder": False,
    "strict": True,
    "inject_missing_state": True,
}


def num_partitions(saved: Path) -> int:
    """Of how many ranks `save_checkpoint` wrote `saved`."""
    return len(list(saved.glob("*_optim_states.pt")))


def load(engine: "DeepSpeedEngine", world: World, saved: Path, aside: Path) -> None:
    """Reads what other ranks saved; rank 0 converts it in `aside`, which is removed again. Every rank calls it.

    Unpickles: `saved` must be of a committed checkpoint whose hashes match. Raises UserError where it cannot be
    converted.
    """
    failed = world.from_main(_convert(saved, aside / saved.name) if world.is_main else "")
    if failed:
        raise UserError(
            f"{saved}, of {num_partitions(saved)} ranks, cannot be converted for {world.size} by DeepSpeed's "
            f"ds_to_universal ({failed}): it needs as much room again beside it; make some, or go on with as many as "
            "before"
        )
    with _universal(engine), _apart(engine.optimizer.optimizer):
        engine.load_checkpoint(aside, tag=saved.name)
    world.barrier()
    if world.is_main:
        shutil.rmtree(aside)


def _convert(saved: Path, converted: Path) -> str:
    """Why it failed; "" where it did not."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted.parent, ignore_errors=True)
    options = Namespace(input_folder=str(saved), output_folder=str(converted), **CONVERSION)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ds_to_universal.main(options)
    except Exception as error:  # whatever it is, the other ranks wait
        return f"{type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def _universal(engine: "DeepSpeedEngine") -> Iterator[None]:
    """The engine reads the format only where its JSON says so, which is written before anyone knows what is read."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def _apart(optimizer: Optimizer) -> Iterator[None]:
    """Groups keep what the recipe gave them, and slices count their own steps: stage 3's loading gives all groups what
    the first one had, and all slices one tensor, which each would then count up."""
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, given, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
