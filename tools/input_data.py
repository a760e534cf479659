"""What tools/bench_input.py reads: the same images in every loader's form; and the environment of the other loaders."""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from shards.index import Index
from tools.benchmarks import JPEGS, ROOT, make_images

LOADERS_FILE = ROOT / "benchmarks/peers/loaders.py"
REQUIREMENTS = ROOT / "benchmarks/peers/requirements.txt"
NUM_SHARDS = 22


@dataclass(frozen=True)
class Data:
    """Below `root`, of each size: `num_timed` images and a tenth more, for what a run reads before and after."""

    root: Path
    num_timed: int
    num_different: int

    def folder(self, size: str, form: str) -> Path:
        return self.root / f"{size}-{self.num_timed}-{self.num_different}" / form

    def prepare(self, size: str, form: str, environment: Path) -> None:
        """Writes the images of a size in a form, and as files, unless they are there."""
        for each in ("images", form):
            out, partial = self.folder(size, each), self.folder(size, f"{each}.partial")
            if not out.exists():
                print(f"writing {out}", flush=True)
                shutil.rmtree(partial, ignore_errors=True)
                self._write(size, each, partial, environment)
                partial.rename(out)

    def mean_bytes(self, size: str) -> dict[str, int]:
        """Of an image, in the shards without and with restart markers that there are."""
        folders = {form: self.folder(size, form) for form in ("shards", "markers")}
        indices = {form: Index.load(folder) for form, folder in folders.items() if folder.exists()}
        return {form: round(index.offsets("train")["size"].mean()) for form, index in indices.items()}

    def _write(self, size: str, form: str, out: Path, environment: Path) -> None:
        number, images = self.num_timed + self.num_timed // 10, str(self.folder(size, "images"))
        if form == "images":
            make_images(out, *JPEGS[size], number, self.num_different, optimize=True)
        elif form in ("shards", "markers"):
            options = ["--split", "train", "--shard-size", str(-(-number // NUM_SHARDS))]
            options += ["--restart-markers"] * (form == "markers")
            _call(sys.executable, str(ROOT / "tools/make_shards.py"), "folder", images, str(out), *options)
        else:
            _call(str(environment / "bin/python"), str(LOADERS_FILE), f"loaders:write_{form}", images, str(out))


def make_environment(environment: Path) -> None:
    """A virtual environment with REQUIREMENTS before all that this one has, unless it is there."""
    installed = environment / "installed.txt"
    if installed.exists() and installed.read_bytes() == REQUIREMENTS.read_bytes():
        return
    print(f"installing {environment}", flush=True)
    _call(sys.executable, "-m", "venv", "--clear", str(environment))
    python = str(environment / "bin/python")
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _call(python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(REQUIREMENTS))
    shutil.copy(REQUIREMENTS, installed)


def _call(*command: str) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
