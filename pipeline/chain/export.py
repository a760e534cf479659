"""The stage that exports."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.backend import World
from pipeline.chain.stage import OfWeights, Stage
from pipeline.export import Formats, Licences, find, write
from pipeline.export.formats import check_onnx_installed
from pipeline.record import write_outcome


@dataclass(frozen=True)
class Exporting:
    """How trained weights are exported; see tools/export.py."""

    onnx: bool = False
    """Also model.onnx."""
    torch_export: bool = False
    """Also model.pt2, a program of torch.export."""
    licence: str = "unknown"
    """Of these weights, for the model card."""
    data_licence: str = "unknown"
    """Of the data they were trained on."""
    start_licence: str = "unknown"
    """Of the weights they started from."""


@dataclass(frozen=True)
class Export(OfWeights):
    """Writes what is handed over in timm's layout, into `timm` below its directory; rank 0 does it."""

    kind: ClassVar[str] = "export"
    OUT: ClassVar[str] = "timm"
    options: Exporting = field(default_factory=Exporting)

    def check(self, world: World, source: Stage | None) -> None:
        if self.options.onnx:
            check_onnx_installed()

    def inputs(self) -> dict[str, object]:
        return {f"export.{name}": value for name, value in vars(self.options).items()}

    def sources(self) -> dict[str, Any]:
        return {}

    def work(self, directory: Path, start: Path | None, world: World) -> str:
        world.place.at(f"exporting {start}")
        world.on_main(lambda: self._write(directory, start))
        return "done"

    def outputs(self, directory: Path) -> list[Path]:
        return sorted(path for path in (directory / self.OUT).iterdir() if path.is_file())

    def _write(self, directory: Path, start: Path | None) -> None:
        assert start is not None
        began = time.monotonic()
        options = self.options
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory / self.OUT, ignore_errors=True)  # of an attempt that was killed before it was noted
        licences = Licences(options.licence, options.data_licence, options.start_licence)
        formats = Formats(options.onnx, options.torch_export)
        differences = write(find(start), directory / self.OUT, formats, licences)
        worst = max(differences.values())
        reason = f"wrote {', '.join(differences)}; logits within {worst:.1e} of the model's"
        write_outcome(directory, "done", 0, reason, seconds=time.monotonic() - began)
