"""What the flags of other programs are called here: one typed table, which README.md shows.

Of ViTTM's program (WACV 2025), of DeiT, LV-ViT, EfficientTrain and YOLOS with Token Expansion (CVPR 2024), and of the
timm program of LTM (TPAMI 2025). Defaults are those of each program: DeiT's of github.com/facebookresearch/deit
main.py, EfficientTrain's of github.com/LeapLabTHU/EfficientTrain ET_training.py and main.py.
"""

from dataclasses import replace

from tools.upstream_types import Flag, Program, later, said, switch

IMAGES = "the images are made into shards first (tools/make_shards.py), where data.path points then"
CLASSES = "the index of the shards knows its classes"
PINNED = "memory is pinned on CUDA always"
BATCH = "a rank's; the global batch is the same on any number of ranks"
LABELS = "token labels (LV-ViT)"
MODEL = "--model picks the recipe, too"
RANDAUGMENT = (
    "with inc1 as timm-increasing, without it as timm, n as augment.randaugment_ops, mstd as augment.randaugment_std"
)
ERASED = "pixel is noise, const mean; rand is not there"
OFF = "0 switches it off"
SCHEDULE = (
    "the schedule is the cosine, by epochs as there; ours warms up by steps, and its cosine begins where the warm-up "
    "ends, not with the training"
)
FIFTHS = (
    "and `progressive.steps`: their fifths have images of 160, 160, 160, 192, 224 px, and RandAugment's magnitude grows"
)
BY_TIMM = {
    "optimizer.decay": "matrices",
    "schedule.cosine_per": "epoch",
    "augment.erasing_scale": "[0.02, 0.3333333333333333]",
}
"""What timm does whatever the flags are."""

EXPANSION = (
    Flag("--expansion-step", "token_expansion.steps", takes="+"),
    Flag("--keep-rate", "token_expansion.keep_rates", takes="+"),
    Flag("--initialization-keep-rate", "token_expansion.initial_keep_rate"),
    Flag("--expansion-multiple-stage", "token_expansion.repetitions"),
)
EFFICIENT_STAGES = ("0 100 200", "0.6 0.8 1.0", "0.3", "2")  # of these flags, in ToE's commands of EfficientTrain

VITTM = Program(
    "ViTTM",
    ("train_lt.py",),
    (
        Flag("--devices", "data.global_batch", BATCH, default="1"),
        Flag("--num-nodes", "data.global_batch", BATCH, default="1"),
        Flag("--batch-size", "data.global_batch", BATCH),
        Flag("--accumulations", "data.accumulation", default="1"),
        said("--dataset", "imagenet-21k picks recipes/pretrain_21k.py, imagenet recipes/finetune_1k.py"),
        said("--data-path", IMAGES),
        said("--num-classes", CLASSES),
        Flag("--num-workers", "data.workers"),
        said("--pin-memory", PINNED, ""),
        Flag("--epochs", "schedule.length", form="{} epochs"),
        Flag("--warmup-steps", "schedule.warmup", form="{} steps"),
        said("--scheduler", "the schedule is the cosine"),
        Flag("--learning-rate", "schedule.lr"),
        Flag("--warmup-lr", "schedule.warmup_lr"),
        Flag("--min-lr", "schedule.min_lr"),
        Flag("--weight-decay", "optimizer.weight_decay"),
        Flag("--grad-clip", "optimizer.clip_norm"),
        said("--gradnorm", "every logged step has grad_norm; runtime.norms shows it of each parameter", ""),
        Flag("--test-batch-size", "evaluation.batch"),
        Flag("--model", "model.name", MODEL),
        Flag("--memory-ps", "model.memory_ps"),
        Flag("--process-ps", "model.process_ps"),
        Flag("--rw-head-type", "model.rw_head_type"),
        Flag("--latent-size-scale", "model.latent_size_scale"),
        Flag("--fusion-type", "model.fusion_type"),
        Flag(
            "--process-embedded-type",
            remark="it is swallowed by **kwargs, for the model calls it process_embedder_type; ours is "
            "model.process_embedder_type, and has an effect",
            kind="no effect",
        ),
        Flag("--drop-path-rate", "model.drop_path_rate"),
        switch("--flexi-process", "model.init_from", "blocks+flexi", "blocks", "its silent start, told here"),
        Flag(
            "--checkpoint-profile",
            remark="the pretrained weights that it names are not loaded; ours is model.start, with init_from none",
            kind="no effect",
        ),
        Flag("--num-ops", "augment.randaugment_ops"),
        Flag("--magnitude", "augment.randaugment_magnitude"),
        switch("--rand-aug", "augment.randaugment_ops", "", "0"),
        switch("--use-mixup", "augment.mixup", "true", "false"),
        switch("--use-cutmix", "augment.cutmix", "true", "false"),
        Flag("--mixup-alpha", "augment.mixup_alpha", "and augment.cutmix_alpha"),
        switch("--random-erasing", "augment.erasing", "0.25", "0"),
        switch("--bce", "loss", "bce", "ce"),
        Flag("--image-size", "augment.image_size", default="224"),
        switch("--compile", "runtime.compile", "inductor", "off"),
        Flag("--checkpoints-path", "run_dir"),
        switch("--wandb", "wandb", "vittm", "", "ours takes the project's name"),
    ),
    {
        "ema_decay": "0.999",
        "runtime.precision": "bf16",
        "optimizer.name": "adamw",
        "model.process_embedder_type": "patch",
    },
)

DEIT = Program(
    "DeiT with ToE",
    ("main.py",),
    (
        Flag("--model", "model.name", MODEL),
        Flag("--patch-size", "model.patch_size"),
        Flag("--batch-size", "data.global_batch", BATCH, default="64"),
        said("--data-path", IMAGES),
        Flag("--output_dir", "run_dir"),
        Flag("--num_workers", "data.workers", default="10"),
        Flag("--seed", "seed", default="0"),
        Flag("--epochs", "schedule.length", form="{} epochs", default="300"),
        Flag("--warmup-epochs", "schedule.warmup", form="{} epochs", default="5"),
        said("--sched", SCHEDULE, default="cosine"),
        Flag("--cooldown-epochs", remark="it trains as many as --epochs says", kind="no effect"),
        Flag("--lr", "schedule.lr", "of 512 samples; ours is that of the global batch", default="5e-4"),
        Flag("--warmup-lr", "schedule.warmup_lr", default="1e-6"),
        Flag("--min-lr", "schedule.min_lr", default="1e-5"),
        Flag("--weight-decay", "optimizer.weight_decay", default="0.05"),
        Flag("--clip-grad", "optimizer.clip_norm", default="0"),
        Flag("--drop-path", "model.drop_path_rate", default="0.1"),
        Flag("--input-size", "augment.image_size", default="224"),
        Flag("--model-ema-decay", "ema_decay", default="0.99996"),
        Flag("--aa", "augment.randaugment_magnitude", RANDAUGMENT, default="rand-m9-mstd0.5-inc1"),
        Flag("--train-interpolation", "augment.interpolation", default="bicubic"),
        Flag("--reprob", "augment.erasing", default="0.25"),
        Flag("--remode", "augment.erasing_fill", ERASED, default="pixel"),
        Flag("--mixup", "augment.mixup_alpha", OFF, default="0.8"),
        Flag("--cutmix", "augment.cutmix_alpha", OFF, default="1.0"),
        Flag("--smoothing", "label_smoothing", default="0.1"),
        Flag("--eval-crop-ratio", "evaluation.crop_pct", default="0.875"),
        later("--repeated-aug", "repeated augmentation; on unless --no-repeated-aug is given", ""),
        said("--no-repeated-aug", "no sample is repeated", ""),
        *EXPANSION,
    ),
    BY_TIMM | {"loss": "ce", "runtime.precision": "fp16", "optimizer.name": "adamw", "model.init_from": "none"},
)

LV_VIT = Program(
    "LV-ViT with ToE",
    ("main.py",),
    (
        later("--model", "LV-ViT"),
        Flag("-b --batch-size", "data.global_batch", BATCH),
        Flag("--output", "run_dir"),
        Flag("--img-size", "augment.image_size"),
        Flag("--drop-path", "model.drop_path_rate"),
        later("--token-label", LABELS, ""),
        later("--token-label-data", LABELS),
        later("--token-label-size", LABELS),
        said("--model-ema", "an average is kept unless ema_decay is 0", ""),
        switch("--apex-amp", "runtime.precision", "fp16", "fp32"),
        *EXPANSION,
    ),
    waits="LV-ViT and its token labels",
)

EFFICIENT_TRAIN = Program(
    "EfficientTrain with ToE",
    ("ET_training.py",),
    (
        said("--data_path", IMAGES),
        Flag("--output_dir", "run_dir"),
        Flag("--model", "model.name", MODEL),
        said("--final_bs", "whatever it is, the program accumulates to a global batch of 4096"),
        Flag("--epochs", "schedule.length", FIFTHS, form="{} epochs", default="300"),
        said("--num_gpus", "the global batch is the same on any number of ranks: accelerate launch --num_processes"),
        Flag("--num_workers", "data.workers", default="10"),
        # Of the commands that it starts, by model.
        Flag("--use_amp", "runtime.precision", form="fp16", default="true"),
        Flag("--clip_grad", "optimizer.clip_norm", default="5.0"),
        *(replace(flag, default=text) for flag, text in zip(EXPANSION, EFFICIENT_STAGES, strict=True)),
    ),
    {
        "data.global_batch": "4096",
        "seed": "0",
        "schedule.lr": "4e-3",
        "schedule.warmup": "20 epochs",
        "schedule.warmup_lr": "0",
        "schedule.min_lr": "1e-6",
        "schedule.cosine_per": "step",
        "model.drop_path_rate": "0.1",
        "loss": "ce",
        "label_smoothing": "0.1",
        "ema_decay": "0",
        "optimizer.name": "adamw",
        "optimizer.weight_decay": "0.05",
        "optimizer.decay": "matrices",
        "model.init_from": "none",
        "augment.interpolation": "bicubic",
        "augment.randaugment": "timm-increasing",
        "augment.randaugment_ops": "2",
        "augment.randaugment_magnitude": "9",
        "augment.randaugment_std": "0.5",
        "augment.image_size": "224",
        "progressive.image_sizes": "[160, 160, 160, 192, 224]",
        "progressive.randaugment_magnitudes": "[1, 3, 5, 7, 9]",
        "augment.erasing": "0.25",
        "augment.erasing_fill": "noise",
        "augment.erasing_scale": BY_TIMM["augment.erasing_scale"],
        "augment.mixup": "true",
        "augment.mixup_alpha": "0.8",
        "augment.cutmix": "true",
        "augment.cutmix_alpha": "1.0",
        "evaluation.crop_pct": "0.875",
    },
)

YOLOS = Program(
    "YOLOS with ToE",
    ("main.py",),
    (
        *(later(name, "detection") for name in ("--coco_path", "--backbone_name", "--pre_trained", "--eval_size")),
        *(later(name, "detection", "+") for name in ("--init_pe_size", "--mid_pe_size")),
        Flag("--batch_size", "data.global_batch", BATCH),
        Flag("--lr", "schedule.lr"),
        Flag("--epochs", "schedule.length", form="{} epochs"),
        Flag("--output_dir", "run_dir"),
        Flag("--num_workers", "data.workers"),
        *EXPANSION,
    ),
    waits="detection on COCO",
)

TIMM = Program(
    "LTM (timm)",
    ("distributed_train.sh", "train.py"),
    (
        Flag("--model", "model.name", "ltm_* picks recipes/ltm.py, too"),
        Flag("-b --batch-size", "data.global_batch", BATCH, default="128"),
        Flag("--workers -j", "data.workers", default="4"),
        said("--pin-mem", PINNED, ""),
        said("--sched", SCHEDULE),
        Flag("--epochs", "schedule.length", form="{} epochs", default="300"),
        Flag(
            "--cooldown-epochs",
            "schedule.cooldown",
            "the length grows by them; their rate is --min-lr",
            form="{} epochs",
        ),
        Flag("--min-lr", "schedule.min_lr"),
        Flag("--lr", "schedule.lr"),
        Flag("--warmup-lr", "schedule.warmup_lr"),
        Flag("--warmup-epochs", "schedule.warmup", form="{} epochs"),
        Flag("--opt", "optimizer.name"),
        Flag("--weight-decay", "optimizer.weight_decay"),
        Flag("--model-ema-decay", "ema_decay", default="0.9998"),
        switch("--model-ema", "ema_decay", "", "0"),
        Flag("--aa", "augment.randaugment_magnitude", RANDAUGMENT),
        Flag("--train-interpolation", "augment.interpolation", "random is not there", default="random"),
        Flag("--reprob", "augment.erasing", default="0"),
        Flag("--remode", "augment.erasing_fill", ERASED, default="pixel"),
        Flag("--mixup", "augment.mixup_alpha", OFF, default="0"),
        Flag("--cutmix", "augment.cutmix_alpha", OFF, default="0"),
        switch("--amp", "runtime.precision", "fp16", "fp32"),
        Flag("--smoothing", "label_smoothing", default="0.1"),
        Flag("--crop-pct", "evaluation.crop_pct"),
        Flag("--checkpoint-hist", "checkpoint.keep"),
        Flag("--compression-ratio", "model.compression_ratio", "the authors' public code has no such flag"),
        Flag("--output", "run_dir"),
    ),
    BY_TIMM | {"loss": "ce", "model.init_from": "none"},
)

T2T = Program(
    "T2T-ViT (mmpretrain)",
    ("train.py",),
    (),
    waits="its command has no flags, but a config file; recipes/t2t_vit.py has what its authors' say",
)

LAUNCHERS = Program(
    "launchers",
    (),
    (
        said("CUDA_VISIBLE_DEVICES", "it works as everywhere"),
        Flag("--nproc_per_node", "data.global_batch", "accelerate launch --num_processes"),
        said("--master_port", "accelerate launch --main_process_port"),
        said("--use_env", "it is so always", ""),
    ),
)
PROGRAMS = {
    "vittm": VITTM,
    "deit": DEIT,
    "lvvit": LV_VIT,
    "efficienttrain": EFFICIENT_TRAIN,
    "yolos": YOLOS,
    "timm": TIMM,
    "t2t": T2T,
}
SCRIPTS = {script for program in PROGRAMS.values() for script in program.scripts}
