"""Arithmetic that a model keeps exact, whatever precision it trains in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """torch refuses even to switch autocast off where it has none, as on the meta device."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
