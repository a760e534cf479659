"""What timm's tools ask of a vision transformer: feature maps, groups of parameters, activation checkpointing."""

from collections.abc import Callable
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pipeline.models.vittm.checks import check_choice


class TimmInterface:
    """The part of ViTTM that is timm's convention."""

    embed_dim: int
    patch_sizes: dict[str, int]
    layers: nn.ModuleList
    norm: nn.Module
    process_norm: nn.Module
    fc_norm: nn.Module
    fc_norm_process: nn.Module
    embed: Callable[[Tensor], tuple[Tensor, Tensor]]
    grids_of: Callable[[tuple[int, int]], tuple[tuple[int, int], tuple[int, int]]]
    run_layer: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    reset_classifier: Callable[[int], None]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of the memory tokens after each layer: channels, and pixels a token."""
        reduction = self.patch_sizes["memory_ps"]
        layers = range(len(self.layers))
        return [{"module": f"layers.{i}", "num_chs": self.embed_dim, "reduction": reduction} for i in layers]

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizers leave undecayed, and ours where optimizer.decay is "matrices"."""
        return {"memory_pos_embed", "process_pos_embed", "process_embedder.process_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters by depth; fusions, which every layer shares, belong to the stem."""
        stem = r"^(?:memory|process)_(?:embedder|pos_embed)|^(?:read|write)_fusion"  # timm reads groups as numbers
        return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^(?:process_)?norm\.", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether layers forget what is inside them, and compute it anew in the backward pass."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Memory after each of the layers `indices` (the last n, or these; None: all), for dense tasks, as timm has it.

        Maps are (B, D, rows, columns), or (B, Nm, D) with `output_fmt` "NLC", after the memory norm with `norm`.
        Returns ((memory, process), maps); the maps alone with `intermediates_only`; with `output_dict` the same under
        the names "image_features" and "image_intermediates". There are no prefix tokens to return.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken, last = feature_take_indices(len(self.layers), indices)
        memory, process = self.embed(x)
        maps = []
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            memory, process = self.run_layer(layer, memory, process)
            if i in taken:
                maps.append(self.norm(memory) if norm else memory)
        if output_fmt == "NCHW":
            grid, _ = self.grids_of((x.shape[-2], x.shape[-1]))
            maps = [tokens.mT.unflatten(2, grid).contiguous() for tokens in maps]
        found = {"image_intermediates": maps}
        if intermediates_only:
            return found if output_dict else maps
        features = self.norm(memory), self.process_norm(process)
        return found | {"image_features": features} if output_dict else (features, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these layers; their indices from the first."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm, self.process_norm = nn.Identity(), nn.Identity()
        if prune_head:
            self.fc_norm, self.fc_norm_process = nn.Identity(), nn.Identity()
            self.reset_classifier(0)
        return taken
