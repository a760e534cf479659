"""The table of optimizers: how each is made, and on which backends it runs. `--help` prints it, `check` enforces it."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.optim
import torch
import torch_optimizer
from torch.optim import Optimizer

from pipeline.optim.lamb import Lamb
from pipeline.optim.shampoo import Shampoo
from pipeline.recipe import Optimizer as Section
from shards.errors import UserError

LR = 1e-3  # what every constructor takes; the learning rate is set before each step
COLLECTION = "torch_optimizer:"
UNUSABLE = {
    "Adahessian": "it needs second derivatives, which the training step does not compute",
    "Lookahead": "it is a wrapper around another optimizer",
}
LAUNCH_FILES = {"ddp": "ds_configs/ddp_*.yaml", "fsdp": "ds_configs/fsdp_*.yaml", "deepspeed": "ds_configs/zero*.yaml"}


@dataclass(frozen=True)
class OptimizerEntry:
    """make: from torch's parameter groups and the recipe's section; backends: one process counts as ddp; reason: why
    not on the others; split_hidden: weights of hidden layers come in groups of their own."""

    make: Callable[[list[dict[str, Any]], Section], Optimizer]
    backends: tuple[str, ...]
    note: str
    reason: str = ""
    split_hidden: bool = False


def find(name: str) -> OptimizerEntry:
    """Raises UserError where there is no such optimizer."""
    if name.startswith(COLLECTION):
        collected(name)
        return OPTIMIZERS[COLLECTION + "NAME"]
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name '{name}' is none of {', '.join(OPTIMIZERS)}{_nearest(name, list(OPTIMIZERS))}")
    return OPTIMIZERS[name]


def check(name: str, strategy: str) -> None:
    """Raises UserError where there is no such optimizer, or not on this backend."""
    entry = find(name)
    if strategy not in entry.backends:
        others = [other for other, found in OPTIMIZERS.items() if strategy in found.backends]
        files = [LAUNCH_FILES[backend] for backend in entry.backends]
        raise UserError(
            f"optimizer.name '{name}' does not run on {strategy}, only on {' and '.join(entry.backends)}: "
            f"{entry.reason}. Start through {' or '.join(files)}, or take --optimizer.name {' or '.join(others)}"
        )


def describe() -> str:
    """The table, a line an optimizer."""
    lines = [f"{name:<22}{', '.join(entry.backends):<22}{entry.note}" for name, entry in OPTIMIZERS.items()]
    return "\n".join(("--optimizer.name, and the backends that it runs on (one process counts as ddp):", *lines))


def collected(name: str) -> type[Optimizer]:
    """The class of torch-optimizer that "torch_optimizer:NAME" means. Raises UserError where it has none, or one that
    cannot train here."""
    classes = {
        each: found
        for each in torch_optimizer.__all__
        if inspect.isclass(found := getattr(torch_optimizer, each)) and issubclass(found, Optimizer)
    }
    chosen = name.removeprefix(COLLECTION)
    if chosen not in classes:
        raise UserError(
            f"optimizer.name '{name}': torch-optimizer {torch_optimizer.__version__} has no optimizer '{chosen}', but "
            f"{', '.join(classes)}{_nearest(chosen, list(classes), COLLECTION)}"
        )
    if chosen in UNUSABLE:
        raise UserError(f"optimizer.name '{name}' cannot train here: {UNUSABLE[chosen]}; take another optimizer")
    return classes[chosen]


def _adamw(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups, lr=LR, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=fused
    )


def _lamb(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    return Lamb(groups, lr=LR, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def _muon(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    """Its updates have the size of AdamW's, so that both parts share one learning rate."""
    return timm.optim.Muon(groups, lr=LR, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def _shampoo(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    return Shampoo(groups, LR, section.betas, weight_decay=section.weight_decay, **vars(section.shampoo))


def _soap(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    from pytorch_optimizer import SOAP  # imports transformers

    return SOAP(groups, lr=LR, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)


def _collected(groups: list[dict[str, Any]], section: Section) -> Optimizer:
    """With those of the section's values that it knows by the same names, and otherwise its own defaults; learning
    rates of its own (Adafactor) are off where they can be."""
    make = collected(section.name)
    known = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    given: dict[str, Any] = {"lr": LR, "weight_decay": section.weight_decay, "relative_step": False}
    if isinstance(known.get("betas"), tuple) and len(known["betas"]) == len(section.betas):
        given["betas"] = section.betas
    if isinstance(known.get("eps"), float):
        given["eps"] = section.eps
    optimizer = make(groups, **{name: value for name, value in given.items() if name in known})
    if isinstance(optimizer, torch_optimizer.Lamb):
        optimizer.register_step_post_hook(_keep_ratios)
    return optimizer


def _keep_ratios(optimizer: Optimizer, *_: Any) -> None:
    """Its trust ratio is the number 1 where a norm is 0, else a tensor: what a checkpoint has as one cannot be loaded
    as the other."""
    for parameter, state in optimizer.state.items():
        state["trust_ratio"] = torch.as_tensor(state["trust_ratio"], dtype=parameter.dtype, device=parameter.device)


def _nearest(name: str, names: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f"; the nearest is '{prefix}{near}'"


ALL = ("ddp", "fsdp", "deepspeed")
FLAT = "ZeRO hands an optimizer flat 1-D slices of many parameters at once, in which there are no matrices"
OPTIMIZERS = {
    "adamw": OptimizerEntry(_adamw, ALL, "torch's."),
    "lamb": OptimizerEntry(_lamb, ALL, "timm's; trust ratios are each parameter's own on every backend."),
    "muon": OptimizerEntry(
        _muon, ALL[:2], "timm's, for weights of hidden linear layers; AdamW for all else.", FLAT, split_hidden=True
    ),
    "shampoo": OptimizerEntry(
        _shampoo, ALL[:2], "Distributed Shampoo as the authors of ViTTM use it: --optimizer.shampoo.", FLAT
    ),
    "soap": OptimizerEntry(
        _soap,
        ALL[:1],
        "pytorch-optimizer's; every rank keeps and computes all of it.",
        "it multiplies whole parameters with plain matrices, and what it finds there is sharded",
    ),
    COLLECTION + "NAME": OptimizerEntry(
        _collected,
        ALL[:1],
        "A class of torch-optimizer, as torch_optimizer:Yogi; A2Grad* set their own learning rate.",
        "torch-optimizer's classes take whole, plain tensors, and what they find there is sharded",
    ),
}
