"""Fine-tune ViTTM-S or ViTTM-B on ImageNet-1k, with the hyper-parameters of its authors (WACV 2025).

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml recipes/finetune_1k.py --model vittm_base
              --model.start runs/pretrain_21k/vittm_base/weights/ema.safetensors
Models:   those of recipes/pretrain_21k.py, timm's vit and deit among them as baselines, by the same settings.
Variants: --variant adamw      from --model.start, or without it from scratch, with AdamW (the default)
                    shampoo    the same with Shampoo, by the settings that the authors name
                    authors    as the authors' published command runs: AdamW, and not from the pretrained weights that
                               it names, which their program ignores, but from the blocks of timm's ViT of the same
                               size, which was fine-tuned on ImageNet-1k (--model.init-from blocks); no --model.start
                    authors-shampoo
Data:     data/imagenet1k (splits train and val), written by tools/make_shards.py
Hardware: CUDA; 8 GPUs take 256 (base) or 512 (small) samples each at once. Fewer: raise --data.accumulation.
Time:     300 epochs of 1,281,167 images; not measured. Arithmetic: if steps reached 40 % of the 312 TFLOP/s of each of
          8 A100 (an assumption), base would take 4.6 hours and small 1.2, ViT-B and DeiT-B 11.3, ViT-S and DeiT-S 3.0.
Top-1:    not measured here. The paper's: 82.9 % for ViTTM-B, of weights that began as timm's ViT, beside 81.0 % for its
          ViT-B. Not known for the others; not from scratch, and not with Shampoo.
Differs:  erasing is drawn a sample, mixing once a global batch, where the authors draw both once a rank; images take
          the fast path (README), whose resize is rounded otherwise than torchvision's; start weights are told.
Debug:    --debug trains a model of 32 px on scikit-learn's handwritten digits, on any machine, in a minute. It starts
          from scratch in every variant: there is no ViT of its size to take blocks from.
"""

import dataclasses

from pipeline.optim.table import describe
from pipeline.recipe import Augment, Data, Evaluation, Model, Optimizer, Recipe, Runtime, Schedule, parse
from pipeline.trainer import run
from recipes import pretrain_21k

MODELS, VARIANTS = pretrain_21k.MODELS, pretrain_21k.VARIANTS


def recipe(model: str) -> Recipe:
    """The authors' settings for one of the two sizes; the model itself is the pretrained one."""
    pretrained = pretrain_21k.recipe(model).model
    return _base(pretrained) if "_base" in model else _small(pretrained)


def _small(model: Model) -> Recipe:
    return Recipe(
        run_dir=f"runs/finetune_1k/{model.name}",
        loss="bce",
        data=Data(path="data/imagenet1k", global_batch=4096, workers=16),
        augment=Augment(
            decode="fast",
            randaugment_ops=2,
            randaugment_magnitude=15,
            erasing=0.25,
            mixup=True,
            cutmix=True,
            mixup_alpha=0.5,
            cutmix_alpha=0.5,
        ),
        model=dataclasses.replace(model, drop_path_rate=0.1),
        optimizer=Optimizer(weight_decay=0.03),
        schedule=Schedule(length="300 epochs", warmup="3000 steps", lr=1.75e-4, warmup_lr=1e-6, min_lr=1e-6),
        evaluation=Evaluation(every="1 epochs", batch=256),
        runtime=Runtime(device="cuda", precision="bf16", log_every="50 steps"),
    )


def _base(model: Model) -> Recipe:
    small = _small(model)
    return dataclasses.replace(
        small,
        data=dataclasses.replace(small.data, global_batch=2048),
        augment=dataclasses.replace(
            small.augment, randaugment_ops=3, randaugment_magnitude=20, mixup_alpha=0.8, cutmix_alpha=0.8
        ),
        model=dataclasses.replace(model, drop_path_rate=0.2),
        optimizer=Optimizer(weight_decay=0.1),
        schedule=dataclasses.replace(small.schedule, lr=0.25e-4, min_lr=1e-7),
    )


def debug(model: str) -> Recipe:
    """The same experiment at 32 px, of the narrow and shallow model of the pretraining's debug form, on digits."""
    small = pretrain_21k.debug(model)
    return dataclasses.replace(
        small,
        run_dir=f"runs/debug/finetune/{model}",
        loss="bce",
        data=dataclasses.replace(small.data, path="data/demo/digits"),
        augment=dataclasses.replace(recipe(model).augment, image_size=32, hflip=0.0),
        model=dataclasses.replace(small.model, drop_path_rate=0.1),
    )


def make(model: str, small: bool, variant: str = VARIANTS[0]) -> Recipe:
    return pretrain_21k.vary(debug(model) if small else recipe(model), variant, small)


if __name__ == "__main__":
    run(parse(make, MODELS, f"{__doc__}\n{describe()}", variants=VARIANTS))
