"""Whom the tokens of a model read from and take from, as weights.

Shapes: B batch, H heads, Nm/Np memory/process tokens, M tokens that ask, N tokens that are asked.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.vittm.embed import LatentEmbedder
from pipeline.models.vittm.heads import RW_HEADS
from pipeline.models.vittm.model import ViTTM
from shards.errors import UserError


class LayerAttention(NamedTuple):
    """Of one layer: shares that sum to 1 over the last dimension."""

    read: Tensor
    """(B, H, Np, Nm): of what a process token reads, the share that a memory token gives."""
    write: Tensor
    """(B, H, Nm, Np): of what is written to a memory token, the share that a process token gives. "conv" memory blocks
    are written to when they hold fewer tokens than Nm."""


class Stream(NamedTuple):
    """Tokens in a grid (rows, columns); `placed` where they are patches of the image."""

    name: str
    grid: tuple[int, int]
    placed: bool

    @property
    def one(self) -> str:
        return f"{self.name} {'patch' if self.placed else 'token'}"

    @property
    def size(self) -> int:
        return self.grid[0] * self.grid[1]


def streams(model: ViTTM, image_size: Sequence[int]) -> tuple[Stream, Stream]:
    """Memory's and process's, of images (height, width)."""
    memory, process = model.grids_of((image_size[0], image_size[1]))
    placed = not isinstance(model.process_embedder, LatentEmbedder)
    return Stream("memory", memory, True), Stream("process", process, placed)


@torch.no_grad()
def attention_maps(model: ViTTM, images: Tensor) -> list[LayerAttention]:
    """The weights of each layer for images (B, in_chans, height, width), as the model's call comes by them: it may be
    sharded, and its layers compiled.

    Raises UserError for heads that have none, and for images as `forward_features`.
    """
    check_has_attention(model)
    heads: list[Any] = [head for layer in model.layers for head in (layer.read_head, layer.write_head)]
    found: list[Tensor] = []

    def keep(head: Any, arguments: tuple, streams: dict[str, Tensor], output: Tensor) -> None:
        found.append(head.attention(**streams))

    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):  # a compiled layer has no hooks
        for head in heads:
            hooks.enter_context(head.register_forward_hook(keep, with_kwargs=True))
        model(images)
    return [LayerAttention(read, write) for read, write in zip(found[::2], found[1::2], strict=True)]


def head_type(model: ViTTM) -> str:
    """The model's `rw_head_type`."""
    (name,) = (name for name, kind in RW_HEADS.items() if type(model.layers[0].read_head) is kind)
    return name


def has_attention(model: ViTTM) -> bool:
    return head_type(model) in _able()


def _able() -> list[str]:
    return [name for name, kind in RW_HEADS.items() if hasattr(kind, "attention")]


def check_has_attention(model: ViTTM) -> None:
    """Raise UserError where the model's heads take no average whose weights tell what was read."""
    name = head_type(model)
    if not has_attention(model):
        raise UserError(
            f"rw_head_type={name!r} has no attention to show: it makes its weights without comparing the token that "
            f"asks with those that it reads; give a model with one of the heads {', '.join(_able())}."
        )
