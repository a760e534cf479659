"""What programs that train with timm's transforms, mixing and schedules have in common, as fields of a recipe."""

import re

from tools.upstream_types import Converted, Given

FILLS = {"pixel": "noise", "const": "mean"}
"""timm's --remode; images are normalised there, so that its constant 0 is the mean."""


def of_timm(found: Converted, given: Given) -> None:
    """Where both MixUp and CutMix are on, timm draws one a batch, with equal odds, as ours."""
    for name in ("mixup", "cutmix"):
        alpha = given.number(f"--{name}")
        found.fields[f"augment.{name}"] = ("true" if alpha else "false", f"--{name} {alpha:g}")
    _fill(found, given)
    _interpolation(found, given)
    _randaugment(found, given)


def cool_down(found: Converted, given: Given) -> None:
    """timm trains on after --epochs, at --min-lr. Where either is not given, its default depends on the version."""
    text = given.text("--cooldown-epochs")
    if not text:
        return
    epochs, told = given.number("--cooldown-epochs"), f"--cooldown-epochs {text}"
    if epochs and not given.text("--min-lr"):
        del found.fields["schedule.cooldown"]
        found.remarks["later"].append(f"{told} without --min-lr: its rate depends on timm's version; give --min-lr")
    elif epochs:
        found.fields["schedule.length"] = (f"{given.number('--epochs') + epochs:g} epochs", f"--epochs and {told}")
        found.fields["schedule.cooldown_lr"] = (given.text("--min-lr"), "--min-lr")


def _fill(found: Converted, given: Given) -> None:
    mode, (_, why) = given.text("--remode"), found.fields.pop("augment.erasing_fill")
    if mode in FILLS:
        found.fields["augment.erasing_fill"] = (FILLS[mode], why)
    else:
        found.remarks["later"].append(f"--remode {mode}: a colour a box; the recipe's own stays")


def _interpolation(found: Converted, given: Given) -> None:
    if given.text("--train-interpolation") == "random":
        _, why = found.fields.pop("augment.interpolation")
        found.remarks["later"].append(f"{why}: bilinear or bicubic, drawn for each image; the recipe's own stays")


def _randaugment(found: Converted, given: Given) -> None:
    """timm's rand-m9-mstd0.5-inc1: of magnitude 10 and two operations, unless m and n say otherwise."""
    policy = given.text("--aa")
    found.fields.pop("augment.randaugment_magnitude", None)
    if not policy.startswith("rand"):
        found.fields["augment.randaugment_ops"] = ("0", f"--aa {policy or 'none'}")
        if policy not in ("", "none"):
            found.remarks["later"].append(f"--aa {policy}: another policy than RandAugment")
        return
    parts = dict(re.findall(r"-([a-z]+)([\d.]+)", policy))
    texts = {
        "randaugment": "timm-increasing" if parts.get("inc", "0") != "0" else "timm",
        "randaugment_ops": parts.get("n", "2"),
        "randaugment_magnitude": parts.get("m", "10"),
        "randaugment_std": parts.get("mstd", "0"),
    }
    found.fields |= {f"augment.{name}": (text, f"--aa {policy}") for name, text in texts.items()}
    if unknown := sorted(parts.keys() - {"m", "n", "mstd", "inc"}):
        found.remarks["later"].append(f"--aa {policy}: {', '.join(unknown)}")
