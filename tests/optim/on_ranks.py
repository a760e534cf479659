"""What the ranks of tests/optim/test_on_ranks.py do: every optimizer on every backend of the table, in one launch."""

import functools
import gc
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from strategies import ZERO, place
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline import optim
from pipeline.backend import Backend, StepOptions, World, start, wrap
from pipeline.loss import SummedOverHeads
from pipeline.optim.shampoo import Shampoo
from pipeline.optim.table import COLLECTION, OPTIMIZERS
from pipeline.recipe import Optimizer
from pipeline.recipe import Shampoo as ShampooSection
from pipeline.trainer import leave

GOLDEN = Path(__file__).parents[1] / "golden" / "shampoo"
TOLERANCES = {"shampoo_every_step": 1e-9, "shampoo_blocked": 1e-4}  # as spec/shampoo.md has them
STRATEGIES = ("ddp", "fsdp", "zero2")  # in this order: Accelerate forgets nothing of DeepSpeed
OTHERS = tuple(stage for stage in ZERO if stage not in STRATEGIES)
"""Left to `make soak`."""
SAVED, STEPS = 2, 4
BATCH, CLASSES, SIDE = 8, 5, 16
TOKEN = (1, 5, 4)  # a parameter of which the second rank of FSDP2 has nothing


def cases(size: int, strategies: tuple[str, ...]) -> list[tuple[str, str]]:
    """(strategy, optimizer): all of the table on two ranks, each of these optimizers on one process; AdamW's groups
    where they become partitions, for all else about it is tested in tests/test_backends.py."""
    names = {name: name.replace("NAME", "Yogi") for name in OPTIMIZERS}
    backends = {"ddp": "ddp", "fsdp": "fsdp"} | dict.fromkeys(ZERO, "deepspeed")
    found = [(it, names[name]) for it in strategies for name in names if backends[it] in OPTIMIZERS[name].backends]
    if size == 1:
        return [("ddp", name) for name in dict.fromkeys(name for _, name in found)]
    return [each for each in found if each not in (("fsdp", "adamw"), ("ddp", "adamw"))]


def resumed(strategies: tuple[str, ...]) -> list[tuple[str, str, int]]:
    """(strategy, optimizer, ranks); Muon is slow on DTensors, and its state is plain."""
    alone = [("ddp", "shampoo", 1)] if "ddp" in strategies else []
    return [(*case, 2) for case in cases(2, strategies) if case != ("fsdp", "muon")] + alone


def moves(size: int, strategies: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(optimizer, strategy, strategy of the other world that saved it)."""
    pairs = [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")] if size == 1 else [("ddp", "ddp"), ("fsdp", "ddp")]
    zero = [("lamb", stage, stage) for stage in ZERO if stage in strategies and size == 1]
    return [(name, *pair) for name in ("shampoo", "lamb") for pair in pairs if pair[0] in strategies] + zero


def train_all(root: Path, strategies: tuple[str, ...]) -> None:
    gc.freeze()  # every backend ends in a full collection, which took half of the time
    world = start("cpu")
    if world.size > 1 and "fsdp" in strategies:
        check_golden(world, root)
        measure_state(world, root)
    for strategy, name in cases(world.size, strategies):
        placed = place(world, strategy, root)
        again = (strategy, name, world.size) in resumed(strategies)
        train_and_resume(placed, name, root / f"{strategy}-{name}-{world.size}", again)
    leave(0)


def continue_all(root: Path, strategies: tuple[str, ...]) -> None:
    """Of what a world of another size saved, those whose state is not torch.optim's."""
    gc.freeze()
    world = start("cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # a launcher sets it for one rank, too, and DeepSpeed asks for it
    other = 3 - world.size
    for name, strategy, saved in moves(world.size, strategies):
        backend = build(place(world, strategy, root), name)
        backend.load_engine(root / f"{saved}-{name}-{other}" / "engine")
        finish(backend, world, SAVED, root / f"{strategy}-{name}-{world.size}-from-{saved}")
    leave(0)


def train_and_resume(world: World, name: str, root: Path, again: bool) -> None:
    """A run that goes through, and beside it, if asked for, one that resumes where the first was saved."""
    whole = build(world, name)
    losses = step(whole, range(SAVED))
    whole.save_engine(root / "engine")
    finish(whole, world, SAVED, root, losses)
    if again:
        taken_over = build(world, name)
        taken_over.load_engine(root / "engine")
        finish(taken_over, world, SAVED, root / "resumed")


def finish(backend: Backend, world: World, first: int, root: Path, losses: Iterable[float] = ()) -> None:
    """The rest of the steps; `root` gets the losses and the weights."""
    losses = [*losses, *step(backend, range(first, STEPS))]
    weights = backend.full_weights()
    backend.close()
    if world.is_main:
        root.mkdir(parents=True, exist_ok=True)
        (root / "losses.json").write_text(json.dumps(losses))
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, root / "weights.safetensors")
    world.barrier()


def build(world: World, name: str) -> Backend:
    """In float64 for Shampoo: in the null spaces of young factors roundings of 1e-7 are not small."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vittm_tiny", num_classes=CLASSES, img_size=SIDE, memory_ps=4, process_ps=8, embed_dim=24, depth=1, num_heads=3
    ).to(torch.float64 if name == "shampoo" else torch.float32)
    shampoo = ShampooSection(max_preconditioner_dim=40, precondition_frequency=3, start_preconditioning_step=2)
    section = Optimizer(name, weight_decay=0.05, decay="matrices", layer_decay=0.8, shampoo=shampoo)
    groups = optim.group(model, section.layer_decay, section.decay)
    bound = groups.bind(model, OPTIMIZERS[name if name in OPTIMIZERS else COLLECTION + "NAME"].split_hidden)
    make = functools.partial(optim.make_optimizer, section=section, groups=groups)
    global_batch = BATCH // 2 * world.size if name == "soap" else BATCH  # see step()
    backend = wrap(world, model, make, StepOptions(global_batch, clip_norm=0.5))
    decays = [group["weight_decay"] for group in backend.stepping.param_groups]
    assert decays == [group.get("weight_decay", 0.05) for group in bound]
    assert {*decays} == {0.05, 0.0}
    return backend


def step(backend: Backend, steps: Iterable[int]) -> list[float]:
    """Losses of these steps, each on a batch of its own that the ranks share.

    With SOAP everyone takes the same half: the eigenvectors of its first factors, of a low rank, are chosen by
    roundings, and everything after depends on the choice.
    """
    losses, world = [], backend.world
    dtype = backend.shards()[0].tensor.dtype
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    mine = slice(0, BATCH // 2) if type(backend.optimizer).__name__ == "SOAP" else mine
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).to(dtype)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        targets = nn.functional.one_hot(labels, CLASSES).to(dtype)
        backend.set_lr(1e-3)
        stepped = backend.step(SummedOverHeads("ce"), [(images[mine], targets[mine])])
        losses.append(world.sum([stepped.loss.item()])[0] / world.size)
    return losses


# --- Shampoo alone, on given gradients


class Given(nn.Module):
    """The parameters of a reference file, and one of TOKEN's shape."""

    def __init__(self, initial: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in initial.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


def check_golden(world: World, root: Path) -> None:
    """On each rank the reference's steps by DDP and by FSDP2; `root` gets the last parameters."""
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,))
    for name, tolerance in TOLERANCES.items():
        for strategy, shards in (("ddp", None), ("fsdp", mesh)):
            found = follow(name, tolerance, shards)
            if world.is_main:
                save_file(found, root / f"{name}-{strategy}.safetensors")
    columns = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"sharded over dimension 0 on all 2 ranks, .* not .*Shard\(dim=1\)"):
        Shampoo([columns], 0.1, (0.9, 0.999), 1e-12, 0.0, 8, 1, 1)


def follow(name: str, tolerance: float, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Steps with a reference file's gradients, whose parameters ours are compared with after each; the last ones.

    mesh: over which parameters are sharded.
    """
    settings, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    token = torch.ones(TOKEN, dtype=torch.float64)
    model = Given({each: tensors[f"init.{each}"] for each in settings["shapes"]} | {"token": token})
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = Shampoo(model.parameters(), **shampoo_options(settings))
    for number in range(settings["steps"]):
        for each, parameter in model.named_parameters():
            key = f"grad.{number:02d}.{each}"
            parameter.grad = as_sharded(tensors[key].clone() if key in tensors else waves(number), parameter)
        optimizer.step()
        found = {each: whole(parameter) for each, parameter in model.named_parameters()}
        for each in settings["shapes"]:
            torch.testing.assert_close(found[each], tensors[f"param.{number:02d}.{each}"], rtol=0, atol=tolerance)
    return found


def shampoo_options(settings: dict) -> dict:
    names = ("lr", "epsilon", "weight_decay", "max_preconditioner_dim", "precondition_frequency")
    names += ("start_preconditioning_step",)
    return {name: settings[name] for name in names} | {"betas": tuple(settings["betas"])}


def waves(number: int) -> Tensor:
    return torch.sin(torch.arange(20, dtype=torch.float64) * (number + 1)).reshape(TOKEN)


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def measure_state(world: World, root: Path) -> None:
    """state.json: bytes of Shampoo's state for vittm_tiny on each rank, by strategy, after a step."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        model = timm.create_model("vittm_tiny", num_classes=10)
        if strategy == "fsdp":
            fully_shard(model)
        found[strategy] = world.gather(state_bytes(model))
    if world.is_main:
        (root / "state.json").write_text(json.dumps(found))


def state_bytes(model: nn.Module) -> int:
    """After one step with the authors' settings."""
    optimizer = optim.make_optimizer(model, Optimizer("shampoo"), optim.group(model, 1.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
