"""Other programs' formats of a model, each read back and compared before it counts as written."""

import io
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from shards.errors import UserError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CLOSE = 1e-4
BATCH = 2


def check_onnx_installed() -> None:
    """Raises UserError where what `write_onnx` needs is not there."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}, not installed here: pip install '.[export]'")


def images_for(image_size: int) -> Tensor:
    """[BATCH + 1, 3, S, S]: another batch than the formats are traced with."""
    return torch.randn(BATCH + 1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference of logits. Raises RuntimeError where it is above the tolerance."""
    difference = (found - expected).abs().max().item()
    if found.shape != expected.shape or not difference <= tolerance:
        raise RuntimeError(
            f"{name} computes other logits than the model: they differ by {difference}, more than {tolerance}; "
            "nothing was exported"
        )
    return difference


@torch.no_grad()
def write_torch_export(model: nn.Module, images: Tensor, path: Path) -> float:
    """A program of torch.export for any batch; how far its logits are from the model's."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images[:BATCH],), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return compare(path.name, torch.export.load(path).module()(images), model(images), CLOSE)


@torch.no_grad()
def write_onnx(model: nn.Module, images: Tensor, path: Path) -> float:
    """One ONNX file for any batch, "image" to "logits"; how far onnxruntime's logits are from the model's."""
    import onnxruntime

    with redirect_stdout(io.StringIO()):  # the exporter says what it does, whatever it is told
        torch.onnx.export(
            model,
            (images[:BATCH],),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["image"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images.numpy()})
    return compare(path.name, torch.from_numpy(logits), model(images), CLOSE)
