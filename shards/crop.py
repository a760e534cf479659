"""Stub of the lead until the helper's module is there."""
from typing import NamedTuple
class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int
def decode_box(data, choose): raise NotImplementedError
