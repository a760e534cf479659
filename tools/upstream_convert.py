"""From the flags of another program's command to the fields of a recipe, and what is to be said about them."""

import difflib
import math
import re
from collections.abc import Iterator

from shards.errors import UserError
from tools.upstream_flags import DEIT, EFFICIENT_TRAIN, PROGRAMS, TIMM, VITTM
from tools.upstream_shell import Command
from tools.upstream_timm import cool_down, of_timm
from tools.upstream_types import Converted, Flag, Given, Program

EFFECTIVE = {("imagenet-21k", "base"): 4096, ("imagenet-21k", "small"): 4096, ("imagenet", "small"): 4096}
EFFECTIVE |= {("imagenet", "base"): 2048}
"""Effective batches of the tables in the README of ViTTM's program, by dataset and size."""
CLASSES = {"imagenet-21k": "10450", "imagenet": "1000"}
RECIPES = {"imagenet-21k": "pretrain_21k", "imagenet": "finetune_1k"}
STAGES = 5
"""EfficientTrain's, which are equally long."""
NUMBER = re.compile(r"-?\.?\d.*")


def choose(command: Command) -> Program:
    """The program whose script the command starts; several are called main.py or train.py."""
    flags = {word.partition("=")[0] for word in command.arguments}
    if command.script == "train.py" and command.arguments[:1] and command.arguments[0].endswith(".py"):
        return PROGRAMS["t2t"]
    if "--coco_path" in flags:
        return PROGRAMS["yolos"]
    if flags & {"--token-label", "--token-label-data"} or any(word.startswith("lvvit") for word in command.arguments):
        return PROGRAMS["lvvit"]
    return next(program for program in PROGRAMS.values() if command.script in program.scripts)


def take(program: Program, command: Command) -> Given:
    """Raises UserError for a flag that the program does not have, or that lacks its value."""
    known = {name: flag for flag in program.flags for name in flag.names.split()}
    values: dict[str, tuple[str, ...]] = {}
    words: list[str] = []
    rest = [*command.arguments]
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("-") or NUMBER.fullmatch(name):
            words.append(name + has_value + value)
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"{program.title} has no flag {name}; the nearest is {near[0] if near else 'none'}")
        flag = known[name]
        values[flag.name] = (value,) if has_value else _values(flag, rest)
    return Given(program, values, tuple(words), _ranks(program, command, words))


def convert(given: Given) -> Converted:
    """Raises UserError where a number is none, or the schedule no cosine."""
    found = Converted({name: (text, "always so there") for name, text in given.program.always.items()})
    for flag in given.program.flags:
        if flag.kind != "field":
            _remark(found, given, flag)
        elif flag.takes:
            _set(found, given, flag)
        elif text := flag.form if flag.name in given.values else flag.default:
            found.fields[flag.field] = (text, flag.name if flag.name in given.values else f"no {flag.name}")
    _set_batch(found, given)
    _SPECIAL.get(given.program.title, _nothing_more)(found, given)
    return found


def command_line(given: Given) -> str:
    """What runs the recipe that was written to RECIPE.yaml."""
    model = given.text("--model")
    if given.program is VITTM:
        recipe, size = RECIPES[given.text("--dataset")], "small" if "small" in model else "base"
        base = f"{'deittm' if model.startswith('deittm') else 'vittm'}_{size}"
    elif model.startswith("ltm_"):
        recipe, base = "ltm", model
    elif given.program is EFFICIENT_TRAIN:
        recipe, base = "toe_deit", f"{model} --variant efficienttrain"
    else:
        recipe, base = "finetune_1k", "deit_base_patch16_224" if "_base" in model else "deit_small_patch16_224"
    processes = f" --num_processes {given.ranks}" if given.ranks > 1 else ""
    return (
        f"accelerate launch --config_file ds_configs/ddp_gpu8.yaml{processes} recipes/{recipe}.py --model {base} "
        "--recipe RECIPE.yaml"
    )


def _values(flag: Flag, rest: list[str]) -> tuple[str, ...]:
    """Takes the flag's values off the front of the rest."""
    most = {"": 0, "1": 1, "+": len(rest)}[flag.takes]
    found: list[str] = []
    while rest and len(found) < most and (not rest[0].startswith("-") or NUMBER.fullmatch(rest[0])):
        found.append(rest.pop(0))
    if flag.takes and not found:
        raise UserError(f"{flag.name} lacks its value")
    return tuple(found)


def _ranks(program: Program, command: Command, words: list[str]) -> int:
    """Processes that a launcher starts; of ViTTM's and EfficientTrain's programs flags say it."""
    count = command.launched("--nproc_per_node") or "1"
    if command.script == "distributed_train.sh":
        count = words[0] if words else ""
    if not count.isdigit():
        raise UserError(f"'{count}' is no number of processes, which {command.script} is started with")
    nodes = command.launched("--nnodes") or "1"
    return int(count) * (int(nodes) if nodes.isdigit() else 1)


def _remark(found: Converted, given: Given, flag: Flag) -> None:
    if flag.name in given.values or flag.default:
        told = " ".join((flag.name, *given.values.get(flag.name, (flag.default, "by default"))))
        found.remarks[flag.kind].append(f"{told}: {flag.remark}")


def _set(found: Converted, given: Given, flag: Flag) -> None:
    text = given.text(flag.name)
    if flag.name in given.values and re.fullmatch(r"<.*>|\[.*\]|.*\$.*", text):
        found.remarks["said"].append(f"{flag.name} {text}: a placeholder, {flag.field} stays the recipe's")
    elif text:
        by_default = "" if flag.name in given.values else " by default"
        value = f"[{text.replace(' ', ', ')}]" if flag.takes == "+" else text
        found.fields[flag.field] = (flag.form.format(value), f"{flag.name} {text}{by_default}")
    else:
        found.open.append(f"{flag.name} ({flag.field})")


def _set_batch(found: Converted, given: Given) -> None:
    """The global batch is a product."""
    names = [flag.name for flag in given.program.flags if flag.field == "data.global_batch"]
    if not names:
        return
    factors = [(name, given.number(name)) for name in names]
    factors += [("--accumulations", given.number("--accumulations"))] if given.program is VITTM else []
    factors += [("ranks", float(given.ranks))] if given.program is not VITTM else []
    product = math.prod(value for _, value in factors)
    found.fields["data.global_batch"] = (f"{product:.0f}", " x ".join(f"{name} {value:.0f}" for name, value in factors))


def _vittm(found: Converted, given: Given) -> None:
    dataset, model, classes = (given.text(name) for name in ("--dataset", "--model", "--num-classes"))
    if dataset not in RECIPES:
        raise UserError(f"--dataset '{dataset}': recipes are there for {' and '.join(RECIPES)}; give one of these")
    _only_cosine(given, "--scheduler")
    size = "small" if "small" in model else "base"
    batch, expected = found.fields["data.global_batch"][0], EFFECTIVE[dataset, size]
    if batch != str(expected):
        found.contradictions.append(
            f"{found.fields['data.global_batch'][1]} is {batch}, but the authors' table of {dataset} gives ViTTM-"
            f"{size[0].upper()} an effective batch of {expected}"
        )
    if classes and classes != CLASSES[dataset]:
        found.contradictions.append(f"--num-classes {classes}, but {dataset} has {CLASSES[dataset]}")
    if found.fields["model.init_from"][0] == "blocks":
        found.fields["model.init_from"] = ("blocks", "the program starts from timm's ViT without saying so")
    found.contradictions += [*_profile(given), *_switched_off(given)]
    if "augment.mixup_alpha" in found.fields:
        found.fields["augment.cutmix_alpha"] = found.fields["augment.mixup_alpha"]
    embedder = given.text("--process-embedded-type")
    if embedder and embedder != "patch":
        found.contradictions.append(
            f"--process-embedded-type {embedder} was trained as patch: model.process_embedder_type {embedder} is "
            "another model"
        )


def _profile(given: Given) -> Iterator[str]:
    """What the name of the pretrained weights says of the model."""
    name, scale, model = (given.text(each) for each in ("--checkpoint-profile", "--latent-size-scale", "--model"))
    told = re.search(r"ls(\d+)", name)
    if told and scale and told[1] != scale:
        yield f"--checkpoint-profile {name} says a latent size scale of {told[1]}, --latent-size-scale {scale}"
    if name and model and model.replace("_", "-") not in name:
        yield f"--checkpoint-profile {name} is of another model than --model {model}"


def _switched_off(given: Given) -> Iterator[str]:
    for name, switches in (
        ("--num-ops", ("--rand-aug",)),
        ("--magnitude", ("--rand-aug",)),
        ("--mixup-alpha", ("--use-mixup", "--use-cutmix")),
    ):
        if name in given.values and not any(each in given.values for each in switches):
            yield f"{name} {given.text(name)} without {' or '.join(switches)} has no effect"


def _deit(found: Converted, given: Given) -> None:
    """The program scales its learning rate."""
    _only_cosine(given, "--sched")
    batch, rate = int(found.fields["data.global_batch"][0]), given.number("--lr")
    found.fields["schedule.lr"] = (f"{rate * batch / 512:.10g}", f"--lr {rate:g} x {batch} / 512")
    if not {"--repeated-aug", "--no-repeated-aug"} & given.values.keys():
        found.remarks["later"].append("--repeated-aug by default: repeated augmentation")
    of_timm(found, given)


def _timm(found: Converted, given: Given) -> None:
    _only_cosine(given, "--sched")
    if "--warmup-lr" in given.values and given.number("--warmup-lr") == given.number("--lr"):
        found.contradictions.append(
            f"--warmup-epochs {given.text('--warmup-epochs')} beside --warmup-lr {given.text('--warmup-lr')}, which is "
            "--lr itself: the warm-up only puts the cosine off"
        )
    of_timm(found, given)
    cool_down(found, given)


def _only_cosine(given: Given, name: str) -> None:
    if given.text(name) not in ("", "cosine"):
        raise UserError(f"{name} {given.text(name)}: the schedule is the cosine here; another one is not there")


def _efficient_train(found: Converted, given: Given) -> None:
    model = given.text("--model")
    if not re.match("deit_(tiny|small)", model):
        raise UserError(f"--model '{model}': of EfficientTrain's models only deit_tiny and deit_small are known here")
    epochs = given.number("--epochs")
    begins = [int(epochs / STAGES * number) for number in range(STAGES)]
    found.fields["progressive.steps"] = (str(begins), f"fifths of --epochs {epochs:g}")
    found.remarks["said"].append(
        "EfficientTrain: the program cuts high frequencies off whole images, ours makes small ones of the crops"
    )


def _nothing_more(found: Converted, given: Given) -> None:
    """There is nothing about the others but their flags."""


_SPECIAL = {
    VITTM.title: _vittm,
    DEIT.title: _deit,
    TIMM.title: _timm,
    EFFICIENT_TRAIN.title: _efficient_train,
}
