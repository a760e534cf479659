"""Budgets and shares as people write them: `100`, `0.01%`."""

import re
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How many of a source's or a split's samples may be bad: a count, or a share of them."""

    text: str = "0.01%"

    def __post_init__(self) -> None:
        self.allows(0)

    def allows(self, num_images: int) -> int:
        """The number of them, rounded down; UserError for a text that is no budget."""
        if re.fullmatch(r"\d+", self.text):
            return int(self.text)
        return int(share(self.text, "a budget of bad samples") * num_images)


def share(text: str, what: str) -> float:
    """`1%` as 0.01; UserError where it is not a percentage in [0, 100]."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)%", text)
    if not match or float(match[1]) > 100:
        raise UserError(f"{what} of {text!r}: give a percentage from 0% to 100%, as in 1%")
    return float(match[1]) / 100
