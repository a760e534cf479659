"""Train DeiT on ImageNet-1k from scratch with token expansion (CVPR 2024): DeiT's own recipe on fewer tokens at first.

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml recipes/toe_deit.py --model deit_small_patch16_224
          --token-expansion.steps --token-expansion.keep-rates, without values, trains on all tokens throughout.
Models:   deit_tiny_patch16_224, deit_small_patch16_224, deit_base_patch16_224; and deit_*_distilled_patch16_224, which
          have no teacher here: the mean of their two heads is trained.
Variants: --variant deit             DeiT's settings (the default)
                    efficienttrain   EfficientTrain's (ICCV 2023) as ToE's authors combine both: on smaller and less
                                     augmented images at first, and with a global batch of 4096. Theirs are tiny and
                                     small; the others take the same settings.
Data:     data/imagenet1k (splits train and val), written by tools/make_shards.py
Hardware: CUDA; 8 GPUs take 128 samples each at once, by efficienttrain 512. Fewer: raise --data.accumulation.
Tokens:   50 % of the patches' tokens up to epoch 100, 75 % up to 200, then all, each chosen from 25 % in 2 rounds a
          stage; by efficienttrain 60 %, 80 % and all, from 30 %. Evaluation, averages and what is exported are the
          plain DeiT.
Images:   of 224 px; by efficienttrain of 160 px up to epoch 180, of 192 up to 240, then of 224, with a RandAugment of
          magnitude 1, and every 60 epochs 2 more. Evaluation is at 224 px throughout.
Time:     300 epochs of 1,281,167 images; not measured. Arithmetic: if steps reached 40 % of the 312 TFLOP/s of each of
          8 A100 (an assumption), tiny, small and base would take 0.62, 2.27 and 8.68 hours, and 0.80, 2.95 and 11.27
          on all tokens; by efficienttrain 0.43, 1.61 and 6.23, and 0.51, 1.89 and 7.29 on all tokens.
Top-1:    not measured here. DeiT's authors, on all tokens: 72.2 % (tiny), 79.9 % (small), 81.8 % (base).
Differs:  mixing is drawn once a global batch, where the authors draw it once a rank; bf16, where they have fp16; images
          take the fast path (README), whose resize is rounded otherwise than Pillow's.
          Of DeiT's program: no sample is repeated (its repeated augmentation); the warm-up moves every step, and the
          cosine begins after it, where DeiT's runs beneath it and moves an epoch later (at most 1.1 % of the peak
          apart). Its 10 epochs of cool-down are no difference: it ends before them.
          Of EfficientTrain's: it decodes, augments and erases 224 px in every stage, and then cuts high frequencies off
          (a Fourier transform on the GPU), in evaluation too; here crops become as small as the stage's images when
          they are decoded, and are augmented so. It trains positions of the stage's grid, and where a stage begins
          resizes them (bilinear) and the optimizer's moments of them; here those of 224 px are trained throughout, and
          resized in every forward pass (by timm, bicubic and antialiased). Batch, schedule, weight decay, clipping and
          drop path are as there, and no average is kept.
Debug:    --debug trains a model of 32 px on scikit-learn's handwritten digits, on any machine, in a minute or two.
"""

from dataclasses import replace

from pipeline.optim.table import describe
from pipeline.recipe import (
    Augment,
    Checkpoint,
    Data,
    Evaluation,
    Model,
    Optimizer,
    Progressive,
    Recipe,
    Runtime,
    Schedule,
    TokenExpansion,
    parse,
)
from pipeline.trainer import run

MODELS = tuple(f"deit_{size}{kind}_patch16_224" for kind in ("", "_distilled") for size in ("tiny", "small", "base"))
VARIANTS = ("deit", "efficienttrain")


def recipe(model: str) -> Recipe:
    """DeiT's settings, the same for every size."""
    return Recipe(
        run_dir=f"runs/toe_deit/{model}",
        seed=3407,
        loss="ce",
        label_smoothing=0.1,
        ema_decay=0.99996,
        data=Data(path="data/imagenet1k", global_batch=1024, workers=16),
        augment=Augment(
            image_size=224,
            decode="fast",
            interpolation="bicubic",
            randaugment="timm-increasing",
            randaugment_ops=2,
            randaugment_magnitude=9,
            randaugment_std=0.5,
            erasing=0.25,
            erasing_fill="noise",
            erasing_scale=(0.02, 1 / 3),
            mixup=True,
            cutmix=True,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        ),
        model=Model(name=model, drop_path_rate=0.1),
        token_expansion=TokenExpansion(
            steps=(0, 100, 200), keep_rates=(0.5, 0.75, 1.0), initial_keep_rate=0.25, repetitions=2
        ),
        optimizer=Optimizer(weight_decay=0.05, decay="matrices", clip_norm=0.0),
        schedule=Schedule(
            length="300 epochs", warmup="5 epochs", lr=1e-3, warmup_lr=1e-6, min_lr=1e-5, cosine_per="epoch"
        ),
        evaluation=Evaluation(every="1 epochs", batch=256, crop_pct=0.875),
        runtime=Runtime(device="cuda", precision="bf16", log_every="50 steps"),
    )


def debug(model: str) -> Recipe:
    """The same experiment at 32 px, of a narrow and shallow model, on digits, of which flips and cuts make others."""
    full = recipe(model)
    return replace(
        full,
        run_dir=f"runs/debug/toe_deit/{model}",
        ema_decay=0.98,
        data=Data(path="data/demo/digits", global_batch=64, workers=1),
        augment=replace(
            full.augment,
            image_size=32,
            decode="exact",
            crop_scale=(0.6, 1.0),
            hflip=0.0,
            randaugment_ops=1,
            randaugment_magnitude=3,
            erasing=0.1,
        ),
        model=Model(name=model, patch_size=4, embed_dim=64, depth=4, num_heads=2, drop_path_rate=0.1),
        token_expansion=replace(full.token_expansion, steps=(0, 20, 40)),
        schedule=replace(full.schedule, length="60 epochs", lr=2e-3),
        evaluation=Evaluation(every="25%", batch=128),
        checkpoint=Checkpoint(every="25%"),
        runtime=Runtime(log_every="20 steps"),
    )


def efficient(plain: Recipe) -> Recipe:
    """EfficientTrain's settings, the same for every size."""
    return replace(
        plain,
        run_dir=f"{plain.run_dir}-efficienttrain",
        seed=0,
        ema_decay=0.0,
        data=replace(plain.data, global_batch=4096),
        token_expansion=replace(plain.token_expansion, keep_rates=(0.6, 0.8, 1.0), initial_keep_rate=0.3),
        progressive=Progressive(
            steps=(0, 60, 120, 180, 240),
            image_sizes=(160, 160, 160, 192, 224),
            randaugment_magnitudes=(1, 3, 5, 7, 9),
        ),
        optimizer=replace(plain.optimizer, clip_norm=5.0),
        schedule=Schedule(length="300 epochs", warmup="20 epochs", lr=4e-3, warmup_lr=0.0, min_lr=1e-6),
    )


def efficient_debug(plain: Recipe) -> Recipe:
    """The variant of a debug form, which keeps its batch and schedule."""
    full = efficient(plain)
    return replace(
        full,
        data=plain.data,
        schedule=plain.schedule,
        progressive=Progressive(
            steps=(0, 12, 24, 36, 48), image_sizes=(24, 24, 24, 28, 32), randaugment_magnitudes=(1, 1, 2, 2, 3)
        ),
    )


def make(model: str, small: bool, variant: str = VARIANTS[0]) -> Recipe:
    plain = debug(model) if small else recipe(model)
    if variant == VARIANTS[0]:
        return plain
    return efficient_debug(plain) if small else efficient(plain)


if __name__ == "__main__":
    run(parse(make, MODELS, f"{__doc__}\n{describe()}", variants=VARIANTS))
