"""Options of ViTTM in combination, and a model of such options beside the reference."""

import itertools
import random
from collections.abc import Iterator, Sequence

import reference
import torch
import torch.nn.functional as F
import upstream

from pipeline.models.vittm import ViTTM, remap_upstream_state_dict

HEADS = [{"rw_head_type": kind} for kind in ("lin", "ca", "la", "lca", "tl")]
HEADS += [{"rw_head_type": "dyna", "dyna_num_heads": 8, "dyna_concat": concat} for concat in (True, False)]
FUSIONS = [{"fusion_type": kind} for kind in ("residual", "erase", "add_erase")]
EMBEDDERS = [
    {"process_embedder_type": "patch"},
    {"process_embedder_type": "downsample", "process_tokens": 2},
    {"process_embedder_type": "downsample"},
    {"process_embedder_type": "latent", "process_tokens": 5},
    {"process_embedder_type": "latent"},
]
MEMORY = [
    {"memory_blocks": None},
    {"memory_blocks": "mlp", "memory_mlp_ratio": 0.3},
    {
        "memory_blocks": "conv",
        "memory_encoder_depths": (1, 2),
        "memory_encoder_downsamples": (2, 1),
        "memory_decoder_depths": (2, 1),
    },
    {
        "memory_blocks": "conv",
        "memory_encoder_depths": (0, 1, 1),
        "memory_encoder_downsamples": (3, 2, 2),
        "memory_decoder_depths": (1, 1, 0),
    },
]
POOLS = [{"global_pool": kind} for kind in ("avg", "token")]
LAYER_SCALES = [{"init_values": value} for value in (None, 0.1)]
LATENT_SCALES = [{"latent_size_scale": scale} for scale in (1, 2, 4, 7)]  # 7 divides no width
PATCHES = [{"memory_ps": memory, "process_ps": process} for memory, process in ((4, 8), (8, 8), (8, 4), (16, 16))]
SIZES = [
    {"embed_dim": 24, "num_heads": 3, "depth": 2, "mlp_ratio": 4.0},
    {"embed_dim": 48, "num_heads": 2, "depth": 1, "mlp_ratio": 2.5, "in_chans": 1, "reduced_dim": 3},
    {"embed_dim": 32, "num_heads": 4, "depth": 3, "mlp_ratio": 1.0, "num_classes": 11},
]
IMAGES = [{"img_size": size} for size in (32, 16, (32, 16), (16, 48))]
ALL = (HEADS, FUSIONS, EMBEDDERS, MEMORY, POOLS, LAYER_SCALES, LATENT_SCALES, PATCHES, SIZES, IMAGES)

EXACT = {"rtol": 1e-8, "atol": 1e-11}  # of float64

Row = tuple[int, ...]  # of each factor the number of the choice
Pair = tuple[tuple[int, int], tuple[int, int]]  # two of (factor, choice)


def options_of(factors: Sequence[list[dict]], row: Row) -> dict:
    chosen = (factor[choice] for factor, choice in zip(factors, row, strict=True))
    return {"num_classes": 7} | {option: value for options in chosen for option, value in options.items()}


def covering(factors: Sequence[list[dict]]) -> tuple[list[Row], set[Pair]]:
    """Rows that are not refused and together hold every pair of choices of two factors; and the pairs that none can.

    Greedily: around a pair that is missing, the best of many random rows. That a pair is refused with all of these is
    taken for a proof, which `test_vittm_pairwise.py` checks.
    """
    generator, rows, refused = random.Random(0), [], set()
    missing = set(_pairs(factors))
    while missing:
        pair = min(missing)
        around = ([generator.randrange(len(factor)) for factor in factors] for _ in range(60))
        found = [tuple(dict(pair).get(i, choice) for i, choice in enumerate(row)) for row in around]
        found = [row for row in found if not refusal(options_of(factors, row))]
        if not found:
            refused.add(pair)
            missing.remove(pair)
            continue
        rows.append(max(found, key=lambda row: len(_held(row) & missing)))
        missing -= _held(rows[-1])
    return rows, refused


def _pairs(factors: Sequence[list[dict]]) -> Iterator[Pair]:
    for (i, left), (j, right) in itertools.combinations(enumerate(factors), 2):
        yield from (((i, a), (j, b)) for a in range(len(left)) for b in range(len(right)))


def _held(row: Row) -> set[Pair]:
    return set(itertools.combinations(enumerate(row), 2))


def refusal(options: dict) -> str | None:
    """Why these options cannot be combined, in the words of the error; None where they can."""
    config = reference.DEFAULTS | options
    if (config["rw_head_type"], config["fusion_type"], config["dyna_concat"]) == ("dyna", "erase", False):
        return "weights before it would never be trained"
    if config["process_embedder_type"] == "downsample":
        sides = reference.sides(config)
        side = config["process_tokens"] or max(sides) // config["process_ps"]
        if not config["process_tokens"] and len(set(sides)) > 1:
            return "makes a square of process tokens"
        if side > min(sides) // config["memory_ps"]:
            return f"averages memory tokens to {side}x{side}, but memory has only"
    return None


def check_equals_reference(options: dict, image_size: tuple[int, int] | None = None) -> None:
    """In float64: the authors' weights load strictly, and give the reference's features, logits and gradients."""
    size = image_size or reference.sides(reference.DEFAULTS | options)
    state = {name: tensor.requires_grad_() for name, tensor in upstream.random_state(options).items()}
    images = torch.randn(2, options.get("in_chans", 3), *size, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([0, 3])
    model = ViTTM(**options).double()
    model.load_state_dict(remap_upstream_state_dict(state, model))
    found, expected = model.forward_features(images), reference.features(state, options, images)
    torch.testing.assert_close(found, expected, **EXACT)
    logits = model.forward_head(*found)
    torch.testing.assert_close(logits, reference.logits(state, options, *expected), **EXACT)
    sum(F.cross_entropy(answer, labels) for answer in logits).backward()
    reference.loss(state, options, *expected, labels).backward()
    theirs = {name: tensor.grad for name, tensor in state.items() if tensor.grad is not None}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, remap_upstream_state_dict(theirs, model), **EXACT)
