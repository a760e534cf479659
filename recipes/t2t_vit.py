"""Train T2T-ViT on ImageNet-1k from scratch, with the hyper-parameters of its authors (ICCV 2021).

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml recipes/t2t_vit.py --model t2t_vit_t_14
Models:   t2t_vit_t_14, t2t_vit_t_19 and t2t_vit_t_24 have transformer layers in their Tokens-to-Token module,
          t2t_vit_14, _19 and _24 and the lite t2t_vit_7, _10 and _12 performer ones.
Data:     data/imagenet1k (splits train and val), written by tools/make_shards.py
Hardware: CUDA; 8 GPUs take 64 samples each at once. Fewer: raise --data.accumulation.
Time:     310 epochs of 1,281,167 images; not measured. Arithmetic: if steps reached 40 % of the 312 TFLOP/s of each of
          8 A100 (an assumption), the three with transformer layers would take 4.0, 6.5 and 9.9 hours.
Top-1:    not measured here. The authors': 81.83 % (t2t_vit_t_14), 82.63 % (t2t_vit_t_19), 82.71 % (t2t_vit_t_24).
          Not known for the others by these settings.
Differs:  mixing is drawn once a global batch, where the authors draw it once a rank; images take the fast path
          (README), whose resize is rounded otherwise than Pillow's.
Debug:    --debug trains a model of 32 px on scikit-learn's handwritten digits, on any machine, in a minute or two.
"""

from dataclasses import replace

from pipeline.optim.table import describe
from pipeline.recipe import Augment, Checkpoint, Data, Evaluation, Model, Optimizer, Recipe, Runtime, Schedule, parse
from pipeline.trainer import run

MODELS = (
    *("t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"),
    *("t2t_vit_14", "t2t_vit_19", "t2t_vit_24", "t2t_vit_7", "t2t_vit_10", "t2t_vit_12"),
)
LR = 5e-4


def recipe(model: str) -> Recipe:
    """The authors' settings, which differ between sizes in the weight decay alone."""
    return Recipe(
        run_dir=f"runs/t2t_vit/{model}",
        loss="ce",
        label_smoothing=0.1,
        ema_decay=0.99996,
        data=Data(path="data/imagenet1k", global_batch=512, workers=16),
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
        optimizer=Optimizer(
            weight_decay=0.065 if model.endswith(("_19", "_24")) else 0.05, decay="matrices", clip_norm=0.0
        ),
        schedule=Schedule(
            length="310 epochs",
            warmup="10 epochs",
            lr=LR,
            warmup_lr=1e-6 * LR,
            min_lr=1e-5,
            cosine_per="epoch",
            cooldown="10 epochs",
            cooldown_lr=1e-6,
        ),
        evaluation=Evaluation(every="1 epochs", batch=256, crop_pct=224 / 248),
        runtime=Runtime(device="cuda", precision="bf16", log_every="50 steps"),
    )


def debug(model: str) -> Recipe:
    """The same experiment at 32 px, of a narrow and shallow model, on digits, of which flips and cuts make others."""
    full = recipe(model)
    return replace(
        full,
        run_dir=f"runs/debug/t2t_vit/{model}",
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
        model=Model(name=model, embed_dim=64, depth=4, num_heads=2, token_dim=32, drop_path_rate=0.1),
        schedule=replace(full.schedule, length="60 epochs", warmup="5 epochs", lr=2e-3, cooldown="2 epochs"),
        evaluation=replace(full.evaluation, every="25%", batch=128),
        checkpoint=Checkpoint(every="25%"),
        runtime=Runtime(log_every="20 steps"),
    )


def make(model: str, small: bool) -> Recipe:
    return debug(model) if small else recipe(model)


if __name__ == "__main__":
    run(parse(make, MODELS, f"{__doc__}\n{describe()}"))
