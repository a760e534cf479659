"""What ViTTM refuses, with the reason and the way out."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import lcm

from shards.errors import UserError


def check_known(unknown: Iterable[str], known: Collection[str]) -> None:
    """Raise UserError for the first keyword that the model does not have, naming the nearest that it has."""
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
        raise UserError(f"ViTTM has no option {name!r}, and an option that is ignored would mislead: {remedy}")


def check_choice(option: str, value: object, available: Collection[object]) -> None:
    """Raise UserError unless `value` is among the `available` ones."""
    if value not in available:
        raise UserError(f"{option}={value!r} is not available in ViTTM; it has {', '.join(map(repr, available))}.")


def check_positive(option: str, value: int) -> None:
    """Raise UserError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{option}={value!r}, but it is a number of things, at least 1: give a whole number.")


def check_rate(option: str, rate: float) -> None:
    """Raise UserError unless `rate` is a probability below 1."""
    if not 0 <= rate < 1:
        raise UserError(f"{option}={rate}, but it is the share that is dropped, from 0 to below 1: correct it.")


def check_divides(option: str, divisor: int, name: str, value: int, reason: str) -> None:
    """Raise UserError unless `divisor`, the value of `option`, divides `value`, which the message calls `name`."""
    if divisor < 1 or value % divisor:
        divisors = [n for n in range(1, value + 1) if value % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - divisor))[:3])
        raise UserError(
            f"{option}={divisor} does not divide {name}={value}: {reason}; "
            f"set {option} to {_either(nearest)}, or change {name}."
        )


def check_image_size(image_size: tuple[int, int], patch_sizes: Mapping[str, int]) -> None:
    """Raise UserError unless the patch sizes (option -> pixels) divide both sides of an image (height, width)."""
    given = ", ".join(f"{option}={size}" for option, size in patch_sizes.items())
    if any(not isinstance(size, int) or size < 1 for size in patch_sizes.values()):
        raise UserError(f"{given}: a patch has at least 1 pixel a side; enlarge it.")
    step = lcm(*patch_sizes.values())
    for side in image_size:
        if side < step or side % step:
            below = side // step * step
            must = f"{given.replace(', ', ' and ')} must {'both ' * (len(patch_sizes) > 1)}divide {side}"
            raise UserError(
                f"image size {image_size[0]}x{image_size[1]} cannot be cut into whole patches: {must}; "
                f"the nearest that works is {_either(size for size in (below, below + step) if size)}."
            )


def check_process_tokens(embedder: str, process_tokens: int | None) -> None:
    """Raise UserError where the number of process tokens is given to the embedder that counts patches itself."""
    if process_tokens is None:
        return
    check_positive("process_tokens", process_tokens)
    if embedder == "patch":
        raise UserError(
            f"process_tokens={process_tokens} has no meaning for process_embedder_type='patch', whose tokens are the "
            "patches of process_ps pixels: change process_ps, or take 'downsample' or 'latent'."
        )


def check_pooled_side(process_grid: tuple[int, int], memory_grid: tuple[int, int]) -> None:
    """Raise UserError unless memory's grid can be averaged down to the square grid of process tokens."""
    rows, columns = process_grid
    if rows != columns:
        raise UserError(
            "process_embedder_type='downsample' makes a square of process tokens, but process_ps cuts "
            f"{rows}x{columns} of this image: give the square's side as process_tokens."
        )
    if rows > min(memory_grid):
        raise UserError(
            f"process_tokens={rows}: process_embedder_type='downsample' averages memory tokens to {rows}x{rows}, but "
            f"memory has only {memory_grid[0]}x{memory_grid[1]}: take a smaller process_tokens, or a smaller memory_ps."
        )


def check_stages(
    encoder_depths: Sequence[int], encoder_downsamples: Sequence[int], decoder_depths: Sequence[int]
) -> None:
    """Raise UserError unless the conv memory block's encoder and decoder have the same number of stages."""
    stages = {
        "memory_encoder_depths": encoder_depths,
        "memory_encoder_downsamples": encoder_downsamples,
        "memory_decoder_depths": decoder_depths,
    }
    given = ", ".join(f"{option}={list(values)}" for option, values in stages.items())
    if len({len(values) for values in stages.values()}) > 1:
        raise UserError(
            f"{given}: every stage of the encoder has a depth, a downsampling and a stage of the decoder that undoes "
            "it: give all three the same number of values."
        )
    if min((*encoder_depths, *decoder_depths, 0)) < 0 or min((*encoder_downsamples, 1)) < 1:
        raise UserError(f"{given}: depths are numbers of blocks, from 0; a downsampling is from 1: correct the value.")


def check_exclusions(fusion_type: str, rw_head_type: str, dyna_concat: bool, patch_drop_rate: float) -> None:
    """Raise UserError for options that exclude each other."""
    if fusion_type == "erase" and rw_head_type == "dyna" and not dyna_concat:
        raise UserError(
            "fusion_type='erase' with rw_head_type='dyna' and dyna_concat=False: the head does not look at the stream "
            "that it answers, and the fusion forgets it, so that weights before it would never be trained: take "
            "dyna_concat=True, or another fusion_type."
        )
    sized_by = sized_by_tokens(fusion_type, rw_head_type)
    if patch_drop_rate and sized_by:
        raise UserError(
            f"patch_drop_rate={patch_drop_rate} with {sized_by}: patch dropout changes the number of process tokens "
            "in training, but these weights fit one number of tokens alone: set patch_drop_rate to 0, or change that "
            "option."
        )


def sized_by_tokens(fusion_type: str, rw_head_type: str) -> str | None:
    """The option, with its value, that owns weights which fit one number of tokens alone."""
    if rw_head_type in ("tl", "dyna"):
        return f"rw_head_type={rw_head_type!r}"
    return f"fusion_type={fusion_type!r}" if fusion_type == "add_erase" else None


def check_same_tokens(sized_by: str | None, built: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> None:
    """Raise UserError where the grids of tokens are `found` instead of `built`, and weights depend on them."""
    if sized_by and built != found:
        raise UserError(
            f"{sized_by} owns weights sized by the number of tokens: the model was built for grids of memory and "
            f"process tokens of {_grids(built)}, this image has {_grids(found)}: give images of img_size, or build the "
            "model for these; heads lin, ca, la and lca with fusions residual and erase take any resolution."
        )


def _grids(grids: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{rows}x{columns}" for rows, columns in grids)


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
