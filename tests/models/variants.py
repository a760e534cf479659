"""Each option of ViTTM once, varied from the recipes' default, and a few models that hold them all."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.loss import heads_of
from pipeline.models.vittm import ViTTM

SMALL = {
    "img_size": 32,
    "memory_ps": 4,
    "process_ps": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
}
VARIANTS: dict[str, dict] = {
    "default": {},
    "ca": {"rw_head_type": "ca"},
    "la": {"rw_head_type": "la"},
    "lca": {"rw_head_type": "lca"},
    "tl": {"rw_head_type": "tl"},
    "dyna": {"rw_head_type": "dyna"},
    "dyna-without-concat": {"rw_head_type": "dyna", "dyna_concat": False},
    "wide-latents": {"latent_size_scale": 2},
    "erase": {"fusion_type": "erase"},
    "add_erase": {"fusion_type": "add_erase"},
    "downsample": {"process_embedder_type": "downsample"},
    "latent": {"process_embedder_type": "latent"},
    "mlp": {"memory_blocks": "mlp"},
    "conv": {"memory_blocks": "conv"},
    "token-pool": {"global_pool": "token"},
    "layer-scale": {"init_values": 1e-2},
}
MIXED = [  # one a head; together every variant
    ("default",),
    ("ca", "add_erase", "latent", "mlp"),
    ("la", "erase", "downsample", "wide-latents"),
    ("lca", "layer-scale", "token-pool"),
    ("tl", "erase", "conv"),
    ("dyna", "add_erase", "latent"),
    ("dyna-without-concat", "mlp", "token-pool"),
]


def mixed(names: tuple[str, ...]) -> dict:
    options = {option: value for name in names for option, value in VARIANTS[name].items()}
    shallow = {"memory_encoder_depths": (1,), "memory_encoder_downsamples": (2,), "memory_decoder_depths": (1,)}
    return options | shallow if "conv" in names else options


def build(options: dict, **more: object) -> ViTTM:
    """A model whose classifiers are not zero, so that gradients reach all of it in the first step."""
    torch.manual_seed(0)
    model = ViTTM(**SMALL | options | more)
    for head in model.get_classifier():
        nn.init.normal_(head.weight)
    return model


def images(batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def loss(answers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([F.cross_entropy(logits, torch.arange(len(logits))) for logits in answers]).sum()


def step(model: nn.Module) -> dict[str, Tensor]:
    """The answers of `model` in training, by their heads, and the gradient of every parameter by its name."""
    torch.manual_seed(2)  # of what is dropped
    model.zero_grad(set_to_none=True)
    answers = heads_of(model(images()))
    loss(answers).backward()
    gradients = {name.removeprefix("_orig_mod."): parameter.grad for name, parameter in model.named_parameters()}
    return dict(zip(("memory", "process"), answers, strict=False)) | gradients
