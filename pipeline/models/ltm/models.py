"""Models of timm whose transformer blocks merge tokens."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from timm.models.byobnet import ByobNet
from timm.models.efficientvit_mit import EfficientVit, EfficientVitBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipeline.models.ltm.blocks import EfficientViTBlock, Merging, MobileViTBlock, SwinBlock, ViTBlock
from pipeline.models.ltm.chain import Chain, chain
from pipeline.models.ltm.mask import MaskModule
from shards.errors import UserError


class LTM(nn.Module):
    """A model of timm, all of whose transformer blocks merge N tokens into ceil(compression_ratio * N).

    A ratio of 1 leaves the model as it is. Names of weights are timm's, and those of the mask modules more.
    Raises UserError for a ratio that is none.
    """

    kinds: ClassVar[dict[type[nn.Module], type[Merging]]]
    """timm's blocks, and what becomes of them."""

    def __init__(self, *, compression_ratio: float = 0.8, **options: Any) -> None:
        ratio = exact_ratio(compression_ratio)
        super().__init__(**options)
        self.compression_ratio = compression_ratio
        stages = [module for module in self.modules() if isinstance(module, nn.Sequential)]
        for stage in stages if ratio < 1 else []:
            if any(type(block) in self.kinds for block in stage):
                chain(stage, self.kinds, ratio, self.all_learn)

    @property
    def all_learn(self) -> bool:
        """Whether the head reads the tokens that the last block merges."""
        return True

    def chains(self) -> list[Chain]:
        return [module for module in self.modules() if isinstance(module, Chain)]

    def merge_map(self) -> list[Tensor]:
        """The masks G of the last forward pass in eval mode, of every block from the first to the last: (B S, N, P),
        where the S sets of tokens of an image merge apart; [] before one, and at ratio 1."""
        merging = [pair for stage in self.chains() for pair in stage.merging()]
        return [merges.dense(block.mask.num_merged(merges.groups.shape[1])) for block, merges in merging]

    def mask_names(self) -> list[str]:
        """Names of the weights that the model without merging lacks."""
        modules = [(name, module) for name, module in self.named_modules() if isinstance(module, MaskModule)]
        return [f"{name}.{own}" for name, module in modules for own, _ in module.named_parameters()]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Of the model without merging, too: the mask modules stay as they are then. Some of their weights without the
        others are an error, as any that is missing."""
        names = self.mask_names()
        if names and not any(name in state_dict for name in names):
            own = self.state_dict()
            state_dict = {**state_dict, **{name: own[name] for name in names}}
        return super().load_state_dict(state_dict, strict, assign)


class _Chained(LTM):
    """Of models whose blocks timm would checkpoint one by one, past the chain that hands masks over."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the activations of every block are computed again in the backward pass."""
        if not self.chains():
            super().set_grad_checkpointing(enable)  # type: ignore[misc] # timm's models have it
        for stage in self.chains():
            stage.grad_checkpointing = enable


class LTMViT(_Chained, VisionTransformer):
    """ViT: every block hands on the tokens that it merged. Where the head reads the class token alone, nothing is to be
    learnt about those of the last block."""

    kinds: ClassVar = {Block: ViTBlock}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for stage in self.chains():
            for block in stage:
                assert isinstance(block, ViTBlock)
                block.num_prefix_tokens = self.num_prefix_tokens

    @property
    def all_learn(self) -> bool:
        return self.global_pool != "token"

    def forward_intermediates(self, *arguments: Any, **options: Any) -> Any:
        """Raises UserError where tokens are merged: what is left of them has no map."""
        if self.chains():
            raise UserError(
                f"compression_ratio={self.compression_ratio}: a ViT that merges its tokens has no feature maps, as the "
                "tokens of its blocks are on no grid: take ltm_swin_*, ltm_mobilevit_* or ltm_efficientvit_b1, or "
                "compression_ratio=1"
            )
        return super().forward_intermediates(*arguments, **options)


class LTMSwin(_Chained, SwinTransformer):
    """Swin. `width_factor`: its widths, and its heads, over those of the size."""

    kinds: ClassVar = {SwinTransformerBlock: SwinBlock}

    def __init__(
        self, *, embed_dim: int, num_heads: tuple[int, ...], width_factor: float = 1.0, **options: Any
    ) -> None:
        width, *heads = _scaled((embed_dim, *num_heads), width_factor)
        super().__init__(embed_dim=width, num_heads=tuple(heads), **options)


class LTMMobileViT(LTM, ByobNet):
    """MobileViT; timm's own `width_factor` is of its convolutions."""

    kinds: ClassVar = {Block: MobileViTBlock}


class LTMEfficientViT(LTM, EfficientVit):
    """EfficientViT. `width_factor`: its widths over those of the size; `img_size` decides nothing."""

    kinds: ClassVar = {EfficientVitBlock: EfficientViTBlock}

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        head_widths: tuple[int, ...],
        head_dim: int,
        width_factor: float = 1.0,
        img_size: int | tuple[int, int] = 224,
        **options: Any,
    ) -> None:
        widths, head_widths = _scaled(widths, width_factor), _scaled(head_widths, width_factor)
        if widths[-2] < head_dim:
            raise UserError(
                f"width_factor={width_factor} leaves {widths[-2]} channels to the first blocks that attend, but a head "
                f"of them has {head_dim}: enlarge it"
            )
        super().__init__(widths=widths, head_widths=head_widths, head_dim=head_dim, **options)


def _scaled(numbers: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """At least 1 each. Raises UserError for a factor that is not positive."""
    if not factor > 0:
        raise UserError(
            f"width_factor={factor}: it multiplies the widths of the model, so that it is above 0: enlarge it"
        )
    return tuple(max(1, round(number * factor)) for number in numbers)


def exact_ratio(given: float) -> Fraction:
    """As it is written: 0.8 is 4/5. Raises UserError where it is not above 0 and at most 1."""
    try:
        ratio = Fraction(str(given))
    except ValueError:
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise UserError(
            f"compression_ratio={given}: it is the share of its tokens that a block keeps, above 0 and at most 1 "
            "(which merges none): correct it"
        )
    return ratio
