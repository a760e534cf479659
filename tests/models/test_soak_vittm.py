"""`make soak`: every combination of ViTTM's options, and each option compiled and exported by itself."""

import itertools
import time

import pytest
from combinations import (
    EMBEDDERS,
    FUSIONS,
    HEADS,
    LATENT_SCALES,
    LAYER_SCALES,
    MEMORY,
    PATCHES,
    POOLS,
    check_equals_reference,
    options_of,
    refusal,
)
from graphs import check_compiles, check_exports
from variants import VARIANTS, build

from pipeline.models.vittm import ViTTM
from shards.errors import UserError

pytestmark = pytest.mark.soak
TINY = [{"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 1, "mlp_ratio": 1.0}]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(map(str, head.values())))
def test_the_full_matrix_equals_the_reference_or_is_refused(head):
    scales = LATENT_SCALES if head["rw_head_type"] in ("lin", "la", "lca") else LATENT_SCALES[:1]  # others have none
    factors = ([head], FUSIONS, EMBEDDERS, MEMORY, POOLS, LAYER_SCALES, scales, PATCHES, TINY)
    started, refused, equal = time.monotonic(), 0, 0
    for row in itertools.product(*(range(len(factor)) for factor in factors)):
        options = options_of(factors, row)
        if reason := refusal(options):
            with pytest.raises(UserError, match=reason):
                ViTTM(**options)
            refused += 1
        else:
            check_equals_reference(options)
            equal += 1
    print(f"\n{head}: {equal} equal, {refused} refused, {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_option_compiles_without_graph_break(name):
    check_compiles(build(VARIANTS[name]), "aot_eager")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own import
def test_the_default_compiles_with_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    started = time.monotonic()
    check_compiles(build({}), "inductor")
    print(f"\ninductor, 2 layers, nothing cached: {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_option_is_exported(name):
    check_exports(build(VARIANTS[name]), any_batch=True)
