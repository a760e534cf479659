"""Train LTM on ImageNet-1k from scratch: a ViT, Swin, MobileViT or EfficientViT whose blocks merge tokens, by a learned
mask, to 80 %, against an information bottleneck (TPAMI 2025).

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml --num_processes 4 recipes/ltm.py
          --model ltm_mobilevit_s
          From a model without merging: add --model.start BASE.safetensors (its classifier is made new).
          --model.compression-ratio 1 trains that model, --bottleneck.weight 0 without the bottleneck.
Models:   ltm_vit_small, ltm_vit_base, ltm_swin_tiny, ltm_swin_base, ltm_mobilevit_xs, ltm_mobilevit_s and
          ltm_efficientvit_b1. The blocks are our own design, by what the paper says of them: its authors' public code
          has none. What the paper measured is no promise of these.
Data:     data/imagenet1k (splits train and val), written by tools/make_shards.py
Hardware: CUDA; 4 GPUs take 64 samples each at once. Fewer: raise --data.accumulation.
Loss:     cross-entropy of smoothed labels for 90 of 300 epochs, then of whole labels, and 0.1 of the bottleneck's
          bound, against 1000 clusters of features and of pixels, and profiles of classes, that every epoch begins with,
          of 25,600 training images.
Time:     300 epochs of 1,281,167 images; not measured. Arithmetic: if steps reached 40 % of the 312 TFLOP/s of each of
          4 A100 (an assumption), they would take 2.1 hours (vit_small), 7.9 (vit_base), 5.2 (swin_tiny), 17.6
          (swin_base), 1.0 (mobilevit_xs), 1.9 (mobilevit_s) and 0.6 (efficientvit_b1).
Top-1:    not measured here. The paper's, of its own blocks: 81.8 % (vit_small), 83.9 % (vit_base), 81.8 % (swin_tiny),
          83.8 % (swin_base), 75.8 % (mobilevit_xs), 79.7 % (mobilevit_s), 80.2 % (efficientvit_b1).
Differs:  bf16, where the authors' command has --amp (fp16); the warm-up moves every step; all images are resized by the
          bicubic filter, where timm draws one of two, and normalised by ImageNet's mean and deviation, MobileViT's too;
          they take the fast path (README), whose resize is rounded otherwise than Pillow's.
Debug:    --debug trains a narrow model of 64 px on scikit-learn's handwritten digits, on any machine, in minutes.
"""

from dataclasses import replace
from typing import Any

from pipeline.optim.table import describe
from pipeline.recipe import (
    Augment,
    Bottleneck,
    Checkpoint,
    Data,
    Evaluation,
    Model,
    Optimizer,
    Recipe,
    Runtime,
    Schedule,
    parse,
)
from pipeline.trainer import run

NARROW: dict[str, dict[str, Any]] = {
    "ltm_vit_small": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
    "ltm_vit_base": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
    "ltm_swin_tiny": {"width_factor": 0.25},
    "ltm_swin_base": {"width_factor": 0.25},
    "ltm_mobilevit_xs": {"width_factor": 0.5},
    "ltm_mobilevit_s": {"width_factor": 0.25},
    "ltm_efficientvit_b1": {"width_factor": 0.5},
}
"""What makes a debug form of each model."""
LEARNT: dict[str, dict[str, Any]] = {
    "vit": {"length": "60 epochs", "lr": 2e-3},
    "swin": {"length": "30 epochs", "lr": 1e-3},
    "mobilevit": {"length": "20 epochs", "lr": 2e-3},
    "efficientvit": {"length": "20 epochs", "lr": 2e-3},
}
"""How long it is trained, and how fast, by family: Swin's, which merges by windows, falls apart at a rate of 2e-3."""
MODELS = ("ltm_mobilevit_s", *(name for name in NARROW if name != "ltm_mobilevit_s"))


def recipe(model: str) -> Recipe:
    """The settings of the authors' command, the same for every model."""
    return Recipe(
        run_dir=f"runs/ltm/{model}",
        loss="ce",
        label_smoothing=0.1,
        ema_decay=0.9995,
        data=Data(path="data/imagenet1k", global_batch=256, workers=8),
        augment=Augment(
            image_size=224,
            decode="fast",
            interpolation="bicubic",
            randaugment="timm",
            randaugment_ops=2,
            randaugment_magnitude=9,
            randaugment_std=0.5,
            erasing=0.2,
            erasing_fill="noise",
            erasing_scale=(0.02, 1 / 3),
        ),
        model=Model(name=model, compression_ratio=0.8),
        bottleneck=Bottleneck(weight=0.1, after="30%"),
        optimizer=Optimizer(weight_decay=0.01, decay="matrices", clip_norm=0.0),
        schedule=Schedule(
            length="300 epochs", warmup="5 epochs", lr=2e-4, warmup_lr=2e-4, min_lr=2e-5, cosine_per="epoch"
        ),
        evaluation=Evaluation(every="1 epochs", batch=256, crop_pct=0.95 if "efficientvit" in model else 0.9),
        checkpoint=Checkpoint(keep=20),
        runtime=Runtime(device="cuda", precision="bf16", log_every="50 steps"),
    )


def debug(model: str) -> Recipe:
    """The same experiment at 64 px, of a narrow model, on digits, of which flips and cuts make others."""
    full = recipe(model)
    return replace(
        full,
        run_dir=f"runs/debug/ltm/{model}",
        ema_decay=0.98,
        data=Data(path="data/demo/digits", global_batch=64, workers=1),
        augment=replace(
            full.augment,
            image_size=64,
            decode="exact",
            crop_scale=(0.6, 1.0),
            hflip=0.0,
            randaugment_ops=1,
            randaugment_magnitude=3,
            erasing=0.1,
        ),
        model=replace(full.model, **NARROW[model]),
        bottleneck=replace(full.bottleneck, centroids=50, iterations=20, samples=500),
        schedule=replace(full.schedule, warmup_lr=1e-4, **LEARNT[model.split("_")[1]]),
        evaluation=replace(full.evaluation, every="25%", batch=128),
        checkpoint=Checkpoint(every="25%"),
        runtime=Runtime(log_every="20 steps"),
    )


def make(model: str, small: bool) -> Recipe:
    return debug(model) if small else recipe(model)


if __name__ == "__main__":
    run(parse(make, MODELS, f"{__doc__}\n{describe()}"))
