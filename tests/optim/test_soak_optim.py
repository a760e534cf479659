"""`make soak`: Shampoo on more ranks and through whole runs, and that every class of torch-optimizer resumes."""

from pathlib import Path

import on_ranks
import pytest
import ranks
import torch
import torch.distributed as dist
from test_table import CLASSES
from torch import nn

from pipeline import optim
from pipeline.backend import StepOptions, start, wrap
from pipeline.optim.table import COLLECTION
from pipeline.recipe import Optimizer
from pipeline.trainer import leave

pytestmark = pytest.mark.soak
FINETUNE = "recipes/finetune_1k.py"
SHAMPOO = ["--optimizer.name", "shampoo", "--optimizer.layer-decay", "0.8"]
SHAMPOO += ["--optimizer.shampoo.max-preconditioner-dim", "64"]
SHAMPOO += ["--optimizer.shampoo.start-preconditioning-step", "3", "--optimizer.shampoo.precondition-frequency", "2"]


def follow_on(shape: tuple[int, ...]) -> None:
    start("cpu")
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for name, tolerance in on_ranks.TOLERANCES.items():
        on_ranks.follow(name, tolerance)
        found = on_ranks.follow(name, tolerance, mesh)
        assert found["token"].isfinite().all()
    leave(0)


@pytest.mark.parametrize("shape", [(3,), (4,), (2, 2), (4, 1)])
def test_the_references_steps_on_other_meshes(tmp_path, shape):
    """One shard of uneven length, empty shards, and replicas of shards."""
    ended = ranks.run_function(follow_on, (shape,), tmp_path, torch.Size(shape).numel()).wait()
    assert set(ended.codes) == {0}, "\n".join(ended.outputs)


@pytest.mark.parametrize("launch_file", ["ddp_cpu2", "fsdp_cpu2"])
def test_a_killed_run_of_shampoo_resumes_bitwise(small, tmp_path, launch_file):
    options, log = ["--debug", *small, *SHAMPOO, "--run-dir"], tmp_path / "log"
    whole, killed = [*options, str(tmp_path / "whole")], [*options, str(tmp_path / "killed")]
    launched(launch_file, whole, log)
    launcher = ranks.accelerate(launch_file, FINETUNE, killed, log)
    ranks.kill_at(launcher, tmp_path / "killed" / "metrics.jsonl", 5)
    assert launcher.wait(ranks.PATIENCE) == 1
    launched(launch_file, killed, log)
    assert ranks.metrics(tmp_path / "killed") == ranks.metrics(tmp_path / "whole")


def launched(launch_file: str, options: list[str], log: Path) -> None:
    assert ranks.accelerate(launch_file, FINETUNE, options, log).wait(ranks.PATIENCE) == 0, log.read_text()


@pytest.fixture(scope="module")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.filterwarnings("ignore:This overload of .* is deprecated:UserWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_optimizer_resumes(alone, tmp_path, name):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        section, groups = Optimizer(COLLECTION + name, weight_decay=0.01), optim.group(model, 1.0, "matrices")
        return wrap(alone, model, lambda m: optim.make_optimizer(m, section, groups), StepOptions(4))

    def train(backend, steps):
        for number in steps:
            backend.set_lr(1e-3)
            images = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
            backend.step(lambda outputs, targets: (outputs - targets).square().mean(), [(images, images[:, :2])])

    whole, resumed, directory = build(), build(), Path(tmp_path / "engine")
    train(whole, range(4))
    whole.save_engine(directory)
    train(whole, range(4, 8))
    resumed.load_engine(directory)
    train(resumed, range(4, 8))
    torch.testing.assert_close(dict(resumed.trained()), dict(whole.trained()), rtol=0, atol=0)
