"""Commands of other programs as recipes. tests/upstream holds those of their READMEs, as they stand there."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

from pipeline.recipe import Augment, Optimizer, Progressive, Recipe, Schedule, TokenExpansion, flatten, parse
from recipes import finetune_1k, ltm, pretrain_21k, toe_deit
from tools.from_upstream import main, table
from tools.upstream_flags import LAUNCHERS, PROGRAMS

COMMANDS = Path(__file__).parent / "upstream"
OF = {
    "vittm_pretrain": "vittm",
    "vittm_pretrain_markdown": "vittm",
    "vittm_finetune": "vittm",
    "deit_small": "deit",
    "lvvit_s": "lvvit",
    "efficienttrain_deit_small": "efficienttrain",
    "yolos_s": "yolos",
    "ltm_mobilevit_s": "timm",
    "t2t_vit_t_14": "t2t",
}
FLAG = re.compile(r"(?<!\S)(?:--?[A-Za-z][\w-]*|CUDA_VISIBLE_DEVICES)")
TIMM = Augment(
    decode="fast",
    interpolation="bicubic",
    randaugment="timm-increasing",
    randaugment_std=0.5,
    erasing_fill="noise",
    erasing_scale=(0.02, 1 / 3),
)
PRETRAIN = (COMMANDS / "vittm_pretrain.txt").read_text()
DEIT = "torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --batch-size 256"


def converted(command: str, tmp_path, capsys, code: int = 0) -> tuple[str, str]:
    """stdout and stderr for the text of a command."""
    path = tmp_path / "command.txt"
    path.write_text(command)
    assert main([str(path)]) == code
    found = capsys.readouterr()
    return found.out, found.err


def recipe_of(text: str, module, options: list[str], tmp_path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse(module.make, module.MODELS, "", [*options, "--recipe", str(path)], getattr(module, "VARIANTS", ()))


def changes(recipe: Recipe, base: Recipe) -> dict[str, object]:
    before = flatten(base)
    return {name: value for name, value in flatten(recipe).items() if value != before[name]}


def fields(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.]+): (\S.*?)  # ", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["vittm_pretrain", "vittm_pretrain_markdown"])
def test_the_pretraining_of_vittm_is_our_authors_variant(name, tmp_path, capsys):
    told, errors = converted((COMMANDS / f"{name}.txt").read_text(), tmp_path, capsys)
    assert errors == ""
    recipe = recipe_of(told, pretrain_21k, ["--variant", "authors"], tmp_path)
    ours = pretrain_21k.make("vittm_base", False, "authors")
    assert changes(recipe, ours) == {"data.workers": 32, "runtime.compile": "inductor"}
    assert "recipes/pretrain_21k.py --model vittm_base --recipe RECIPE.yaml" in told.splitlines()[1]
    plain = changes(recipe_of(told, pretrain_21k, [], tmp_path), ours)
    assert plain.pop("run_dir") == "runs/pretrain_21k/vittm_base"
    assert plain == changes(recipe, ours), "the variant must not matter"
    assert "data.global_batch: 4096  # --devices 2 x --num-nodes 2 x --batch-size 1024 x --accumulations 1\n" in told
    assert "# no effect in the authors' program: --process-embedded-type patch: it is swallowed by **kwargs" in told


def test_the_fine_tuning_of_vittm(tmp_path, capsys):
    told, errors = converted((COMMANDS / "vittm_finetune.txt").read_text(), tmp_path, capsys)
    ours = finetune_1k.make("vittm_base", False, "authors")
    recipe = recipe_of(told, finetune_1k, ["--variant", "authors"], tmp_path)
    assert changes(recipe, ours) == {"data.workers": 32, "runtime.compile": "inductor", "evaluation.batch": 64}
    profile = "--checkpoint-profile vittm-base-21k-300-im1k-300-lin-ls2"
    contradiction = f"contradiction: {profile} says a latent size scale of 2, --latent-size-scale 4\n"
    assert errors == contradiction
    assert f"# {contradiction}" in told
    assert (
        f"# no effect in the authors' program: {profile}: the pretrained weights that it names are not loaded" in told
    )
    assert "# not given, so that the recipe's own values stay: --checkpoints-path (run_dir)\n" in told


def test_deit_has_the_defaults_of_its_program(tmp_path, capsys):
    told, errors = converted((COMMANDS / "deit_small.txt").read_text(), tmp_path, capsys)
    assert errors == ""
    assert "--num_processes 4 recipes/finetune_1k.py --model deit_small_patch16_224 " in told.splitlines()[1]
    recipe = recipe_of(told, finetune_1k, ["--model", "deit_small_patch16_224"], tmp_path)
    assert (recipe.seed, recipe.loss, recipe.ema_decay, recipe.optimizer.clip_norm) == (3407, "ce", 0.99996, 0)
    assert (recipe.data.global_batch, recipe.schedule.lr, recipe.schedule.warmup) == (1024, 1e-3, "5 epochs")
    assert (recipe.model.name, recipe.model.drop_path_rate) == ("deit_small_patch16_224", 0.1)
    assert recipe.optimizer == Optimizer(weight_decay=0.05, decay="matrices", clip_norm=0.0)
    assert recipe.schedule == Schedule("300 epochs", "5 epochs", 1e-3, 1e-6, 1e-5, cosine_per="epoch")
    assert recipe.augment == dataclasses.replace(
        TIMM, mixup=True, cutmix=True, mixup_alpha=0.8, cutmix_alpha=1.0, randaugment_ops=2, erasing=0.25
    )
    assert (recipe.label_smoothing, recipe.evaluation.crop_pct) == (0.1, 0.875)
    waiting = re.findall(r"^# not there yet: (--\S+)", told, re.MULTILINE)
    assert waiting == ["--repeated-aug"]
    assert recipe.token_expansion == TokenExpansion((0, 100, 200), (0.5, 0.75, 1.0), 0.25, 2)
    assert "# no field of ours: --sched cosine by default: the schedule is the cosine, by epochs as there; ours" in told


@pytest.mark.parametrize(
    ("flags", "expected", "remark"),
    [
        ("--remode const --reprob 0.1", {"augment.erasing_fill": "mean", "augment.erasing": "0.1"}, ""),
        (
            "--remode rand",
            {"augment.erasing_fill": None},
            "not there yet: --remode rand: a colour a box; the recipe's own stays",
        ),
        ("--mixup 0", {"augment.mixup": "false", "augment.cutmix": "true", "augment.cutmix_alpha": "1.0"}, ""),
        ("--cutmix 0 --mixup 0.3", {"augment.cutmix": "false", "augment.mixup_alpha": "0.3"}, ""),
        ("--train-interpolation bilinear", {"augment.interpolation": "bilinear"}, ""),
        ("--eval-crop-ratio 0.95 --smoothing 0", {"evaluation.crop_pct": "0.95", "label_smoothing": "0"}, ""),
        (
            "--aa rand-m7-n3-inc1",
            {
                "augment.randaugment": "timm-increasing",
                "augment.randaugment_ops": "3",
                "augment.randaugment_magnitude": "7",
                "augment.randaugment_std": "0",
            },
            "",
        ),
        (
            "--aa rand-mstd1.5-inc1-mmax15",
            {"augment.randaugment_magnitude": "10", "augment.randaugment_std": "1.5"},
            "not there yet: --aa rand-mstd1.5-inc1-mmax15: mmax",
        ),
        (
            "--aa original",
            {"augment.randaugment_ops": "0", "augment.randaugment": None},
            "not there yet: --aa original: another policy than RandAugment",
        ),
        (
            "--cooldown-epochs 10",
            {"schedule.length": "300 epochs", "schedule.cooldown": None},
            "no effect in the authors' program: --cooldown-epochs 10: it trains as many as --epochs says",
        ),
    ],
)
def test_flags_of_deit(flags, expected, remark, tmp_path, capsys):
    told, _ = converted(f"{DEIT} {flags}", tmp_path, capsys)
    found = fields(told)
    assert {name: found.get(name) for name in expected} == expected
    assert f"# {remark}" in told
    plain = {line for line in converted(DEIT, tmp_path, capsys)[0].splitlines() if line.startswith("#")}
    assert len([line for line in told.splitlines() if line.startswith("#") and line not in plain]) == bool(remark)


@pytest.mark.parametrize(
    ("flags", "expected", "remark"),
    [
        (
            "--min-lr 1e-5 --cooldown-epochs 10",
            {"schedule.length": "310 epochs", "schedule.cooldown": "10 epochs", "schedule.cooldown_lr": "1e-5"},
            "not given, so that the recipe's own values stay: --lr",
        ),
        (
            "--cooldown-epochs 0",
            {"schedule.length": "300 epochs", "schedule.cooldown": "0 epochs", "schedule.cooldown_lr": None},
            "not given, so that the recipe's own values stay: --min-lr",
        ),
        (
            "--cooldown-epochs 10",
            {"schedule.length": "300 epochs", "schedule.cooldown": None, "schedule.cooldown_lr": None},
            "not there yet: --cooldown-epochs 10 without --min-lr: its rate depends on timm's version; give --min-lr",
        ),
        (
            "--crop-pct 0.9 --train-interpolation bicubic --mixup 0.2 --workers 3",
            {
                "evaluation.crop_pct": "0.9",
                "augment.interpolation": "bicubic",
                "augment.mixup_alpha": "0.2",
                "augment.cutmix": "false",
            },
            "not given, so that the recipe's own values stay: --cooldown-epochs (schedule.cooldown), --min-lr",
        ),
    ],
)
def test_flags_of_timm(flags, expected, remark, tmp_path, capsys):
    told, _ = converted(f"./distributed_train.sh 4 data --model vit_small_patch16_224 {flags}", tmp_path, capsys)
    assert {name: fields(told).get(name) for name in expected} == expected
    assert f"# {remark}" in told


def test_efficient_train(tmp_path, capsys):
    told, _ = converted((COMMANDS / "efficienttrain_deit_small.txt").read_text(), tmp_path, capsys)
    assert "recipes/toe_deit.py --model deit_small_patch16_224 --variant efficienttrain " in told.splitlines()[1]
    options = ["--model", "deit_small_patch16_224", "--variant", "efficienttrain"]
    recipe = recipe_of(told, toe_deit, options, tmp_path)
    ours = toe_deit.make("deit_small_patch16_224", False, "efficienttrain")
    assert changes(recipe, ours) == {"data.workers": 8, "runtime.precision": "fp16"}
    plain = changes(recipe_of(told, toe_deit, options[:2], tmp_path), ours)
    assert plain.pop("run_dir") == "runs/toe_deit/deit_small_patch16_224"
    assert plain == changes(recipe, ours), "the variant must not matter"
    assert recipe.progressive == Progressive((0, 60, 120, 180, 240), (160, 160, 160, 192, 224), (1, 3, 5, 7, 9))
    assert recipe.token_expansion == TokenExpansion((0, 100, 200), (0.6, 0.8, 1.0), 0.3, 2)
    assert recipe.schedule == Schedule("300 epochs", "20 epochs", 4e-3, 0.0, 1e-6)
    assert recipe.optimizer == Optimizer(weight_decay=0.05, decay="matrices", clip_norm=5.0)
    assert recipe.augment == dataclasses.replace(
        TIMM, mixup=True, cutmix=True, mixup_alpha=0.8, cutmix_alpha=1.0, randaugment_ops=2, erasing=0.25
    )
    assert (recipe.label_smoothing, recipe.ema_decay, recipe.evaluation.crop_pct) == (0.1, 0, 0.875)
    assert "# not there yet" not in told
    shorter, _ = converted("python ET_training.py --model deit_tiny_patch16_224 --epochs 250", tmp_path, capsys)
    assert fields(shorter)["progressive.steps"] == "[0, 50, 100, 150, 200]"


def test_the_command_of_ltm_is_our_recipe(tmp_path, capsys):
    told, errors = converted((COMMANDS / "ltm_mobilevit_s.txt").read_text(), tmp_path, capsys)
    recipe, ours = recipe_of(told, ltm, [], tmp_path), ltm.make("ltm_mobilevit_s", False)
    off = {"augment.mixup_alpha": 0.0, "augment.cutmix_alpha": 0.0}
    differs = {"run_dir": "your-output-path-saving-results", "runtime.precision": "fp16"}
    assert changes(recipe, ours) == off | differs
    assert "--num_processes 4 recipes/ltm.py --model ltm_mobilevit_s --recipe RECIPE.yaml" in told.splitlines()[1]
    assert "# not there yet: --train-interpolation random by default: bilinear or bicubic, drawn for each image" in told
    assert fields(told)["model.compression_ratio"] == "0.8"
    assert errors == (
        "contradiction: --warmup-epochs 5 beside --warmup-lr 0.0002, which is --lr itself: the warm-up only puts the "
        "cosine off\n"
    )


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("lvvit_s", "LV-ViT with ToE: not there yet: LV-ViT and its token labels"),
        ("yolos_s", "YOLOS with ToE: not there yet: detection on COCO"),
        (
            "t2t_vit_t_14",
            "T2T-ViT (mmpretrain): not there yet: its command has no flags, but a config file; recipes/t2t_vit.py has "
            "what its authors' say",
        ),
    ],
)
def test_what_no_recipe_can_be_made_of(name, waits, tmp_path, capsys):
    told, errors = converted((COMMANDS / f"{name}.txt").read_text(), tmp_path, capsys, code=2)
    assert errors == f"error: no recipe can be made of a command of {waits}\n"
    assert "accelerate launch" not in told


@pytest.mark.parametrize("name", OF)
def test_the_readme_has_every_flag_of_every_command(name):
    """The one that is commented out, too, and those of launchers."""
    assert sorted(OF) == sorted(path.stem for path in COMMANDS.iterdir())
    text = re.sub(r"-m torch\.\S+|#!\S+", "", (COMMANDS / f"{name}.txt").read_text())
    program = PROGRAMS[OF[name]]
    rows = [row for row in readme_table() if row.startswith((f"| {program.title} (`", f"| {LAUNCHERS.title} "))]
    for flag in set(FLAG.findall(re.sub(r"#(?! --wandb).*", "", text))):
        assert any(f"`{flag}`" in row.split(" | ")[1] for row in rows), f"{flag} of {program.title}"
    assert rows


def readme_table() -> list[str]:
    section = (ranks.ROOT / "README.md").read_text().partition("### Coming from other programs\n")[2]
    return [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]


def test_the_readme_has_the_table_and_the_table_has_our_fields():
    assert readme_table() == [*table()]
    ours = flatten(Recipe())
    for program in (*PROGRAMS.values(), LAUNCHERS):
        assert {flag.field for flag in program.flags if flag.kind == "field"} <= ours.keys()
        assert program.always.keys() <= ours.keys()
        names = [name for flag in program.flags for name in flag.names.split()]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("change", "contradiction"),
    [
        (
            ("--devices 2", "--devices 4"),
            "--devices 4 x --num-nodes 2 x --batch-size 1024 x --accumulations 1 is 8192, but the authors' table of "
            "imagenet-21k gives ViTTM-B an effective batch of 4096",
        ),
        (("10450", "1000"), "--num-classes 1000, but imagenet-21k has 10450"),
        (("--rand-aug ", ""), "--num-ops 2 without --rand-aug has no effect"),
        (("--use-mixup", ""), "--mixup-alpha 0.5 without --use-mixup or --use-cutmix has no effect"),
        (("-type patch", "-type latent"), "--process-embedded-type latent was trained as patch"),
        (
            ("--compile ", "--checkpoint-profile vittm-small-ls4 "),
            "--checkpoint-profile vittm-small-ls4 is of another model than --model vittm_base",
        ),
    ],
)
def test_contradictions(change, contradiction, tmp_path, capsys):
    assert change[0] in PRETRAIN
    told, errors = converted(PRETRAIN.replace(*change), tmp_path, capsys)
    assert f"contradiction: {contradiction}" in errors
    assert f"# contradiction: {contradiction}" in told


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo", "no commands of a known program are there, which start ET_training.py, distributed_train.sh, main.py"),
        (f"{DEIT}\n{DEIT}", "2 commands of a known program are there"),
        (f"{DEIT} --keeprate 0.5", "DeiT with ToE has no flag --keeprate; the nearest is --keep-rate"),
        (f"{DEIT} --seed", "--seed lacks its value"),
        (f"{DEIT} --mixup much", "--mixup 'much': it takes a number, for augment.mixup_alpha is made of it"),
        (f"{DEIT} --epochs many", "schedule.length: 'many epochs' is no duration"),
        (f"{DEIT} --drop-path big", "model.drop_path_rate 'big': it takes a number, or null"),
        (f"{DEIT} --data-path 'x", "cannot be read (No closing quotation): mend its quotes"),
        (
            f"{DEIT} --expansion-step 0 9 --keep-rate 1",
            "token_expansion.steps (0, 9) and keep_rates (1.0,): each stage has one of both, but they are 2 and 1",
        ),
        (
            "python train_lt.py --dataset cifar --batch-size 8",
            "--dataset 'cifar': recipes are there for imagenet-21k and",
        ),
        ("python train_lt.py --dataset imagenet", "--batch-size '': it takes a number, for data.global_batch is made"),
        (PRETRAIN.replace("cosine", "step"), "--scheduler step: the schedule is the cosine here"),
        (
            "./distributed_train.sh --model x",
            "'' is no number of processes, which distributed_train.sh is started with",
        ),
        (
            "python ET_training.py --model swin_tiny",
            "--model 'swin_tiny': of EfficientTrain's models only deit_tiny and",
        ),
    ],
)
def test_what_is_refused(command, message, tmp_path, capsys):
    told, errors = converted(command, tmp_path, capsys, 2)
    assert message in errors
    assert not told


def test_a_file_that_is_not_there(capsys):
    assert main(["nosuch.txt"]) == 2
    assert capsys.readouterr().err.startswith("error: nosuch.txt cannot be read ([Errno 2] No such file")


def test_the_tool_as_it_is_called(tmp_path):
    """From stdin, and from the words behind --; what a command would run is not run."""
    trap = tmp_path / "trap"
    words = ["python", "train_lt.py", "--dataset", "imagenet", "--batch-size", "2048", "--model", f"$(touch {trap})"]
    script = [sys.executable, "tools/from_upstream.py"]
    behind = subprocess.run([*script, "--", *words], cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    text = " ".join(words[:-2]) + f' --model "$(touch {trap})"'
    piped = subprocess.run(script, input=text, cwd=ranks.ROOT, capture_output=True, text=True, check=True)
    assert behind.stdout == piped.stdout
    assert "data.global_batch: 2048" in piped.stdout
    assert not trap.exists()
