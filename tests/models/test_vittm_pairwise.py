"""Options of ViTTM in combination: equal to the reference, or refused."""

import combinations
import pytest
import torch
import upstream
from combinations import ALL, EMBEDDERS, HEADS, MEMORY, check_equals_reference, options_of, refusal

from pipeline.models.vittm import ViTTM, remap_upstream_state_dict
from shards.errors import UserError

SMALL = {"img_size": 32, "memory_ps": 4, "process_ps": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
ROWS, REFUSED = combinations.covering(ALL)
SEEN = [{"seen": size} for size in ((48, 48), (32, 64), (72, 40), (16, 16))]
RESIZABLE = (HEADS[:4], combinations.FUSIONS[:2], EMBEDDERS, MEMORY, SEEN)
RESIZED, _ = combinations.covering(RESIZABLE)


def _id(row: combinations.Row) -> str:
    return "-".join(map(str, row))


@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_every_pair_of_options_equals_the_reference(row):
    check_equals_reference(options_of(ALL, row))


@pytest.mark.parametrize("row", RESIZED, ids=_id)
def test_images_of_another_size_equal_the_reference(row):
    options = SMALL | options_of(RESIZABLE, row)
    check_equals_reference(options, options.pop("seen"))


@pytest.mark.parametrize("rw_head_type", ["lin", "la", "lca"])
def test_models_large_enough_for_products_in_another_order_equal_the_reference(rw_head_type):
    size = {"img_size": 112, "memory_ps": 14, "process_ps": 14, "embed_dim": 384, "depth": 1, "num_heads": 6}
    check_equals_reference(size | {"rw_head_type": rw_head_type, "num_classes": 7})


def test_pairs_in_no_row_are_refused_by_themselves():
    refused = [SMALL | options_of([ALL[i], ALL[j]], (a, b)) for (i, a), (j, b) in REFUSED]
    for options in refused:
        with pytest.raises(UserError, match=refusal(options)):
            ViTTM(**options)
    assert len(refused) == 4


@pytest.mark.parametrize("size", SEEN, ids=str)
@pytest.mark.parametrize(
    ("option", "value"), [("rw_head_type", "tl"), ("rw_head_type", "dyna"), ("fusion_type", "add_erase")]
)
def test_weights_sized_by_tokens_refuse_images_of_another_size(option, value, size):
    model = ViTTM(**SMALL, **{option: value}, dyna_num_heads=8)
    model(torch.zeros(1, 3, 32, 32))
    height, width = size["seen"]
    grids = f"{height // 4}x{width // 4} and {height // 8}x{width // 8}"
    with pytest.raises(UserError) as raised:
        model(torch.zeros(1, 3, height, width))
    assert str(raised.value) == (
        f"{option}={value!r} owns weights sized by the number of tokens: the model was built for grids of memory and "
        f"process tokens of 8x8 and 4x4, this image has {grids}: give images of img_size, or build the "
        "model for these; heads lin, ca, la and lca with fusions residual and erase take any resolution."
    )


def test_a_file_whose_patch_embed_is_the_memory_embedder_loads():
    """With memory_ps 16 the authors' program has both under one set of weights, of which safetensors keeps one."""
    options = SMALL | {"memory_ps": 16, "process_ps": 16}
    state = upstream.random_state(options, dtype=torch.float32)
    kernel = state.pop("memory_embedder.proj.weight"), state.pop("memory_embedder.proj.bias")
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = kernel
    model = ViTTM(**options | {"num_classes": 1000})
    model.load_state_dict(remap_upstream_state_dict(state, model))
    assert torch.equal(model.memory_embedder.proj.weight, kernel[0])
    assert torch.equal(model.memory_embedder.proj.bias, kernel[1])
