"""Which parameters an optimizer moves, how fast, and which of them decay: decided by name, before a backend wraps or
shards the model."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Groups:
    """scales: the share of the learning rate of every trainable parameter; hidden: names of the weights of linear
    layers other than classifiers; undecayed: names of what weight decay leaves alone."""

    scales: dict[str, float]
    hidden: frozenset[str]
    undecayed: frozenset[str] = frozenset()

    def bind(self, model: nn.Module, split_hidden: bool = False) -> list[dict[str, Any]]:
        """Parameter groups of torch for the model, whose parameters may be sharded by now: one for all that share a
        scale and decay alike, and with `split_hidden` two, of which the one with `use_fallback` has what is not
        hidden. A group that does not decay says so; the others take the optimizer's weight decay."""
        found: dict[tuple[float, bool, bool], dict[str, Any]] = {}
        for name, parameter in trainable(model):
            scale, undecayed = self.scales[name], name in self.undecayed
            fallback = split_hidden and name not in self.hidden
            group = {"params": [], "lr_scale": scale} | ({"use_fallback": fallback} if split_hidden else {})
            group |= {"weight_decay": 0.0} if undecayed else {}
            found.setdefault((scale, fallback, undecayed), group)["params"].append(parameter)
        return list(found.values())


def group(model: nn.Module, layer_decay: float, decay: Literal["all", "matrices"] = "all") -> Groups:
    """layer_decay: the learning rate of a layer over that of the next, towards the input; timm's `group_matcher` of
    the model says what a layer is. decay: which parameters weight decay is for; "matrices" are what timm's optimizers
    leave it on."""
    names = {id(parameter): name for name, parameter in trainable(model)}
    scales = dict.fromkeys(names.values(), 1.0)
    if layer_decay != 1.0:
        for part in param_groups_layer_decay(model, layer_decay=layer_decay, weight_decay_exclude_1d=False):
            scales |= {names[id(parameter)]: part["lr_scale"] for parameter in part["params"]}
    undecayed = _undecayed(model) if decay == "matrices" else frozenset[int]()
    return Groups(scales, frozenset(_hidden(model)), frozenset(names[key] for key in undecayed))


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


def _undecayed(model: nn.Module) -> frozenset[int]:
    """Ids of vectors (norms, biases) and of what the model's `no_weight_decay()` names, by timm's rule."""
    named: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    parts = param_groups_weight_decay(model, weight_decay=1.0, no_weight_decay_list=named)
    return frozenset(id(parameter) for part in parts if not part["weight_decay"] for parameter in part["params"])


def _hidden(model: nn.Module) -> Iterator[str]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = {classifier} if isinstance(classifier, str) else set(classifier)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in heads and module.weight.requires_grad:
            yield f"{name}.weight" if name else "weight"
