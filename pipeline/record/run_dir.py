"""A run's directory."""

import subprocess
from pathlib import Path
from tempfile import TemporaryFile

from shards.errors import UserError

LOGS = "logs"
"""Below a run's directory: what its ranks printed."""
WEIGHTS = ("model", "ema", "best_model", "best_ema")
"""What a run leaves: the first two at its end, the best ones on the way; those with "ema" are averages."""


def check_writable(run_dir: Path) -> None:
    """Raises UserError unless a file can be written in `run_dir`, which is made if need be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise unwritable(run_dir, error) from error


def weights_path(run_dir: Path, name: str) -> Path:
    """Where a run leaves its weights; name: one of WEIGHTS."""
    return run_dir / "weights" / f"{name}.safetensors"


def run_of(path: Path) -> Path:
    """The directory of the run that a file of its weights/, or one of its checkpoints/, belongs to."""
    return path.absolute().parent.parent


def code_version() -> str:
    """The commit of this code, as git describes it; "unknown" where it is not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def unwritable(run_dir: Path, error: OSError) -> UserError:
    """To raise where it takes no file."""
    return UserError(
        f"run_dir {run_dir} cannot be written ({error}): checkpoints, metrics and the outcome go there; mend its "
        "permissions, make room, or give another --run-dir"
    )
