"""The table of optimizers and backends: printed by --help, and enforced before work starts."""

import itertools
import json

import pytest
import torch
import torch_optimizer
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from pipeline import optim
from pipeline.optim.table import COLLECTION, OPTIMIZERS, UNUSABLE, check, collected, describe
from pipeline.recipe import Optimizer
from shards.errors import UserError

STRATEGIES = ("ddp", "fsdp", "deepspeed")
CLASSES = [
    name
    for name in torch_optimizer.__all__
    if isinstance(getattr(torch_optimizer, name), type) and name not in UNUSABLE
]


def test_the_table():
    assert {name: entry.backends for name, entry in OPTIMIZERS.items()} == {
        "adamw": STRATEGIES,
        "lamb": STRATEGIES,
        "muon": ("ddp", "fsdp"),
        "shampoo": ("ddp", "fsdp"),
        "soap": ("ddp",),
        "torch_optimizer:NAME": ("ddp",),
    }


@pytest.mark.parametrize(("name", "strategy"), [*itertools.product(OPTIMIZERS, STRATEGIES)])
def test_a_pair_runs_or_is_refused_with_reason_and_remedy(name, strategy):
    name, entry = name.replace("NAME", "Yogi"), OPTIMIZERS[name]
    if strategy in entry.backends:
        check(name, strategy)
        return
    with pytest.raises(UserError) as error:
        check(name, strategy)
    text, backends = str(error.value), " and ".join(entry.backends)
    assert len(entry.reason) > 20
    assert text.startswith(f"optimizer.name '{name}' does not run on {strategy}, only on {backends}: {entry.reason}. ")
    assert "Start through ds_configs/ddp_*.yaml" in text
    assert "or take --optimizer.name adamw or lamb" in text


def test_shampoo_on_zero_says_why():
    with pytest.raises(UserError, match=r"flat 1-D slices .*Start through ds_configs/ddp_.* or ds_configs/fsdp_"):
        check("shampoo", "deepspeed")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shampo", r"optimizer\.name 'shampo' is none of adamw, lamb, .*; the nearest is 'shampoo'"),
        ("torch_optimizer:Yogy", r"has no optimizer 'Yogy', but .*; the nearest is 'torch_optimizer:Yogi'"),
        ("torch_optimizer:get", r"has no optimizer 'get'"),
        ("torch_optimizer:Adahessian", r"cannot train here: it needs second derivatives.*; take another"),
        ("torch_optimizer:Lookahead", r"cannot train here: it is a wrapper around another optimizer; take another"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, message):
    with pytest.raises(UserError, match=message):
        check(name, "ddp")


def test_a_refused_pair_ends_the_launch_before_work_starts(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run"), "--optimizer.name", "muon"]
    options += ["--data.path", str(tmp_path / "nosuch")]  # which would be the next to be found
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero2.json"}
    ended = start("recipes/finetune_1k.py", options, **environment).wait()
    assert ended.codes == [2], ended.outputs
    assert "error: optimizer.name 'muon' does not run on deepspeed, only on ddp and fsdp" in ended.outputs[0]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "error"


def test_a_recipe_trains_by_the_optimizer_that_it_names(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run"), "--optimizer.name", "shampoo"]
    options += ["--optimizer.shampoo.max-preconditioner-dim", "64", "--schedule.length", "3 steps"]
    ended = start("recipes/finetune_1k.py", [*options, "--optimizer.layer-decay", "0.8"]).wait()
    assert ended.codes == [0], ended.outputs
    metadata = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000003" / "engine").read_metadata()
    names = [name for name in metadata.state_dict_metadata if "layers.0.block.attn.qkv.weight.block_1_0_" in name]
    assert sorted(name.rpartition("block_1_0_")[2] for name in names) == [
        *("exp_avg", "exp_avg_sq", "factor_0", "factor_1", "root_0", "root_1")
    ]


@pytest.mark.parametrize("recipe", ["pretrain_21k", "finetune_1k", "chain", "demo"])
def test_help_prints_the_table(start, recipe):
    ended = start(f"recipes/{recipe}.py", ["--help"]).wait()
    assert ended.codes == [0], ended.outputs
    assert all(line in ended.outputs[0] for line in describe().splitlines())


@pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_optimizer_trains(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    section = Optimizer(COLLECTION + name, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01)
    optimizer = optim.make_optimizer(model, section, optim.group(model, 1.0, "matrices"))
    assert [group.get("weight_decay", 0.01) for group in optimizer.param_groups] == [0.01, 0.0]
    assert type(optimizer) is collected(section.name)
    images = torch.randn(16, 6)
    losses = []
    for _ in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        losses.append((model(images) - images[:, :2]).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_the_collections_lamb_keeps_tensors_alone():
    """Before its first step a checkpoint makes one with zero gradients, where trust ratios are 1."""
    model = nn.Linear(2, 2)
    optimizer = optim.make_optimizer(model, Optimizer(COLLECTION + "Lamb"), optim.group(model, 1.0, "matrices"))
    for gradient in (torch.zeros_like, torch.ones_like):
        for parameter in model.parameters():
            parameter.grad = gradient(parameter)
        optimizer.step()
        ratios = [optimizer.state[parameter]["trust_ratio"] for parameter in model.parameters()]
        assert {(type(ratio), ratio.dtype) for ratio in ratios} == {(torch.Tensor, torch.float32)}
    assert not any(torch.equal(ratio, torch.ones(())) for ratio in ratios)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Yogi", {"betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.01}),
        ("AggMo", {"betas": (0.0, 0.9, 0.99), "weight_decay": 0.01}),
        ("Adafactor", {"relative_step": False, "eps2": (1e-30, 1e-3)}),
    ],
)
def test_a_class_of_torch_optimizer_gets_what_it_knows(name, expected):
    model = nn.Linear(2, 2)
    section = Optimizer(COLLECTION + name, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01)
    [group] = optim.make_optimizer(model, section, optim.group(model, 1.0)).param_groups
    assert {key: group[key] for key in expected} == expected
