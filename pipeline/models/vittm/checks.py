"""What ViTTM refuses, with the reason and the way out."""

import difflib
from collections.abc import Collection, Iterable
from math import lcm

from shards.errors import UserError


def check_known(unknown: Iterable[str], known: Collection[str]) -> None:
    """Raise UserError for the first keyword that the model does not have, naming the nearest that it has."""
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}."
        raise UserError(f"ViTTM has no option {name!r}, and an option that is ignored would mislead: {remedy}")


def check_choice(option: str, value: str, available: Collection[str]) -> None:
    """Raise UserError unless `value` is among the `available` ones."""
    if value not in available:
        raise UserError(f"{option}={value!r} is not available in ViTTM; it has {', '.join(map(repr, available))}.")


def check_divides(option: str, divisor: int, name: str, value: int, reason: str) -> None:
    """Raise UserError unless `divisor`, the value of `option`, divides `value`, which the message calls `name`."""
    if divisor < 1 or value % divisor:
        divisors = [n for n in range(1, value + 1) if value % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - divisor))[:3])
        raise UserError(
            f"{option}={divisor} does not divide {name}={value}: {reason}; "
            f"set {option} to {_either(nearest)}, or change {name}."
        )


def check_image_size(image_size: tuple[int, int], memory_ps: int, process_ps: int) -> None:
    """Raise UserError unless both patch sizes (pixels) divide both sides of an image (height, width in pixels)."""
    if min(memory_ps, process_ps) < 1:
        raise UserError(
            f"memory_ps={memory_ps}, process_ps={process_ps}: a patch has at least 1 pixel a side; enlarge it."
        )
    step = lcm(memory_ps, process_ps)
    for side in image_size:
        if side < step or side % step:
            below = side // step * step
            raise UserError(
                f"image size {image_size[0]}x{image_size[1]} cannot be cut into whole patches: "
                f"memory_ps={memory_ps} and process_ps={process_ps} must both divide {side}; "
                f"the nearest that works is {_either(size for size in (below, below + step) if size)}."
            )


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
