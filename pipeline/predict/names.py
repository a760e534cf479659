"""Words for ImageNet's class names."""

import functools

from timm.data import ImageNetInfo


@functools.cache
def _info() -> ImageNetInfo:
    return ImageNetInfo()


def readable(class_name: str) -> str:
    """What WordNet calls a wnid ("n01440764": "tench, Tinca tinca"); "" for other names."""
    try:
        return _info().label_name_to_description(class_name)
    except KeyError:
        return ""
