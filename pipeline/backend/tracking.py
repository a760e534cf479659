"""Weights & Biases, through Accelerate's tracker."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate.tracking import WandBTracker
from numpy.typing import NDArray

from pipeline.backend.world import World
from shards.durable import replace_text
from shards.errors import UserError

ID = "wandb.id"


class WandB:
    """One run of Weights & Biases for one run directory, whatever attempts it takes: RUN/wandb.id is what it is called
    there. Its own files go to RUN/wandb."""

    def __init__(self, project: str, run_dir: Path, recipe: Mapping[str, object]) -> None:
        settings = {"console": "off"}  # it would wrap stdout
        name, kept = run_dir.name, _kept_id(run_dir)
        self._tracker = WandBTracker(project, dir=str(run_dir), id=kept, resume="allow", name=name, settings=settings)
        self._tracker.start()
        self._tracker.store_init_configuration(dict(recipe))
        # Not its own count, which may only grow: a resumed run is back at an earlier step.
        self._tracker.tracker.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log({"step": step, **values})

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._tracker.log({"step": step})
        self._tracker.log_images({name: [pixels]})

    def finish(self) -> None:
        self._tracker.finish()


def check_installed(project: str) -> None:
    """Raises UserError where there is a project, but Weights & Biases is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"wandb '{project}' needs the package wandb, which is not installed here: pip install '.[wandb]' "
            "--constraint constraints.txt, or leave --wandb out"
        )


def open_trackers(project: str, run_dir: Path, recipe: Mapping[str, object], world: World) -> list[WandB]:
    """WandB on rank 0, where there is a project; every rank calls it.

    Raises UserError, on all ranks, where it does not let us in. That it is installed is checked before.
    """
    found: list[WandB] = []
    failure = _open(found, project, run_dir, recipe) if project and world.is_main else ""
    if reason := world.from_main(failure):
        raise UserError(
            f"wandb '{project}' cannot be opened ({reason}): call `wandb login`, set WANDB_MODE=offline (and `wandb "
            "sync` later), or leave --wandb out"
        )
    return found


def _open(found: list[WandB], project: str, run_dir: Path, recipe: Mapping[str, object]) -> str:
    """Adds the tracker to `found`; else why there is none."""
    from wandb.errors import Error  # an extra

    try:
        found.append(WandB(project, run_dir, recipe))
    except Error as error:
        return str(error)
    return ""


def _kept_id(run_dir: Path) -> str:
    path = run_dir / ID
    if not path.exists():
        replace_text(path, uuid.uuid4().hex[:8])
    return path.read_text()
