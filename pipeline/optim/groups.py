"""Which parameters an optimizer moves, and how fast: decided by name, before a backend wraps or shards the model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Groups:
    """scales: the share of the learning rate of every trainable parameter; hidden: names of the weights of linear
    layers other than classifiers."""

    scales: dict[str, float]
    hidden: frozenset[str]

    def bind(self, model: nn.Module, split_hidden: bool = False) -> list[dict[str, Any]]:
        """Parameter groups of torch for the model, whose parameters may be sharded by now: one a scale, and with
        `split_hidden` two, of which the one with `use_fallback` has what is not hidden."""
        found: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in trainable(model):
            scale, fallback = self.scales[name], split_hidden and name not in self.hidden
            group = {"params": [], "lr_scale": scale} | ({"use_fallback": fallback} if split_hidden else {})
            found.setdefault((scale, fallback), group)["params"].append(parameter)
        return list(found.values())


def group(model: nn.Module, layer_decay: float) -> Groups:
    """layer_decay: the learning rate of a layer over that of the next, towards the input; timm's `group_matcher` of
    the model says what a layer is. Every parameter decays: see `pipeline.optim.table`."""
    names = {id(parameter): name for name, parameter in trainable(model)}
    scales = dict.fromkeys(names.values(), 1.0)
    if layer_decay != 1.0:
        for part in param_groups_layer_decay(model, layer_decay=layer_decay, weight_decay_exclude_1d=False):
            scales |= {names[id(parameter)]: part["lr_scale"] for parameter in part["params"]}
    return Groups(scales, frozenset(_hidden(model)))


def check_partition(model: nn.Module, optimizer: Optimizer) -> None:
    """Asserts that every trainable parameter of the model is in exactly one group of the optimizer, and nothing else
    is in any."""
    seen = Counter(id(parameter) for part in optimizer.param_groups for parameter in part["params"])
    names = {id(parameter): name for name, parameter in trainable(model)}
    wrong = [f"{name} is in {seen[key]} groups" for key, name in names.items() if seen[key] != 1]
    strangers = len(seen.keys() - names.keys())
    wrong += [f"{strangers} tensors are no trainable parameters of the model"] if strangers else []
    assert not wrong, f"every trainable parameter belongs to exactly one group: {'; '.join(wrong[:5])}"


def trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _hidden(model: nn.Module) -> Iterator[str]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = {classifier} if isinstance(classifier, str) else set(classifier)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in heads and module.weight.requires_grad:
            yield f"{name}.weight" if name else "weight"
