"""ToE, Token Expansion (Huang et al. 2024, arXiv 2404.00672): training on a part of the tokens, and on more by stages.

Shapes: B batch, N tokens of patches, K those that are kept, n those that a round adds, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.ltm import LTM
from pipeline.models.precision import no_autocast
from pipeline.models.vittm import ViTTM
from pipeline.recipe import TokenExpansion as Options
from shards.errors import UserError


class TokenExpansion(nn.Module):
    """What stands between two blocks; it has no weights and no state but its stage.

    From the epoch `steps[t]` on, `keep_rates[t]` of the tokens are kept: those on a grid (`initial_keep_rate` of all),
    and those that are least like any token that is kept already, added in `repetitions` rounds a stage. The others
    are merged into the kept ones that they are most like. Off in eval mode, before `steps[0]`, and in a last stage that
    keeps all. The first `num_prefix_tokens` and the last `num_suffix_tokens` are left alone.

    Raises UserError for options that cannot be.
    """

    def __init__(
        self,
        steps: Sequence[int],
        keep_rates: Sequence[float],
        initial_keep_rate: float,
        repetitions: int,
        distance: str = "cosine",
        num_prefix_tokens: int = 1,
        num_suffix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.options = Options(tuple(steps), tuple(keep_rates), initial_keep_rate, repetitions, distance)  # type: ignore[arg-type]
        if found := list(self.options.errors()):
            raise UserError(f"token expansion cannot be as it is asked for: {'; '.join(found)}")
        if min(num_prefix_tokens, num_suffix_tokens) < 0:
            raise UserError(
                f"num_prefix_tokens={num_prefix_tokens}, num_suffix_tokens={num_suffix_tokens}: numbers of tokens that "
                "are left alone, from 0; correct them."
            )
        self.num_prefix_tokens, self.num_suffix_tokens = num_prefix_tokens, num_suffix_tokens
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is trained, counted from 0."""
        self.stage = sum(step <= epoch for step in self.options.steps)

    @property
    def is_on(self) -> bool:
        last = self.stage == len(self.options.steps) and self.options.keep_rates[-1:] == (1,)
        return self.training and self.stage > 0 and not last

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, prefix + N + suffix, D) -> those that are kept, in the order of their selection, and where they stood,
        int64 (B, prefix + K + suffix); as they are, with None, where it is off.

        Raises UserError where N tokens are too few to begin with.
        """
        return self._expand(tokens) if self.is_on else (tokens, None)

    def _expand(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Apart from `forward`, which without a tensor's operation is nothing to compile: dynamo then takes this."""
        apart = self.num_prefix_tokens, self.num_suffix_tokens
        num_tokens = tokens.shape[1] - sum(apart)
        sizes = (apart[0], num_tokens, apart[1])
        prefix, patches, suffix = tokens.split(sizes, dim=1)
        with no_autocast(tokens.device):  # it would round the tokens, and the likenesses by which they are ranked
            selected, target = _select(patches, schedule(num_tokens, self.options, self.stage), self.options.distance)
            merged = _merge(patches, target, selected.shape[1])
        first, _, last = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1).split(sizes, dim=1)
        return torch.cat((prefix, merged, suffix), dim=1), torch.cat((first, selected + apart[0], last), dim=1)


class Schedule(NamedTuple):
    """Every `stride`-th token is selected, the first `num_first` of these; then so many in each of the rounds."""

    stride: int
    num_first: int
    rounds: tuple[int, ...]


def schedule(num_tokens: int, options: Options, stage: int) -> Schedule:
    """How the tokens of a stage, counted from 1, are selected: through all stages before it.

    The authors' arithmetic in floats: stage t adds int(N (r_t - r_t-1)) tokens, the last stage those up to
    int(N r_S). Raises UserError where not one token is on the grid.
    """
    first = options.initial_keep_rate
    num_first = int(num_tokens * first)
    if num_first < 1:
        raise UserError(
            f"initial_keep_rate {first} of {num_tokens} tokens is none to begin token expansion with: raise it to at "
            f"least {1 / max(1, num_tokens):.3g}, or take smaller patches or larger images"
        )
    rates = (first, *options.keep_rates)
    added = [high - low for low, high in zip(rates, options.keep_rates, strict=False)]
    numbers = [int(num_tokens * rate) for rate in added]
    numbers[-1] = int(num_tokens * rates[-1]) - int(num_tokens * (first + sum(added[:-1])))
    rounds = [number for total in numbers[:stage] for number in _rounds(total, options.repetitions)]
    return Schedule(int(1 // first), num_first, tuple(number for number in rounds if number))


def _rounds(total: int, repetitions: int) -> list[int]:
    """The last takes what is left over."""
    each = total // repetitions
    return [*[each] * (repetitions - 1), total - each * (repetitions - 1)]


def _cosine(unit: Tensor) -> Tensor:
    return unit @ unit.mT


def _manhattan(unit: Tensor) -> Tensor:
    return -torch.cdist(unit, unit, p=1)


def _euclidean(unit: Tensor) -> Tensor:
    return -torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")


_LIKENESS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": _cosine,
    "manhattan": _manhattan,
    "euclidean": _euclidean,
}
"""(B, N, D) of length 1 -> (B, N, N), the larger the more alike two tokens are."""


@torch.no_grad()
def _select(patches: Tensor, schedule: Schedule, distance: str) -> tuple[Tensor, Tensor]:
    """(B, N, D) -> the selected tokens (B, K), and of every token which of these it belongs to, (B, N) from 0 to K.

    All likenesses are computed once; a round looks only at those to the tokens that were just selected. All numbers are
    known beforehand, so that nothing waits for the device, and a stage is one graph.
    """
    batch, num_tokens, _ = patches.shape
    alike = _LIKENESS[distance](F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1))
    grid = torch.arange(num_tokens, device=patches.device)[:: schedule.stride][: schedule.num_first]
    selected = grid.expand(batch, -1)
    nearest, target = alike[:, :, :: schedule.stride][:, :, : schedule.num_first].max(dim=2)
    for number in schedule.rounds:
        scores = nearest.scatter(1, selected, inf)
        new = scores.sort(dim=1, stable=True).indices[:, :number]  # topk leaves the order of equals open
        likeness, place = alike.gather(2, new.unsqueeze(1).expand(-1, num_tokens, -1)).max(dim=2)
        target = torch.where(likeness > nearest, place + selected.shape[1], target)
        nearest, selected = nearest.maximum(likeness), torch.cat((selected, new), dim=1)
    own = torch.arange(selected.shape[1], device=patches.device).expand(batch, -1)
    return selected, target.scatter(1, selected, own)


def _merge(patches: Tensor, target: Tensor, num_selected: int) -> Tensor:
    """(B, N, D), (B, N) -> (B, K, D): the mean of the tokens that belong together.

    A product with zeros and ones: unlike sums by index, it has the same order in every run on a GPU.
    """
    numbers = torch.arange(num_selected, device=patches.device).unsqueeze(1)
    belongs = (target.unsqueeze(1) == numbers).to(patches.dtype)  # (B, K, N)
    return belongs @ patches / belongs.sum(dim=2, keepdim=True)


@dataclass(frozen=True)
class _Before:
    """A hook before a layer: its input number `position` is expanded."""

    expansion: TokenExpansion
    position: int

    def __call__(self, layer: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        tokens, _ = self.expansion(inputs[self.position])
        return (*inputs[: self.position], tokens, *inputs[self.position + 1 :])


@dataclass(frozen=True)
class TokenStages:
    """Tells an expansion at which step the training is. Without one (no stages) it does nothing."""

    expansion: TokenExpansion
    batches_per_epoch: int

    @classmethod
    def of(cls, options: Options, model: nn.Module, batches_per_epoch: int) -> "TokenStages":
        """Puts the expansion, where the recipe has one, into `model`. Raises UserError as `expand_tokens` does."""
        fields = vars(options)
        expansion = TokenExpansion(**fields, num_prefix_tokens=getattr(model, "num_prefix_tokens", 0))
        if options.steps:
            expand_tokens(model, expansion)
        return cls(expansion, batches_per_epoch)

    def __call__(self, step: int) -> None:
        """The next step to train, counted from 0."""
        self.expansion.set_epoch(step // self.batches_per_epoch)


def expand_tokens(model: nn.Module, expansion: TokenExpansion) -> nn.Module:
    """The model, timm's ViT or DeiT or a ViTTM (whose process tokens are expanded), with `expansion` between its first
    and its second layer; it follows the model's train() and eval(). In place, and before the model is wrapped.

    Raises UserError for models that cannot do with fewer tokens, and where it leaves other tokens alone than the model
    has apart.

    The place is a hook before layer 1: names of weights stay, and whoever calls the layers meets it. What wraps a layer
    comes inside of it: a layer that is computed twice keeps the expanded tokens, so that they are selected once; of
    compiled layers the selection is one graph more a stage; what FSDP2 and ZeRO do before a layer is done before or
    behind all of it. Where timm checkpoints blocks from without, the selection is made twice, and is the same.
    """
    layers, position, num_tokens = _process(model) if isinstance(model, ViTTM) else _blocks(model)
    _check(model, expansion, len(layers))
    if expansion.options.steps:
        schedule(num_tokens, expansion.options, stage=0)  # refuses too few tokens
    layers[1].register_forward_pre_hook(_Before(expansion, position))
    model.token_expansion = expansion
    return model


def _blocks(model: nn.Module) -> tuple[nn.Sequential, int, int]:
    """The layers, the number of their input that is tokens, and how many tokens of patches there are."""
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"token expansion is for timm's ViT and DeiT, T2T-ViT and ViTTM, whose blocks take any number of tokens, "
            f"but the model is a {type(model).__name__}: leave token_expansion.steps empty, or take another model."
        )
    if isinstance(model, LTM) and model.chains():
        raise UserError(
            f"token expansion and compression_ratio={model.compression_ratio} both choose among tokens: leave "
            "token_expansion.steps empty, or take compression_ratio 1, which merges none."
        )
    return model.blocks, 0, model.patch_embed.num_patches


def _process(model: ViTTM) -> tuple[nn.ModuleList, int, int]:
    """The same of ViTTM."""
    if model.sized_by:
        raise UserError(
            f"token expansion changes the number of process tokens, but {model.sized_by} owns weights sized by it: "
            "take rw_head_type lin, ca, la or lca with fusion_type residual or erase, or leave "
            "token_expansion.steps empty."
        )
    return model.layers, 1, prod(model.grids[1])


def _check(model: nn.Module, expansion: TokenExpansion, num_layers: int) -> None:
    if hasattr(model, "token_expansion"):
        raise UserError("the model has a token expansion already: build a new model for another one.")
    if num_layers < 2:
        raise UserError(f"token expansion stands between two layers, but the model's depth is {num_layers}: deepen it.")
    for name in ("num_prefix_tokens", "num_suffix_tokens"):
        given, own = getattr(expansion, name), getattr(model, name, 0)
        if given != own:
            raise UserError(
                f"token expansion leaves {name}={given} tokens alone, but a {type(model).__name__} has {own} of them: "
                f"give {name}={own}."
            )
