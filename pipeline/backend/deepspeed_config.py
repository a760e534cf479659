"""The DeepSpeed JSON of a launch: what a recipe owns is filled in, what would be guessed or contradicts is refused."""

import json
from pathlib import Path

from pipeline.backend.base import StepOptions
from shards.errors import UserError

STAGES = (1, 2, 3)


def read_config(path: str, world_size: int, options: StepOptions) -> dict:
    """The DeepSpeed JSON with every "auto" filled from the recipe, whose micro-batches are all equal.

    Raises UserError where the file is missing or no JSON, an "auto" is left, a value contradicts the recipe, the ZeRO
    stage is not one of STAGES or cannot do what the recipe asks for, or something is offloaded to NVMe.
    """
    config = _read(path)
    owned = {
        "train_micro_batch_size_per_gpu": options.global_batch // options.accumulation // world_size,
        "train_batch_size": options.global_batch,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.clip_norm,
    }
    for key, value in owned.items():
        if config.setdefault(key, "auto") not in ("auto", value):
            raise UserError(
                f'{path}: {key} is {config[key]}, but the recipe makes it {value}: the recipe owns it; write "auto"'
            )
    config |= owned | _arithmetic(config, options.precision, path)
    _refuse_auto(config, path)
    _check_zero(config.get("zero_optimization", {}), path)
    if config["zero_optimization"]["stage"] == 3 and options.compiler != "off":
        raise UserError(
            f"runtime.compile {options.compiler} cannot be had under ZeRO stage 3 ({path}): it gathers weights where a "
            "layer touches them, which the compiler does not see; start through ds_configs/fsdp_*.yaml, which shards "
            "weights as well, or leave compile off"
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


def _arithmetic(config: dict, precision: str, path: str) -> dict:
    """What the recipe's runtime.precision is in DeepSpeed's words."""
    given = [key for key in ("bf16", "fp16", "torch_autocast", "data_types") if key in config]
    if given:
        raise UserError(
            f"{path}: {given[0]} is given, but the recipe makes the precision {precision}: the recipe owns it; remove "
            "the section, and set --runtime.precision"
        )
    if precision == "bf16":
        # Outside autocast would be switched off by the engine; an empty list keeps gradients in fp32 on the wire.
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    if precision == "bf16-pure":
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return {}


def _check_zero(section: dict, path: str) -> None:
    if section.get("stage") not in STAGES:
        raise UserError(
            f"{path}: zero_optimization.stage is {section.get('stage')}, but this backend runs {STAGES}: write one of "
            "these"
        )
    for name in ("offload_optimizer", "offload_param"):
        if section.get(name, {}).get("device") == "nvme":
            raise UserError(
                f'{path}: zero_optimization.{name}.device is "nvme", where averages and checkpoints cannot reach the '
                'weights: write "cpu", or remove the section'
            )


def _refuse_auto(config: dict, path: str, prefix: str = "") -> None:
    for key, value in config.items():
        if value == "auto":
            raise UserError(
                f'{path}: {prefix}{key} is "auto", but no recipe field fills it and DeepSpeed would guess: '
                "write a value, or remove the key"
            )
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{prefix}{key}.")
