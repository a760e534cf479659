"""Reference outputs of the authors' program, and small models for the tests of this folder."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.vittm import ViTTM, remap_upstream_state_dict

GOLDEN = Path(__file__).parents[1] / "golden" / "vittm"
REFERENCES = (
    "lin_residual",
    "lin_same_patch",
    "lin_resampled_at_48",
    "lin_add_erase_mlp",
    "ca_erase",
    "la_residual",
    "lca_residual",
    "tl_residual",
    "conv_memory",
)


@dataclass(frozen=True)
class Golden:
    """One reference file: the options of its model, its weights, inputs and outputs, and gradient norms by key."""

    options: dict
    weights: dict[str, torch.Tensor]
    given: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    grad_norms: dict[str, float | None]  # None: created by the authors' program, and never used

    def model(self) -> ViTTM:
        model = ViTTM(**self.options)
        model.load_state_dict(remap_upstream_state_dict(self.weights, model))
        return model


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_golden(name: str) -> Golden:
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    ours = inspect.signature(ViTTM).parameters
    options = {option: value for option, value in described["config"].items() if option in ours}
    parts = (_with_prefix(tensors, prefix) for prefix in ("state.", "in.", "out."))
    return Golden(options, *parts, described["grad_norms"])


@pytest.fixture(params=REFERENCES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read_golden(request.param)


@pytest.fixture
def small_options() -> dict:
    return {
        "img_size": 32,
        "memory_ps": 4,
        "process_ps": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 7,
    }


@pytest.fixture
def small(small_options: dict) -> ViTTM:
    torch.manual_seed(0)
    return ViTTM(**small_options)
