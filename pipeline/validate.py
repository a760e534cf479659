"""What about a recipe alone cannot work, and what its durations are in steps."""

from pipeline.recipe import Augment, Optimizer, Recipe, flatten
from pipeline.recipe.stages import STAGED
from shards.budget import Budget
from shards.errors import UserError

MAGNITUDES = {"torchvision": 30, "timm": 10, "timm-increasing": 10}
"""The largest of each of RandAugment's policies."""
MAY_BE_ZERO = ("schedule.warmup", "schedule.cooldown", "bottleneck.after")
UNITS = ("epochs", "steps", "images", "%")


def num_steps(duration: str, batches_per_epoch: int, global_batch: int, total: int = 0) -> int:
    """Optimizer steps, rounded, of a duration such as "300 epochs", "10000 steps", "1e9 images" or "2%" (of `total`
    steps).

    Raises UserError where the text is no such duration.
    """
    number, unit = _split_duration(duration)
    if unit == "images":
        return round(number / global_batch)
    scale = {"epochs": batches_per_epoch, "steps": 1, "%": total / 100}[unit]
    return round(number * scale)


def validate(recipe: Recipe) -> None:
    """Raises one UserError that lists everything about the recipe alone that cannot work."""
    found = [
        *_duration_errors(recipe),
        *_range_errors(recipe),
        *_augment_errors(recipe.augment),
        *_start_errors(recipe),
        *_stage_errors(recipe),
        *_bottleneck_errors(recipe),
    ]
    if found:
        raise UserError("the recipe cannot run:\n" + "\n".join(f"  - {message}" for message in found))


def _split_duration(duration: str) -> tuple[float, str]:
    number, unit = duration.removesuffix("%"), "%"
    if not duration.endswith("%"):
        number, _, unit = duration.strip().partition(" ")
        unit = unit.strip().rstrip("s") + "s"
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit not in UNITS or not 0 <= value < float("inf"):
        raise UserError(
            f"'{duration}' is no duration: it takes a number, 0 or more, and a unit, "
            "as '300 epochs', '10000 steps', '1e9 images' or '2%'"
        )
    return value, unit


def _duration_errors(recipe: Recipe) -> list[str]:
    durations = {
        "schedule.length": recipe.schedule.length,
        "schedule.warmup": recipe.schedule.warmup,
        "schedule.cooldown": recipe.schedule.cooldown,
        "evaluation.every": recipe.evaluation.every,
        "bottleneck.after": recipe.bottleneck.after,
        "checkpoint.every": recipe.checkpoint.every,
        "runtime.log_every": recipe.runtime.log_every,
    }
    found = []
    for name, duration in durations.items():
        try:
            number, unit = _split_duration(duration)
        except UserError as error:
            found.append(f"{name}: {error}")
            continue
        if name == "schedule.length" and unit == "%":
            found.append(f"{name} '{duration}': a percentage of itself; give epochs, steps or images")
        if name not in MAY_BE_ZERO and number == 0:
            found.append(f"{name} '{duration}': must be above 0")
    return found


def _range_errors(recipe: Recipe) -> list[str]:
    leaves = flatten(recipe)
    positive = (
        "data.global_batch",
        "data.window",
        "data.accumulation",
        "augment.image_size",
        "evaluation.batch",
        "bottleneck.centroids",
        "bottleneck.iterations",
        "bottleneck.samples",
        "checkpoint.keep",
        "runtime.fsdp_replicas",
        "optimizer.shampoo.max_preconditioner_dim",
        "optimizer.shampoo.precondition_frequency",
        "optimizer.shampoo.start_preconditioning_step",
    )
    shares = ("augment.hflip", "augment.erasing", "ema_decay")
    rates = (
        "schedule.lr",
        "schedule.warmup_lr",
        "schedule.min_lr",
        "schedule.cooldown_lr",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "bottleneck.weight",
    )
    runtime = ("runtime.processes", "runtime.activation_checkpointing", "runtime.max_skipped", "runtime.spike")
    telemetry = ("profile", "runtime.peak_tflops", "runtime.hang_timeout")
    counts = ("data.workers", "data.runs", "augment.randaugment_ops", *runtime, *telemetry)
    limits = [
        *((name, 1, float("inf")) for name in positive),
        *((name, 0, 1) for name in shares),
        *((name, 0, float("inf")) for name in (*rates, *counts)),
        ("augment.randaugment_magnitude", 0, MAGNITUDES[recipe.augment.randaugment]),
        ("augment.randaugment_std", 0, 100),
    ]
    found = [
        f"{name} {leaves[name]}: must " + (f"be {low} or more" if high == float("inf") else f"lie in {low} .. {high}")
        for name, low, high in limits
        if not low <= leaves[name] <= high  # type: ignore[operator]
    ]
    spans = {"augment.crop_scale": recipe.augment.crop_scale, "augment.crop_ratio": recipe.augment.crop_ratio}
    found += [f"{name} {span}: must be 0 < low <= high" for name, span in spans.items() if not 0 < span[0] <= span[1]]
    if not 0 <= recipe.label_smoothing < 1:
        found.append(f"label_smoothing {recipe.label_smoothing}: must be 0 <= value < 1")
    if not 0 < recipe.evaluation.crop_pct <= 1:
        found.append(f"evaluation.crop_pct {recipe.evaluation.crop_pct}: must be 0 < value <= 1")
    found += _optimizer_errors(recipe.optimizer)
    try:
        Budget(recipe.data.max_bad)
    except UserError as error:
        found.append(f"data.max_bad: {error}")
    return found


def _augment_errors(section: Augment) -> list[str]:
    """What depends on another field of the section, or has two limits."""
    found = []
    low, high = section.erasing_scale
    if not 0 < low <= high <= 1:
        found.append(f"augment.erasing_scale {section.erasing_scale}: must be 0 < low <= high <= 1")
    if section.randaugment_std and section.randaugment == "torchvision":
        found.append(
            f"augment.randaugment_std {section.randaugment_std}: torchvision's RandAugment has magnitudes without a "
            "spread: set it to 0, or augment.randaugment to timm or timm-increasing"
        )
    return found + [
        f"augment.{kind}_alpha {alpha}: must be above 0 while {kind} is on"
        for kind, alpha in (("mixup", section.mixup_alpha), ("cutmix", section.cutmix_alpha))
        if getattr(section, kind) and alpha <= 0
    ]


def _start_errors(recipe: Recipe) -> list[str]:
    start, init_from, init_weights = recipe.model.start, recipe.model.init_from, recipe.model.init_weights
    found = []
    if start and init_from != "none":
        found.append(
            f"model.start '{start}' and model.init_from '{init_from}': a model starts from one of them; leave start "
            "empty, or set init_from to none"
        )
    if init_weights and init_from == "none":
        found.append(
            f"model.init_weights '{init_weights}' would not be looked at while model.init_from is none: set that to "
            "blocks or blocks+flexi, or give a whole checkpoint as model.start"
        )
    return found


def _stage_errors(recipe: Recipe) -> list[str]:
    found = [f"{name}.{error}" for name in STAGED for error in getattr(recipe, name).errors()]
    found += _progressive_errors(recipe)
    length = recipe.schedule.length
    try:
        epochs, unit = _split_duration(length)
    except UserError:  # is among the errors
        return found
    lasts = {name: max(getattr(recipe, name).steps, default=-1) for name in STAGED}
    return found + [
        f"{name}.steps {getattr(recipe, name).steps}: the stage of epoch {last} would never begin, as schedule.length "
        f"is '{length}', counted from 0: train longer, or begin it earlier"
        for name, last in lasts.items()
        if unit == "epochs" and last >= epochs
    ]


def _progressive_errors(recipe: Recipe) -> list[str]:
    """What does not fit to the augmentation."""
    section, augment, found = recipe.progressive, recipe.augment, []
    sizes, magnitudes = section.image_sizes, section.randaugment_magnitudes
    if sizes and (sizes[-1] != augment.image_size or max(sizes) > augment.image_size):
        found.append(
            f"progressive.image_sizes {sizes}: the last and largest must be augment.image_size {augment.image_size}, "
            "which the model is evaluated at"
        )
    largest = MAGNITUDES[augment.randaugment]
    if not all(0 <= magnitude <= largest for magnitude in magnitudes):
        found.append(f"progressive.randaugment_magnitudes {magnitudes}: each must lie in 0 .. {largest}")
    if magnitudes and magnitudes[-1] != augment.randaugment_magnitude:
        found.append(
            f"progressive.randaugment_magnitudes {magnitudes}: the last must be augment.randaugment_magnitude "
            f"{augment.randaugment_magnitude}"
        )
    if magnitudes and not augment.randaugment_ops:
        found.append(
            f"progressive.randaugment_magnitudes {magnitudes}: augment.randaugment_ops is 0, so that there is no "
            "RandAugment: raise that, or leave them empty"
        )
    return found


def _bottleneck_errors(recipe: Recipe) -> list[str]:
    section, augment, found = recipe.bottleneck, recipe.augment, []
    if section.samples < section.centroids:
        found.append(
            f"bottleneck.samples {section.samples}: must be at least bottleneck.centroids {section.centroids}, which "
            "they are clustered to"
        )
    if section.weight and (augment.mixup or augment.cutmix):
        found.append(
            f"bottleneck.weight {section.weight}: its bound is of images with one label each: set augment.mixup and "
            "augment.cutmix to False"
        )
    if section.weight and recipe.progressive.image_sizes:
        found.append(
            f"bottleneck.weight {section.weight}: its clusters are of images of one size: leave "
            "progressive.image_sizes empty"
        )
    if section.weight and recipe.loss != "ce":
        found.append(
            f"bottleneck.weight {section.weight}: its bound goes with cross-entropy, but loss is '{recipe.loss}': set "
            "it to ce"
        )
    return found


def _optimizer_errors(section: Optimizer) -> list[str]:
    """What has no largest or smallest value that may be taken."""
    shampoo = section.shampoo
    decays = {
        "betas[0]": section.betas[0],
        "betas[1]": section.betas[1],
        "shampoo.grafting_beta2": shampoo.grafting_beta2,
    }
    epsilons = {"shampoo.epsilon": shampoo.epsilon, "shampoo.grafting_epsilon": shampoo.grafting_epsilon}
    found = [
        f"optimizer.{name} {value}: must be 0 <= value < 1" for name, value in decays.items() if not 0 <= value < 1
    ]
    found += [f"optimizer.{name} {value}: must be above 0" for name, value in epsilons.items() if not value > 0]
    if not 0 < section.layer_decay <= 1:
        found.append(f"optimizer.layer_decay {section.layer_decay}: must be 0 < value <= 1")
    return found
