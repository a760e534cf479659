"""Pretrain ViTTM-S or ViTTM-B on ImageNet-21k-P, with the hyper-parameters of its authors (WACV 2025).

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml recipes/pretrain_21k.py --model vittm_base
Models:   vittm, deittm (its blocks have LayerScale), and as baselines timm's vit and deit, all by the same settings, so
          that a baseline differs in its model alone: these are not the settings of DeiT's own authors.
Variants: --variant adamw      from scratch, with AdamW (the default)
                    shampoo    from scratch, with Shampoo, by the settings that the authors name
                    authors    as the authors ran it: AdamW, from the blocks of timm's ViT of the same size, which was
                               fine-tuned on ImageNet-1k (--model.init-from blocks); no baseline has them
                    authors-shampoo
Data:     data/imagenet21k-p (splits train and val), written by tools/make_shards.py
Hardware: CUDA; 8 GPUs take 512 samples each at once. Fewer: raise --data.accumulation.
Time:     300 epochs of 11,060,223 images; not measured. Arithmetic: if steps reached 40 % of the 312 TFLOP/s of each of
          8 A100 (an assumption), base would take 40 hours and small 10, ViT-B and DeiT-B 97, ViT-S and DeiT-S 25.
Top-1:    not known; the authors give none for 21k-P.
Differs:  mixing is drawn once a global batch and pairs neighbours, where the authors' program draws once a rank; images
          take the fast path (README), whose resize is rounded otherwise than torchvision's; start weights are told.
Debug:    --debug trains a model of 32 px on the formula-driven images of `make demo`, on any machine, in a minute. It
          starts from scratch in every variant: there is no ViT of its size to take blocks from.
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
    Recipe,
    Runtime,
    Schedule,
    Shampoo,
    parse,
)
from pipeline.trainer import run

BASELINES = ("vit_base_patch16_224", "vit_small_patch16_224", "deit_base_patch16_224", "deit_small_patch16_224")
MODELS = ("vittm_base", "vittm_small", "deittm_base", "deittm_small", *BASELINES)
VARIANTS = ("adamw", "shampoo", "authors", "authors-shampoo")


def recipe(model: str) -> Recipe:
    """The authors' settings, which are the same for both sizes."""
    vittm = Model(
        name=model,
        memory_ps=28,
        process_ps=28,
        rw_head_type="lin",
        latent_size_scale=4,
        fusion_type="residual",
        process_embedder_type="patch",
        drop_path_rate=0.0,
    )
    return Recipe(
        run_dir=f"runs/pretrain_21k/{model}",
        loss="ce",
        ema_decay=0.999,
        data=Data(path="data/imagenet21k-p", global_batch=4096, workers=16),
        augment=Augment(
            image_size=224, decode="fast", randaugment_ops=2, randaugment_magnitude=15, mixup=True, mixup_alpha=0.5
        ),
        model=Model(name=model, patch_size=16, drop_path_rate=0.0) if model in BASELINES else vittm,
        optimizer=Optimizer(weight_decay=0.03, clip_norm=1.0),
        schedule=Schedule(length="300 epochs", warmup="10000 steps", lr=1.5e-4, warmup_lr=1e-6, min_lr=1e-7),
        evaluation=Evaluation(every="1 epochs", batch=256),
        checkpoint=Checkpoint(every="1 epochs", keep=2),
        runtime=Runtime(device="cuda", precision="bf16", log_every="50 steps"),
    )


def debug(model: str) -> Recipe:
    """The same experiment at 32 px, of a narrow and shallow model, on the demo's formula-driven images."""
    narrow = Model(name=model, embed_dim=48, depth=2, num_heads=3)
    baseline, vittm = replace(narrow, patch_size=8), replace(narrow, memory_ps=4, process_ps=8)
    return Recipe(
        run_dir=f"runs/debug/pretrain/{model}",
        ema_decay=0.9,
        data=Data(path="data/demo/formula", global_batch=128, workers=1),
        augment=Augment(image_size=32, randaugment_ops=2, randaugment_magnitude=15, mixup=True, mixup_alpha=0.5),
        model=baseline if model in BASELINES else vittm,
        schedule=Schedule(length="40 steps", warmup="10%", lr=1e-3, warmup_lr=1e-6, min_lr=1e-5),
        evaluation=Evaluation(every="50%", batch=128),
        checkpoint=Checkpoint(every="10 steps"),
        runtime=Runtime(log_every="1 steps"),
    )


def vary(plain: Recipe, variant: str, small: bool) -> Recipe:
    """A variant of a recipe. A debug form keeps its start, and preconditions from its second step on; small matrices
    merged into one dimension of up to 8192 would take minutes to decompose."""
    shampoo = Shampoo(
        epsilon=1e-12,
        max_preconditioner_dim=64 if small else 8192,
        precondition_frequency=10 if small else 100,
        start_preconditioning_step=2 if small else 300,
        grafting_beta2=0.999,
        grafting_epsilon=1e-8,
    )
    optimizer = replace(plain.optimizer, name="shampoo", betas=(0.9, 0.999), shampoo=shampoo)
    from_blocks = variant.startswith("authors") and not small
    return replace(
        plain,
        run_dir=plain.run_dir if variant == VARIANTS[0] else f"{plain.run_dir}-{variant}",
        optimizer=optimizer if variant.endswith("shampoo") else plain.optimizer,
        model=replace(plain.model, init_from="blocks" if from_blocks else "none"),
    )


def make(model: str, small: bool, variant: str = VARIANTS[0]) -> Recipe:
    return vary(debug(model) if small else recipe(model), variant, small)


if __name__ == "__main__":
    run(parse(make, MODELS, f"{__doc__}\n{describe()}", variants=VARIANTS))
