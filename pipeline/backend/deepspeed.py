"""DeepSpeed's ZeRO 1 and 2 through Accelerate: optimizer states (and gradients) in partitions, weights whole."""

import json
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from pipeline.backend import universal
from pipeline.backend.base import Backend, Criterion, Mixed, StepOptions, Stepped
from pipeline.backend.ddp import accumulation_plugin
from pipeline.backend.world import World
from shards.errors import UserError

STAGES = (1, 2)
TAG = "engine"


class DeepSpeed(Backend):
    """`accelerator.backward` steps the engine in the last micro-batch, clipping included."""

    def __init__(
        self, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, options: StepOptions, config: dict
    ) -> None:
        if world.device.type == "cpu":
            _check_toolchain()
        self.accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            mixed_precision="no",
            gradient_accumulation_plugin=accumulation_plugin(options.accumulation),
        )
        self.engine, wrapped = self.accelerator.prepare(model, optimizer)
        super().__init__(world, self.engine, wrapped.optimizer, options)
        self._check(config)
        if hasattr(optimizer, "place"):
            optimizer.place([_part(parameter) for parameter in self.module.parameters() if parameter.requires_grad])

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def step(self, criterion: Criterion, batches: Sequence[Mixed]) -> Stepped:
        losses = []
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.forward_loss(criterion, batch)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        norm = torch.as_tensor(self.engine.get_global_grad_norm())
        return Stepped(torch.stack(losses).mean(), norm)

    def save_engine(self, directory: Path) -> None:
        """DeepSpeed's own pickles: read back only from a committed directory whose hashes match."""
        try:
            self.engine.save_checkpoint(directory, tag=TAG, save_latest=False)
        except RuntimeError as error:  # what torch.save's writer makes of a write that failed
            raise OSError(f"DeepSpeed's save_checkpoint: {error}") from error

    def load_engine(self, directory: Path) -> None:
        saved = directory / TAG
        if universal.num_partitions(saved) == self.world.size:
            self.engine.load_checkpoint(directory, tag=TAG)
        else:
            checkpoint = directory.parent
            universal.load(self.engine, self.world, saved, checkpoint.with_name(f"{checkpoint.name}.universal.tmp"))

    def full_weights(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}

    def close(self) -> None:
        self.engine.destroy()
        self.accelerator.free_memory()
        AcceleratorState._reset_state()

    def _check(self, config: dict) -> None:
        stage = config["zero_optimization"]["stage"]
        engine = self.engine
        if not hasattr(engine, "zero_optimization_stage"):
            raise UserError(f"DeepSpeed was asked for, but Accelerate made a {type(engine).__name__}: {REMEDY}")
        if (engine.zero_optimization_stage(), engine.world_size) != (stage, self.world.size):
            raise UserError(
                f"ZeRO stage {stage} over {self.world.size} ranks was asked for, but DeepSpeed runs stage "
                f"{engine.zero_optimization_stage()} over {engine.world_size}: {REMEDY}"
            )


def _part(parameter: Any) -> Tensor | None:
    """What this rank's flat fp32 partitions hold of a parameter, as a view into them; None for nothing."""
    if hasattr(parameter, "ds_id"):  # stage 3, which pads the last rank's part with what memory held
        part = parameter._z3_optimizer.get_local_fp32_param(parameter)
        length = parameter.ds_numel - dist.get_rank(parameter.ds_process_group) * len(part)
        return part[: max(length, 0)]
    return None if parameter._hp_mapping is None else parameter._hp_mapping.get_hp_fragment()


REMEDY = "the launch did not reach DeepSpeed; start through ds_configs/zero2_*.yaml"


def read_config(path: str, micro_batch: int, world_size: int, options: StepOptions) -> dict:
    """The DeepSpeed JSON with every "auto" filled from the recipe.

    Raises UserError where the file is missing or no JSON, an "auto" is left, a value contradicts the recipe, or the
    ZeRO stage is not one of STAGES.
    """
    config = _read(path)
    owned = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * options.accumulation * world_size,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.clip_norm,
    }
    for key, value in owned.items():
        if config.setdefault(key, "auto") not in ("auto", value):
            raise UserError(
                f'{path}: {key} is {config[key]}, but the recipe makes it {value}: the recipe owns it; write "auto"'
            )
    config |= owned
    if options.bf16:
        # Outside autocast would be switched off by the engine; an empty list keeps gradients in fp32 on the wire.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    _refuse_auto(config, path)
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in STAGES:
        raise UserError(
            f"{path}: zero_optimization.stage is {stage}, but this backend runs {STAGES}: write one of these"
        )
    return config


def _read(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(
            f"the launch file names the DeepSpeed configuration '{path}', but {Path.cwd()} holds no such file: "
            "correct deepspeed_config_file there (it is relative to where the launch is started), or take "
            "ds_configs/zero2.json"
        ) from None
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"the DeepSpeed configuration '{path}' cannot be read ({error}): mend the file") from None


def _refuse_auto(config: dict, path: str, prefix: str = "") -> None:
    for key, value in config.items():
        if value == "auto":
            raise UserError(
                f'{path}: {prefix}{key} is "auto", but no recipe field fills it and DeepSpeed would guess: '
                "write a value, or remove the key"
            )
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{prefix}{key}.")


def _check_toolchain() -> None:
    """On the CPU, DeepSpeed compiles its communication kernel at first use."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    missing += [] if header.exists() else [str(header)]
    if missing:
        raise UserError(
            f"DeepSpeed compiles a kernel at first use, but {', '.join(missing)} is missing: install g++, the Python "
            "headers (Debian: g++ python3-dev) and ninja (pip install ninja), and put ninja on PATH"
        )
